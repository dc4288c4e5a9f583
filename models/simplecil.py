"""A control: the nearest class mean on the frozen backbone."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.heads.cosine import CosineHead
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.base import BaseLearner, TaskReport
from utils.errors import UserError
from utils.runs import distributed


class SimpleCIL(BaseLearner):
    """A control: nearest class mean by cosine similarity on frozen features, nothing trained (Zhou et al., 2023)."""

    kind = CosineHead.kind  # its file is that of a cosine head

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.prototypes = nn.Module()
        self.prototypes.register_buffer("weight", torch.zeros(0, self.backbone.width, device=self.device))

    def make_room(self, task: int) -> None:
        self.task = task

    @torch.no_grad()
    def train(self) -> None:
        classes = self.data.task_classes(self.task)
        if len(self.prototypes.weight) == classes.stop:
            return  # the checkpoint was written after this
        sums = torch.zeros(len(classes), self.backbone.width, device=self.device)
        counts = torch.zeros(len(classes), device=self.device)
        size = self.config.batch_size
        total = self.data.eval_batch_count("train", classes, size)
        for number, (images, labels) in enumerate(self.data.eval_batches("train", classes, size, distributed.part())):
            self.session.work(f"Task {self.task}: class means", number, total)
            if len(labels) == 0:
                continue
            members = F.one_hot(labels - classes.start, len(classes)).float()  # [b, c]: a product sums in a fixed order
            sums += members.T @ self.embed(images)
            counts += members.sum(0)
        distributed.add_up(sums, counts)
        means = F.normalize(sums / counts[:, None], dim=1)
        self.prototypes.weight = torch.cat([self.prototypes.weight, means])

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
        return {"task": self.task, "prototypes": self.prototypes.weight}

    def load_state(self, state: dict[str, Any]) -> None:
        self.task = state["task"]
        self.prototypes.weight = state["prototypes"].to(self.device)
