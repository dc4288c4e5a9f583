"""Frozen ViTs with prompts that depend on the image, and the prompts that are learned.

A prompt is either tokens of its own (models/l2p.py) or a prefix (Li & Liang, ACL 2021): keys and values that stand before
those of the tokens in the attention of a block.

Shapes: b images, N tokens, d width, L tokens of a prefix. A prefix is `[b, 2, L, d]`, keys first. Columns of a fused qkv: q
`[0, d)`, k `[d, 2d)`, v `[2d, 3d)`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.models.cait import TalkingHeadAttn
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from backbone import FrozenViT
from utils.errors import UserError

# In these any number of further keys and values has a place: what they compute knows no position, or knows it of the tokens
# after the first `num_prefix_tokens` alone. Older versions of timm lack the last two.
_OPEN = (Attention, EvaAttention, TalkingHeadAttn,
         *(getattr(timm.layers, name) for name in ("AttentionRope", "DiffAttention") if hasattr(timm.layers, name)))


class Pool(nn.Module):
    """All that is learned beside the head: makes the prompts of images from their queries."""

    method: str  # its `model_name`

    @abstractmethod
    def forward(self, queries: Tensor, **choice: Any) -> tuple[Any, Tensor]:
        """The prompts of images with `queries` `[b, d]`, and cosines `[b, ...]` of these and keys."""

    def snapshot(self) -> dict[str, Tensor | None]:
        """Everything that makes the pool what it is, as copies; `restore` takes it back."""
        parts = {**self._parameters, **self._buffers}
        return {name: None if part is None else part.detach().clone() for name, part in parts.items()}

    def restore(self, state: dict[str, Tensor | None]) -> None:
        """The pool as it was at `snapshot`."""
        here = (*self.parameters(), *self.buffers())[0]
        for name, part in state.items():
            part = None if part is None else part.to(here, copy=True)
            setattr(self, name, nn.Parameter(part) if part is not None and name in self._parameters else part)

    def to_file(self, task: int) -> dict[str, Tensor]:
        """What `task`, just finished, has left or changed."""
        return self.state_dict()

    def files_of(self, task: int) -> range:
        """The tasks from whose files the pool after `task` is made."""
        return range(task, task + 1)

    def from_files(self, files: list[dict[str, Tensor]]) -> None:
        """The pool of which `to_file` gave `files`."""
        self.load_state_dict(files[-1])


class GrowingPool(Pool):
    """A pool of which some tensors `[n, ...]` grow by the same number of rows with every task: those of finished tasks are
    fixed, those of the current one, `new_<name>` (None between tasks), are trained."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.growing = tuple(shapes)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(0, *shape))
            self.register_parameter(f"new_{name}", None)

    def grow(self, starts: Mapping[str, Tensor]) -> None:
        """Rows for a new task, trained from `starts`."""
        for name, start in starts.items():
            setattr(self, f"new_{name}", nn.Parameter(start.to(getattr(self, name), copy=True)))

    def commit(self) -> None:
        """The current task's rows join the fixed ones."""
        for name in self.growing:
            setattr(self, name, self.whole(name).detach())
            setattr(self, f"new_{name}", None)

    def whole(self, name: str) -> Tensor:
        """Fixed and trained rows."""
        fixed, new = getattr(self, name), getattr(self, f"new_{name}")
        return fixed if new is None else torch.cat([fixed, new])

    def to_file(self, task: int) -> dict[str, Tensor]:
        return {name: part[task * len(part) // (task + 1):] if name in self.growing else part
                for name, part in self.state_dict().items()}

    def files_of(self, task: int) -> range:
        return range(task + 1)

    def from_files(self, files: list[dict[str, Tensor]]) -> None:
        for name in self.growing:
            setattr(self, name, torch.cat([file[name] for file in files]))
        self.load_state_dict(files[-1] | {name: getattr(self, name) for name in self.growing})


class QueriedViT(nn.Module):
    """A frozen ViT that meets every image twice: without prompts, and with those that the pool gives for what came out.

    Images `[b, 3, S, S]` to features `[b, d]`.
    """

    def __init__(self, backbone: FrozenViT, pool: Pool) -> None:
        super().__init__()
        self.backbone, self.pool, self.image_size = backbone, pool, backbone.image_size

    def forward(self, images: Tensor) -> Tensor:
        return self.look(images)[0]

    @abstractmethod
    def prompted(self, images: Tensor, prompts: Any) -> Tensor:
        """Features of images with the prompts that the pool has made for them."""

    def look(self, images: Tensor, **choice: Any) -> tuple[Tensor, Tensor]:
        """Features, and the cosines that the pool gives with `choice`.

        Prompts are chosen without autocast: rounding must not give an image other ones in the run than in the network that
        is loaded from its files.
        """
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                queries = self.backbone(images)
            prompts, cosines = self.pool(queries, **choice)
        return self.prompted(images, prompts), cosines

    def as_timm(self) -> nn.Module:
        raise UserError(f"model_name: '{self.pool.method}' puts prompts into the network, others for every image, which no "
                        "network of timm does; export it as torchscript or onnx.")


class PrefixedViT(QueriedViT):
    """A frozen ViT whose attention, in some blocks, finds the prefixes that the pool gives: `{block: [b, 2, L, d]}`."""

    def __init__(self, backbone: FrozenViT, pool: Pool, **blocks: list[int]) -> None:
        """blocks: numbers of the blocks, from 0, by the config keys that name them. Raises UserError for a block that the
        network has not got, and for attention without a place for a prefix."""
        super().__init__(backbone, pool)
        depth, name = len(backbone.vit.blocks), backbone.identity.name
        for key, numbers in blocks.items():
            if numbers and numbers[-1] >= depth:
                raise UserError(f"{key}: {numbers[-1]} is none of the {depth} blocks of '{name}'; choose from 0 to "
                                f"{depth - 1}.")
        chosen = sorted({number for numbers in blocks.values() for number in numbers})
        if not all(isinstance(backbone.vit.blocks[number].attn, _OPEN) for number in chosen):
            raise UserError(f"backbone_type: the attention of '{name}' has no place for the keys and values of "
                            f"'{pool.method}'; choose another one, such as 'vit_base_patch16_224'.")
        self.sites = {number: _Site(backbone.vit.blocks[number].attn) for number in chosen}

    def prompted(self, images: Tensor, prompts: dict[int, Tensor]) -> Tensor:
        for number, site in self.sites.items():
            site.prefix = prompts[number]
        features = self.backbone(images)
        for site in self.sites.values():
            site.prefix = None
        return features


class _Site:
    """Where prefixes meet the attention of a block; with `prefix` None it computes as ever.

    The attention sees L more tokens, before all others, of which nothing but keys and values enters, and whose outputs leave
    with it: so it stays timm's own.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.prefix: Tensor | None = None
        attention.register_forward_pre_hook(self._enter)
        attention.qkv.register_forward_hook(self._fill)
        attention.register_forward_hook(self._leave)

    def _enter(self, attention: nn.Module, arguments: tuple) -> tuple | None:
        if self.prefix is None:
            return None
        length = self.prefix.shape[2]
        self._shift(attention, length)
        return (F.pad(arguments[0], (0, 0, length, 0)), *arguments[1:])  # (16, 197, 768) -> (16, 5 + 197, 768)

    def _fill(self, linear: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        if self.prefix is None:
            return output
        rows = F.pad(self.prefix.transpose(1, 2).flatten(2), (self.prefix.shape[3], 0))  # (16, 5, 3 x 768), q being 0
        return torch.cat([rows.to(output.dtype), output[:, rows.shape[1]:]], 1)

    def _leave(self, attention: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        if self.prefix is None:
            return output
        length = self.prefix.shape[2]
        self._shift(attention, -length)
        return output[:, length:]

    @staticmethod
    def _shift(attention: nn.Module, length: int) -> None:
        """Tells attention that rotates tokens by their position where the first of them now stands."""
        if hasattr(attention, "num_prefix_tokens"):
            attention.num_prefix_tokens += length
