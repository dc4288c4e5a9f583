"""models/mos.py against its equations on plain tensors, image by image; read from the official code, sun-hailong/AAAI25-MOS at
8d5e07c, but for how often it merges."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.mos import MOS
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
from utils.runs import distributed

SIZES = [3, 2, 2]
CLOSE = {"rtol": 1e-8, "atol": 1e-10}
stream = partial(begun, "mos", init_cls=3, increment=2, nb_tasks=3, align_epochs=2, align_samples=12, align_lr=0.002,
                 weight_decay=0.01)


def next_task(learner: MOS, task: int) -> None:
    learner.end_task()
    learner.begin_task(task)
    look_trained(learner)


def plain_loss(features: Tensor, W: Tensor, b: Tensor, targets: Tensor, means: Tensor, gamma: float) -> Tensor:
    """Of the class rows from `len(means)` on, row by row."""
    total = 0
    for f, y in zip(features, targets, strict=True):
        logits = W[len(means):] @ f + b[len(means):]
        total = total + logits.logsumexp(0) - logits[y]
    rows = [*means, *features]
    for number, row in enumerate(rows):
        alike = torch.stack([row @ other for other in rows]) / 0.8
        total = total + gamma * (alike.logsumexp(0) - alike[number]) * len(features) / len(rows)
    return total


def check_step(learner: MOS) -> None:
    """Loss, logits, and the gradients of adapter and head rows, old ones included."""
    images, labels = next(iter(learner.data.train_batches(learner.task, 0, 6)))
    images = images * 0.3  # features of a length at which the contrast is not 0
    targets = labels - learner.data.task_classes(learner.task).start
    head, adapter = learner.head, leaves(learner.bank.current)
    W, b = (row.detach().clone().requires_grad_() for row in (head.new_weight, head.new_bias))
    features = plain_features(fresh(), images, adapter)
    plain = plain_loss(features, W, b, targets, head.means, 0.1)
    plain.backward()
    learner.before_step(0)
    loss, logits = learner.loss(images, targets)
    loss.backward()
    torch.testing.assert_close(loss, plain, **CLOSE)
    torch.testing.assert_close(logits, (features @ W.T + b)[:, len(head.means):], **CLOSE)
    torch.testing.assert_close(head.new_weight.grad, W.grad, **CLOSE)
    torch.testing.assert_close(head.new_bias.grad, b.grad, **CLOSE)
    assert W.grad[:len(head.means)].abs().sum() == 0 and len(W) == sum(SIZES[:learner.task + 1])
    for number, part in enumerate(learner.bank.current):
        torch.testing.assert_close(part.grad, torch.stack([block[number].grad for block in adapter]), **CLOSE)
        assert part.grad.abs().max() > 1e-6


def test_loss_and_gradients_of_every_task() -> None:
    learner = stream()
    check_step(learner)
    for task in (1, 2):
        next_task(learner, task)
        check_step(learner)


def test_the_contrast_weighs_in_the_loss() -> None:
    for coefficient in (0.0, 0.1, 0.3):
        learner = stream(contrast_coeff=coefficient)
        images, labels = next(iter(learner.data.train_batches(0, 0, 6)))
        learner.before_step(0)
        loss, logits = learner.loss(images * 0.0, labels)  # equal rows: each has log(6) to pay
        entropy = F.cross_entropy(logits, labels, reduction="sum")
        assert (loss - entropy).item() == pytest.approx(coefficient * 6 * torch.tensor(6.0).log().item())


def test_the_adapter_goes_on_from_the_last_and_is_merged_after_every_step() -> None:
    learner = stream(adapter_momentum=0.25, momentum=0.0, scheduler="constant", init_lr=0.1, lrate=0.02, batch_size=6,
                     optimizer="sgd")
    optimizer, kept = learner.optimizer(), []
    before = [part.detach().clone() for part in learner.bank.current]
    optimizer.step()
    assert all(map(torch.equal, before, learner.bank.current)), "no step, and nothing to merge with in the first task"
    for task in (1, 2):
        learner.end_task()
        kept.append([part[-1].clone() for part in learner.bank.stacks()])
        learner.begin_task(task)
        assert all(map(torch.equal, learner.bank.current, kept[-1]))
        look_trained(learner)
        optimizer = learner.optimizer()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.002])
        before = [part.detach().clone() for part in learner.bank.current]
        images, labels = next(iter(learner.data.train_batches(task, 0, 6)))
        learner.before_step(0)
        learner.backward(images, labels, None, 6)
        optimizer.step()
        for number, (part, start) in enumerate(zip(learner.bank.current, before, strict=True)):
            stepped = start - 0.02 * (part.grad + 0.01 * start)
            mean = sum(adapter[number] for adapter in kept) / task
            torch.testing.assert_close(part.detach(), 0.75 * stepped + 0.25 * mean, **CLOSE)


def test_a_batch_in_parts_has_the_gradients_of_the_whole(monkeypatch) -> None:
    """In `grad_accum` parts, and in those of two processes, of which one is played here after the other."""
    learner = stream(adapter_dropout=0.4)
    next_task(learner, 1)
    images, labels = next(iter(learner.data.train_batches(1, 0, 7)))
    images = images * 0.3
    pieces = [images[:4], images[4:]]

    def gradients(parts: int, process: int | None = None) -> tuple[Tensor, list[Tensor]]:
        learner.before_step(0)
        object.__setattr__(learner.config, "grad_accum", parts)
        mine = slice(None) if process is None else slice(4 * process, 4 + 3 * process)
        if process is not None:
            learner._process, learner._drawn = (process, 2), (learner._drawn[0], 4 * process)
        parameters = [*learner.bank.current, *learner.head.trainable()]
        for parameter in parameters:
            parameter.grad = None
        loss, _, _ = learner.backward(images[mine], labels[mine], None, 7)
        return loss, [parameter.grad.clone() for parameter in parameters]

    loss, whole = gradients(1)
    for other, found in (gradients(3),):
        torch.testing.assert_close(other, loss, **CLOSE)
        torch.testing.assert_close(found, whole, **CLOSE)
    learner.before_step(0)
    drawn, features = learner._drawn[0], []
    for number, piece in enumerate(pieces):
        learner._drawn = (drawn, 4 * number)
        features.append(learner.embed_dropping(piece).detach())

    def add_up(batch: Tensor) -> None:  # what the other process has
        empty = (batch == 0).all(1)
        batch[empty] = torch.cat(features)[empty]

    monkeypatch.setattr(distributed, "add_up", add_up)
    first, second = gradients(1, 0), gradients(1, 1)
    torch.testing.assert_close(first[0] + second[0], loss, **CLOSE)
    torch.testing.assert_close([a + b for a, b in zip(first[1], second[1], strict=True)], whole, **CLOSE)


def test_prediction_is_that_of_the_official_code_image_by_image() -> None:
    """Class statistics, alignment, retrieval and ensemble, after every task."""
    learner, vit, adapters = stream(retrieval_rounds=3), fresh(), []
    images = test_images(learner, 24).double()
    prototypes, means, covariances, owner = [], [], [], []
    met: set[int] = set()
    for task in range(3):
        if task:
            learner.begin_task(task)
            look_trained(learner)
        adapters.append([[part.detach() for part in block] for block in leaves(learner.bank.current)])
        W, b = (row.detach().clone() for row in learner.head.rows())
        learner.end_task()
        x, y = task_images(learner, task)
        first, newest = plain_features(vit, x, adapters[0]), plain_features(vit, x, adapters[-1])
        for label in range(SIZES[task]):
            prototypes.append(first[y == label].mean(0))
            means.append(newest[y == label].mean(0))
            covariances.append(torch.cov(newest[y == label].T))
            owner.append(task)
        if task:
            W, b = plain_alignment(learner, [W, b], lambda x, W, b: x @ W.T + b, means, covariances, [0.002, 0.001])
        torch.testing.assert_close(learner.head.weight, W, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(learner.head.bias, b, rtol=1e-5, atol=1e-5)
        tested = [plain_features(vit, images, adapter) for adapter in adapters]
        for image, found in enumerate(learner.predict(images)):
            f = tested[0][image]
            cosines = torch.stack([f @ p / (f.norm() * p.norm()) for p in prototypes])
            adapter = owner[cosines.argmax()]
            for _ in range(3):
                logits, last = W @ tested[adapter][image] + b, adapter
                adapter = owner[logits.argmax()]
                if adapter == last:
                    break
            met.add(last)
            want = logits.softmax(0) + ((task + 1) * cosines).softmax(0)
            torch.testing.assert_close(found.exp(), want, rtol=1e-5, atol=1e-5)
    assert met == {0, 1, 2}, "images of all adapters"
    stored = 3 * 6 * (2 * 128 * 5 + 5 + 128) + 7 * (2 * 128 + 1) + 7 * (128 + 128 * 129 // 2) + 3
    assert sum(tensor.numel() for tensor in learner.stored_tensors()) == stored


def test_images_of_one_adapter_share_a_forward_and_none_meets_one_twice() -> None:
    learner = stream(align_epochs=0)
    for task in (1, 2):
        next_task(learner, task)
    learner.end_task()
    images = test_images(learner, 20).double()
    expected, seen = learner.predict(images), []
    learner.backbone.register_forward_pre_hook(lambda _, arguments: seen.append((learner.bank.chosen.down[0, 0, 0].item(),
                                                                                  arguments[0])))
    assert torch.equal(learner.predict(images), expected)
    assert len(seen[0][1]) == 20 and 1 < len(seen) <= 1 + 2 * 4
    pairs = [(adapter, image.sum().item()) for adapter, batch in seen for image in batch]
    assert len(set(pairs)) == len(pairs) < 60
    learner.network.grouped = False
    torch.testing.assert_close(learner.predict(images), expected, **CLOSE)


def test_without_alignment_the_rows_stay_as_they_were_trained() -> None:
    learner = stream(align_epochs=0)
    next_task(learner, 1)
    rows = learner.head.new_weight.detach().clone()
    learner.end_task()
    assert torch.equal(learner.head.weight, rows)
    assert 0.01 < rows[3:].std() < 0.03 and learner.head.bias.abs().max() == 0


@pytest.mark.parametrize("changes, word", [
    ({"adapter_momentum": 1.0}, "'adapter_momentum' is 1.0"), ({"retrieval_rounds": 0}, "'retrieval_rounds' is 0"),
    ({"contrast_coeff": -0.1}, "'contrast_coeff' is -0.1"), ({"align_lr": 0}, "'align_lr' is 0"),
    ({"head_lr_scale": 0}, "'head_lr_scale' is 0"), ({"align_samples": 0}, "'align_samples' is 0"),
    ({"head": "ridge"}, "'head'")])
def test_bad_values_are_one_sentence(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        small_config(model_name="mos", **changes)


@pytest.mark.parametrize("name, epochs, rate, decay, batch",
                         [("mos_c100", 20, 0.03, 5e-4, 48), ("mos_inr", 10, 0.05, 5e-3, 16)])
def test_configs_follow_the_published_protocol(name: str, epochs: int, rate: float, decay: float, batch: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.init_epoch, config.epochs, config.batch_size) == (epochs, epochs, batch)
    assert (config.init_lr, config.lrate, config.weight_decay, config.head_lr_scale) == (rate, rate, decay, 0.1)
    assert (config.optimizer, config.momentum, config.scheduler, config.min_lr) == ("sgd", 0.9, "cosine", 0)
    assert (config.bottleneck, config.adapter_scale, config.adapter_dropout) == (16, 0.1, 0.1)
    assert (config.adapter_momentum, config.contrast_coeff, config.retrieval_rounds) == (0.1, 0.1, 4)
    assert (config.align_epochs, config.align_samples, config.align_lr) == (30, 5 * batch, 0.005)
