"""DualPrompt: general prefixes for all tasks, and an expert prefix for each (Wang et al., ECCV 2022, arXiv 2204.04799).

The attention of the blocks `general_blocks` finds L_g further keys and values that every task trains; that of the
`expert_blocks` L_e that a single task t has trained, e_t, together with a key k_t. Loss: cross-entropy over the
task's classes - lambda cos(q, k_t), q being the class token's output of the network without prefixes. In training an image
gets the expert of the task, in evaluation the one with the key nearest to q by cosine.

As in the official code, google-research/l2p at dd8836e (JAX), from which these come: prefixes and keys start from U(0, 0.01),
an expert from that of the task before, head rows from 0; L keys and L values where the text halves a prompt of length L. Not
as there: a key takes part once its task has begun, where the code draws the keys of all tasks at the start and offers them
all; and each image is given the expert that is nearest to it, where the code's config for CIFAR-100 gives a whole batch the
one that most of it is nearest to.

Shapes: b images, d width, T tasks so far, G general and E expert blocks.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.prompts import GrowingPool, PrefixedViT
from models.prompted import PromptLearner
from utils.config import Config, key
from utils.config.rules import Blocks
from utils.rng import generator


class ExpertPool(GrowingPool):
    """general `[G, 2, L_g, d]`, trained in every task; experts `[T, E, 2, L_e, d]` and keys `[T, d]`, each in its own."""

    method = "dualprompt"

    def __init__(self, config: Config, width: int) -> None:
        self.general_blocks, self.expert_blocks = config.general_blocks, config.expert_blocks
        super().__init__({"experts": (len(self.expert_blocks), 2, config.expert_length, width), "keys": (width,)})
        self.general = nn.Parameter(torch.zeros(len(self.general_blocks), 2, config.general_length, width))

    def forward(self, queries: Tensor, own: bool = False) -> tuple[dict[int, Tensor], Tensor]:
        """The prefixes of every block, and the cosine `[b]` of query and chosen key; `own`: the newest task is chosen."""
        keys, experts, b = self.whole("keys"), self.whole("experts"), queries.shape[0]  # `len` would be a constant of a trace
        cosines = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T  # (24, 768) @ (768, 10) -> (24, 10)
        if own:
            cosine, expert = cosines[:, -1], experts[-1].expand(b, -1, -1, -1, -1)
        else:
            cosine, nearest = cosines.max(1)
            expert = experts[nearest]
        prefixes = {block: part.expand(b, -1, -1, -1) for block, part in zip(self.general_blocks, self.general, strict=True)}
        for block, part in zip(self.expert_blocks, expert.unbind(1), strict=True):
            prefixes[block] = torch.cat([prefixes[block], part], 2) if block in prefixes else part
        return prefixes, cosine


class DualPrompt(PromptLearner):
    """A frozen network with prefixes for its attention: general ones, and an expert of each task that images find by its
    key."""

    class Keys(PromptLearner.Keys):
        """Prefixes of DualPrompt"""

        general_length: int = key(5, "Keys, and as many values, of a general prefix.", ge=1)
        general_blocks: Blocks = key(
            [0, 1], "Blocks with a general prefix, counted from 0; none leaves it out.",
            allowed="a list of ascending integers of at least 0")
        expert_length: int = key(
            20, "Keys, and as many values, of an expert's prefix. The official code has 5 on CIFAR-100.", ge=1)
        expert_blocks: Blocks = key(
            [2, 3, 4], "Blocks with the prefix of an expert, counted from 0; one that has both has them one after the other.",
            allowed="a list of ascending integers of at least 0, not empty", min_length=1)
        pull_constraint_coeff: float = key(
            1.0, "Weight of the loss that pulls the task's key towards its images; 0 leaves it where it starts.", ge=0)
        optimizer: Literal["sgd", "adam", "adamw"] = key("adam", "The optimizer; Adam as published.")
        scheduler: Literal["cosine", "steplr", "constant"] = key(
            "constant", "The learning rate within a task, as elsewhere; constant as published.")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            self.pool.general.copy_(self._start(self.pool.general.shape, "general"))

    @classmethod
    def network_of(cls, config: Config, backbone: FrozenViT) -> PrefixedViT:
        return PrefixedViT(backbone, ExpertPool(config, backbone.width), general_blocks=config.general_blocks,
                           expert_blocks=config.expert_blocks)

    def _start(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        return torch.rand(shape, generator=generator(self.seed, *purpose)) * 0.01

    def grow_head(self, task: int) -> None:
        """Rows and biases of 0."""
        super().grow_head(task)
        self.head.clear()

    def make_room(self, task: int) -> None:
        super().make_room(task)
        experts = self.pool.experts
        expert = experts[-1:] if len(experts) else self._start((1, *experts.shape[1:]), "expert")
        self.pool.grow({"experts": expert, "keys": self._start((1, experts.shape[-1]), "key", task)})

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.pulled(images, targets, own=True)

    def settle(self) -> None:
        self.pool.commit()
