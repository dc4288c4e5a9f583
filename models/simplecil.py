"""A control: the nearest class mean on the frozen backbone."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.heads.cosine import CosineHead
from backbone.heads.linear import placed
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.base import BaseLearner, TaskReport
from utils.errors import UserError
from utils.runs import distributed


class SimpleCIL(BaseLearner):
    """A control: nearest class mean by cosine similarity on frozen features, nothing trained (Zhou et al., 2023)."""

    enters_blocks = False
    kind = CosineHead.kind  # save_head takes the learner for its head: `kind` and `to_file`
    scenarios = ("class", "domain")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.prototypes = nn.Module()
        self.prototypes.register_buffer("weight", torch.zeros(0, self.backbone.width, device=self.device))
        # Of classes that come back, the length of the sum of all their features: with the direction it is the sum.
        self.prototypes.register_buffer("lengths", torch.zeros(0, device=self.device))
        self.learned = -1

    def make_room(self, task: int) -> None:
        self.task = task

    @torch.no_grad()
    def train(self) -> None:
        classes, cells = self.data.task_classes(self.task), self.data.task_cells(self.task)  # a cell: one class in one task
        if self.learned == self.task:
            return  # the checkpoint was written after this
        sums = torch.zeros(len(classes), self.backbone.width, device=self.device)
        counts = torch.zeros(len(classes), device=self.device)
        size = self.config.batch_size
        total = self.data.eval_batch_count("train", cells, size)
        for number, (images, labels) in enumerate(self.data.eval_batches("train", cells, size, distributed.part())):
            self.session.work(f"Task {self.task}: class means", number, total)
            if len(labels) == 0:  # this one of several processes has no part of the batch
                continue
            members = F.one_hot(labels - classes.start, len(classes)).float()  # [b, c]: a product sums in a fixed order
            sums += members.T @ self.embed(images)
            counts += members.sum(0)
        distributed.add_up(sums, counts)
        self._learn(classes, sums, counts)
        self.learned = self.task

    def _learn(self, classes: range, sums: Tensor, counts: Tensor) -> None:
        """Takes in the sums `[c, d]` of the features of so many images of each of the task's `classes`. Where these have been
        seen before, as in a domain-incremental stream, their means are then of all images."""
        known, (earlier, visits) = self.prototypes, self.data.visits(self.task)
        first = classes.start if earlier else None
        if earlier:
            rows = slice(classes.start, classes.stop)
            sums = sums + known.weight[rows] * known.lengths[rows, None]
            counts = torch.ones_like(counts)
        known.weight = placed(known.weight, F.normalize(sums / counts[:, None], dim=1), first)
        if visits > 1:
            known.lengths = placed(known.lengths, sums.norm(dim=1), first)

    def end_task(self) -> TaskReport:
        if not torch.isfinite(self.prototypes.weight).all():
            raise UserError(f"A class mean of task {self.task} is not finite; check the images and 'backbone_weights'.")
        return TaskReport()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return F.linear(F.normalize(self.embed(images), dim=1), self.prototypes.weight)

    def save(self, folder: Path) -> list[Path]:
        return [save_head(folder, self, self.task)]

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        backbone = saved.backbone()
        return SavedNetwork(backbone, None, saved.head(backbone.width))

    def to_file(self) -> dict[str, Tensor]:
        """The class means as a cosine head: weight `[classes, d]` and a bias of zeros."""
        return {"weight": self.prototypes.weight, "bias": self.prototypes.weight.new_zeros(len(self.prototypes.weight))}

    def modules(self) -> list[nn.Module]:
        return [self.prototypes]

    def state(self) -> dict[str, Any]:
        return {"task": self.task, "learned": self.learned, "prototypes": self.prototypes.weight,
                "lengths": self.prototypes.lengths}

    def load_state(self, state: dict[str, Any]) -> None:
        self.task, self.learned = state["task"], state["learned"]
        self.prototypes.weight, self.prototypes.lengths = (state[name].to(self.device) for name in ("prototypes", "lengths"))
