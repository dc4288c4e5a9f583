"""How well features tell the classes of a task apart that is still to be learned: the two sides of forward transfer.

Which difference is reported, and why so: `utils.results.metrics.forward_transfer`.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone import FrozenViT
from models.base import BaseLearner
from utils.config import Config
from utils.data_manager import SplitName
from utils.results.metrics import ZeroShot
from utils.runs import distributed


class Reference:
    """The frozen network as it was pretrained, which a learner may inject into or train: a copy of it."""

    def __init__(self, backbone: FrozenViT, config: Config, device: torch.device) -> None:
        """To be made before the learner."""
        self.backbone = copy.deepcopy(backbone).to(device)
        self.backbone.read_class_token_alone()
        self.bf16 = config.precision == "bf16"

    def represent(self, images: Tensor) -> Tensor:
        """Features `[b, d]`, in the run's precision."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.backbone(images)

    def beside(self, learner: BaseLearner, task: int) -> ZeroShot:
        """What the learner's network, as it is evaluated, and this one make of `task`, which the learner has not begun."""
        images, (learned, frozen) = nearest_means(learner, [learner.represent, self.represent], task)
        return ZeroShot(images, learned, frozen)


@torch.no_grad()
def nearest_means(learner: BaseLearner, networks: Sequence[Callable[[Tensor], Tensor]], task: int) -> tuple[int, list[int]]:
    """How many test images `task` has, and how many of them each of `networks` gives to the right class of that task.

    That is the class whose mean, of its training images' features under the test transform, has the largest cosine with the
    image's. Of several processes each looks at its part.
    """
    classes, size = learner.data.task_classes(task), learner.data.image_size
    blank = torch.zeros(1, 3, size, size, device=learner.device)  # a process may be left without an image
    sums = [torch.zeros(len(classes), network(blank).shape[1], dtype=torch.float64, device=learner.device)
            for network in networks]
    for images, labels in _images(learner, task, "train"):
        members = F.one_hot(labels, len(classes)).double()  # [b, c]: a product sums in a fixed order
        for part, network in zip(sums, networks, strict=True):
            part += members.T @ network(images).double()
    distributed.add_up(*sums)
    means = [F.normalize(part, dim=1) for part in sums]  # a sum points where its mean does
    counts = torch.zeros(1 + len(networks), dtype=torch.long, device=learner.device)
    for images, labels in _images(learner, task, "test"):
        cosines = [F.normalize(network(images).double(), dim=1) @ mean.T  # (128, 768) @ (768, 10)
                   for network, mean in zip(networks, means, strict=True)]
        right = torch.stack([torch.ones_like(labels, dtype=torch.bool), *(part.argmax(1) == labels for part in cosines)])
        counts += right.sum(1)
    distributed.add_up(counts)
    images, *right = counts.tolist()
    return images, right


def _images(learner: BaseLearner, task: int, split: SplitName) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of the images of `task` with labels from 0, batch by batch; a signal stops it between two."""
    data, size = learner.data, learner.config.batch_size
    cells, first = data.task_cells(task), data.task_classes(task).start
    total = data.eval_batch_count(split, cells, size)
    for number, (images, labels) in enumerate(data.eval_batches(split, cells, size, distributed.part())):
        learner.session.work(f"Task {task}: forward transfer", number, total)
        if len(labels):
            yield images, labels - first
