"""LoRA on the k and v projections, of which one factor is given and the other trained.

Shapes: L blocks, N tokens, d width, r rank, R summed rank of the stored adapters. Rows of a fused qkv weight: q `[0, d)`, k
`[d, 2d)`, v `[2d, 3d)`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.vit import fused_qkv


class LowRankKV(nn.Module):
    """Stands in for a timm block's fused `attn.qkv` linear: `merged` holds the frozen weight and all stored adapters.

    The current adapter of the bank, if it has one, is added on its own. second: `[d, d]` float64, to which every forward adds
    `sum x x^T` of its inputs while it is not None.
    """

    def __init__(self, qkv: nn.Linear, bank: "KVBank", number: int) -> None:
        super().__init__()
        self._bank, self.number = [bank], number  # in a list: the bank is no part of the backbone
        self.weight = nn.Parameter(qkv.weight.detach(), requires_grad=False)
        self.bias = None if qkv.bias is None else nn.Parameter(qkv.bias.detach(), requires_grad=False)
        self.register_buffer("merged", self.weight.clone(), persistent=False)
        self.second: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.second is not None:
            with torch.autocast(x.device.type, enabled=False):
                tokens = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
                self.second += (tokens.T @ tokens).double()
        out, bank = F.linear(x, self.merged, self.bias), self._bank[0]
        if bank.new_A is None:
            return out
        added = F.linear(F.linear(x, bank.new_A[self.number]), bank.new_B[self.number])  # (16, 197, 1536)
        return out + F.pad(added, (x.shape[-1], 0))  # q gets nothing


class KVBank(nn.Module):
    """The adapters of a stream: A `[L, R, d]`, B `[L, 2d, R]` of finished tasks, whose sum is merged into the network, and the
    current one: `new_A [L, r, d]` fixed, `new_B` trained from 0."""

    def __init__(self, vit: nn.Module, name: str) -> None:
        super().__init__()
        linears = fused_qkv(vit, name)
        self.layers = [LowRankKV(linear, self, number) for number, linear in enumerate(linears)]  # parts of the backbone
        for block, layer in zip(vit.blocks, self.layers, strict=True):
            block.attn.qkv = layer
        self.width = linears[0].in_features
        self.register_buffer("A", torch.zeros(len(linears), 0, self.width))
        self.register_buffer("B", torch.zeros(len(linears), 2 * self.width, 0))
        self.register_buffer("new_A", None)
        self.new_B = nn.ParameterList()

    def add(self, rank: int) -> None:
        """A new adapter, whose A is to be given by `aim`; it adds 0."""
        depth = len(self.layers)
        self._set_current(self.A.new_zeros(depth, rank, self.width), [self.B.new_zeros(2 * self.width, rank)] * depth)

    def aim(self, rows: Tensor) -> None:
        """Sets the rows `[L, r, d]` of the current adapter's A."""
        self.new_A.copy_(rows)

    @torch.no_grad()
    def commit(self) -> None:
        """Stores the current adapter and merges it."""
        self.store(self.new_A, torch.stack(list(self.new_B)))
        self._set_current(None, [])
        self.merge()

    def store(self, A: Tensor, B: Tensor) -> None:
        """Adds an adapter `[L, r, d]`, `[L, 2d, r]`."""
        self.A, self.B = torch.cat([self.A, A.to(self.A)], 1), torch.cat([self.B, B.to(self.B)], 2)

    @torch.no_grad()
    def merge(self) -> None:
        """`merged = weight + sum_t B_t A_t` on the k and v rows."""
        for layer, A, B in zip(self.layers, self.A, self.B, strict=True):
            layer.merged.copy_(layer.weight)
            layer.merged[self.width:].addmm_(B, A)

    def _set_current(self, A: Tensor | None, B: list[Tensor]) -> None:
        self.new_A = A
        self.new_B = nn.ParameterList(nn.Parameter(part.clone()) for part in B)

    # ---- state

    def snapshot(self) -> dict[str, Any]:
        """Everything that makes the bank what it is; `restore` takes it back."""
        new_A = None if self.new_A is None else self.new_A.clone()
        return {"A": self.A, "B": self.B, "new_A": new_A, "new_B": [part.detach().clone() for part in self.new_B]}

    def restore(self, state: dict[str, Any]) -> None:
        """The bank as it was at `snapshot`."""
        self.A, self.B = state["A"].to(self.A), state["B"].to(self.B)
        new_A = None if state["new_A"] is None else state["new_A"].to(self.A, copy=True)
        self._set_current(new_A, [part.to(self.A) for part in state["new_B"]])
        self.merge()
