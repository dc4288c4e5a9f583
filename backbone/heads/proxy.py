"""Rows that train a network and then go: the classifier that stays is made of the finished network's features.

Shapes: d width, b batch, c classes of the current task, classes: of all tasks so far.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.heads.linear import Features, GrowingHead, Pause, placed


class ProxyHead(GrowingHead):
    """As the official code of APER, RanPAC and EASE trains its adapters: logits `s cos(f, w)` of the task's classes alone, s
    trained from 1 and w from U(-1 / sqrt(d), 1 / sqrt(d)).

    `commit` throws both away. What answers then is a subclass's, from what `collect` and `absorb` gave it.
    """

    _ROWS = (*GrowingHead._ROWS, "scale")

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scale: nn.Parameter | None = None

    @property
    def training_rows(self) -> bool:
        """Whether a task is being trained, so that the rows answer."""
        return self.new_weight is not None

    def grow(self, classes: int, generator: torch.Generator) -> None:
        rows = (torch.rand(classes, self.width, generator=generator) * 2 - 1) / math.sqrt(self.width)
        self.new_weight = nn.Parameter(rows.to(self.weight))
        self.scale = nn.Parameter(self.weight.new_ones(()))

    def go_on(self) -> None:
        """Rows that go with their task leave nothing to go on from."""

    @torch.no_grad()
    def commit(self) -> None:
        self.new_weight = self.scale = None

    def current_logits(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.new_weight))


class TaskMeansHead(ProxyHead):
    """Then class means, task by task. known: for every finished task one tensor, whose rows are its classes."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.known = nn.ParameterList()

    @property
    def sizes(self) -> list[int]:
        """Classes of each task."""
        return [len(part) for part in self.known]

    @torch.no_grad()
    def know(self, known: list[Tensor]) -> None:
        """Puts means in place of those that are there."""
        self.known = nn.ParameterList(nn.Parameter(part.detach(), requires_grad=False) for part in known)

    # ---- what is stored

    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "known": [part.detach() for part in self.known]}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.know([part.to(self.weight) for part in state["known"]])

    def to_file(self) -> dict[str, Tensor]:
        return {f"means_{task}": part.detach().float() for task, part in enumerate(self.known)}

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        self.know([tensors[f"means_{task}"] for task in range(len(tensors))])


class PrototypeHead(ProxyHead):
    """Then the nearest class mean by cosine (Zhou et al., 2023).

    prototypes `[classes, k d]`: mean features of k networks' outputs side by side, not normalised. images `[classes]`: how
    many they are the means of, empty where no class comes back.
    """

    kind = "cosine"  # the file is that of a cosine head
    STATISTICS = ("prototypes", "images")

    def __init__(self, width: int, *args, networks: int = 1) -> None:
        super().__init__(width, *args)
        self.register_buffer("prototypes", torch.zeros(0, networks * width))
        self.register_buffer("images", torch.zeros(0, dtype=torch.long))

    @torch.no_grad()
    def collect(self, features: Features, classes: int) -> list[Tensor]:
        """Sums `[c, k d]` and numbers `[c]` of the images of each class."""
        return class_sums(features, classes, self.prototypes)

    @torch.no_grad()
    def absorb(self, sums: list[Tensor], task: int, pause: Pause) -> None:
        self.prototypes, self.images = joined_means(self.prototypes, self.images, sums, self.first, self.visits[1] > 1)

    def forward(self, features: Tensor) -> Tensor:
        if self.training_rows:
            return self.current_logits(features)
        return F.linear(F.normalize(features), F.normalize(self.prototypes).to(features.dtype))

    def to_file(self) -> dict[str, Tensor]:
        weight = F.normalize(self.prototypes).float()
        return {"weight": weight, "bias": weight.new_zeros(len(weight))}


def class_sums(features: Features, classes: int, like: Tensor) -> list[Tensor]:
    """Sums `[c, k]` of features `[b, k]` and numbers `[c]` of the images of each class, float64, on the device of `like`."""
    sums = torch.zeros(classes, like.shape[-1], dtype=torch.float64, device=like.device)
    counts = torch.zeros(classes, dtype=torch.float64, device=like.device)
    for batch, labels, _ in features:
        members = F.one_hot(labels, classes).double()  # [b, c]: a product sums in a fixed order
        sums += members.T @ batch.double()
        counts += members.sum(0)
    return [sums, counts]


def class_means(sums: list[Tensor]) -> Tensor:
    """Mean features `[c, k]` from what `class_sums` returned."""
    return sums[0] / sums[1][:, None]


def joined_means(means: Tensor, images: Tensor, sums: list[Tensor], first: int | None, returning: bool
                 ) -> tuple[Tensor, Tensor]:
    """Class means `[classes, k]` with those of a task's `sums` behind them, or from class `first` on joined to those of the
    same classes, every image counting the same (as RanPAC/RanPAC at 012927f sums them); and the numbers of `images` that they
    are of, kept for classes that are `returning` alone."""
    counts = sums[1].to(images)
    if first is None:
        return torch.cat([means, class_means(sums).to(means)]), torch.cat([images, counts]) if returning else images
    stop = first + len(counts)
    total = images[first:stop] + counts
    whole = means[first:stop].double() * images[first:stop, None] + sums[0]
    return placed(means, (whole / total[:, None]).to(means), first), placed(images, total, first)
