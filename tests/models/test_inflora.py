"""models/inflora.py and backbone/kv_lora.py against the paper and its code on plain tensors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.inflora import InfLoRA, directions, grown
from models.optimisation import quarter
from tests.helpers import ROOT, learner_of, small_config, test_images, with_images_in_float64
from tests.models.plain_adapters import fresh, lora_features
from utils.config import load_config
from utils.errors import UserError
from utils.rng import generator

NOTHING = [(torch.zeros(128, 128).double(),) * 2] * 6


def begun(**changes) -> InfLoRA:
    changes = {"rank": 3, "nb_tasks": 2, "head": "linear", **changes}
    learner = with_images_in_float64(learner_of(small_config(model_name="inflora", **changes)))
    learner.begin_task(0)
    return learner


@torch.no_grad()
def look_trained(learner: InfLoRA) -> None:
    draw = generator(learner.task, "B")
    for part in learner.bank.new_B:
        part += torch.randn(part.shape, generator=draw) * 0.2


def plain_features(vit: nn.Module, images: Tensor, deltas: list[tuple[Tensor, Tensor]], inputs: list | None = None) -> Tensor:
    """Class-token features with the (K, V) of every block added to its projections."""
    return lora_features(vit, images, [(None, *added) for added in deltas], inputs)


def test_loss_gradients_and_prediction_of_two_tasks() -> None:
    learner, vit, old = begun(), fresh(), NOTHING
    heads, tested = [], test_images(learner, 5).double()
    for task in range(2):
        look_trained(learner)
        images, labels = next(iter(learner.data.train_batches(task, 0, 6)))
        learner.backward(images, labels, None, 6)
        head, bank = learner.head, learner.bank
        assert head.new_bias.abs().max() <= 128**-0.5 and head.new_bias.abs().max() > 0
        B = [part.detach().clone().requires_grad_() for part in bank.new_B]
        deltas = [(K + b[:128] @ A, V + b[128:] @ A) for (K, V), b, A in zip(old, B, bank.new_A, strict=True)]
        rows = [row.detach().clone().requires_grad_() for row in (head.new_weight, head.new_bias)]
        F.cross_entropy(plain_features(vit, images, deltas) @ rows[0].T + rows[1], labels - 2 * task).backward()
        for part, plain in zip([*bank.new_B, head.new_weight, head.new_bias], [*B, *rows], strict=True):
            torch.testing.assert_close(part.grad, plain.grad, rtol=1e-8, atol=1e-11)
            assert part.grad.abs().max() > 1e-7
        old = [(K.detach(), V.detach()) for K, V in deltas]
        heads.append([row.detach() for row in rows])
        with torch.no_grad():
            features = plain_features(vit, tested, old)
        want = torch.cat([features @ W.T + b for W, b in heads], 1)
        torch.testing.assert_close(learner.predict(tested), want, rtol=1e-8, atol=1e-9)
        learner.end_task()
        torch.testing.assert_close(learner.predict(tested), want, rtol=1e-8, atol=1e-9)
        if task == 0:
            learner.begin_task(1)


def test_directions_are_those_of_the_inputs_and_leave_old_ones_alone() -> None:
    learner, inputs = begun(memory_energy=0.9, memory_energy_end=0.9), []
    images = torch.cat([x for x, _ in learner.data.train_batches(0, learner.epochs(), 32)])
    with torch.no_grad():
        plain_features(fresh(), images, NOTHING, inputs)
    for A, x in zip(learner.bank.new_A, inputs, strict=True):
        x = x.flatten(0, 1)
        leading = torch.linalg.eigh(x.T @ x)[1][:, -3:]
        torch.testing.assert_close(3 * A.T @ A, leading @ leading.T, rtol=1e-6, atol=1e-6)
    learner.end_task()
    learner.begin_task(1)
    for A, basis, kept in zip(learner.bank.new_A, learner.memory.bases, learner.memory.kept, strict=True):
        assert not kept and (A @ basis).abs().max() < 1e-6, "a step of task 1 moves nothing that lies in the memory"
        torch.testing.assert_close(3 * A @ A.T, torch.eye(3).to(A), rtol=1e-6, atol=1e-6)


def published(basis: np.ndarray | None, kept: bool, moments: np.ndarray, share: float) -> tuple[np.ndarray, bool]:
    """DualGPM with the loops of the official code, in numpy."""
    width = len(moments)
    if basis is None:
        U, S, _ = np.linalg.svd(moments)
        r = np.sum(np.cumsum(S**2 / (S**2).sum()) < share)
        basis = U[:, :max(r, 1)]
    else:
        total = (np.linalg.svd(moments)[1] ** 2).sum()
        inside = basis @ basis.T @ moments
        U, S, _ = np.linalg.svd(inside if kept else moments - inside)
        ratio, reached, r = S**2 / total, (S**2).sum() / total, 0
        if kept:
            while r < width and reached >= 1 - share:
                reached, r = reached - ratio[r], r + 1
            if r:
                left = basis - U[:, :r] @ U[:, :r].T @ basis
                basis = np.linalg.svd(left)[0][:, :basis.shape[1] - r]
        else:
            reached = 1 - reached
            while r < width and reached < share:
                reached, r = reached + ratio[r], r + 1
            basis = np.hstack([basis, U[:, :r]])[:, :width]
    if not kept and basis.shape[1] > width / 2:
        return np.linalg.svd(basis)[0][:, basis.shape[1]:], True
    return basis, kept


def test_the_memory_grows_and_turns_as_dual_gradient_projection_memory_does() -> None:
    draw, ours, theirs, seen = generator(0, "moments"), (None, False), (None, False), []
    for task in range(12):
        x = torch.randn(9, 3, generator=draw).double() @ torch.randn(3, 30, generator=draw).double()
        x = x + 0.1 * torch.randn(9, 30, generator=draw).double()
        moments = x @ x.T
        ours = grown(*ours, moments, 0.9 + 0.005 * task)
        theirs = published(*theirs, moments.numpy(), 0.9 + 0.005 * task)
        assert ours[1] == theirs[1] and ours[0].shape == theirs[0].shape
        torch.testing.assert_close(ours[0] @ ours[0].T, torch.from_numpy(theirs[0] @ theirs[0].T), rtol=1e-7, atol=1e-7)
        seen.append((ours[1], ours[0].shape[1]))
    assert {kept for kept, _ in seen} == {False, True} and len({count for kept, count in seen if kept}) > 1


def test_where_nothing_is_left_to_learn_in_a_has_rows_of_zero() -> None:
    x = torch.randn(6, 2, generator=generator(0, "x")).double()
    moments = x @ x.T
    rows = directions(moments, 4, moments.norm())
    assert rows[:2].norm(dim=1).tolist() == pytest.approx([3**-0.5] * 2) and rows[2:].abs().max() == 0
    basis, kept = grown(None, False, torch.eye(4).double(), 1.0)
    assert kept and basis.shape[1] < 4


def test_the_share_of_energy_rises_from_the_first_value_towards_the_end_of_the_stream(monkeypatch) -> None:
    shares, learner = [], begun(nb_tasks=4, memory_energy=0.5, memory_energy_end=0.9)
    monkeypatch.setattr("models.inflora.grown",
                        lambda basis, kept, moments, share: (shares.append(share), moments[:, :1], kept)[1:])
    for task in range(1, 4):
        learner.end_task()
        learner.begin_task(task)
    learner.end_task()
    assert shares == pytest.approx([share for share in (0.5, 0.6, 0.7, 0.8) for _ in learner.bank.layers])


def test_the_learning_rate_is_a_quarter_of_a_cosine() -> None:
    assert [quarter(5, epoch) for epoch in (0, 4)] == [1, pytest.approx(math.cos(0.495 * math.pi))]
    assert quarter(1, 0) == 1
    assert quarter(5, 6) == quarter(5, 4), "rows that are fitted for longer are not trained uphill"
    learner = learner_of(small_config(model_name="inflora", epochs=3))
    assert learner.phases(1)[0].rate(2) == pytest.approx(0.0157, abs=1e-3) and learner.phases(1)[0].rate(0) == 1


@pytest.mark.parametrize("changes, word", [({"rank": 129}, "^rank: 129 is above the width 128"), ({"rank": 0}, "'rank'"),
                                           ({"memory_energy": 0}, "'memory_energy'"),
                                           ({"memory_energy_end": 1.1}, "'memory_energy_end'"),
                                           ({"memory_energy_end": 0.9}, "'memory_energy' is 0.95, above 'memory_energy_end'")])
def test_bad_values_are_one_sentence(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        begun(**changes)


@pytest.mark.parametrize("name, epochs, energy", [("inflora_c100", 20, 0.95), ("inflora_inr", 50, 0.98)])
def test_configs_follow_the_published_protocol(name: str, epochs: int, energy: float) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.init_epoch, config.epochs, config.batch_size, config.shuffle) == (epochs, epochs, 128, False)
    assert (config.optimizer, config.init_lr, config.lrate, config.weight_decay) == ("adam", 5e-4, 5e-4, 0)
    assert (config.rank, config.scheduler, config.memory_energy, config.memory_energy_end) == (10, "quarter", energy, 1)
