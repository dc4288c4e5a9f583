"""models/sdlora.py: a task's life as METHOD.md, sections 3 and 4, tells it, and the invariants of whole tasks."""

import pytest
import torch

from models.growth import combination_of_stored
from models.sdlora import rank_of
from tests.helpers import in_float64, learn, learner_of, small_config, test_images
from utils.gumbel_utils import TemperatureScheduler
from utils.runs.progress import LOGGER


def logits(learner) -> torch.Tensor:
    learner.start_evaluation()
    x = test_images(learner)
    return learner.predict(x.to(learner.head.weight.dtype))


def test_i1_begin_changes_no_output() -> None:
    learner = learner_of(small_config(growth_rule="none"))
    learn(learner, range(2))
    in_float64(learner)
    before = logits(learner)
    alphas = learner.bank.alpha.detach().clone()
    learner.begin_task(2)
    seen = before.shape[1]
    assert (logits(learner)[:, :seen] - before).abs().max() < 1e-10
    assert not torch.allclose(alphas, learner.bank.alpha[:2]), "magnitudes must have answered the newcomer"


def test_without_compensation_the_newcomer_dilutes() -> None:
    learner = learner_of(small_config(growth_rule="none", gate_compensation=False))
    learn(learner, range(2))
    with torch.no_grad():
        learner.bank.alpha *= 30  # one epoch trains little; make the adapters matter
    before = logits(learner)
    learner.begin_task(2)
    assert (logits(learner)[:, :before.shape[1]] - before).abs().max() > 1e-3


def test_newcomer_starts_at_the_smallest_logit_of_the_support() -> None:
    learner = learner_of(small_config(growth_rule="none"))
    learn(learner, range(2))
    learner.gate.replace(torch.tensor([0.9, 0.2]))
    learner.begin_task(2)
    assert learner.gate.logits[-1] == learner.gate.logits[0], "0.2 is outside of the support at tau_final 0.5"


def test_threshold_keeps_above_and_prunes_below() -> None:
    learner = learner_of(small_config())
    learn(learner, range(1))
    learn(learner, range(1, 2), end_last=False)
    learner.gate.replace(torch.tensor([0.5, 0.44]))  # at tau_final 0.5: (1 + 0.12) / 2 = 0.56 and 0.44
    report = learner.end_task()
    assert report.kept and report.beta == pytest.approx(0.44, abs=1e-6) and learner.bank.tasks == [0, 1]
    learn(learner, range(2, 3), end_last=False)
    learner.gate.replace(torch.tensor([0.5, 0.5, 0.29]))
    report = learner.end_task()
    assert not report.kept and report.beta_values == pytest.approx([0.47333, 0.47333, 0.05333], abs=1e-4)
    assert learner.bank.tasks == [0, 1] and report.pruning_mask == [1, 1, 0]
    assert report.beta_after == pytest.approx([0.5, 0.5, 0.0])


def test_settling_leaves_every_product_of_gate_and_magnitude() -> None:
    learner = learner_of(small_config(refit_epochs=0, growth_threshold=1.0))
    learn(learner, range(1))
    learn(learner, range(1, 2), end_last=False)
    beta = learner.gate(tau=learner.config.gumbel_tau_final)
    products = beta[0] * learner.bank.alpha[0]
    report = learner.end_task()
    assert not report.kept and 0 < report.beta < 1
    assert torch.allclose(learner.gate()[0] * learner.bank.alpha[0], products)
    assert learner.gate().tolist() == [1.0]


def test_pruning_refits_the_new_head_rows_only() -> None:
    heads = []
    for epochs in (0, 2):
        learner = learner_of(small_config(refit_epochs=epochs, growth_threshold=1.0))
        learn(learner, range(2))
        heads.append(learner.head.weight.clone())
    assert torch.equal(heads[0][:2], heads[1][:2]) and not torch.allclose(heads[0][2:], heads[1][2:])


def test_task_0_is_always_kept() -> None:
    learner = learner_of(small_config(growth_threshold=1.0))
    learn(learner, range(1))
    assert learner.bank.tasks == [0] and learner.pruning_mask().tolist() == [1, 1, 1]


def test_i5_a_pruned_adapter_leaves_nothing_behind() -> None:
    learner = learner_of(small_config(growth_threshold=1.0))
    learn(learner, range(2))
    assert learner.bank.tasks == [0] and learner.bank.new_A is None
    learner.begin_task(2)
    learner.before_step(0)
    assert learner.bank.alpha.shape[0] == 2 and learner.bank.A.shape[2] == 4
    learner.predict(test_images(learner))
    assert learner.beta_after()[1] == 0 and learner.bank.tasks == [0, 2]


def test_topk_can_evict_older_adapters() -> None:
    learner = learner_of(small_config(growth_rule="topk", growth_topk=2))
    learn(learner, range(2))
    learn(learner, range(2, 3), end_last=False)
    learner.gate.replace(torch.tensor([0.2, 0.1, 0.3]))
    report = learner.end_task()
    assert learner.bank.tasks == [0, 2] and report.kept and report.evicted == [1] and report.pruning_mask == [1, 0, 1]


@pytest.mark.parametrize("margin, kept", [(-10.0, True), (10.0, False)])
def test_val_loss_compares_with_and_without(margin: float, kept: bool) -> None:
    learner = learner_of(small_config(growth_rule="val_loss", growth_margin=margin, val_fraction=0.2, nb_tasks=2))
    learn(learner, range(2))
    assert (1 in learner.bank.tasks) is kept


def test_val_loss_probe_changes_nothing() -> None:
    learner = learner_of(small_config(growth_rule="val_loss", val_fraction=0.2, nb_tasks=2))
    learn(learner, range(1))
    learn(learner, range(1, 2), end_last=False)
    learner.gate.set_temperature(0.5)
    before, rows = logits(learner), learner.head.new_weight.detach().clone()
    with_it, without = learner._held_out_losses()
    assert with_it != without and learner.bank.current == 1
    assert torch.equal(logits(learner), before) and torch.equal(learner.head.new_weight, rows)
    assert learner._held_out_losses() == (with_it, without), "deterministic"


def test_i8_evaluating_more_often_changes_no_result() -> None:
    states = []
    for every in (0, 1):
        learner = learner_of(small_config(eval_every=every, nb_tasks=2))
        for task in range(2):
            learner.begin_task(task)
            session = Alone()
            session.evaluate = lambda learner=learner: float(logits(learner).sum())
            learner.train(session)
            learner.end_task()
        states.append((learner.head.weight, learner.bank.A, learner.bank.B, learner.bank.alpha, learner.gate.logits))
    for first, second in zip(*states):
        assert torch.equal(first, second)


def test_the_gate_moves_no_other_random_stream() -> None:
    """Turning the noise off changes neither the adapters' start nor the order of the images."""
    starts = []
    for noise in (0.0, 1.0):
        learner = learner_of(small_config(gate_noise=noise))
        learn(learner, range(1))
        learner.begin_task(1)
        images, labels = next(iter(learner.data.train_batches(1, 0, 32)))
        starts.append((learner.bank.new_A.detach(), learner.head.new_weight.detach(), images, labels))
    for first, second in zip(*starts):
        assert torch.equal(first, second)


def test_noise_is_drawn_once_per_step_and_keyed_by_it() -> None:
    learner = learner_of(small_config())
    learn(learner, range(1))
    learner.begin_task(1)
    assert torch.equal(learner._noise(3), learner._noise(3)) and not torch.equal(learner._noise(3), learner._noise(4))


def test_sparsity_is_in_the_loss_once_per_step() -> None:
    losses = {}
    for parts in (1, 4):
        learner = learner_of(small_config(grad_accum=parts, lambda_sparsity=10.0))
        learn(learner, range(1))
        learner.begin_task(1)
        learner.schedule = TemperatureScheduler(5.0, 0.5, "auto", 10)
        images, labels = next(iter(learner.data.train_batches(1, 0, 32)))
        clf, sparse, _ = learner._accumulate(images, labels, learner.before_step(0))
        gradients = [p.grad.clone() for group in learner.groups() for p in group["params"]]
        losses[parts] = (clf, sparse, *gradients)
    for whole, split in zip(losses[1], losses[4]):
        assert torch.allclose(whole, split, rtol=1e-3, atol=1e-5)
    assert losses[1][1] > 1


def test_old_head_rows_and_stored_directions_get_no_gradient() -> None:
    learner = learner_of(small_config(growth_rule="none"))
    learn(learner, range(1))
    rows, A, B = learner.head.weight.clone(), learner.bank.A.clone(), learner.bank.B.clone()
    alpha = learner.bank.alpha.detach().clone()
    learn(learner, range(1, 2))
    assert torch.equal(learner.head.weight[:2], rows) and torch.equal(learner.bank.A[:, :, :4], A)
    assert torch.equal(learner.bank.B[..., :4], B) and not torch.equal(learner.bank.alpha[0], alpha[0])


def test_sd_lora_baseline_resets_its_magnitudes() -> None:
    learner = learner_of(small_config(gate="none", gate_lr=None, nb_tasks=2))
    learn(learner, range(1))
    assert learner.bank.alpha.item() != pytest.approx(0.8, abs=1e-7)
    learner.begin_task(1)
    assert learner.bank.alpha.tolist() == pytest.approx([0.8, 0.8]) and learner.gate().tolist() == [1, 1]
    assert learner.before_step(0) is None


def test_kd_drops_a_direction_that_earlier_ones_span() -> None:
    learner = learner_of(small_config(gate="none", gate_lr=None, growth_rule="kd", refit_epochs=0))
    learn(learner, range(2))
    learner.begin_task(2)
    bank = learner.bank
    in_float64(learner)
    with torch.no_grad():  # a current adapter whose product is a combination of the two stored ones
        span = torch.cat([0.7 * bank.B[..., :4], -0.4 * bank.B[..., 4:]], -1) @ bank.A
        U, S, V = torch.linalg.svd(span)
        rank = 8
        bank.new_A = torch.nn.Parameter(V[:, :, :rank])
        bank.new_B = torch.nn.Parameter(U[..., :rank] * S[..., None, :rank])
        bank.ranks[-1] = rank
    coefficients, residual = combination_of_stored(bank)
    assert residual.max() < 1e-9
    norm = span.norm(dim=(-2, -1))
    assert torch.allclose(coefficients[0] * norm, torch.full_like(norm, 0.7), atol=1e-6)
    assert torch.allclose(coefficients[1] * norm, torch.full_like(norm, -0.4), atol=1e-6)
    before = logits(learner)
    report = learner.end_task()
    assert not report.kept and bank.tasks == [0, 1]
    assert torch.allclose(logits(learner), before, atol=1e-9), "its magnitude has gone to the earlier adapters"


def test_kd_keeps_a_new_direction() -> None:
    learner = learner_of(small_config(gate="none", gate_lr=None, growth_rule="kd", nb_tasks=2))
    learn(learner, range(2))
    assert learner.bank.tasks == [0, 1]


def test_rank_schedule_lowers_the_rank() -> None:
    config = small_config(rank=10, rank_schedule=[[0, 10], [4, 8], [8, 6]])
    assert [rank_of(config, task) for task in (0, 3, 4, 7, 8, 30)] == [10, 10, 8, 8, 6, 6]


def test_a_rate_that_does_not_arrive_is_said_once(monkeypatch) -> None:
    said = []
    monkeypatch.setattr(LOGGER, "warning", said.append)
    learn(learner_of(small_config(gumbel_anneal_rate=0.999, nb_tasks=1)), range(1))
    assert len(said) == 1 and "0.999" in said[0] and "arrive" in said[0]
