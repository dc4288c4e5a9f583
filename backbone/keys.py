"""What the images looked like to the frozen network when each adapter was learned: the memory of gate "evidence" and of
routed inference, from which a task's logits start.

Shapes: c classes of a task, p statistics of a class, k keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 4  # tokens are averaged over a grid of so many cells to a side
PRIOR = 5.0  # degrees of freedom with which the variance of all tasks so far backs that of a pair
_FLOOR = 1e-2  # of the mean variance: a statistic that hardly varies is no evidence
_SHIFT = "shift_"  # in the record of a run, before the task that founded the key


def token_statistics(tokens: Tensor) -> Tensor:
    """What an image's patch tokens `[b, n, d]` say about how it looks, wherever and whatever: `[b, p]` float64.

    Their means over a 4 x 4 grid (over 16 stretches where the tokens are no square), over the whole image, and their standard
    deviation over it; p = 18 d.
    """
    side = round(tokens.shape[1] ** 0.5)
    by_width = tokens.double().mT  # [b, d, n]
    if side * side == tokens.shape[1]:
        cells = F.adaptive_avg_pool2d(by_width.unflatten(2, (side, side)), GRID).flatten(2)
    else:
        cells = F.adaptive_avg_pool1d(by_width, GRID**2)
    return torch.cat([cells.flatten(1), by_width.mean(2), by_width.std(2, correction=0)], 1)


def key_size(width: int) -> int:
    """p, for tokens of `width` d."""
    return (GRID**2 + 2) * width


@dataclass(frozen=True)
class Key:
    """The classes of one domain: their number, the mean of their class means `[p]`, and the sum of squared deviations of the
    class means from it `[p]`."""

    classes: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, class_means: Tensor) -> "Key":
        """The key of a task from the mean statistics of its classes `[c, p]`."""
        mean = class_means.mean(0)
        return cls(len(class_means), mean, (class_means - mean).square().sum(0))

    def joined(self, other: "Key") -> "Key":
        """The key of the classes of both (Chan, Golub & LeVeque, 1983)."""
        total = self.classes + other.classes
        apart = (other.mean - self.mean).square() * (self.classes * other.classes / total)
        return Key(total, (self.classes * self.mean + other.classes * other.mean) / total,
                   self.scatter + other.scatter + apart)


def shift_numbers(shifts: dict[int, float]) -> dict[str, float]:
    """Shifts by the task of the key, under their names in the record of a run; `shifts_of` reads them."""
    return {f"{_SHIFT}{task}": shift for task, shift in shifts.items()}


def shifts_of(numbers: Mapping[str, float]) -> dict[int, float]:
    """The shifts among the numbers of a task's record, by the task of the key."""
    return {int(name.removeprefix(_SHIFT)): value for name, value in numbers.items() if name.startswith(_SHIFT)}


class Keys:
    """One key per kept adapter, and the variance of class means within tasks, over every task so far.

    A task whose adapter is refused joins the key that it resembles most: the domain is then known from more classes.
    """

    def __init__(self) -> None:
        self.of: dict[int, Key] = {}
        self.scatter: Tensor | None = None
        self.freedom = 0

    def shifts(self, new: Key) -> dict[int, float]:
        """How far the new task's images have moved from those of each adapter: an F ratio, about 1 when its classes could as
        well have come up in the adapter's domain.

        `F = mean_p (m_new - m_i)^2 / (v (1 / c_new + 1 / c_i))`: the squared distance of the domains' means over what the
        choice of classes alone would make of it. `v`, the variance of class means within a domain, is pooled over the pair,
        with the variance within all tasks so far as a prior.
        """
        scatter, freedom = self._within(new)
        shifts = {}
        for task, key in self.of.items():
            pooled = new.scatter + key.scatter + PRIOR * scatter / freedom
            variance = pooled / (new.classes + key.classes - 2 + PRIOR)
            variance = variance + _FLOOR * variance.mean()
            spread = variance * (1 / new.classes + 1 / key.classes)
            shifts[task] = ((new.mean - key.mean).square() / spread.clamp_min(torch.finfo(spread.dtype).tiny)).mean().item()
        return shifts

    def learn(self, task: int, new: Key, nearest: int | None) -> None:
        """Takes a task in: as a key of its own, or into the key of the adapter `nearest`."""
        self.scatter, self.freedom = self._within(new)
        self.of[task if nearest is None else nearest] = new if nearest is None else self.of[nearest].joined(new)

    def tensors(self) -> list[Tensor]:
        """What is stored."""
        return [tensor for key in self.of.values() for tensor in (key.mean, key.scatter)] + (
            [] if self.scatter is None else [self.scatter])

    def state(self) -> dict:
        """Everything, as tensors and plain values; `load` takes it back."""
        return {"keys": {task: (key.classes, key.mean, key.scatter) for task, key in self.of.items()},
                "scatter": self.scatter, "freedom": self.freedom}

    def load(self, state: dict, device: torch.device) -> None:
        """The keys as they were at `state`."""
        self.of = {task: Key(classes, mean.to(device), scatter.to(device))
                   for task, (classes, mean, scatter) in state["keys"].items()}
        self.scatter, self.freedom = state["scatter"], state["freedom"]
        if self.scatter is not None:
            self.scatter = self.scatter.to(device)

    def _within(self, new: Key) -> tuple[Tensor, int]:
        before = 0 if self.scatter is None else self.scatter
        return new.scatter + before, self.freedom + new.classes - 1
