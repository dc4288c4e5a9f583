"""Equation 1 of METHOD.md in the two obvious ways: adapter by adapter, and with all adapters stacked along the rank.

The fast projection is timed against both and tested against both. Shapes as in `backbone/lora.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.lora import AdapterBank

Term = tuple[Tensor, Tensor, Tensor, Tensor]  # gate weight (scalar), magnitude [2], A [2, r, d], B [2, d, r]


class LoopQKV(nn.Module):
    """A fused qkv linear with the weighted adapters added one by one to its output.

    The gate weight and the magnitude are both learned, so autograd keeps two outputs `[N, d]` per adapter and projection.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, terms: list[Term]) -> None:
        super().__init__()
        self.weight, self.bias, self.terms = weight, bias, terms

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.weight, self.bias).chunk(3, -1)
        for beta, alpha, A, B in self.terms:
            q = q + beta * (alpha[0] * (x @ A[0].T @ B[0].T))
            v = v + beta * (alpha[1] * (x @ A[1].T @ B[1].T))
        return torch.cat([q, k, v], -1)


class StackedQKV(nn.Module):
    """A fused qkv linear with all adapters as one of rank `R + r`, whose rows are scaled between the two products."""

    def __init__(self, weight: Tensor, bias: Tensor | None, c: Tensor, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.c, self.A, self.B = c, A, B  # [2, R + r], [2, R + r, d], [2, d, R + r]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.weight, self.bias).chunk(3, -1)
        q = q + (x @ self.A[0].T * self.c[0]) @ self.B[0].T
        v = v + (x @ self.A[1].T * self.c[1]) @ self.B[1].T
        return torch.cat([q, k, v], -1)


def loop_layers(bank: AdapterBank, beta: Tensor) -> list[nn.Module]:
    """One `LoopQKV` per block for gate weights `[n]`; gradients reach the bank's parameters."""
    weights, magnitudes = bank.gate.scale * beta, bank.magnitudes()
    layers = []
    for block, layer in enumerate(bank.layers):
        terms = [(weights[i], magnitudes[i, block], A, B) for i, (A, B) in enumerate(_factors(bank, block))]
        layers.append(LoopQKV(layer.weight, layer.bias, terms))
    return layers


def stacked_layers(bank: AdapterBank, beta: Tensor) -> list[nn.Module]:
    """One `StackedQKV` per block for gate weights `[n]`; gradients reach the bank's parameters."""
    coefficients = bank.gate.scale * beta[:, None, None] * bank.magnitudes()  # [n, L, 2]
    ranks = torch.tensor(bank.ranks, device=beta.device)
    columns = torch.arange(len(bank.ranks), device=beta.device).repeat_interleave(ranks, output_size=sum(bank.ranks))
    layers = []
    for block, layer in enumerate(bank.layers):
        A, B = torch.cat([bank.A[block], bank.new_A[block]], 1), torch.cat([bank.B[block], bank.new_B[block]], 2)
        layers.append(StackedQKV(layer.weight, layer.bias, coefficients[columns, block].T, A, B))
    return layers


def _factors(bank: AdapterBank, block: int) -> list[tuple[Tensor, Tensor]]:
    """A `[2, r, d]` and B `[2, d, r]` of every active adapter, the current one last."""
    ranks = bank.ranks if bank.current is None else bank.ranks[:-1]
    stored = list(zip(bank.A[block].split(ranks, 1), bank.B[block].split(ranks, 2), strict=True)) if ranks else []
    return stored if bank.current is None else [*stored, (bank.new_A[block], bank.new_B[block])]
