"""models/tuna.py against its equations on plain tensors, image by image; read from the official code, LAMDA-CL/ICCV2025-TUNA
at 77d4f10, but for the universal adapter, which that never uses."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from backbone.bottleneck import Bottleneck
from models.tuna import TUNA, fused
from tests.helpers import ROOT, small_config, test_images
from tests.models.plain_adapters import (
    begun,
    fresh,
    leaves,
    look_trained,
    plain_alignment,
    plain_features,
    task_images,
)
from utils.config import load_config
from utils.errors import UserError

SIZES = [3, 2, 2]
CLOSE = {"rtol": 1e-8, "atol": 1e-10}
stream = partial(begun, "tuna", init_cls=3, increment=2, nb_tasks=3, align_epochs=7, align_samples=12, align_lr=0.05,
                 weight_decay=0.01, logit_scale=5.0, orthogonality_coeff=0.7)


def cosines(features: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([torch.stack([f @ w / (f.norm() * w.norm()) for w in rows]) for f in features])


def plain_overlap(up: list[Tensor], earlier: list[list[Tensor]]) -> Tensor:
    """Over all pairs of rows of the up-projections of every block."""
    total = 0
    for other in earlier:
        for own, theirs in zip(up, other, strict=True):
            own, theirs = (part / part.norm(dim=1, keepdim=True) for part in (own, theirs))
            total = total + (own @ theirs.T).mean().abs() / len(up)
    return total


def plain_fusion(adapters: list[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Number by number: the mean elects the sign, the largest of that sign is taken."""
    def fuse(values: list[float]) -> float:
        positive = sum(values) > 0
        agreeing = [value for value in values if (value > 0 if positive else value < 0)]
        return max(agreeing, key=abs, default=0.0)

    made = []
    for block in zip(*adapters, strict=True):
        made.append([torch.tensor([fuse(list(values)) for values in zip(*(p.flatten().tolist() for p in parts), strict=True)],
                                  dtype=torch.float64).view(parts[0].shape) for parts in zip(*block, strict=True)])
    return made


def check_step(learner: TUNA, margin: float, kept: list[list[list[Tensor]]]) -> None:
    """Loss, logits, extra term and all gradients."""
    images, labels = next(iter(learner.data.train_batches(learner.task, 0, 6)))
    targets, old = labels - learner.data.task_classes(learner.task).start, len(learner.head.means)
    adapter, W = leaves(learner.bank.current), learner.head.new_weight.detach().clone().requires_grad_()
    found = 5.0 * cosines(plain_features(fresh(), images, adapter), W[old:])
    plain = 0
    for logits, y in zip(found, targets, strict=True):
        led = logits - 5.0 * margin * torch.eye(len(logits)).double()[y]
        plain = plain + led.logsumexp(0) - led[y]
    apart = torch.zeros(()).double()
    if kept:
        ups = [[block[2] for block in other] for other in kept]
        apart = 0.7 * math.exp(-(learner.task + 1)) * plain_overlap([block[2] for block in adapter], ups)
    (plain + apart).backward()
    extra = learner.before_step(0)
    loss, logits = learner.loss(images, targets)
    assert (extra is None) == (not kept)
    (loss if extra is None else loss + extra).backward()
    torch.testing.assert_close(loss, plain, **CLOSE)
    torch.testing.assert_close(logits, found, **CLOSE)
    torch.testing.assert_close(torch.zeros(()).double() if extra is None else extra, apart, **CLOSE)
    torch.testing.assert_close(learner.head.new_weight.grad, W.grad, **CLOSE)
    assert W.grad[:old].abs().sum() == 0 and len(W) == sum(SIZES[:learner.task + 1])
    for number, part in enumerate(learner.bank.current):
        torch.testing.assert_close(part.grad, torch.stack([block[number].grad for block in adapter]), **CLOSE)
        assert part.grad.abs().max() > 1e-6


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_loss_and_gradients_of_every_task(margin: float) -> None:
    learner, kept = stream(logit_margin=margin), []
    check_step(learner, margin, kept)
    for task in (1, 2):
        kept.append([[part.detach() for part in block] for block in leaves(learner.bank.current)])
        learner.end_task()
        learner.begin_task(task)
        starts = zip(leaves(learner.bank.current), kept[-1], strict=True)
        assert all(torch.equal(own, last) for block, other in starts for own, last in zip(block, other, strict=True))
        look_trained(learner)
        check_step(learner, margin, kept)


def test_stored_adapters_and_their_overlap_get_no_gradient() -> None:
    learner = stream(orthogonality_coeff=0.0)
    learner.end_task()
    learner.begin_task(1)
    assert learner.before_step(0) is None
    assert [part for part in learner.bank.buffers() if part.requires_grad] == []
    adapter, rows = 6 * (2 * 128 * 5 + 5 + 128), 5 * 128
    assert sum(p.numel() for group in learner.optimizer().param_groups for p in group["params"]) == adapter + rows
    assert learner.trainable_parameters() == adapter + rows


def test_fusion_elects_a_sign_and_takes_the_largest() -> None:
    values = torch.tensor([[3.0, -1.0, 0.0, 2.0, -2.0], [-1.0, -4.0, 0.0, -2.0, 1.0], [1.0, 2.0, 0.0, 0.0, 0.5]])
    one = fused(Bottleneck(*[values] * 4))
    assert [part.tolist() for part in one] == [[3.0, -4.0, 0.0, -2.0, -2.0]] * 4


@pytest.mark.parametrize("shrink", [False, True])
def test_prediction_is_that_of_the_official_code_image_by_image(shrink: bool) -> None:
    """Class statistics, alignment with a rate that falls and rises again, choice by entropy, the universal adapter."""
    learner, vit, adapters = stream(shrink_means=shrink), fresh(), []
    images = test_images(learner, 16).double()
    means, covariances, owner, met = [], [], [], set()
    rates = [0.05 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(7)]
    for task in range(3):
        if task:
            learner.begin_task(task)
            look_trained(learner)
        adapters.append([[part.detach() for part in block] for block in leaves(learner.bank.current)])
        W = learner.head.rows()[0].clone()
        learner.end_task()
        x, y = task_images(learner, task)
        newest = plain_features(vit, x, adapters[-1])
        for label in range(SIZES[task]):
            means.append(newest[y == label].mean(0))
            covariances.append(torch.cov(newest[y == label].T))
            owner.append(task)
        if task:
            before = W
            around = [mean * (0.9 + 0.1 * (own + 1) / (task + 1)) if shrink else mean
                      for mean, own in zip(means, owner, strict=True)]
            W, = plain_alignment(learner, [W], lambda x, W: 5.0 * cosines(x, W), around, covariances, rates)
            assert (W - before).abs().max() > 0.001
        torch.testing.assert_close(learner.head.weight, W, rtol=1e-5, atol=1e-5)
        tested = [5.0 * cosines(plain_features(vit, images, adapter), W) for adapter in adapters]
        found = learner.predict(images)
        if task == 0:
            torch.testing.assert_close(found, tested[0], rtol=1e-5, atol=1e-5)
            continue
        universal = (5.0 * cosines(plain_features(vit, images, plain_fusion(adapters)), W)).softmax(1)
        for image in range(len(images)):
            choices = [logits[image].softmax(0) for logits in tested]
            entropies = [-(p * p.log()).sum().item() for p in choices]
            surest = entropies.index(min(entropies))
            met.add(surest)
            torch.testing.assert_close(found[image].exp(), choices[surest] + universal[image], rtol=1e-5, atol=1e-5)
    assert len(met) > 1, "images of several adapters"
    stored = 3 * 6 * (2 * 128 * 5 + 5 + 128) + 7 * 128 + 7 * (128 + 128 * 129 // 2) + 3
    assert sum(tensor.numel() for tensor in learner.stored_tensors()) == stored


@pytest.mark.parametrize("changes, word", [
    ({"logit_scale": 0}, "'logit_scale' is 0"), ({"logit_margin": -1}, "'logit_margin' is -1"),
    ({"orthogonality_coeff": -0.1}, "'orthogonality_coeff' is -0.1"), ({"shrink_means": "some"}, "'shrink_means'"),
    ({"bottleneck": 0}, "'bottleneck' is 0"), ({"align_epochs": -1}, "'align_epochs' is -1"), ({"head": "ridge"}, "'head'")])
def test_bad_values_are_one_sentence(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        small_config(model_name="tuna", **changes)


@pytest.mark.parametrize("name, epochs, rate, batch, shrink", [("tuna_c100", 15, 0.01, 16, False),
                                                                ("tuna_inr", 10, 0.02, 32, True)])
def test_configs_follow_the_published_protocol(name: str, epochs: int, rate: float, batch: int, shrink: bool) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.init_epoch, config.epochs, config.batch_size) == (epochs, epochs, batch)
    assert (config.init_lr, config.lrate, config.weight_decay) == (rate, rate, 5e-4)
    assert (config.optimizer, config.momentum, config.scheduler, config.min_lr) == ("sgd", 0.9, "cosine", 0)
    assert (config.bottleneck, config.adapter_scale, config.adapter_dropout) == (16, 0.1, 0.1)
    assert (config.logit_scale, config.logit_margin, config.orthogonality_coeff) == (20, 0, 1e-3)
    assert (config.align_epochs, config.align_samples, config.align_lr, config.shrink_means) == (30, 5 * batch, 0.005, shrink)
