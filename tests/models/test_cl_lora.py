"""models/cl_lora.py and backbone/dual_lora.py against the paper and its code on plain tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cl_lora import CLLoRA
from tests.helpers import ROOT, learner_of, small_config, test_images, with_images_in_float64
from tests.models.plain_adapters import fresh, lora_features, task_images
from utils.config import load_config
from utils.errors import UserError
from utils.rng import generator

SHARED, DEPTH, RANK = 3, 6, 3
CLOSE = {"rtol": 1e-8, "atol": 1e-11}
Parts = dict[str, Tensor]


def begun(**changes) -> CLLoRA:
    """A learner in float64 that has begun task 0, its adapters as if trained."""
    changes = {"rank": RANK, "nb_tasks": 3, "init_lr": 0.1, "lrate": 0.1, "weight_decay": 0.02, **changes}
    learner = with_images_in_float64(learner_of(small_config(model_name="cl_lora", **changes)))
    learner.begin_task(0)
    look_trained(learner)
    return learner


@torch.no_grad()
def look_trained(learner: CLLoRA) -> None:
    draw, bank = generator(learner.task, "trained"), learner.bank
    for part in (bank.shared_A, bank.new_A, bank.new_B, bank.new_mu):
        part += torch.randn(part.shape, generator=draw) * 0.3


def parts_of(learner: CLLoRA) -> Parts:
    """What a task trains, as tensors of its own."""
    bank, head = learner.bank, learner.head
    trained = {"shared_A": bank.shared_A, "A": bank.new_A, "B": bank.new_B, "mu": bank.new_mu, "rows": head.new_weight,
               "scale": head.scale}
    return {name: part.detach().clone().requires_grad_() for name, part in trained.items()}


def gradients(learner: CLLoRA) -> Parts:
    bank, head = learner.bank, learner.head
    return {"shared_A": bank.shared_A.grad, "A": bank.new_A.grad, "B": bank.new_B.grad, "mu": bank.new_mu.grad,
            "rows": head.new_weight.grad, "scale": head.scale.grad}


def shared_deltas(A: Tensor, B: Tensor) -> list[tuple]:
    return [(A[block, 0] @ B[block, 0], None, A[block, 1] @ B[block, 1]) for block in range(SHARED)]


def own_deltas(A: Tensor, B: Tensor, mu: Tensor) -> list[tuple]:
    return [(mu[block, 0] * A[block, 0] @ B[block, 0], None, mu[block, 1] * A[block, 1] @ B[block, 1])
            for block in range(DEPTH - SHARED)]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def row_logits(features: Tensor, parts: Parts) -> Tensor:
    return torch.stack([torch.stack([parts["scale"] * cosine(f, w) for w in parts["rows"]]) for f in features])


def task_loss(vit: nn.Module, images: Tensor, targets: Tensor, parts: Parts, shared_B: Tensor, old_mu: list[Tensor]) -> Tensor:
    deltas = shared_deltas(parts["shared_A"], shared_B) + own_deltas(parts["A"], parts["B"], parts["mu"])
    loss = F.cross_entropy(row_logits(lora_features(vit, images, deltas), parts), targets)
    if old_mu:
        loss = loss + 1e-4 * sum(cosine(parts["mu"].flatten(), mu.flatten()).abs() for mu in old_mu) / len(old_mu)
    return loss


def plain_step(parts: Parts, rate: float, decay: float) -> None:
    """A first step of SGD, on what has a gradient."""
    with torch.no_grad():
        for part in parts.values():
            if part.grad is not None:
                part -= rate * (part.grad + decay * part)
                part.grad = None


def distilled(vit: nn.Module, images: Tensor, parts: Parts, before: Tensor, shared_B: Tensor) -> Tensor:
    """The distillation loss with lambda 5 and T 2; leaves its gradients, those of the shared A reassigned row by row."""
    new = row_logits(lora_features(vit, images, shared_deltas(parts["shared_A"], shared_B)), parts) / 2
    old = row_logits(lora_features(vit, images, shared_deltas(before, shared_B)), parts) / 2
    loss = -5 * (old.softmax(1) * new.log_softmax(1)).sum() / len(images)
    loss.backward()
    for block in range(SHARED):
        for p in range(2):
            norms = torch.stack([row.norm() for row in before[block, p]])
            for row, norm in enumerate(norms):
                parts["shared_A"].grad[block, p, row] *= len(norms) * norm / norms.sum()
    return loss.detach()


def test_loss_and_gradients_of_every_task() -> None:
    learner, vit, old_mu = begun(), fresh(), []
    for task in range(3):
        if task:
            learner.begin_task(task)
            before = learner.bank.shared_A.detach().clone()
            look_trained(learner)
        images, labels = next(iter(learner.data.train_batches(task, 0, 6)))
        targets, shared_B, parts = labels - 2 * task, learner.bank.shared_B, parts_of(learner)
        learner._optimizer = learner.optimizer()
        if task:
            with torch.no_grad():
                found = learner.distillation(images) / 6
            torch.testing.assert_close(found, distilled(vit, images, parts, before, shared_B), **CLOSE)
            assert parts["A"].grad is None and parts["shared_A"].grad.abs().max() > 1e-4
            plain_step(parts, 0.1, 0.02)
        extra = learner.before_step(0)
        learner.backward(images, labels, extra, 6)
        for name, part in parts_of(learner).items():
            torch.testing.assert_close(part, parts[name], msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
        loss = task_loss(vit, images, targets, parts, shared_B, old_mu)
        loss.backward()
        with torch.no_grad():
            found = learner.loss(images, targets)[0] / 6 + (extra if task else 0)
        torch.testing.assert_close(found, loss.detach(), **CLOSE)
        for name, grad in gradients(learner).items():
            torch.testing.assert_close(grad, parts[name].grad, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
            assert grad.abs().max() > 1e-7
        learner._optimizer.zero_grad()
        old_mu.append(learner.bank.new_mu.detach().clone())
        learner.end_task()


def test_prediction_is_the_nearest_mean_of_a_task_s_own_adapters() -> None:
    learner, vit, own, means = begun(), fresh(), [], []
    images = test_images(learner, 5).double()
    for task in range(3):
        if task:
            learner.begin_task(task)
            look_trained(learner)
        parts, rows = parts_of(learner), learner.head.new_weight.detach()
        shared = shared_deltas(parts["shared_A"].detach(), learner.bank.shared_B)
        own.append(own_deltas(*(parts[name].detach() for name in ("A", "B", "mu"))))
        tested = [lora_features(vit, images, shared + deltas) for deltas in own]
        old = [[cosine(tested[i][image], mean) for i, of_task in enumerate(means) for mean in of_task] for image in range(5)]
        want = [line + [cosine(tested[-1][image], row) for row in rows] for image, line in enumerate(old)]
        torch.testing.assert_close(learner.predict(images), torch.tensor(want), **CLOSE)
        learner.end_task()
        x, y = task_images(learner, task)
        features = lora_features(vit, x, shared + own[-1])
        means.append([features[y == label].mean(0) for label in range(2)])
        want = [line + [cosine(tested[-1][image], mean) for mean in means[-1]] for image, line in enumerate(old)]
        torch.testing.assert_close(learner.predict(images), torch.tensor(want), **CLOSE)
    shared, adapter = 2 * SHARED * 2 * 128 * RANK, 2 * (DEPTH - SHARED) * (2 * 128 * RANK + 1)
    assert sum(tensor.numel() for tensor in learner.stored_tensors()) == shared + 3 * adapter + 6 * 128


def test_adapters_start_as_the_official_code_has_them() -> None:
    learner = learner_of(small_config(model_name="cl_lora", rank=RANK))
    learner.begin_task(0)
    bank, images = learner.bank, test_images(learner, 3)
    for B in (bank.shared_B, bank.new_B.detach()):
        torch.testing.assert_close(B @ B.mT, torch.eye(RANK).expand(3, 2, RANK, RANK), rtol=1e-5, atol=1e-5)
        assert (B[0, 0] - B[0, 1]).abs().max() > 1e-3, "every block and projection has its own"
    assert bank.new_mu.min() >= 0.5 and bank.new_mu.max() <= 1.5 and bank.new_mu.std() > 0.1
    torch.testing.assert_close(learner.embed(images), fresh().float()(images), rtol=1e-5, atol=1e-5)
    fixed = bank.shared_B.clone()
    learner.train()
    assert torch.equal(bank.shared_B, fixed) and bank.shared_A.abs().max() > 0
    assert sum(p.numel() for p in learner._trained()) == learner.trainable_parameters()


def test_without_distillation_a_step_is_one() -> None:
    learner = begun(kd_weight=0.0)
    learner.end_task()
    learner.begin_task(1)
    images, labels = next(iter(learner.data.train_batches(1, 0, 6)))
    before = parts_of(learner)
    learner.backward(images, labels, learner.before_step(0), 6)
    assert all(torch.equal(part, before[name]) for name, part in parts_of(learner).items())


def test_a_distillation_that_is_not_finite_is_left_out() -> None:
    learner = begun(nan_policy="skip")
    learner.end_task()
    learner.begin_task(1)
    images, labels = next(iter(learner.data.train_batches(1, 0, 6)))
    before, learner._optimizer = parts_of(learner), learner.optimizer()
    learner.bank.before[0, 0, 0, 0] = torch.nan
    learner.backward(images, labels, learner.before_step(0), 6)
    assert all(torch.equal(part, before[name]) for name, part in parts_of(learner).items()) and learner._skipped == 1


@pytest.mark.parametrize("changes, word", [
    ({"shared_share": 0.05}, "^shared_share: 0.05 of the 6 blocks"), ({"shared_share": 0.95}, "^shared_share: 0.95 of the 6"),
    ({"shared_share": 1.0}, "'shared_share'"), ({"rank": 129}, "^rank: 129 is above the width 128"),
    ({"kd_weight": -1}, "'kd_weight'"), ({"kd_temperature": 0}, "'kd_temperature'"),
    ({"mu_orthogonality": -1}, "'mu_orthogonality'"), ({"ease_alpha": 0.2}, "'ease_alpha'.*no effect for")])
def test_bad_values_are_one_sentence(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        begun(**changes)


@pytest.mark.parametrize("name, rank, epochs, rate, decay, batch", [("cl_lora_c100", 8, 30, 0.03, 1e-4, 64),
                                                                    ("cl_lora_inr", 10, 20, 0.05, 5e-4, 32)])
def test_configs_follow_the_published_protocol(name: str, rank: int, epochs: int, rate: float, decay: float,
                                               batch: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.rank, config.init_epoch, config.epochs, config.batch_size) == (rank, epochs, epochs, batch)
    assert (config.init_lr, config.lrate, config.weight_decay) == (rate, rate, decay)
    assert (config.optimizer, config.momentum, config.scheduler, config.min_lr) == ("sgd", 0.9, "cosine", 0)
    assert (config.shared_share, config.kd_weight, config.kd_temperature, config.mu_orthogonality) == (0.5, 5, 2, 1e-4)
