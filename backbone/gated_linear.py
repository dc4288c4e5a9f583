"""The q/v projection with all active adapters, forward as one product.

Shapes: N tokens (all leading dimensions of `x`), d width, r rank of the current adapter, R summed rank of the stored ones,
p = 0 for q and 1 for v. Rows of a fused qkv weight: q `[0, d)`, k `[d, 2d)`, v `[2d, 3d)`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Operands(NamedTuple):
    """What one block's projection adds to its frozen weight, `sum_i c_i B_i A_i` for q and v (METHOD.md, equation 1)."""

    stored_c: Tensor  # [2, R] coefficient of each stored rank-one term: its adapter's gate_scale * beta * alpha
    stored_A: Tensor  # [2, R, d]
    stored_B: Tensor  # [2, d, R]
    new_c: Tensor  # [2] coefficient of the current adapter
    new_A: Tensor  # [2, r, d]
    new_B: Tensor  # [2, d, r]


class GatedQKV(nn.Module):
    """Stands in for a timm block's fused `attn.qkv` linear.

    `merged` holds the frozen weight plus the weighted adapters; it is filled by `merge` once per optimizer step or once
    per evaluation. With `operands` bound the backward also reaches the gates, magnitudes and the current adapter; without,
    the layer is a plain linear, at the price of the backbone.
    """

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(qkv.weight.detach(), requires_grad=False)
        self.bias = None if qkv.bias is None else nn.Parameter(qkv.bias.detach(), requires_grad=False)
        self.register_buffer("merged", self.weight.clone(), persistent=False)
        self.operands: Operands | None = None

    @torch.no_grad()
    def merge(self, operands: Operands | None) -> None:
        """`merged = weight + sum_i c_i B_i A_i` on the q and v rows; cost `O(d^2 (R + r))`, whatever the batch."""
        width = self.weight.shape[1]
        for p, start in enumerate((0, 2 * width)):
            rows = slice(start, start + width)
            frozen, target = self.weight[rows], self.merged[rows]
            if operands is None:
                target.copy_(frozen)
                continue
            torch.addmm(frozen, operands.stored_B[p] * operands.stored_c[p], operands.stored_A[p], out=target)
            target.addmm_(operands.new_B[p] * operands.new_c[p], operands.new_A[p])

    def forward(self, x: Tensor) -> Tensor:
        if self.operands is None:
            return F.linear(x, self.merged, self.bias)
        return GatedLinear.apply(x, self.merged, self.bias, *self.operands)


class GatedLinear(torch.autograd.Function):
    """`x W^T + b` with the merged `W`, whose backward differentiates `W = W_0 + sum_i c_i B_i A_i` by its factors.

    With `G` the gradient of the output rows of one projection, `M = G^T x` is the gradient of that part of `W`, and
    `dL/dc_i = <M, B_i A_i>`, `dL/dA = c B^T M`, `dL/dB = c M A^T`. While `R + r <= d / 2` these come from the low-rank
    products `x A^T` and `G B` and `M` is never formed; beyond, one transient `M [d, d]` per projection is cheaper. Nothing
    per adapter is kept from the forward: only `x` and the merged weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *operands: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight, *operands)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        operands = Operands(*rest)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        width = weight.shape[1]
        tokens = x.reshape(-1, width)  # (16, 197, 768) -> (3152, 768)
        rows = grad.reshape(-1, 3 * width)
        terms = operands.stored_A.shape[1] + operands.new_A.shape[1]
        factor_gradients = _low_rank if 2 * terms <= width else _full_rank
        parts = [factor_gradients(tokens, rows[:, start:start + width], p, operands)
                 for p, start in enumerate((0, 2 * width))]
        stored_c, new_c, new_A, new_B = (torch.stack(part) for part in zip(*parts, strict=True))
        return grad_x, None, None, stored_c, None, None, new_c, new_A, new_B


def _low_rank(x: Tensor, g: Tensor, p: int, o: Operands) -> tuple[Tensor, ...]:
    """Gradients of (stored_c, new_c, new_A, new_B) of projection `p` through products of rank R and r."""
    stored = _paired_sum(x @ o.stored_A[p].T.to(x.dtype), g @ o.stored_B[p].to(g.dtype))
    right, left = x @ o.new_A[p].T.to(x.dtype), g @ o.new_B[p].to(g.dtype)  # [N, r] each
    c, wide = o.new_c[p], o.new_A.dtype
    return stored, _paired_sum(right, left).sum(), c * (left.T @ x).to(wide), c * (g.T @ right).to(wide)


def _full_rank(x: Tensor, g: Tensor, p: int, o: Operands) -> tuple[Tensor, ...]:
    """The same through one transient gradient of the `[d, d]` weight."""
    m = (g.T @ x).to(o.new_A.dtype)
    stored = ((o.stored_B[p].T @ m) * o.stored_A[p]).sum(1)
    left = o.new_B[p].T @ m  # [r, d]
    c = o.new_c[p]
    return stored, (left * o.new_A[p]).sum(), c * left, c * (m @ o.new_A[p].T)


def _paired_sum(right: Tensor, left: Tensor) -> Tensor:
    """`sum_n right[n, j] left[n, j]`, accumulated in float32 or wider."""
    wide = torch.promote_types(right.dtype, torch.float32)
    return (right.to(wide) * left.to(wide)).sum(0)
