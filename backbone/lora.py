"""The adapter bank: every LoRA adapter of the stream, its magnitude and its gate, and how they enter the frozen ViT.

Shapes: L blocks, d width, r rank of the current adapter, R summed rank of the stored adapters, n = |S| active adapters,
p = 0 for q and 1 for v. METHOD.md sections 1 to 3 define the symbols.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backbone.gated_linear import GatedQKV, Operands
from backbone.gates import Gate, GumbelGate
from backbone.vit import fused_qkv, merged_copy

__all__ = ["AdapterBank", "GumbelGate", "frobenius_norm", "inject", "merged_copy"]


def frobenius_norm(A: Tensor, B: Tensor) -> Tensor:
    """`||B A||_F` for A `[..., r, d]`, B `[..., d, r]`, as `sqrt(<B^T B, A A^T>)`: `O(d r^2)`, in float64."""
    A, B = A.double(), B.double()
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp_min(0).sqrt()


def inject(vit: nn.Module, name: str) -> list[GatedQKV]:
    """Replaces the fused `attn.qkv` linear of every block by a `GatedQKV`; nothing is changed if one block has none."""
    layers = [GatedQKV(linear) for linear in fused_qkv(vit, name)]
    for block, layer in zip(vit.blocks, layers, strict=True):
        block.attn.qkv = layer
    return layers


class AdapterBank(nn.Module):
    """The active adapters: stored ones as unit directions, the current one as it is being trained.

    layers: the projections that the bank writes to. alpha_scope: one magnitude per block and projection (`"layer"`) or
    per adapter (`"task"`). train_alpha: whether magnitudes are trained; where they are not, A and B carry the newcomer's until
    commit moves it here. `tasks` lists the active adapters by task, ascending; the current one, if any, is the last.
    A pruned adapter's tensors are gone: nothing masked remains (METHOD.md, I5).

    skip_silent: leave adapters that this step's gate weighs exactly 0 out of the step; they move neither output nor gradient.
    Only on the CPU: which ones those are would have to be read back from any other device.
    """

    _FIXED = ("A", "B", "scale", "product_ratio", "absorbed")

    def __init__(self, layers: list[GatedQKV], gate: Gate, alpha_scope: str, train_alpha: bool = True) -> None:
        super().__init__()
        self.layers = layers  # a plain list: the layers belong to the backbone, not to the bank
        self.gate = gate
        self.alpha_scope, self.train_alpha = alpha_scope, train_alpha
        self.skip_silent = True
        self._spread: tuple[tuple, Tensor] | None = None
        self.tasks: list[int] = []
        self.ranks: list[int] = []
        depth, width = len(layers), layers[0].weight.shape[1]
        self.alpha = self._magnitude(torch.zeros(self._alpha_shape(0)))
        self.register_buffer("A", torch.zeros(depth, 2, 0, width))  # stored directions, stacked along the rank
        self.register_buffer("B", torch.zeros(depth, 2, width, 0))
        self.register_buffer("scale", torch.ones(0, depth, 2))  # fixed factor of each magnitude; 1 for gated methods
        self.register_buffer("product_ratio", torch.ones(0, depth, 2))  # ||B A|| / (||A|| ||B||), for SD-LoRA
        self.register_buffer("absorbed", torch.zeros(0, depth, 2))  # magnitude taken over from dropped ones (SD-LoRA-KD)
        self.new_A: nn.Parameter | None = None
        self.new_B: nn.Parameter | None = None

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        return self.layers[0].weight.shape[1]

    @property
    def current(self) -> int | None:
        """Task of the adapter that is being trained, None between commit and begin."""
        return None if self.new_A is None else self.tasks[-1]

    # ---- life of an adapter

    @torch.no_grad()
    def add(self, task: int, rank: int, init_alpha: float, logit: float, generator: torch.Generator) -> None:
        """A new adapter with `B = 0`: `A` as in LoRA (Kaiming uniform), the direction undefined until trained."""
        assert self.current is None, "commit or drop the current adapter first"
        bound = 1 / math.sqrt(self.width)  # Kaiming uniform with a = sqrt(5), as nn.Linear
        shape = (self.depth, 2, rank, self.width)
        A = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        self.new_A = nn.Parameter(A.to(self.A))
        self.new_B = nn.Parameter(torch.zeros(self.depth, 2, self.width, rank).to(self.B))
        self._append(task, rank, self.alpha.new_full(self._alpha_shape(1), init_alpha), logit)

    @torch.no_grad()
    def keep_only(self, tasks: list[int]) -> None:
        """Prunes every active adapter that is not in `tasks`: out of the active set, tensors freed."""
        keep = [i for i, task in enumerate(self.tasks) if task in tasks]
        if len(keep) == len(self.tasks):
            return
        columns = self._columns(tasks).to(self.A.device)
        self.A, self.B = self.A[:, :, columns], self.B[..., columns]
        if self.current is not None and self.current not in tasks:
            self.new_A = self.new_B = None
        self.scale, self.product_ratio, self.absorbed = self.scale[keep], self.product_ratio[keep], self.absorbed[keep]
        self.alpha = self._magnitude(self.alpha[keep])
        self.gate.replace(self.gate.logits[keep])
        self.tasks = [self.tasks[i] for i in keep]
        self.ranks = [self.ranks[i] for i in keep]

    @torch.no_grad()
    def commit(self, keep_norm: bool = False) -> None:
        """Stores the current adapter as direction and magnitude (METHOD.md, section 3, step 5).

        With `alpha_scope` "layer" the norm moves into alpha, so no output changes; with "task" the scalar stays as it is, and
        so does the output only with `keep_norm`: the norm is a fixed factor until the next task begins (`reset_magnitudes`).
        """
        assert self.current is not None
        norm = frobenius_norm(self.new_A, self.new_B)  # [L, 2]
        factors = torch.linalg.matrix_norm(self.new_A.double()) * torch.linalg.matrix_norm(self.new_B.double())
        alive = norm > 0
        unit_B = torch.where(alive[..., None, None], self.new_B.double() / norm.clamp_min(1e-300)[..., None, None], 0)
        self.A = torch.cat([self.A, self.new_A.detach()], dim=2)
        self.B = torch.cat([self.B, unit_B.to(self.B)], dim=3)
        self.product_ratio[-1] = torch.where(alive, norm / factors.clamp_min(1e-300), 0)
        if self.alpha_scope == "layer":
            self.alpha[-1] *= norm.to(self.alpha)
        else:
            self.scale[-1] = norm if keep_norm else alive  # a norm of zero enters with magnitude 0
        self.new_A = self.new_B = None

    @torch.no_grad()
    def store(self, task: int, tensors: dict[str, Tensor], magnitude: Tensor) -> None:
        """Adds an adapter from its file: unit direction under the names of `direction`, magnitude `[L, 2]`."""
        A, B = (torch.stack([torch.stack([tensors[f"blocks.{block}.{name}.{factor}"] for name in "qv"])
                             for block in range(self.depth)]) for factor in "AB")
        self.A, self.B = torch.cat([self.A, A.to(self.A)], dim=2), torch.cat([self.B, B.to(self.B)], dim=3)
        self._append(task, A.shape[2], magnitude[None].to(self.alpha), 0.0)

    @torch.no_grad()
    def reset_magnitudes(self, value: float) -> None:
        """SD-LoRA's start of a task: every alpha back to `value`, stored adapters divided by `||A||_F ||B||_F`."""
        self.alpha.fill_(value)
        self.scale.copy_(self.product_ratio)

    @torch.no_grad()
    def rescale(self, before: Tensor, after: Tensor) -> None:
        """`alpha_i <- alpha_i * before_i / after_i` wherever `after_i > 0`: gate weights may move, products may not."""
        ratio = torch.where(after > 0, before / after.clamp_min(torch.finfo(after.dtype).tiny), 1)
        self.alpha.mul_(ratio.reshape(-1, *[1] * (self.alpha.ndim - 1)).to(self.alpha))

    # ---- what the network computes with

    def magnitudes(self) -> Tensor:
        """alpha of every active adapter as it enters equation 1, `[n, L, 2]`."""
        alpha = self.alpha if self.alpha_scope == "layer" else self.alpha[:, None, None]
        return alpha * self.scale + self.absorbed

    def train_step(self, noise: Tensor | None = None) -> Tensor:
        """Merges with this step's gate weights and binds the factors for the backward; returns beta `[n]` with its graph.

        Called once per optimizer step, so one draw of noise is shared by every block and both projections.
        """
        beta = self.gate(None if noise is None else noise.to(self.gate.logits))
        for layer, operands in zip(self.layers, self.operands(beta, self._sounding_columns(beta)), strict=True):
            layer.merge(operands)
            layer.operands = operands
        return beta

    @torch.no_grad()
    def merge(self, beta: Tensor | None = None, among: list[int] | None = None) -> None:
        """Merges without noise for inference; from here on the backbone runs as a plain ViT.

        beta: gate weights `[n]` to use; by default the gate's own at its current temperature. among: the adapters, by task,
        that weigh anything; with it the result is the same to the bit whatever else is in the bank.
        """
        weights = self.gate() if beta is None else beta
        columns = None if among is None else self._columns(among).to(self.A.device)
        operands = self.operands(weights, columns) if self.tasks else [None] * self.depth
        for layer, operand in zip(self.layers, operands, strict=True):
            layer.operands = None
            layer.merge(operand)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """The frozen network alone; what is merged stays for afterwards."""
        for layer in self.layers:
            layer.silent = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer.silent = False

    def operands(self, beta: Tensor, columns: Tensor | None = None) -> list[Operands]:
        """What gate weights `[n]` add to each block's projections; `columns` picks some of the R stored rank-one terms, None
        takes all."""
        coefficients = self.gate.scale * beta[:, None, None] * self.magnitudes()  # [n, L, 2]
        stored = len(self.tasks) - (self.current is not None)
        spread, A, B = self._membership(stored), self.A, self.B
        if columns is not None:
            spread, A, B = spread[:, columns], A[:, :, columns], B[..., columns]
        stored_c = coefficients[:stored].permute(1, 2, 0) @ spread  # [L, 2, R]
        if self.current is None:
            new_c = coefficients.new_zeros(self.depth, 2)
            new_A, new_B = self.A[:, :, :0], self.B[..., :0]
        else:
            new_c, new_A, new_B = coefficients[-1], self.new_A, self.new_B
        return [Operands(*parts) for parts in zip(stored_c.unbind(0), A.unbind(0), B.unbind(0), new_c.unbind(0),
                                                  new_A.unbind(0), new_B.unbind(0), strict=True)]

    @torch.no_grad()
    def _sounding_columns(self, beta: Tensor) -> Tensor | None:
        """Columns of the stored adapters with a gate weight other than 0, None for all of them.

        Outside sparsemax's support the gradient of a weight is 0 as well, so nothing is lost. The test is on beta, not on
        beta * alpha: a magnitude of 0 still has a gradient.
        """
        stored = len(self.tasks) - (self.current is not None)
        if not self.skip_silent or beta.device.type != "cpu" or stored == 0 or beta[:stored].count_nonzero() == stored:
            return None
        return ((beta[:stored] != 0).to(self.A) @ self._membership(stored)).nonzero().squeeze(1)

    # ---- state

    def direction(self, task: int) -> dict[str, Tensor]:
        """The stored direction of adapter `task` under the names of its file (METHOD.md, section 5)."""
        index = self.tasks.index(task)
        stop = self._stops(len(self.tasks))[index]
        columns = slice(stop - self.ranks[index], stop)
        return {f"blocks.{block}.{name}.{factor}": tensor
                for block in range(self.depth) for p, name in enumerate("qv")
                for factor, tensor in (("A", self.A[block, p, columns]), ("B", self.B[block, p, :, columns]))}

    def snapshot(self) -> dict[str, Any]:
        """Everything that makes the bank what it is, as detached copies and plain values; `restore` takes it back."""
        tensors = {name: getattr(self, name) for name in ("alpha", "new_A", "new_B", *self._FIXED)}
        copies = {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}
        return {**copies, "logits": self.gate.logits.detach().clone(), "tasks": list(self.tasks), "ranks": list(self.ranks)}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """The bank as it was at `snapshot`."""
        for name in self._FIXED:
            setattr(self, name, state[name].to(self.A, copy=True))
        self.alpha = self._magnitude(state["alpha"].to(self.A, copy=True))
        for name in ("new_A", "new_B"):
            setattr(self, name, None if state[name] is None else nn.Parameter(state[name].to(self.A, copy=True)))
        self.gate.replace(state["logits"].to(self.A))
        self.tasks, self.ranks = list(state["tasks"]), list(state["ranks"])

    def _append(self, task: int, rank: int, alpha: Tensor, logit: float) -> None:
        self.tasks.append(task)
        self.ranks.append(rank)
        self.alpha = self._magnitude(torch.cat([self.alpha, alpha]))
        self.gate.replace(torch.cat([self.gate.logits, self.gate.logits.new_full((1,), logit)]))
        for name, value in (("scale", 1), ("product_ratio", 1), ("absorbed", 0)):
            factor = getattr(self, name)
            setattr(self, name, torch.cat([factor, factor.new_full((1, self.depth, 2), value)]))

    def _membership(self, stored: int) -> Tensor:
        """`[n, R]`: 1 where a column of the stack belongs to an adapter. As a product it spreads coefficients over columns,
        and its transpose sums their gradients in a fixed order, also on CUDA. Built when the active set has changed."""
        key = (tuple(self.ranks[:stored]), self.A.dtype, self.A.device)
        if self._spread is None or self._spread[0] != key:
            ones = [torch.ones(1, rank) for rank in self.ranks[:stored]]
            self._spread = key, (torch.block_diag(*ones) if ones else torch.zeros(0, 0)).to(self.A)
        return self._spread[1]

    def _columns(self, tasks: list[int]) -> Tensor:
        """The columns of the stored adapters of these `tasks`, on the CPU."""
        stored = len(self.tasks) - (self.current is not None)
        spans = [torch.arange(stop - rank, stop)
                 for task, rank, stop in zip(self.tasks[:stored], self.ranks, self._stops(stored)) if task in tasks]
        return torch.cat([torch.arange(0), *spans])

    def _stops(self, count: int) -> list[int]:
        """End column of each of the first `count` adapters in the stack along the rank."""
        return torch.tensor(self.ranks[:count], dtype=torch.long).cumsum(0).tolist()

    def _magnitude(self, alpha: Tensor) -> nn.Parameter:
        return nn.Parameter(alpha.detach(), requires_grad=self.train_alpha)

    def _alpha_shape(self, count: int) -> tuple[int, ...]:
        return (count, self.depth, 2) if self.alpha_scope == "layer" else (count,)
