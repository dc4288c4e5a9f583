"""models/ranpac.py against algorithm 1 of the paper on plain tensors."""

import copy
import math

import pytest
import torch

from tests.helpers import ROOT, learn, learner_of, resumed, small_config, test_images
from tests.models.plain_adapters import begun, check_training_step, fresh, leaves, plain_features, task_images
from utils.config import load_config
from utils.errors import UserError


def test_loss_and_gradients_of_the_first_task() -> None:
    learner = begun("ranpac", ridge_dim=40)
    check_training_step(learner)
    assert learner.trainable_parameters() == 6 * (2 * 128 * 5 + 5 + 128) + 2 * 128 + 1


@pytest.mark.parametrize("choice", ["auto", "pooled"])
def test_prediction_is_algorithm_1_with_its_choice_of_lambda_or_that_of_all_tasks(choice: str) -> None:
    learner = begun("ranpac", ridge_dim=40, ridge_lambda=choice)
    adapter = leaves(learner.bank.current)
    W = learner.head.projection.clone()
    assert W.std().item() == pytest.approx(1, abs=0.05)
    G, Q, vit, seen = torch.zeros(40, 40).double(), torch.zeros(40, 0).double(), fresh(), []
    images = test_images(learner, 7).double()
    for task in range(2):
        learner.end_task()
        x, y = task_images(learner, task)
        with torch.no_grad():
            H, Y = torch.relu(plain_features(vit, x, adapter) @ W), torch.eye(2).double()[y]
            tested = torch.relu(plain_features(vit, images, adapter) @ W)
        seen.append((H, torch.eye(4).double()[2 * task + y], (torch.arange(len(H)) + 1) % 5 == 0))
        X, targets, out = seen[-1] if choice == "auto" else (torch.cat(parts) for parts in zip(*seen))
        errors = []
        for exponent in range(-8, 9):
            fit = torch.linalg.solve(X[~out].T @ X[~out] + 10.0**exponent * torch.eye(40).double(), X[~out].T @ targets[~out])
            errors.append(((X[out] @ fit - targets[out]) ** 2).sum().item())
        penalty = 10.0 ** (errors.index(min(errors)) - 8)
        G, Q = G + H.T @ H, torch.cat([Q, H.T @ Y], 1)
        want = tested @ torch.linalg.solve(G + penalty * torch.eye(40).double(), Q)
        assert math.isfinite(want.abs().max()) and want.shape == (7, 2 * task + 2)
        torch.testing.assert_close(learner.predict(images), want, rtol=1e-6, atol=1e-6)
        learner.begin_task(task + 1)
        learner.train()
        assert learner.trainable_parameters() == learner.steps_in(task + 1) == 0


def test_later_tasks_change_neither_adapter_nor_old_sums() -> None:
    config = small_config(model_name="ranpac", ridge_dim=16, bottleneck=4, nb_tasks=2, batch_size=96)
    learner = learn(learner_of(config), range(1))
    before = copy.deepcopy(learner.bank.snapshot()["stored"])
    cross = learner.head.cross.clone()
    again = resumed(learner)
    for each in (learner, again):
        each.begin_task(1)
        each.train()
        each.end_task()
    assert all(torch.equal(a, b) for a, b in zip(before, learner.bank.snapshot()["stored"], strict=True))
    assert torch.equal(learner.head.cross[:, :2], cross) and torch.equal(learner.head.readout, again.head.readout)
    numbers = 6 * (2 * 128 * 4 + 4 + 128) + 128 * 16 + 2 * 16 * 4  # adapter; W; cross and readout of 4 classes
    assert sum(tensor.numel() for tensor in learner.stored_tensors()) == numbers + 16 * 16


def test_a_penalty_too_small_for_the_rounding_is_left_out_and_refused_when_it_is_asked_for() -> None:
    for choice in ("auto", 1e-300):
        learner = begun("ranpac", ridge_dim=100, ridge_lambda=choice)  # 40 images for 100 features: their sums are singular
        if choice == "auto":
            learner.end_task()
            assert learner.head.readout.isfinite().all()
        else:
            with pytest.raises(UserError, match="^ridge_lambda: 1e-300 is too small"):
                learner.end_task()


@pytest.mark.parametrize("changes, word", [({"ridge_dim": 0}, "'ridge_dim'"), ({"ridge_lambda": 0}, "'ridge_lambda'"),
                                           ({"head": "ridge"}, "'head'"), ({"epochs": 3}, "'epochs'"),
                                           ({"row_views": 3}, "'row_views'"), ({"bottleneck": 0}, "'bottleneck'"),
                                           ({"adapter_dropout": 1.0}, "'adapter_dropout'")])
def test_bad_values_are_one_sentence(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        small_config(model_name="ranpac", **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, epochs, rate, decay, batch", [("ranpac_c100", 20, 0.01, 5e-4, 48),
                                                              ("ranpac_inr", 10, 0.05, 5e-3, 16)])
def test_configs_follow_the_published_protocol(name: str, epochs: int, rate: float, decay: float, batch: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.init_epoch, config.init_lr, config.weight_decay, config.batch_size) == (epochs, rate, decay, batch)
    assert (config.optimizer, config.momentum, config.scheduler, config.min_lr) == ("sgd", 0.9, "cosine", 0)
    assert (config.ridge_dim, config.ridge_lambda) == (10_000, "auto")
    assert (config.bottleneck, config.adapter_scale, config.adapter_dropout) == (64, 0.1, 0.1)
