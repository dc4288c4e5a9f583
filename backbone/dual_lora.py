"""LoRA on the q and v projections, in the first blocks one for all tasks, in the others one for each, one of them in force.

Shapes: L blocks, of which the first l share theirs, s = L - l, N tokens, d width, r rank, n finished tasks.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.vit import fused_qkv

FACTORS = ("A", "B", "mu")  # of an adapter, by the names of its file


class LowRankQV(nn.Module):
    """Stands in for a timm block's fused `attn.qkv` linear, and adds what the bank has in force in the block."""

    def __init__(self, qkv: nn.Linear, bank: "DualBank", number: int) -> None:
        super().__init__()
        self._bank, self.number = [bank], number  # in a list: the bank is no part of the backbone
        self.weight = nn.Parameter(qkv.weight.detach(), requires_grad=False)
        self.bias = None if qkv.bias is None else nn.Parameter(qkv.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out, factors = F.linear(x, self.weight, self.bias), self._bank[0].factors(self.number)
        if factors is None:
            return out
        q, v = (F.linear(F.linear(x, B), A) for A, B in zip(*factors, strict=True))
        return out + torch.cat([q, torch.zeros_like(q), v], -1)  # (64, 197, 2304)


class Resume(nn.Module):
    """In place of the shared blocks: gives out the tokens that came out of them when they were last computed."""

    def __init__(self, following: nn.Module) -> None:
        super().__init__()
        self.tokens: Tensor | None = None
        self.noting = False
        following.register_forward_pre_hook(self._note)

    def _note(self, block: nn.Module, arguments: tuple) -> None:
        if self.noting:
            self.tokens = arguments[0]

    def forward(self, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        return self.tokens


class DualBank(nn.Module):
    """The adapters of a stream: a block adds `mu A B x` to its q and its v, mu being 1 where the adapter is shared.

    shared_A `[l, 2, d, r]`, trained from 0, shared_B `[l, 2, r, d]`, fixed; the second dimension is q, v. A `[n, s, 2, d, r]`,
    B `[n, s, 2, r, d]`, mu `[n, s, 2]`: of finished tasks; new_A, new_B, new_mu: of the current one. before: shared_A as the
    last task left it, while another one is trained. chosen: the task whose adapters are in force.
    """

    def __init__(self, vit: nn.Module, name: str, shared: int, rank: int) -> None:
        super().__init__()
        linears = fused_qkv(vit, name)
        self.layers = [LowRankQV(linear, self, number) for number, linear in enumerate(linears)]  # parts of the backbone
        for block, layer in zip(vit.blocks, self.layers, strict=True):
            block.attn.qkv = layer
        self.shared, self.width, above = shared, linears[0].in_features, len(linears) - shared
        self.shared_A = nn.Parameter(torch.zeros(shared, 2, self.width, rank))
        self.register_buffer("shared_B", torch.zeros(shared, 2, rank, self.width))
        self.register_buffer("before", None)
        for field, shape in zip(FACTORS, ((2, self.width, rank), (2, rank, self.width), (2,)), strict=True):
            self.register_buffer(field, torch.zeros(0, above, *shape))
            self.register_parameter(f"new_{field}", None)
        self.chosen: int | None = None
        self._distilling = False
        resume = Resume(vit.blocks[shared])
        rest = vit.blocks[shared - 1:]
        rest[0] = resume
        self._views = [_with_blocks(vit, vit.blocks[:shared]), _with_blocks(vit, rest), resume]  # parts of the backbone too

    def __len__(self) -> int:
        return len(self.A)

    @property
    def early(self) -> nn.Module:
        """The network with the shared blocks alone."""
        return self._views[0]

    # ---- life of an adapter

    @torch.no_grad()
    def share(self, shared_A: Tensor, shared_B: Tensor) -> None:
        """Sets the shared adapter."""
        self.shared_A.copy_(shared_A)
        self.shared_B.copy_(shared_B)

    @torch.no_grad()
    def add(self, draw: torch.Generator) -> None:
        """A new adapter for the blocks that share none, which adds 0, in force from now on."""
        _, above, _, width, rank = self.A.shape
        self.before = self.shared_A.detach().clone() if len(self) else None
        self._set_current([torch.zeros(above, 2, width, rank), orthonormal(above, width, rank, draw),
                           torch.rand(above, 2, generator=draw) + 0.5])

    @torch.no_grad()
    def commit(self) -> None:
        """Stores the current adapter, which is trained no further."""
        self.store(*(getattr(self, f"new_{field}").detach() for field in FACTORS))
        self._set_current(None)
        self.before = None

    def store(self, A: Tensor, B: Tensor, mu: Tensor) -> None:
        """Adds a trained adapter."""
        for field, part in zip(FACTORS, (A, B, mu), strict=True):
            stack = getattr(self, field)
            setattr(self, field, torch.cat([stack, part[None].to(stack)]))
        self.chosen = len(self) - 1

    def _set_current(self, parts: list[Tensor] | None) -> None:
        for number, field in enumerate(FACTORS):
            setattr(self, f"new_{field}", None if parts is None else nn.Parameter(parts[number].to(self.A, copy=True)))
        self.chosen = len(self) - (parts is None)

    # ---- what a block computes with

    def factors(self, number: int) -> tuple[Tensor, Tensor] | None:
        """`mu A` `[2, d, r]` and B `[2, r, d]` in force in a block; None where there is nothing to add."""
        if number < self.shared:
            return (self.before if self._distilling else self.shared_A)[number], self.shared_B[number]
        above = number - self.shared
        if self.chosen is None or self.chosen < 0:
            return None
        stored = self.chosen < len(self)
        A, B, mu = (getattr(self, field)[self.chosen] if stored else getattr(self, f"new_{field}") for field in FACTORS)
        return mu[above, :, None, None] * A[above], B[above]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Within, the shared blocks compute with what the last task left."""
        self._distilling = True
        try:
            yield
        finally:
            self._distilling = False

    def reassign(self) -> None:
        """Multiplies the gradient of every row of shared_A by the row's norm in `before`, over the mean of the norms."""
        norms = self.before.norm(dim=-1)  # [l, 2, d]
        mean = norms.mean(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
        self.shared_A.grad *= (norms / mean)[..., None]

    def side_by_side(self, images: Tensor, embed: Callable[..., Tensor]) -> Tensor:
        """Features `[b, k d]` of all tasks so far. embed: images to features by the whole network, or by the one that it is
        given. The newest adapters are in force afterwards."""
        _, rest, resume = self._views
        parts = []
        for number in range(len(self) + (self.new_A is not None)):
            self.chosen, resume.noting = number, number == 0
            parts.append(embed(images, rest) if number else embed(images))
        resume.tokens, resume.noting = None, False
        return torch.cat(parts, 1)

    # ---- state

    def snapshot(self) -> dict[str, Any]:
        """Everything that makes the bank what it is; `restore` takes it back."""
        new = None if self.new_A is None else [getattr(self, f"new_{field}").detach().clone() for field in FACTORS]
        return {"shared": (self.shared_A.detach().clone(), self.shared_B), "before": self.before, "new": new,
                "stored": [getattr(self, field) for field in FACTORS]}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """The bank as it was at `snapshot`; the newest adapters are in force."""
        self.share(*state["shared"])
        self.before = None if state["before"] is None else state["before"].to(self.A)
        for field, part in zip(FACTORS, state["stored"], strict=True):
            setattr(self, field, part.to(self.A))
        self._set_current(state["new"])


def orthonormal(blocks: int, width: int, rank: int, draw: torch.Generator) -> Tensor:
    """B `[blocks, 2, r, d]` as it starts: the orthonormal directions of a matrix `[d, r]` from U(0, 1), as rows."""
    return torch.linalg.qr(torch.rand(blocks, 2, width, rank, generator=draw))[0].mT


def _with_blocks(vit: nn.Module, blocks: nn.Module) -> nn.Module:
    """The same network with other blocks; all else belongs to both."""
    view = copy.copy(vit)
    view._modules = dict(vit._modules)
    view.blocks = blocks
    return view
