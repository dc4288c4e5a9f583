"""models/recipes/evidence.py: what it decides and when, the invariants of whole tasks under it, and what it leaves on disk.

The stream: digits light on dark (task 0), as they are (task 1), and light on dark again (task 2). The right answer is keep,
keep, drop.
"""

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

import trainer
from backbone.gates import EqualGate
from models import load_network
from models.base import BaseLearner
from tests.helpers import (
    LONG,
    PRETRAINED,
    Interrupted,
    Watch,
    in_float64,
    learn,
    learner_of,
    logits,
    resumed,
    same,
    test_images,
    tiny_config,
)
from tests.tiny_backbone import BLOCKS, WIDTH
from utils.errors import UserError
from utils.results.metrics import TaskCounts, count_predictions, kept_set
from utils.runs.progress import LOGGER

STREAM = {"gate": "evidence", "growth_threshold": 0.5, "init_cls": 4, "increment": 3, "batch_size": 64,
          "task_domains": ["negative", "plain", "negative"], "head_lr": 0.02, "refit_lr": 0.02, "eval_every": 0}
KEPT = [True, True, False]
FACTORS = BLOCKS * 2 * 2 * 4 * WIDTH  # of an adapter of rank 4


def config_of(folder: Path | str = "./unused/", **changes):
    return tiny_config(folder, **{**STREAM, **changes})


@pytest.fixture(scope="module")
def whole() -> tuple[BaseLearner, list[dict]]:
    """A learner that has been through the stream undisturbed, and its state before each of the tasks."""
    learner = learner_of(config_of())
    states = []
    for task in range(3):
        states.append(copy.deepcopy(learner.state()) if task else {})
        learn(learner, range(task, task + 1))
    return learner, states


@pytest.fixture
def before(whole: tuple[BaseLearner, list[dict]]) -> Callable[[int], BaseLearner]:
    """A learner of its own that stands before a task (1 or 2)."""

    def load(task: int) -> BaseLearner:
        learner = learner_of(config_of())
        learner.load_state(copy.deepcopy(whole[1][task]))
        return learner

    return load


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> trainer.Run:
    """The same stream as a run, finished."""
    folder = tmp_path_factory.mktemp("evidence") / "run"
    LOGGER.setLevel(logging.INFO)
    finished = trainer.Run(config_of(folder), 1993, folder, torch.device("cpu"))
    finished.finish()
    return finished


# ---- the decision


def decided(monkeypatch: pytest.MonkeyPatch, shifts: dict[int, float], **changes) -> Tensor:
    """The gate weights that a decision reads when the new images are so far from those of older adapters."""
    learner = learner_of(config_of(growth_rule="none", nb_tasks=3, **changes))
    statistics = torch.zeros(3, 18 * WIDTH, dtype=torch.float64)
    monkeypatch.setattr(type(learner.recipe), "_class_statistics", lambda recipe: statistics)
    for task in range(len(shifts) + 1):
        monkeypatch.setattr(learner.recipe.keys, "shifts", lambda new, task=task: {t: shifts[t] for t in range(task)})
        learner.begin_task(task)
        if task < len(shifts):
            learner.bank.commit()
            learner.head.commit()
    return learner.decision_beta


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_one_old_adapter_weighs_what_the_logarithms_say(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for shift in (1e-30, 2.9, 3.0, 3.1, 1e30):
        newcomer = min(max(0.5 + (math.log(shift) - math.log(3.0)) / (2 * tau), 0), 1)
        beta = decided(monkeypatch, {0: shift}, gumbel_tau_final=tau)
        assert beta.tolist() == pytest.approx([1 - newcomer, newcomer], abs=1e-5)


def test_several_old_adapters_share_by_sparsemax_of_minus_the_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projection onto the simplex by its threshold, found by a root search."""
    for shifts in ({0: 2.0, 1: 2.5}, {0: 0.0, 1: 7.0}, {0: 1.0, 1: 90.0}):
        z = -np.log(np.maximum([*shifts.values(), 3.0], np.finfo(np.float32).tiny)) / 0.5
        threshold = brentq(lambda t, z=z: np.maximum(z - t, 0).sum() - 1, z.min() - 1, z.max(), xtol=1e-14)
        assert np.allclose(decided(monkeypatch, shifts), np.maximum(z - threshold, 0), atol=1e-6)


def test_what_is_in_use_enters_whole_however_many_there_are() -> None:
    gate = EqualGate()
    for count in range(1, 60):
        gate.replace(torch.arange(float(count)))
        assert torch.allclose(gate.scale * gate(), torch.ones(count)) and gate().sum().item() == pytest.approx(1)
        assert not gate.logits.requires_grad and not gate().requires_grad


def decisions(learner: BaseLearner) -> tuple[list[bool], list[Tensor]]:
    kept, weights = [], []
    for task in range(3):
        learner.begin_task(task)
        kept.append(learner.bank.current == task)
        weights.append(learner.decision_beta.clone())
        learner.train()
        learner.end_task()
    return kept, weights


def test_it_keeps_where_a_domain_is_new_and_drops_where_it_returns(whole: tuple) -> None:
    learner, _ = whole
    assert learner.bank.tasks == [0, 1] and learner.pruning_mask().tolist() == [1, 1, 0] and learner.pruned == {2}
    assert learner.decision_beta.tolist() == [1.0, 0.0, 0.0], "task 2 is what task 0 was"
    assert {task: key.classes for task, key in learner.recipe.keys.of.items()} == {0: 4 + 3, 1: 3}
    numbers = learner.recipe.numbers()
    assert sorted(numbers) == ["price", "shift_0", "shift_1"] and numbers["shift_0"] < numbers["price"] < numbers["shift_1"]


@pytest.mark.slow
def test_the_decision_does_not_follow_how_one_trains(whole: tuple) -> None:
    other = {"init_epoch": 2, "epochs": 2, "batch_size": 100, "init_lr": 0.05, "lrate": 0.002, "head_lr": 0.1, "refit_lr": 0.1,
             "optimizer": "adam", "rank": 2}
    learner = learner_of(config_of(**other))
    kept, weights = decisions(learner)
    assert kept == KEPT and torch.allclose(weights[-1], whole[0].decision_beta, atol=1e-5)
    assert [key.classes for key in learner.recipe.keys.of.values()] == [7, 3]
    for mine, theirs in zip(learner.recipe.keys.tensors(), whole[0].recipe.keys.tensors(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6), "what is remembered is the frozen network's"


def test_the_price_decides_and_the_first_task_is_always_kept() -> None:
    for price, kept in ((1e6, [0]), (1e-6, [0, 1, 2])):
        learner = learner_of(config_of(gate_price=price))
        for task in range(3):
            learner.begin_task(task)
            if learner.bank.current is not None:
                learner.bank.commit()
            learner.head.commit()
        assert learner.bank.tasks == kept


# ---- life of a task


@pytest.mark.parametrize("task", [1, 2])
def test_i1_begin_changes_no_output(task: int, before: Callable[[int], BaseLearner]) -> None:
    learner = before(task)
    in_float64(learner)
    early = learner.backbone.early_tokens
    learner.backbone.early_tokens = lambda images: early(images.double())
    old = logits(learner)
    learner.begin_task(task)
    assert (learner.bank.current == task) is KEPT[task]
    assert (logits(learner)[:, :old.shape[1]] - old).abs().max() < 1e-10
    learner.before_step(0)
    assert (learner.predict(test_images(learner).double())[:, :old.shape[1]] - old).abs().max() < 1e-10


def test_i2_commit_changes_no_output(before: Callable[[int], BaseLearner]) -> None:
    learner = before(1)
    learn(learner, range(1, 2), end_last=False)
    in_float64(learner)
    old = logits(learner)
    assert (learner.bank.new_B != 0).any()
    learner.bank.commit()
    assert learner.bank.alpha[-1].min() > 0 and (logits(learner) - old).abs().max() < 1e-10


def test_the_rows_of_a_kept_task_are_fitted_anew_and_no_others(before: Callable[[int], BaseLearner]) -> None:
    learner = before(1)
    learn(learner, range(1, 2), end_last=False)
    old, rows = logits(learner), learner.head.new_weight.detach().clone()
    learner.end_task()
    new = logits(learner)
    assert torch.allclose(new[:, :4], old[:, :4], atol=1e-5) and not torch.allclose(new[:, 4:], old[:, 4:], atol=1e-2)
    assert not torch.allclose(learner.head.weight[4:], rows, atol=1e-3)


def test_i5_a_task_without_adapter_fits_its_rows_and_trains_nothing(before: Callable[[int], BaseLearner]) -> None:
    learner = before(2)
    bank, features = learner.bank.snapshot(), learner.embed(test_images(learner))
    learner.begin_task(2)
    assert learner.bank.new_A is None and learner.bank.tasks == [0, 1]
    assert not learner.head.new_weight.any() and not learner.head.new_bias.any(), "rows of a fixed network start alike"
    assert learner.trainable_parameters() == 3 * (WIDTH + 1)
    learner.train()
    assert learner.steps_done() == 0
    report = learner.end_task()
    assert not report.kept and report.active_adapters == 2 and report.pruning_mask == [1, 1, 0]
    assert learner.head.weight[7:].any()
    after = learner.bank.snapshot()
    for name in ("A", "B", "alpha", "scale", "absorbed"):
        assert torch.equal(bank[name], after[name]), name
    assert torch.equal(learner.embed(test_images(learner)), features), "what the network sees is what it saw"


def test_magnitudes_and_logits_of_an_adapter_in_use_are_not_trained(before: Callable[[int], BaseLearner]) -> None:
    learner = before(1)
    alpha = learner.bank.alpha.clone()
    learner.begin_task(1)
    weights = learner.gate.logits.clone()
    assert learner.trainable_parameters() == FACTORS + 3 * (WIDTH + 1)
    learner.train()
    assert torch.equal(learner.bank.alpha[:1], alpha) and torch.equal(learner.gate.logits, weights)


@pytest.mark.slow
def test_i8_evaluating_changes_no_result(whole: tuple) -> None:
    session = Watch()
    learner = learn(learner_of(config_of(eval_every=1), session), range(3))
    assert session.evaluated == [4, 7] and same(learner, whole[0])


@pytest.mark.slow
def test_i9_an_interrupted_learner_ends_with_the_same_tensors(whole: tuple) -> None:
    learner = learner_of(config_of())
    for task in range(3):  # tasks 0 and 1 with an adapter, task 2 without
        learner.begin_task(task)
        learner.session = Watch(stop_at=3)
        if KEPT[task]:  # within its steps, else within the fit of its rows
            with pytest.raises(Interrupted):
                learner.train()
            assert learner.steps_done() == 3
        else:
            with pytest.raises(Interrupted):
                learner.end_task()
        learner = resumed(learner)
        assert (learner.bank.current == task) is KEPT[task]
        learner.train()
        learner = resumed(learner)
        learner.end_task()
        learner = resumed(learner)
    assert same(learner, whole[0]) and learner.recipe.numbers() == whole[0].recipe.numbers()


# ---- what is left behind


def test_artifacts_are_those_of_the_contract(run: trainer.Run) -> None:
    for task in range(3):
        record = torch.load(run.folder / f"beta_values_task_{task}.pt")
        active = [t for t in range(task + 1) if record["pruning_mask"][t]]
        assert active == [t for t in range(task + 1) if KEPT[t]] and record["kept"] == KEPT[task]
        assert record["beta_values"].sum().item() == pytest.approx(1) == record["beta_after"].sum().item()
        assert record["gate_scale"] == len(active)
        for t in range(task + 1):
            whole_weight = record["gate_scale"] * record["beta_after"][t].item()
            assert whole_weight == pytest.approx(1.0 if t in active else 0.0)
            assert torch.isneginf(record["gate_logits"][t]).item() is (t not in active)
            assert record["alphas"][t].abs().sum().item() > 0 or t not in active
        assert (run.folder / f"adapter_task_{task}.safetensors").exists() is KEPT[task]
        assert (record["threshold"], record["tau"], record["growth_rule"]) == (0.5, 0.5, "threshold")


def test_i3_the_network_evaluated_is_the_network_saved(run: trainer.Run) -> None:
    images = next(iter(run.data.eval_batches("test", range(10), 64)))[0]
    run.learner.start_evaluation()
    assert torch.equal(load_network(run.folder, 2)(images), run.learner.predict(images))
    network, counts = load_network(run.folder, 1), TaskCounts.zeros(2)
    for images, labels in run.data.eval_batches("test", range(7), 64):
        counts += count_predictions(network(images), labels, run.data.task_of_class, 2)
    assert counts == TaskCounts(**run.records[1]["counts"])


def test_the_run_is_that_of_the_learner(run: trainer.Run, whole: tuple) -> None:
    assert same(run.learner, whole[0])


def test_results_say_how_right_the_kept_set_is(run: trainer.Run) -> None:
    result = json.loads((run.folder / "results.json").read_text())
    found = result["metrics"]["kept_set"]
    assert found == kept_set(KEPT, KEPT, [task["beta"] for task in result["tasks"]])
    assert (found["truth"], found["kept"]) == (KEPT, KEPT)
    assert found["precision"] == found["recall"] == found["f1"] == found["auc"] == 1.0
    assert [task["kept"] for task in result["tasks"]] == KEPT
    assert [task["trainable_parameters"] for task in result["tasks"]] == [
        FACTORS + 4 * (WIDTH + 1), FACTORS + 3 * (WIDTH + 1), 3 * (WIDTH + 1)]
    assert json.loads((run.folder / "split.json").read_text())["task_domains"] == STREAM["task_domains"]


def test_log_lines_say_what_was_decided(run: trainer.Run) -> None:
    text = (run.folder / "train.log").read_text()
    assert text.count("[Gumbel CL-LoRA] gate=evidence, tau_final=0.5, price=3.0\n") == 1
    for line in ("Task 2 - Beta values: [1.00 0.00 0.00]", "Current task beta: 0.0000, threshold: 0.5000",
                 "✓ Keeping adapter for task 1 (beta=1.0000 > 0.5000)",
                 "✗ Pruning adapter for task 2 (beta=0.0000 <= 0.5000)", "Active adapters: 2/3 (66.7%)"):
        assert f"[Conditional Growth] {line}\n" in text
    assert "tau=" not in text and "sparse=" not in text


# ---- with other parts, and what is refused


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"head": "cosine"}, {"head": "ridge", "ridge_dim": 48},
                                     {"head": "aligned", "align_epochs": 1, "align_samples": 16},
                                     {"grad_accum": 3, "optimizer": "adamw", "lrate": 0.002, "init_lr": 0.002},
                                     *([{"precision": "bf16"}] if LONG else [])],  # half a minute on a processor without it
                         ids=lambda changes: next(iter(changes.values())))
def test_it_works_with_every_head_and_precision(changes: dict) -> None:
    learner = learner_of(config_of(nb_tasks=2, task_domains=["negative", "negative"], **PRETRAINED, **changes))
    learn(learner, range(2))
    assert learner.bank.tasks == [0] and learner.bank.A.dtype == torch.float32
    right = [(learner.predict(x).argmax(1) == y) for x, y in learner.data.eval_batches("test", range(7), 64)]
    assert torch.cat(right).float().mean() > 2 / 7, "twice as often as by chance"


def test_keys_of_a_trained_gate_are_refused() -> None:
    for key, value in (("gate_lr", 0.1), ("lambda_sparsity", 0.5), ("alpha_lr", 0.1), ("gate_noise", 0.0),
                       ("refit_epochs", 1), ("alpha_scope", "task")):
        with pytest.raises(UserError, match=f"'{key}' is "):
            config_of(**{key: value})
    for gate in ("sparsemax", "none"):
        with pytest.raises(UserError, match=f"'gate_price' is 2.0, but it has no effect for gate \"{gate}\""):
            tiny_config(gate=gate, gate_price=2.0)
