"""Prefixes written out, for the tests of the methods that use them: a network of timm's, block by block."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.prompted import PromptLearner
from tests.helpers import learn, learner_of, method_values, with_images_in_float64
from utils.config import config_from_dict

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def plain_features(vit: nn.Module, images: Tensor, prefixes: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Class-token features `[b, d]`; prefixes: keys and values `[b, L, d]` by the number of the block."""
    x = vit.patch_embed(images)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
    for number, block in enumerate(vit.blocks):
        h, attn = block.norm1(x), block.attn
        q, k, v = F.linear(h, attn.qkv.weight, attn.qkv.bias).chunk(3, 2)
        if number in prefixes:
            k, v = (torch.cat([more, tokens], 1) for more, tokens in zip(prefixes[number], (k, v), strict=True))
        q, k, v = (part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + F.linear((weights @ v).transpose(1, 2).flatten(2), attn.proj.weight, attn.proj.bias)
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x)[:, 0]


def learner(name: str, **changes) -> PromptLearner:
    """A learner in float64, before its first task."""
    config = config_from_dict({**method_values(name, optimizer="adam", **changes), "filepath": "./unused/"})
    return with_images_in_float64(learner_of(config))


def begun(name: str, **changes) -> PromptLearner:
    """A learner in float64 that has learned task 0 and begun task 1."""
    made = learn(learner(name, **changes), range(1))
    made.begin_task(1)
    return made


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def batch_of(learner: PromptLearner, count: int = 12) -> tuple[Tensor, Tensor]:
    """Training images of the task, and their labels from 0."""
    images, labels = next(iter(learner.data.train_batches(learner.task, 0, count)))
    return images, labels - learner.data.task_classes(learner.task).start


def check_gradients(pairs: list[tuple[Tensor, Tensor]], least: float = 1e-7) -> None:
    """Every first tensor has the gradient of its plain one, and one that is not 0."""
    for ours, plain in pairs:
        torch.testing.assert_close(ours.grad, plain.grad, **CLOSE)
        assert ours.grad.abs().max() > least
