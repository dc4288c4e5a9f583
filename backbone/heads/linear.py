"""The linear classifier that grows by the rows of each task's classes, and what every other head shares with it.

Shapes: d width of the features, b batch, c classes of the current task, classes: of all tasks so far.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config import Component, Config

Pause = Callable[[str, int, int], None]  # called between parts of longer work: what it is, parts done, parts in all
# Batches of features [b, d], labels int64 [b], 0 for the task's first class, and int64 [b], which place each image has in the
# pass over all images of the task: 0, 1, ... whatever the batches, and whichever of several processes sees it.
Features = Iterable[tuple[Tensor, Tensor, Tensor]]


class GrowingHead(Component, nn.Module):
    """As SD-LoRA's: linear, rows of earlier tasks are fixed, rows of the current task are trained.

    weight `[classes, d]`, bias `[classes]`: rows of all finished tasks, in the order of the stream. new_weight, new_bias:
    the current task's rows, None between tasks.

    A task goes: `begin`, training through `current_logits`, `commit`, then `collect` over the task's training images in the
    network as it will be evaluated, and `absorb` of what was collected. The last two do nothing for a linear head; a head
    that keeps statistics keeps them in the buffers named in `STATISTICS`. They are those of the network at the end of
    their task: later tasks move the features, and the statistics do not follow.

    Where classes come back in another domain, a class still has one row. first: the first class of the current task if it has
    come before, None for classes behind all others; visits: how many tasks have its classes, before it and in all.
    """

    kind = "linear"
    predicts = "F.linear(features, weight, bias)"  # logits by the tensors of the head's file, for those who have nothing else
    STATISTICS: tuple[str, ...] = ()
    _ROWS = ("weight", "bias", "new_weight", "new_bias")

    def __init__(self, width: int, config: Config, seed: int) -> None:
        super().__init__()
        self.width, self.config, self.seed = width, config, seed
        self.register_buffer("weight", torch.zeros(0, width))
        self.register_buffer("bias", torch.zeros(0))
        self.new_weight: nn.Parameter | None = None
        self.new_bias: nn.Parameter | None = None
        self.first: int | None = None
        self.visits = (0, 1)

    # ---- life of a task

    def begin(self, classes: range, visits: tuple[int, int], generator: torch.Generator) -> None:
        """Trainable rows for `classes`, all of them new or all of them back: those go on from where their rows are."""
        self.visits, self.first = visits, classes.start if visits[0] else None
        self.grow(len(classes), generator)
        if self.first is not None:
            self.go_on()

    @torch.no_grad()
    def go_on(self) -> None:
        """The current rows start from those that their classes have."""
        rows = slice(self.first, self.first + len(self.new_weight))
        self.new_weight.copy_(self.weight[rows])
        if self.new_bias is not None:
            self.new_bias.copy_(self.bias[rows])

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """New trainable rows for `classes` classes: weights from U(-sqrt(3 / d), sqrt(3 / d)), a variance of 1 / d, and biases
        of 0, as SD-LoRA's official code starts them (METHOD.md, section 4)."""
        bound = math.sqrt(3 / self.width)
        rows = (torch.rand(classes, self.width, generator=generator) * 2 - 1) * bound
        self.new_weight = nn.Parameter(rows.to(self.weight))
        self.new_bias = nn.Parameter(torch.zeros(classes).to(self.bias))

    @torch.no_grad()
    def spread(self, generator: torch.Generator) -> None:
        """The current task's rows and biases start from U(-1 / sqrt(d), 1 / sqrt(d)), as a layer of torch's own does."""
        for parameter in (self.new_weight, self.new_bias):
            if parameter is not None:
                parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) / math.sqrt(self.width))

    @torch.no_grad()
    def clear(self) -> None:
        """The current task's rows start from 0, those of classes that come back from where they were."""
        if self.first is not None:
            self.go_on()
            return
        self.new_weight.zero_()
        if self.new_bias is not None:
            self.new_bias.zero_()

    def trainable(self) -> list[nn.Parameter]:
        """What the current task trains of the head."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def commit(self) -> None:
        """The current rows join the fixed ones, or take the place of those that their classes had."""
        self.weight, self.bias = self.rows()
        self.new_weight = self.new_bias = None

    def collect(self, features: Features, classes: int) -> list[Tensor]:
        """Sums over the images of the task, of `classes` classes; those of several processes may be added up."""
        return []

    def absorb(self, sums: list[Tensor], task: int, pause: Pause) -> None:
        """Takes the sums that `collect` returned into the statistics, and makes the head that predicts from them.

        What `pause` raises leaves a head that is to be restored."""

    # ---- logits

    def rows(self) -> tuple[Tensor, Tensor]:
        """Weight `[classes, d]` and bias `[classes]` of every class so far, detached; the current task's as they are."""
        if self.new_weight is None:
            return self.weight, self.bias
        return (placed(self.weight, self.new_weight.detach(), self.first),
                placed(self.bias, self.new_bias.detach(), self.first))

    def current_logits(self, features: Tensor) -> Tensor:
        """Logits `[b, c]` of the current task's classes alone: old rows get no gradient."""
        return F.linear(features, self.new_weight, self.new_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[b, classes]` of every class seen so far, for features `[b, d]`."""
        weight, bias = self.rows()
        return F.linear(features, weight.to(features.dtype), bias.to(features.dtype))

    # ---- what is stored

    def snapshot(self) -> dict[str, Any]:
        """Rows as detached copies, statistics as they are (they are replaced, never written to); `restore` takes it back."""
        rows = {name: getattr(self, name) for name in self._ROWS}
        return {name: None if tensor is None else tensor.detach().clone() for name, tensor in rows.items()} | {
            name: getattr(self, name) for name in self.STATISTICS} | {
            "first": self.first, "visits": list(self.visits)}

    def restore(self, state: dict[str, Any]) -> None:
        """The head as it was at `snapshot`."""
        for name in self._ROWS:
            value = None if state[name] is None else state[name].to(self.weight, copy=True)
            setattr(self, name, value if value is None or name in ("weight", "bias") else nn.Parameter(value))
        for name in self.STATISTICS:
            setattr(self, name, state[name].to(self.weight.device))
        self.first, self.visits = state["first"], tuple(state["visits"])

    def as_linear(self) -> tuple[Tensor, Tensor] | None:
        """Weight `[classes, d]` and bias `[classes]` of the plain linear layer that gives these very logits between tasks;
        None where none does."""
        return self.weight, self.bias

    def to_file(self) -> dict[str, Tensor]:
        """The tensors of `head_task_<t>.safetensors`: all that it takes to predict."""
        weight, bias = self.rows()
        return {"weight": weight.float(), "bias": bias.float()}

    @classmethod
    def unfilled(cls, width: int, seed: int) -> "GrowingHead":
        """A head that is to predict from what `from_file` gives it."""
        return cls(width, cls.Keys(), seed)

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        """The head that predicts as the one did whose `to_file` gave `tensors`."""
        self.weight, self.bias = tensors["weight"], tensors["bias"]


def placed(old: Tensor, new: Tensor, first: int | None) -> Tensor:
    """Rows `old` `[classes, ...]` with `new` ones behind them, or in the place of those from row `first` on."""
    if first is None:
        return torch.cat([old, new])
    return torch.cat([old[:first], new, old[first + len(new):]])
