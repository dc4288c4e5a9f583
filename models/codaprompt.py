"""CODA-Prompt: prefixes put together from components that grow with the tasks (Smith et al., CVPR 2023, arXiv 2211.13218).

In every block of `prompt_blocks` the prefix of an image is `sum_m cos(q * A_m, K_m) P_m`, q being the class token's output
of the network without prefixes, A_m what component m looks at in it, K_m its key and P_m its prompt, the first half of whose
tokens are keys and the second values. Every task trains M / T components of its own; those of earlier tasks take part as they
are, in training and in evaluation. Loss: cross-entropy over the task's classes + lambda `sum_B ||B B^T - I||^2` over B = K, A,
P of every block, P with its tokens in a row; the norm is a mean over entries.

As in the official code, GT-RIPL/CODA-Prompt at 6417d4f, from which these come: components start orthonormal to those before
by Gram-Schmidt from N(0, 1), when their task begins; lambda is 0 since they do (0.1 in the paper, where all of them start
orthogonal before the first task); head rows and biases start from U(-1 / sqrt(d), 1 / sqrt(d)); the learning rate falls along
`cos(0.495 pi e / (E - 1))`. Not as there: the last, smaller batch of an epoch is trained on too.

Shapes: b images, d width, m components so far, k blocks with a prefix of L keys and L values.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone import FrozenViT
from backbone.prompts import GrowingPool, PrefixedViT
from models.optimisation import QuarterKeys
from models.prompted import PromptLearner
from utils.config import Config, key
from utils.config.rules import Blocks
from utils.errors import UserError
from utils.rng import generator


def orthonormal(before: Tensor, draws: Tensor) -> Tensor:
    """`draws` `[n, k, x]` less, one after the other, what lies along `before` `[m, k, x]` and along each other, of length 1.

    Trained components are not orthogonal among themselves: the projections on each of them are taken off all the same, as
    the official code does.
    """
    basis = before
    for draw in draws:
        shares = (basis * draw).sum(-1, keepdim=True) / basis.square().sum(-1, keepdim=True)
        basis = torch.cat([basis, (draw - (shares * basis).sum(0))[None]])
    return F.normalize(basis[len(before):], dim=-1)


class ComponentPool(GrowingPool):
    """prompts P `[m, k, 2, L, d]`, keys K `[m, k, d]` and attentions A `[m, k, d]`."""

    method = "codaprompt"

    def __init__(self, config: Config, width: int) -> None:
        self.blocks, count = config.prompt_blocks, len(config.prompt_blocks)
        super().__init__({"prompts": (count, 2, config.prompt_length // 2, width), "keys": (count, width),
                          "attentions": (count, width)})

    def forward(self, queries: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """The prefixes of every block, and the cosines `[b, m, k]` that weigh the components in them."""
        P, K, A = (self.whole(name) for name in self.growing)
        # Of q * A_m and K_m: neither is ever held for every image, component and block, `[b, m, k, d]`.
        dots = queries @ (A * F.normalize(K, dim=2)).flatten(0, 1).T  # (128, 768) @ (768, 100 x 5) -> (128, 500)
        lengths = (queries.square() @ A.square().flatten(0, 1).T).clamp_min(1e-24).sqrt()
        cosines = (dots / lengths).unflatten(1, K.shape[:2])
        prefixes = torch.einsum("bmk,mkx->bkx", cosines, P.flatten(2)).unflatten(2, P.shape[2:])  # (128, 5, 2, 4, 768)
        return dict(zip(self.blocks, prefixes.unbind(1), strict=True)), cosines

    def penalty(self) -> Tensor:
        """How far the components are from orthonormal: the mean square of `B B^T - I`, summed over blocks and B = K, A, P."""
        terms = []
        for name in self.growing:
            parts = self.whole(name).flatten(2).transpose(0, 1)  # (5, 100, 768)
            terms.append((parts @ parts.mT - torch.eye(parts.shape[1]).to(parts)).square().mean((1, 2)).sum())
        return torch.stack(terms).sum()


class CODAPrompt(PromptLearner):
    """A frozen network with prefixes for its attention, weighted sums of components by what the image is; a share of the
    components for every task."""

    class Keys(QuarterKeys, PromptLearner.Keys):
        """Components of CODA-Prompt"""

        prompt_components: int = key(
            100, "Components in the end; every task has an equal share, rounded down. At most the backbone's width.", ge=1)
        prompt_length: int = key(8, "Tokens of a component's prompt: half of them keys, half values.", ge=2, multiple_of=2,
                                 allowed="an even number of at least 2")
        prompt_blocks: Blocks = key([0, 1, 2, 3, 4], "Blocks with a prefix, counted from 0.",
                                    allowed="a list of ascending integers of at least 0, not empty", min_length=1)
        ortho_mu: float = key(
            0.0, "Weight of the loss that keeps components orthonormal; 0.1 in the paper, 0 in its code.", ge=0)
        optimizer: Literal["sgd", "adam", "adamw"] = key("adam", "The optimizer; Adam as published.")
        init_lr: float = key(1e-3, "Learning rate in the first task.", gt=0)
        lrate: float = key(1e-3, "Learning rate in every later task.", gt=0)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        components, tasks, width = self.config.prompt_components, self.data.nb_tasks, self.backbone.width
        self.share = components // tasks
        if not self.share:
            raise UserError(f"prompt_components: {components} leaves none for each of the {tasks} tasks; choose at least "
                            f"{tasks}.")
        if components > width:
            raise UserError(f"prompt_components: {components} of width {width} cannot be orthogonal, as those of "
                            f"'{self.config.backbone_type}' would have to be; choose at most {width}.")

    @classmethod
    def network_of(cls, config: Config, backbone: FrozenViT) -> PrefixedViT:
        return PrefixedViT(backbone, ComponentPool(config, backbone.width), prompt_blocks=config.prompt_blocks)

    def grow_head(self, task: int) -> None:
        super().grow_head(task)
        self.head.spread(generator(self.seed, "head", task))

    def make_room(self, task: int) -> None:
        super().make_room(task)
        draw, starts = generator(self.seed, "components", task), {}
        for name in self.pool.growing:
            before = getattr(self.pool, name)
            normal = torch.randn(self.share, *before.shape[1:], generator=draw).double()
            start = orthonormal(before.double().cpu().flatten(2), normal.flatten(2))
            starts[name] = start.view_as(normal)
        self.pool.grow(starts)

    def before_step(self, step: int) -> Tensor | None:
        return self.config.ortho_mu * self.pool.penalty() if self.config.ortho_mu else None

    def loss_parts(self, means: dict[str, float]) -> str:
        return f" (clf={means['clf']:.3f}, ortho={means['sparse']:.3f})" if self.config.ortho_mu else ""

    def settle(self) -> None:
        self.pool.commit()
