"""Bottleneck adapters beside the MLPs of a frozen ViT, several in a block at a time, mixed by a router of the block's own.

Shapes: b images, N tokens, d width, r bottleneck, m inner units of a descriptor, K adapters of a block.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.bottleneck import Site, attachable

ADAPTER = ("down", "down_bias", "up", "up_bias")
ROUTER = ("router", "router_bias")
DESCRIPTOR = ("encoder", "encoder_bias", "decoder", "decoder_bias")


class Cell(nn.Module):
    """The adapters of one block: finished ones, stacked along a new first dimension, and the current one in training.

    With `inner` 0 the block has one adapter and no router. Otherwise each adapter has a column of the router, and a
    descriptor: an autoencoder of the mean token with so many inner units, of whose errors in training the last `memory` are
    kept in `recent` and, once it is finished, their `mean` and `std` `[K]`. Weights start from U(-1 / sqrt(inputs),
    1 / sqrt(inputs)), the router's bias as well, all else from 0.
    """

    def __init__(self, width: int, bottleneck: int, inner: int, memory: int) -> None:
        super().__init__()
        self.memory = memory
        self.shapes: dict[str, tuple[int, ...]] = {"down": (bottleneck, width), "down_bias": (bottleneck,),
                                                   "up": (width, bottleneck), "up_bias": (width,)}
        if inner:
            self.shapes |= {"router": (width,), "router_bias": (), "encoder": (inner, width), "encoder_bias": (inner,),
                            "decoder": (width, inner), "decoder_bias": (width,)}
        for name, shape in self.shapes.items():
            self.register_buffer(name, torch.zeros(0, *shape))
            self.register_parameter(f"new_{name}", None)
        for name in ("mean", "std", "recent"):
            self.register_buffer(name, torch.zeros(0) if inner else None)

    def __len__(self) -> int:
        return len(self.down)

    @property
    def grows(self) -> bool:
        """Whether it has a router and descriptors."""
        return "router" in self.shapes

    def size(self) -> int:
        """Scalars of an adapter with its column of the router and its descriptor."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @torch.no_grad()
    def add(self, draw: torch.Generator) -> None:
        """A new adapter to train, which adds 0."""
        for name, shape in self.shapes.items():
            value = torch.zeros(shape)
            if name in ("down", "encoder", "decoder", *ROUTER):
                inputs = shape[-1] if shape else self.shapes["router"][0]
                value = (torch.rand(shape, generator=draw) * 2 - 1) / math.sqrt(inputs)
            setattr(self, f"new_{name}", nn.Parameter(value.to(self.down)))

    def current(self, names: tuple[str, ...]) -> list[nn.Parameter]:
        """These parts of the adapter that is being trained, as far as there are any."""
        parts = [getattr(self, f"new_{name}") for name in names if name in self.shapes]
        return [part for part in parts if part is not None]

    @torch.no_grad()
    def commit(self) -> None:
        """The current adapter, if there is one, joins the finished ones."""
        if self.new_down is None:
            return
        for name in self.shapes:
            setattr(self, name, self._all(name).detach())
            setattr(self, f"new_{name}", None)
        if self.grows:
            few = len(self.recent) <= 2  # then the descriptor finds nothing new
            mean, std = (0 * self.recent.sum(),) * 2 if few else (self.recent.mean(), self.recent.std())
            self.mean = torch.cat([self.mean, mean[None]])
            self.std = torch.cat([self.std, std[None] + (math.inf if few else 0)])
            self.recent = self.recent[:0]

    def _all(self, name: str) -> Tensor:
        """A part of all adapters, the current one last, `[K, ...]`."""
        stored, new = getattr(self, name), getattr(self, f"new_{name}")
        return stored if new is None else torch.cat([stored, new[None]])

    # ---- what a block computes with

    def forward(self, x: Tensor) -> Tensor:
        """`sum_k w_k (U_k relu(D_k x + d_k) + u_k)`, `w = softmax(R mean(x) + r)`, for tokens x `[b, ..., d]`."""
        down, up = self._all("down"), self._all("up")
        inner = F.relu(F.linear(x, down.flatten(0, 1), self._all("down_bias").flatten()))  # (32, 197, 2 * 16)
        up_bias = self._all("up_bias")
        if not self.grows:
            return F.linear(inner, up[0], up_bias[0])
        weights = F.linear(mean_token(x), self._all("router"), self._all("router_bias")).softmax(1)  # [b, K]
        spread = weights.repeat_interleave(up.shape[2], 1)  # (32, 2) -> (32, 32)
        ones = [1] * (x.ndim - 2)
        return (F.linear(inner * spread.view(-1, *ones, spread.shape[1]), up.movedim(0, 1).flatten(1))  # @ (32, 768)
                + F.linear(weights, up_bias.T).view(-1, *ones, x.shape[-1]))

    def error(self, means: Tensor) -> Tensor:
        """Mean squared error `[b]` of the current descriptor for mean tokens `[b, d]`."""
        inner = F.linear(means, self.new_encoder, self.new_encoder_bias)
        return (F.linear(inner, self.new_decoder, self.new_decoder_bias) - means).square().mean(1)

    def scores(self, means: Tensor) -> Tensor:
        """How far the errors of finished descriptors are from those in their training, in standard deviations, `[K, b]`."""
        inner = means @ self.encoder.mT + self.encoder_bias[:, None]  # (128, 768) @ (K, 768, 128)
        errors = (inner @ self.decoder.mT + self.decoder_bias[:, None] - means).square().mean(2)
        return ((errors - self.mean[:, None]) / self.std[:, None]).abs()

    def remember(self, errors: Tensor) -> None:
        """Takes the errors `[b]` of a step into `recent`."""
        self.recent = torch.cat([self.recent, errors])[-self.memory:]


class MixtureBank(nn.Module):
    """A cell for every block of `vit`, of which the last `growing` may get more than one adapter. chosen: None for the frozen
    network."""

    def __init__(self, vit: nn.Module, name: str, growing: int, bottleneck: int, inner: int, memory: int) -> None:
        super().__init__()
        blocks = attachable(vit, name)
        self.cells = nn.ModuleList(Cell(vit.embed_dim, bottleneck, inner if number >= len(blocks) - growing else 0, memory)
                                   for number in range(len(blocks)))
        self.chosen: int | None = None
        self._seen: dict[int, Tensor] | None = None
        for number, block in enumerate(blocks):
            Site(self, number).attach(block)

    @property
    def growing(self) -> list[int]:
        """The blocks that may get more than one adapter."""
        return [number for number, cell in enumerate(self.cells) if cell.grows]

    def choose(self, number: int | None) -> None:
        """Puts the mixture in force, or with None the frozen network."""
        self.chosen = number

    def added(self, x: Tensor, block: int) -> Tensor:
        """What a block's adapters add to its output, for tokens x `[b, ..., d]`."""
        if self._seen is not None and self.cells[block].grows:
            self._seen[block] = mean_token(x)
        return self.cells[block](x)

    @contextmanager
    def watching(self) -> Iterator[dict[int, Tensor]]:
        """What the descriptors of the growing blocks look at in the forward within: their mean tokens `[b, d]`, by block."""
        self._seen = seen = {}
        try:
            yield seen
        finally:
            self._seen = None

    def current(self, *names: str) -> list[nn.Parameter]:
        """These parts of all adapters that are being trained."""
        return [part for cell in self.cells for part in cell.current(names)]

    def commit(self) -> None:
        """All current adapters are trained no further."""
        for cell in self.cells:
            cell.commit()

    # ---- state

    def to_file(self) -> dict[str, Tensor]:
        """All that it takes to predict, by block and part."""
        return {f"blocks.{number}.{name}": getattr(cell, name).float() for number, cell in enumerate(self.cells)
                for name in (*ADAPTER, *ROUTER) if name in cell.shapes}

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        """The bank that predicts as the one did whose `to_file` gave `tensors`."""
        for name, tensor in tensors.items():
            _, number, part = name.split(".")
            setattr(self.cells[int(number)], part, tensor)
        self.choose(0)

    def snapshot(self) -> list[dict[str, Any]]:
        """Everything that makes the bank what it is; `restore` takes it back."""
        return [{**{name: buffer for name, buffer in cell.named_buffers()},
                 **{name: part.detach().clone() for name, part in cell.named_parameters()}} for cell in self.cells]

    @torch.no_grad()
    def restore(self, state: list[dict[str, Any]]) -> None:
        """The bank as it was at `snapshot`, with the mixture in force."""
        for cell, tensors in zip(self.cells, state, strict=True):
            for name in cell.shapes:
                setattr(cell, f"new_{name}", None)
            for name, tensor in tensors.items():
                value = tensor.to(cell.down, copy=True)
                setattr(cell, name, nn.Parameter(value) if name.startswith("new_") else value)
        self.choose(0)


def mean_token(x: Tensor) -> Tensor:
    """The mean of all tokens `[b, d]` of x `[b, ..., d]`."""
    return x.flatten(1, -2).mean(1)
