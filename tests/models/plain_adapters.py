"""Adapters written out, for the tests of the methods that use them: a network of timm's, block by block."""

import math
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.bottleneck import Bottleneck
from backbone.embedded import EMBEDDED
from models.adapted import BottleneckLearner, ContinuedLearner
from tests.helpers import learner_of, small_config, with_images_in_float64
from utils.rng import generator


def fresh() -> nn.Module:
    """The embedded network as it was pretrained, in float64, nothing attached to it."""
    return timm.create_model(EMBEDDED, pretrained=True, num_classes=0).requires_grad_(False).eval().double()


def plain_features(vit: nn.Module, images: Tensor, adapter: list[list[Tensor]] | None, scale: float = 0.1) -> Tensor:
    """Class-token features `[b, d]`; adapter: D, d, U, u of every block."""
    x = vit.patch_embed(images)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
    for number, block in enumerate(vit.blocks):
        x = x + block.attn(block.norm1(x))
        beside = 0
        if adapter is not None:
            D, d, U, u = adapter[number]
            beside = scale * (torch.relu(x @ D.T + d) @ U.T + u)
        x = x + block.mlp(block.norm2(x)) + beside
    return vit.norm(x)[:, 0]


def lora_features(vit: nn.Module, images: Tensor, deltas: list[tuple], inputs: list | None = None) -> Tensor:
    """Class-token features after the first blocks, one for each of `deltas`, through the last norm, with `q + x Q^T` and so on
    for its (Q, K, V), of which each may be None; attention's inputs go to `inputs`."""
    x = vit.patch_embed(images)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
    for block, added in zip(vit.blocks, deltas, strict=False):
        h, attn = block.norm1(x), block.attn
        if inputs is not None:
            inputs.append(h)
        plain = F.linear(h, attn.qkv.weight, attn.qkv.bias).chunk(3, 2)
        q, k, v = ((part if delta is None else part + h @ delta.T).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
                   for part, delta in zip(plain, added, strict=True))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x)[:, 0]


def leaves(adapter: Bottleneck) -> list[list[Tensor]]:
    """The adapter as tensors of its own, block by block."""
    return [[part[block].detach().clone().requires_grad_() for part in adapter] for block in range(len(adapter.down))]


def begun(name: str, **changes) -> BottleneckLearner:
    """A learner in float64 that has begun task 0, its adapter as if trained."""
    changes = {"bottleneck": 5, "adapter_dropout": 0.0, "nb_tasks": 3, **changes}
    learner = with_images_in_float64(learner_of(small_config(model_name=name, **changes)))
    learner.begin_task(0)
    look_trained(learner)
    return learner


@torch.no_grad()
def look_trained(learner: BottleneckLearner) -> None:
    """Moves every part of the current adapter off its start."""
    draw = generator(learner.task, "trained")
    for part in learner.bank.current:
        part += torch.randn(part.shape, generator=draw) * 0.3


def task_images(learner: BottleneckLearner, task: int) -> tuple[Tensor, Tensor]:
    """All training images of a task as the statistics see them, in order, and labels from 0."""
    classes = learner.data.task_classes(task)
    batches = list(learner.data.eval_batches("train", classes, learner.config.batch_size))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]) - classes.start


def check_training_step(learner: BottleneckLearner) -> None:
    """Loss, logits and all gradients of a step are those of cross-entropy over `s cos(f, w)`."""
    images, labels = next(iter(learner.data.train_batches(learner.task, 0, 6)))
    targets = labels - learner.data.task_classes(learner.task).start
    learner.before_step(0)
    loss, logits = learner.loss(images, targets)
    loss.backward()
    adapter, head = leaves(learner.bank.current), learner.head
    rows, s = head.new_weight.detach().clone().requires_grad_(), head.scale.detach().clone().requires_grad_()
    features = plain_features(fresh(), images, adapter)
    cosines = torch.stack([torch.stack([f @ w / (f.norm() * w.norm()) for w in rows]) for f in features])
    plain = -F.log_softmax(s * cosines, 1)[range(len(targets)), targets].sum()
    plain.backward()
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss, plain, **close)
    torch.testing.assert_close(logits, s * cosines, **close)
    torch.testing.assert_close(head.new_weight.grad, rows.grad, **close)
    torch.testing.assert_close(head.scale.grad, s.grad, **close)
    for number, part in enumerate(learner.bank.current):
        torch.testing.assert_close(part.grad, torch.stack([block[number].grad for block in adapter]), **close)
        assert part.grad.abs().max() > 1e-6


def plain_alignment(learner: ContinuedLearner, rows: list[Tensor], logits: Callable[..., Tensor], means: list[Tensor],
                    covariances: list[Tensor], rates: list[float]) -> list[Tensor]:
    """Head rows after SGD on samples of all classes' Gaussians, an epoch at each of `rates`; `logits` of samples and rows."""
    config, classes, width = learner.config, len(means), means[0].numel()
    rows, draw = [row.clone().requires_grad_() for row in rows], generator(learner.seed, "align", learner.task)
    speed, size = [torch.zeros_like(row) for row in rows], config.align_samples
    factors = [torch.linalg.cholesky(covariance + 1e-4 * torch.eye(width).double()) for covariance in covariances]
    for rate in rates:
        noise = [torch.randn(size, width, generator=draw).double() for _ in range(classes)]
        samples = torch.cat([mean + e @ L.T for mean, e, L in zip(means, noise, factors, strict=True)])
        labels = torch.arange(classes).repeat_interleave(size)
        for batch in torch.randperm(size * classes, generator=draw).split(size):
            gradients = torch.autograd.grad(F.cross_entropy(logits(samples[batch], *rows), labels[batch]), rows)
            with torch.no_grad():
                for part, gradient, v in zip(rows, gradients, speed, strict=True):
                    v.mul_(0.9).add_(gradient + config.weight_decay * part)
                    part -= rate * v
    return [row.detach() for row in rows]
