"""The linear classifier that grows by the rows of each task's classes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GrowingHead(nn.Module):
    """Rows of earlier tasks are fixed, rows of the current task are trained.

    weight `[classes, d]`, bias `[classes]`: rows of all finished tasks, in the order of the stream. new_weight, new_bias:
    the current task's rows, None between tasks.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("weight", torch.zeros(0, width))
        self.register_buffer("bias", torch.zeros(0))
        self.new_weight: nn.Parameter | None = None
        self.new_bias: nn.Parameter | None = None

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """New trainable rows for `classes` classes, initialised as nn.Linear's (uniform, `1 / sqrt(d)`)."""
        bound = 1 / math.sqrt(self.width)
        rows = (torch.rand(classes, self.width + 1, generator=generator) * 2 - 1) * bound
        self.new_weight = nn.Parameter(rows[:, :-1].contiguous().to(self.weight))
        self.new_bias = nn.Parameter(rows[:, -1].contiguous().to(self.bias))

    @torch.no_grad()
    def commit(self) -> None:
        """The current rows join the fixed ones."""
        self.weight, self.bias = self.rows()
        self.new_weight = self.new_bias = None

    def rows(self) -> tuple[Tensor, Tensor]:
        """Weight `[classes, d]` and bias `[classes]` of every class so far, detached."""
        if self.new_weight is None:
            return self.weight, self.bias
        return (torch.cat([self.weight, self.new_weight.detach()]), torch.cat([self.bias, self.new_bias.detach()]))

    def snapshot(self) -> dict[str, Tensor | None]:
        """Every row, as detached copies; `restore` takes it back."""
        tensors = {name: getattr(self, name) for name in ("weight", "bias", "new_weight", "new_bias")}
        return {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}

    def restore(self, state: dict[str, Tensor | None]) -> None:
        """The head as it was at `snapshot`."""
        tensors = {name: None if value is None else value.to(self.weight, copy=True) for name, value in state.items()}
        self.weight, self.bias = tensors["weight"], tensors["bias"]
        for name in ("new_weight", "new_bias"):
            setattr(self, name, None if tensors[name] is None else nn.Parameter(tensors[name]))

    def current_logits(self, features: Tensor) -> Tensor:
        """Logits `[b, c]` of the current task's classes alone: old rows get no gradient."""
        return F.linear(features, self.new_weight, self.new_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[b, classes]` of every class seen so far, for features `[b, d]`."""
        weight, bias = self.rows()
        return F.linear(features, weight.to(features.dtype), bias.to(features.dtype))
