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
        self.silent = False  # the frozen projection alone

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
        if self.operands is None or self.silent:
            return F.linear(x, self.weight if self.silent else self.merged, self.bias)
        return GatedLinear.apply(x, self.merged, self.bias, *self.operands)


class GatedLinear(torch.autograd.Function):
    """`x W^T + b` with the merged `W`, whose backward differentiates `W = W_0 + sum_i c_i B_i A_i` by its factors.

    With `G` the gradient of the output rows of one projection, `M = G^T x` is the gradient of that part of `W`, and
    `dL/dc_i = <M, B_i A_i>`, `dL/dA = c B^T M`, `dL/dB = c M A^T`. While `R + r <= d / 2` these come from the low-rank
    products `x A^T` and `G B` and `M` is never formed; beyond, one transient `M [d, d]` per projection is cheaper. Nothing
    per adapter is kept from the forward: only `x` and the merged weight. Stored adapters whose coefficients are not trained
    cost nothing here.
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
        stored_trained = ctx.needs_input_grad[3]
        if not stored_trained:
            operands = operands._replace(stored_A=operands.stored_A[:, :0], stored_B=operands.stored_B[..., :0])
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        width = weight.shape[1]
        tokens = x.reshape(-1, width)  # (16, 197, 768) -> (3152, 768)
        rows = grad.reshape(-1, 3 * width)
        terms = operands.stored_A.shape[1] + operands.new_A.shape[1]
        factor_gradients = _low_rank if 2 * terms <= width else _full_rank
        stored_c, new_c, new_A, new_B = factor_gradients(tokens, (rows[:, :width], rows[:, 2 * width:]), operands)
        return grad_x, None, None, stored_c if stored_trained else None, None, None, new_c, new_A, new_B


def _low_rank(x: Tensor, grads: tuple[Tensor, Tensor], o: Operands) -> tuple[Tensor, ...]:
    """Gradients of (stored_c, new_c, new_A, new_B) through products of rank R and r; `grads` are those of q and v, `[N, d]`.

    Every product is written with its thin side as rows, `[r, N]` and not `[N, r]`: with ten columns the usual order is two
    to five times slower on a CPU (docs/LOG.md). Both projections have the same x, so its products are shared.
    """
    wide = o.new_A.dtype
    stored = _paired_sum(_project(x, o.stored_A), torch.stack([_transposed_product(g, B) for g, B in zip(grads, o.stored_B)]))
    right = _project(x, o.new_A)  # [2, r, N]
    left = torch.stack([_transposed_product(g, B) for g, B in zip(grads, o.new_B)])
    c = o.new_c[:, None, None]
    grad_A = (left.flatten(0, 1) @ x).view(o.new_A.shape)  # (20, 3152) @ (3152, 768) -> (20, 768)
    grad_B = torch.stack([thin @ g for thin, g in zip(right, grads)]).mT
    return stored, _paired_sum(right, left).sum(1), c * grad_A.to(wide), c * grad_B.to(wide)


def _full_rank(x: Tensor, grads: tuple[Tensor, Tensor], o: Operands) -> tuple[Tensor, ...]:
    """The same through one transient gradient of the `[d, d]` weight of each projection."""
    parts = []
    for p, g in enumerate(grads):
        m = (g.T @ x).to(o.new_A.dtype)
        stored = ((o.stored_B[p].T @ m) * o.stored_A[p]).sum(1)
        left, c = o.new_B[p].T @ m, o.new_c[p]  # [r, d], scalar
        parts.append((stored, (left * o.new_A[p]).sum(), c * left, c * (m @ o.new_A[p].T)))
    return tuple(torch.stack(part) for part in zip(*parts, strict=True))


def _project(x: Tensor, A: Tensor) -> Tensor:
    """`A[p] x^T` for both projections in one product: x `[N, d]`, A `[2, r, d]` -> `[2, r, N]`."""
    return (A.flatten(0, 1).to(x.dtype) @ x.T).view(*A.shape[:2], len(x))


def _transposed_product(g: Tensor, B: Tensor) -> Tensor:
    """`B^T g^T`: g `[N, d]`, B `[d, r]` -> `[r, N]`."""
    return B.T.to(g.dtype) @ g.T


def _paired_sum(right: Tensor, left: Tensor) -> Tensor:
    """`sum_n right[p, j, n] left[p, j, n]`, accumulated in float32 or wider: `[2, r]`."""
    wide = torch.promote_types(right.dtype, torch.float32)
    return (right.to(wide) * left.to(wide)).sum(2)
