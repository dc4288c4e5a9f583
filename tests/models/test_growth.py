"""models/growth.py: what each rule keeps, and why it says so (METHOD.md, section 2, equation 4)."""

import pytest
import torch
import torch.nn.functional as F

from models.growth import Decision, combination_of_stored
from models.rows import RowFit
from tests.helpers import grown, in_float64, learner_of, logits, tiny_config
from utils.errors import UserError
from utils.runs import distributed


def deciding(tasks: int = 1, **changes):
    """A learner whose task `tasks` is to be decided."""
    return grown(learner_of(tiny_config(refit_epochs=0, **changes)), range(tasks), begin_next=True)


def test_threshold_keeps_above_and_prunes_below_and_at_the_threshold() -> None:
    learner = deciding()
    learner.gate.replace(torch.tensor([0.5, 0.44]))  # at tau_final 0.5: (1 + 0.12) / 2 = 0.56 and 0.44
    report = learner.end_task()
    assert report.kept and report.beta == pytest.approx(0.44, abs=1e-6) and learner.bank.tasks == [0, 1]
    learner.begin_task(2)
    learner.gate.replace(torch.tensor([0.5, 0.5, 0.29]))
    report = learner.end_task()
    assert not report.kept and report.beta_values == pytest.approx([0.47333, 0.47333, 0.05333], abs=1e-4)
    assert learner.bank.tasks == [0, 1] and report.pruning_mask == [1, 1, 0]
    assert report.beta_after == pytest.approx([0.5, 0.5, 0.0])
    learner = deciding(growth_threshold=0.5)
    learner.gate.replace(torch.zeros(2))
    assert not learner.end_task().kept, "0.5 is not above 0.5"


def test_task_0_is_always_kept() -> None:
    learner = grown(learner_of(tiny_config(growth_threshold=1.0)), range(1))
    assert learner.bank.tasks == [0] and learner.pruning_mask().tolist() == [1, 1, 1]


def test_topk_can_evict_older_adapters() -> None:
    learner = deciding(growth_rule="topk", growth_topk=2)
    learner.end_task()
    learner.begin_task(2)
    learner.gate.replace(torch.tensor([0.2, 0.1, 0.3]))
    report = learner.end_task()
    assert learner.bank.tasks == [0, 2] and report.kept and report.evicted == [1] and report.pruning_mask == [1, 0, 1]


def held_out(margin: float):
    changes = {"growth_rule": "val_loss", "growth_margin": margin, "val_fraction": 0.2, "nb_tasks": 2, "refit_epochs": 1}
    return grown(learner_of(tiny_config(**changes)), range(1), begin_next=True)


def test_val_loss_compares_with_and_without_and_its_probe_changes_nothing() -> None:
    learner = held_out(0.0)
    learner.gate.set_temperature(0.5)
    before, rows = logits(learner), learner.head.new_weight.detach().clone()
    with_it, without = learner._held_out_losses()
    assert with_it != without and learner.bank.current == 1
    assert torch.equal(logits(learner), before) and torch.equal(learner.head.new_weight, rows)
    assert learner._held_out_losses() == (with_it, without), "deterministic"
    gain = (without - with_it) / with_it
    for margin, kept in ((gain - 1e-4, True), (gain + 1e-4, False)):
        report = held_out(margin).end_task()
        assert report.kept is kept and report.numbers["val_loss"] == pytest.approx(gain)


def test_held_out_losses_are_with_the_newcomer_and_without_on_images_that_were_not_trained_on(monkeypatch) -> None:
    monkeypatch.setattr(RowFit, "run", lambda fit, whole=False: fit.learner.start_evaluation())
    learner, expected = held_out(0.0), []
    learner.gate.set_temperature(0.5)
    found = learner._held_out_losses()
    for keep in ([0, 1], [0]):
        learner.recipe.prune(keep)
        learner.start_evaluation()
        losses = [F.cross_entropy(learner.head.current_logits(learner.embed(x)), y - 2, reduction="none")
                  for x, y in learner.data.eval_batches("val", learner.data.task_cells(1), 64)]
        expected.append(torch.cat(losses).mean().item())
    assert found == pytest.approx(expected) and expected[0] != pytest.approx(expected[1])


def test_kd_drops_a_direction_that_earlier_ones_span() -> None:
    learner = deciding(2, gate="none", growth_rule="kd")
    assert learner.bank.tasks == [0, 1, 2], "random directions are new"
    in_float64(learner)
    bank = learner.bank
    with torch.no_grad():  # a current adapter whose product is a combination of the two stored ones
        span = torch.cat([0.7 * bank.B[..., :4], -0.4 * bank.B[..., 4:]], -1) @ bank.A
        U, S, V = torch.linalg.svd(span)
        bank.new_A, bank.new_B = torch.nn.Parameter(V[:, :, :8]), torch.nn.Parameter(U[..., :8] * S[..., None, :8])
        bank.ranks[-1] = 8
    coefficients, residual = combination_of_stored(bank)
    assert residual.max() < 1e-9
    norm = span.norm(dim=(-2, -1))
    assert torch.allclose(coefficients[0] * norm, torch.full_like(norm, 0.7), atol=1e-6)
    assert torch.allclose(coefficients[1] * norm, torch.full_like(norm, -0.4), atol=1e-6)
    before = logits(learner)
    report = learner.end_task()
    assert not report.kept and bank.tasks == [0, 1]
    assert torch.allclose(logits(learner), before, atol=1e-9), "its magnitude has gone to the earlier adapters"
    learner.data.nb_tasks = 4
    bank.reset_magnitudes(0.8)
    assert bank.absorbed.abs().max() > 0, "and no reset takes it back"


def test_kd_moves_magnitudes_on_the_main_process_s_word(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = deciding(1, gate="none", growth_rule="kd", kd_residual=1e9)
    others_word = Decision([0, 1], "as it found", {1: "as it found"}, refit=False)
    monkeypatch.setattr(distributed, "on_main", lambda work: others_word)
    assert learner.end_task().kept and learner.bank.absorbed.abs().max() == 0


@pytest.mark.parametrize("rule, kept", [("none", [0, 1, 2, 3]), ("first_k", [0, 1])])
def test_controls_keep_by_name(rule: str, kept: list[int]) -> None:
    topk = {} if rule == "none" else {"growth_topk": 2}
    learner = grown(learner_of(tiny_config(growth_rule=rule, nb_tasks=4, refit_epochs=0, **topk)), range(4))
    assert learner.bank.tasks == kept


def test_random_keeps_as_many_drawn_from_the_seed() -> None:
    kept = {}
    for seed in range(6):
        config = tiny_config(growth_rule="random", growth_topk=3, nb_tasks=5, refit_epochs=0, seed=seed)
        kept[seed] = tuple(grown(learner_of(config), range(5)).bank.tasks)
    assert all(tasks[0] == 0 and len(tasks) == 3 for tasks in kept.values()) and len(set(kept.values())) > 1
    assert kept[0] == tuple(grown(learner_of(tiny_config(growth_rule="random", growth_topk=3, nb_tasks=5, refit_epochs=0,
                                                          seed=0)), range(5)).bank.tasks)


@pytest.mark.parametrize("gate, rule", [("none", "topk"), ("gumbel_sparsemax", "kd"), ("evidence", "topk"),
                                        ("evidence", "val_loss"), ("evidence", "kd")])
def test_a_rule_that_needs_what_the_gate_lacks_is_refused(gate: str, rule: str) -> None:
    with pytest.raises(UserError, match="'growth_rule' is .*'gate' is .*the rule needs .*; choose another rule") as caught:
        tiny_config(gate=gate, growth_rule=rule)
    assert "\n" not in str(caught.value)


def test_the_log_says_what_was_compared(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.sdlora.LOGGER.propagate", True)
    caplog.set_level("INFO")
    learner = deciding(growth_threshold=0.7)
    learner.gate.replace(torch.zeros(2))
    learner.end_task()
    said = [record.message for record in caplog.records if "Growth" in record.message]
    assert "[Conditional Growth] ✗ Pruning adapter for task 1 (beta=0.5000 <= 0.7000)" in said
    assert "[Conditional Growth] Current task beta: 0.5000, threshold: 0.7000" in said
    assert "[Conditional Growth] Task 1 - Beta values: [0.50 0.50]" in said
