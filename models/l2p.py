"""L2P: a pool of prompts, of which every image gets those whose keys it resembles (Wang et al., CVPR 2022).

Shapes: b images, d width, M prompts of L tokens in the pool (`pool_size`, `prompt_length`), K of them for an image (`top_k`).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.prompts import Pool, QueriedViT
from models.prompted import PromptLearner
from utils.config import Config, key
from utils.config.rules import above
from utils.errors import UserError
from utils.rng import generator


class PromptPool(Pool):
    """The prompts P `[M, L, d]` and their keys k `[M, d]`."""

    method = "l2p"

    def __init__(self, prompts: Tensor, keys: Tensor, top_k: int) -> None:
        super().__init__()
        self.prompts, self.keys, self.top_k = nn.Parameter(prompts), nn.Parameter(keys), top_k

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts of the K nearest keys of each query q `[b, d]` by cosine (equation 3), `[b, K L, d]`, and the cosines
        `[b, K]` of these keys."""
        cosines = F.normalize(queries, dim=1) @ F.normalize(self.keys, dim=1).T  # (16, 768) @ (768, 10) -> (16, 10)
        nearest, chosen = cosines.topk(self.top_k)
        # A product and not an index: its gradient sums in a fixed order.
        rows = F.one_hot(chosen, len(self.keys)).to(queries) @ self.prompts.flatten(1)  # (16, 5, 10) @ (10, 3840)
        return rows.unflatten(2, self.prompts.shape[1:]).flatten(1, 2), nearest


class PromptedViT(QueriedViT):
    """A frozen ViT in which every image's prompts stand before its tokens; the feature is the mean of the prompts' outputs.

    The query is the class token's output where the network is pooled by that. Raises UserError for a network without a place
    for prompts.
    """

    def __init__(self, backbone: FrozenViT, pool: PromptPool) -> None:
        super().__init__(backbone, pool)
        vit, name = backbone.vit, backbone.identity.name
        if not isinstance(vit, VisionTransformer) or vit.attn_pool is not None:
            raise UserError(f"backbone_type: '{name}' has no place for L2P's prompts, which stand among the tokens of timm's "
                            "VisionTransformer and are averaged in place of its class token or mean, not of a pooling by "
                            "attention; choose another one, such as 'vit_base_patch16_224'.")

    def prompted(self, images: Tensor, prompts: Tensor) -> Tensor:
        vit = self.backbone.vit
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        tokens = vit.norm(vit.blocks(torch.cat([prompts, tokens], 1)))  # (16, 25 + 197, 768)
        return vit.fc_norm(tokens[:, :prompts.shape[1]].mean(1))


class L2P(PromptLearner):
    """Learning to Prompt: a frozen network and a pool of prompts with keys; every image chooses its own.

    Loss (equation 5): cross-entropy over the task's classes - lambda sum_s cos(q, k_s) over the K chosen keys s. The pool
    serves all tasks and is trained in each. As in the official code, keys are rows of their own and prompts have no position;
    starts from U(-1, 1) and defaults are those of its PyTorch port, with which the field reports L2P. Both give a whole batch
    the prompts that most of its images choose, in evaluation too; here, as in the paper, an image's prompts depend on no other
    image.
    """

    reads_class_token_alone = False
    scenarios = ("class", "domain")

    class Keys(PromptLearner.Keys):
        """Prompts of L2P"""

        pool_size: int = key(10, "Prompts in the pool, each with a key.", ge=1)
        prompt_length: int = key(5, "Tokens of a prompt.", ge=1)
        top_k: int = key(5, "Prompts that an image gets: those with the keys nearest to it. At most `pool_size`.", ge=1)
        pull_constraint_coeff: float = key(
            0.1, "Weight of the loss that pulls the chosen keys towards the image; 0 leaves them where they start.", ge=0)

    @classmethod
    def contradictions(cls, config: Config) -> Iterator[str]:
        yield from super().contradictions(config)
        if config.top_k > config.pool_size:
            yield above(config, "top_k", "pool_size", "an image gets different prompts")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        draw = generator(self.seed, "prompts")
        with torch.no_grad():
            for part in (self.pool.prompts, self.pool.keys):
                part.copy_(torch.rand(part.shape, generator=draw) * 2 - 1)

    @classmethod
    def network_of(cls, config: Config, backbone: FrozenViT) -> PromptedViT:
        prompts = torch.zeros(config.pool_size, config.prompt_length, backbone.width)
        return PromptedViT(backbone, PromptPool(prompts, torch.zeros_like(prompts[:, 0]), config.top_k))

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.pulled(images, targets)
