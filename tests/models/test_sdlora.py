"""models/sdlora.py: a task's life as METHOD.md, section 3, tells it, and the invariants of whole tasks."""

import pytest
import torch

from models.sdlora import rank_of
from tests.helpers import Watch, grown, in_float64, learn, learner_of, logits, randomize, same, test_images, tiny_config

TRAINED = ["gumbel_sparsemax", "sparsemax", "gumbel_softmax"]


@pytest.mark.parametrize("gate", TRAINED)
def test_i1_begin_changes_no_output(gate: str) -> None:
    learner = grown(learner_of(tiny_config(gate=gate, growth_rule="none")), range(2))
    in_float64(learner)
    before, alphas = logits(learner), learner.bank.alpha.detach().clone()
    learner.begin_task(2)
    assert (logits(learner)[:, :4] - before).abs().max() < 1e-10
    assert not torch.allclose(alphas, learner.bank.alpha[:2]), "magnitudes must have answered the newcomer"


@pytest.mark.parametrize("gate", TRAINED)
def test_i2_settling_a_kept_adapter_changes_no_output(gate: str) -> None:
    learner = grown(learner_of(tiny_config(gate=gate, growth_rule="none")), range(1), begin_next=True)
    in_float64(learner)
    randomize(learner)
    learner.gate.set_temperature(0.5)
    before = logits(learner)
    learner.end_task()
    assert learner.bank.tasks == [0, 1] and (logits(learner) - before).abs().max() < 1e-10


def test_settling_a_dropped_adapter_leaves_every_product_of_gate_and_magnitude() -> None:
    learner = grown(learner_of(tiny_config(refit_epochs=0, growth_threshold=1.0)), range(1), begin_next=True)
    products = learner.gate(tau=0.5)[0] * learner.bank.alpha[0]
    report = learner.end_task()
    assert not report.kept and 0 < report.beta < 1
    assert torch.allclose(learner.gate()[0] * learner.bank.alpha[0], products)
    assert learner.gate().tolist() == [1.0]


def test_i5_a_pruned_adapter_leaves_nothing_behind() -> None:
    learner = grown(learner_of(tiny_config(growth_threshold=1.0, refit_epochs=0)), range(2))
    assert learner.bank.tasks == [0] and learner.bank.new_A is None and learner.pruning_mask().tolist() == [1, 0, 1]
    learner.begin_task(2)
    learner.before_step(0)
    assert learner.bank.alpha.shape[0] == 2 and learner.bank.A.shape[2] == 4
    assert learner.beta_after()[1] == 0 and learner.bank.tasks == [0, 2]


@pytest.mark.parametrize("gate", ["gumbel_sparsemax", "none"])
def test_i8_evaluating_more_often_changes_no_result(gate: str) -> None:
    plain = learn(learner_of(tiny_config(gate=gate, nb_tasks=2, eval_every=0)), range(2))
    session = Watch()
    watched = learn(learner_of(tiny_config(gate=gate, nb_tasks=2), session), range(2))
    assert session.evaluated == [2, 4] and same(watched, plain)


def test_old_head_rows_and_stored_directions_get_no_gradient() -> None:
    learner = grown(learner_of(tiny_config(growth_rule="none", nb_tasks=2)), range(1))
    rows, A, B, alpha = (tensor.detach().clone() for tensor in (learner.head.weight, learner.bank.A, learner.bank.B,
                                                                learner.bank.alpha))
    learn(learner, range(1, 2))
    assert torch.equal(learner.head.weight[:2], rows) and torch.equal(learner.bank.A[:, :, :4], A)
    assert torch.equal(learner.bank.B[..., :4], B) and not torch.equal(learner.bank.alpha[0], alpha[0])


def test_learning_rates_of_adapter_head_magnitude_and_gate() -> None:
    learner = learner_of(tiny_config(lrate=0.03, init_lr=0.02, head_lr=0.5, alpha_lr=0.0, gate_lr=0.7))
    learner.begin_task(0)
    groups = learner.optimizer().param_groups
    assert [group["lr"] for group in groups] == [0.02, 0.5, 0.0, 0.7]
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(learner.bank.new_A), id(learner.bank.new_B)], [id(p) for p in learner.head.trainable()], [id(learner.bank.alpha)],
        [id(learner.gate.logits)]]
    assert not any(group["weight_decay"] for group in groups[2:])


def test_rank_schedule_lowers_the_rank() -> None:
    config = tiny_config(rank=10, rank_schedule=[[0, 10], [4, 8], [8, 6]])
    assert [rank_of(config, task) for task in (0, 3, 4, 7, 8, 30)] == [10, 10, 8, 8, 6, 6]
    learner = grown(learner_of(tiny_config(rank=None, rank_schedule=[[0, 3], [1, 2]], growth_rule="none")), range(2))
    assert learner.bank.ranks == [3, 2] and torch.isfinite(learner.predict(test_images(learner))).all()
