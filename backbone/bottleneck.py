"""Bottleneck adapters beside the MLPs of a frozen ViT (AdaptFormer, Chen et al., 2022), several of them, one in force.

A block computes `x' = x + attention`, `x'' = x' + MLP(norm(x'))`; an adapter adds `s (U relu(D x' + d) + u)`. It reads x' as
it is, without the norm, as the official code of RanPAC, APER and EASE does; in the papers' text it reads what the MLP reads.
It is attached by hooks, so any block with a `norm2` and an `mlp` takes one, whatever else it does.

Shapes: L blocks, N tokens, d width, r bottleneck, n stored adapters.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

_MASK = 0xFFFFFFFF


class Bottleneck(NamedTuple):
    """One adapter, all blocks of it."""

    down: Tensor  # D [L, r, d]
    down_bias: Tensor  # d [L, r]
    up: Tensor  # U [L, d, r]
    up_bias: Tensor  # u [L, d]


class BottleneckBank(nn.Module):
    """The adapters of a stream: stored ones, stacked along a new first dimension, and the current one while it is trained.

    vit: the network that they are attached to. scale: s. dropout: share of the inner units that training leaves out.
    chosen: the adapter in force, None for the frozen network. `choose` sets it to a stored or the current one; a method that
    mixes adapters may set it to any `Bottleneck` of its own.
    """

    def __init__(self, vit: nn.Module, name: str, size: int, scale: float, dropout: float) -> None:
        super().__init__()
        blocks, width = attachable(vit, name), vit.embed_dim
        self.scale, self.dropout = scale, dropout
        self.chosen: Bottleneck | None = None
        self._shapes = Bottleneck((len(blocks), size, width), (len(blocks), size), (len(blocks), width, size),
                                  (len(blocks), width))
        for field, shape in self._shapes._asdict().items():
            self.register_buffer(field, torch.zeros(0, *shape))
            self.register_parameter(f"new_{field}", None)
        self._dropping: tuple[Tensor, int] | None = None  # key of the step, and number of its first image here
        for number, block in enumerate(blocks):
            Site(self, number).attach(block)

    def __len__(self) -> int:
        return len(self.down)

    # ---- life of an adapter

    @torch.no_grad()
    def add(self, generator: torch.Generator) -> None:
        """A new adapter to train, in force from now on: D from U(-1 / sqrt(d), 1 / sqrt(d)), all else 0, so that it adds 0."""
        for field, shape in self._shapes._asdict().items():
            value = torch.zeros(shape)
            if field == "down":
                value = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])
            setattr(self, f"new_{field}", nn.Parameter(value.to(self.down)))
        self.chosen = self.current

    @property
    def current(self) -> Bottleneck | None:
        """The adapter that is being trained."""
        if self.new_down is None:
            return None
        return Bottleneck(self.new_down, self.new_down_bias, self.new_up, self.new_up_bias)

    @torch.no_grad()
    def commit(self) -> None:
        """Stores the current adapter, which is trained no further."""
        self.store(Bottleneck(*(part.detach() for part in self.current)))
        for field in Bottleneck._fields:
            setattr(self, f"new_{field}", None)
        self.choose(len(self) - 1)

    @torch.no_grad()
    def go_on(self) -> None:
        """The current adapter starts from where the newest stored one has ended."""
        for new, stored in zip(self.current, self.stored(len(self) - 1), strict=True):
            new.copy_(stored)

    def stacks(self) -> Bottleneck:
        """All stored adapters, every part with a first dimension n."""
        return Bottleneck(*(getattr(self, field) for field in Bottleneck._fields))

    def stored(self, number: int) -> Bottleneck:
        """Stored adapter `number`, by the order in which they came."""
        return Bottleneck(*(stack[number] for stack in self.stacks()))

    def store(self, adapter: Bottleneck) -> None:
        """Adds a trained adapter."""
        for field, part in adapter._asdict().items():
            stack = getattr(self, field)
            setattr(self, field, torch.cat([stack, part[None].to(stack)]))

    def choose(self, number: int | None) -> None:
        """Puts stored adapter `number` in force, by the order in which they came, None for the frozen network, and the current
        one if `number` is the next after the stored ones."""
        if number is None:
            self.chosen = None
        elif number == len(self):
            self.chosen = self.current
        else:
            self.chosen = self.stored(number)

    # ---- what a block computes with

    @contextmanager
    def dropping(self, key: Tensor, first: int) -> Iterator[None]:
        """Within, inner units are left out at random: by `key` (int64, of the optimizer step), the number of the image in the
        whole batch, which for the images here starts at `first`, its token and the unit, and by nothing else."""
        self._dropping = (key, first) if self.dropout > 0 else None
        try:
            yield
        finally:
            self._dropping = None

    def added(self, x: Tensor, block: int) -> Tensor:
        """What the chosen adapter adds to the output of `block`, for tokens x `[b, ..., d]`."""
        adapter = self.chosen
        inner = F.relu(F.linear(x, adapter.down[block], adapter.down_bias[block]))
        if self._dropping is not None:
            inner = inner * self._kept(inner, block)
        return self.scale * F.linear(inner, adapter.up[block], adapter.up_bias[block])

    def _kept(self, inner: Tensor, block: int) -> Tensor:
        """0 for a unit that is left out, else `1 / (1 - dropout)`, in the shape of `inner`.

        A hash of where the unit is takes the place of a stream of random numbers: parts of a batch, in whichever process,
        leave out what the whole would. Products of 32-bit and 27-bit numbers stay below 2^63.
        """
        key, first = self._dropping
        number = torch.arange(inner.numel(), device=inner.device).view(inner.shape) + first * inner[0].numel()
        number = (number ^ (key + block * 0x9E3779B1)) & _MASK
        for _ in range(2):
            number = ((number ^ (number >> 16)) * 0x45D9F3B) & _MASK
        number = number ^ (number >> 16)
        return (number >= round(self.dropout * 2**32)).to(inner.dtype) / (1 - self.dropout)

    # ---- state

    def snapshot(self) -> dict[str, Any]:
        """Everything that makes the bank what it is; `restore` takes it back."""
        current = self.current
        return {"stored": [getattr(self, field) for field in Bottleneck._fields],
                "new": None if current is None else [part.detach().clone() for part in current]}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """The bank as it was at `snapshot`; the newest adapter is in force."""
        for number, field in enumerate(Bottleneck._fields):
            setattr(self, field, state["stored"][number].to(self.down))
            new = None if state["new"] is None else nn.Parameter(state["new"][number].to(self.down, copy=True))
            setattr(self, f"new_{field}", new)
        last = len(self) if self.current is not None else len(self) - 1
        self.choose(last if last >= 0 else None)


class Bank(Protocol):
    """What a site asks: `added` to the output of a block for its x', unless `chosen` is None."""

    chosen: object

    def added(self, x: Tensor, block: int) -> Tensor: ...


class Site:
    """Where one block meets the bank: keeps the x' that goes into the MLP's part, and adds to what comes out of the block."""

    def __init__(self, bank: Bank, number: int) -> None:
        self.bank, self.number = bank, number
        self.x: Tensor | None = None

    def attach(self, block: nn.Module) -> None:
        block.register_forward_pre_hook(self._begin)
        for part in (block.norm2, block.mlp):  # in a block with its norms behind, the MLP comes first
            part.register_forward_pre_hook(self._enter)
        block.register_forward_hook(self._leave)

    def _begin(self, block: nn.Module, arguments: tuple) -> None:
        self.x = None

    def _enter(self, part: nn.Module, arguments: tuple) -> None:
        if self.x is None:
            self.x = arguments[0]

    def _leave(self, block: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        x, self.x = self.x, None
        return output if self.bank.chosen is None else output + self.bank.added(x, self.number)


def attachable(vit: nn.Module, name: str) -> list[nn.Module]:
    """The blocks of a network, each of which takes an adapter; raises UserError, naming the model, if one does not."""
    blocks = list(vit.blocks)
    fitting = [isinstance(getattr(block, part, None), nn.Module) for block in blocks for part in ("norm2", "mlp")]
    if not all(fitting) or not hasattr(vit, "embed_dim"):
        raise UserError(f"backbone_type: '{name}' has blocks without a 'norm2' and an 'mlp', beside which an adapter would "
                        "stand; choose another one, such as 'vit_base_patch16_224'.")
    return blocks
