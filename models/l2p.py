"""L2P: a pool of prompts, of which every image gets those whose keys it resembles (Wang et al., CVPR 2022).

Shapes: b images, d width, M prompts of L tokens in the pool (`pool_size`, `prompt_length`), K of them for an image (`top_k`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbone import FrozenViT
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.training import GradientLearner
from utils.config import Config, key
from utils.config.rules import above
from utils.errors import UserError
from utils.rng import generator
from utils.runs.files import write_safetensors


class PromptPool(nn.Module):
    """The prompts P `[M, L, d]` and their keys k `[M, d]`: all that is learned beside the head."""

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


class PromptedViT(nn.Module):
    """A frozen ViT in which every image's prompts stand before its tokens: images `[b, 3, S, S]` to features `[b, d]`.

    The query is the image's feature in the network without prompts, the class token's output where it is pooled by that. The
    feature is the mean of the prompts' outputs. Raises UserError for a network without a place for prompts.
    """

    def __init__(self, backbone: FrozenViT, pool: PromptPool) -> None:
        super().__init__()
        vit, name = backbone.vit, backbone.identity.name
        if not isinstance(vit, VisionTransformer) or vit.attn_pool is not None:
            raise UserError(f"backbone_type: '{name}' has no place for L2P's prompts, which stand among the tokens of timm's "
                            "VisionTransformer and are averaged in place of its class token or mean, not of a pooling by "
                            "attention; choose another one, such as 'vit_base_patch16_224'.")
        self.backbone, self.pool, self.image_size = backbone, pool, backbone.image_size

    def forward(self, images: Tensor) -> Tensor:
        return self.look(images)[0]

    def as_timm(self) -> nn.Module:
        raise UserError("model_name: 'l2p' puts prompts before the tokens of every image, which no network of timm does; "
                        "export it as torchscript or onnx.")

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[b, d]`, and cosines `[b, K]` of query and chosen keys.

        The choice is made without autocast: rounding must not give an image other prompts in the run than in the network that
        is loaded from its files.
        """
        vit = self.backbone.vit
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                queries = self.backbone(images)
            prompts, cosines = self.pool(queries)
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        tokens = vit.norm(vit.blocks(torch.cat([prompts, tokens], 1)))  # (16, 25 + 197, 768)
        return vit.fc_norm(tokens[:, :prompts.shape[1]].mean(1)), cosines


class L2P(GradientLearner):
    """Learning to Prompt: a frozen network and a pool of prompts with keys; every image chooses its own.

    Loss (equation 5): cross-entropy over the task's classes - lambda sum_s cos(q, k_s) over the K chosen keys s. The pool
    serves all tasks and is trained in each. As in the official code, keys are rows of their own and prompts have no position;
    starts from U(-1, 1) and defaults are those of its PyTorch port, with which the field reports L2P. Both give a whole batch
    the prompts that most of its images choose, in evaluation too; here, as in the paper, an image's prompts depend on no other
    image.
    """

    reads_class_token_alone = False
    scenarios = ("class", "domain")

    class Keys(GradientLearner.Keys):
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
        config, width, draw = self.config, self.backbone.width, generator(self.seed, "prompts")
        prompts = torch.rand(config.pool_size, config.prompt_length, width, generator=draw) * 2 - 1
        keys = torch.rand(config.pool_size, width, generator=draw) * 2 - 1
        self.pool = PromptPool(prompts, keys, config.top_k).to(self.device)
        network = PromptedViT(self.backbone, self.pool)
        self._look = torch.compile(network.look) if config.compile else network.look

    def groups(self) -> list[dict]:
        return [{"params": [*self.pool.parameters(), *self.head.trainable()], "name": "prompts and head"}]

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `PromptedViT.look`, in the run's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            features, cosines = self._look(images)
        return features.to(cosines.dtype), cosines

    def embed(self, images: Tensor) -> Tensor:
        return self.look(images)[0]

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        features, cosines = self.look(images)
        logits = self.head.current_logits(features)
        pull = self.config.pull_constraint_coeff * cosines.sum()
        return F.cross_entropy(logits, targets, reduction="sum") - pull, logits

    # ---- what is stored

    def modules(self) -> list[nn.Module]:
        return [self.pool, self.head]

    def save(self, folder: Path) -> list[Path]:
        """The head, and in `prompts_task_<task>.safetensors` the pool."""
        path = folder / f"prompts_task_{self.task}.safetensors"
        write_safetensors(path, self.pool.state_dict(), {"task": str(self.task), "top_k": str(self.pool.top_k)})
        return [save_head(folder, self.head, self.task), path]

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        backbone, tensors = saved.backbone(), saved.tensors(f"prompts_task_{saved.task}.safetensors")
        pool = PromptPool(tensors["prompts"], tensors["keys"], saved.config.top_k)
        return SavedNetwork(PromptedViT(backbone, pool), None, saved.head(backbone.width))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "pool": {name: tensor.clone() for name, tensor in self.pool.state_dict().items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.pool.load_state_dict(state["pool"])
