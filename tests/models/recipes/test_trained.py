"""models/recipes/trained.py: logits, noise, temperature and compensation of the trained gates."""

import pytest
import torch

from tests.helpers import grown, learn, learner_of, logits, tiny_config
from utils.gumbel_utils import TemperatureScheduler, gumbel_softmax, gumbel_sparsemax, sample_gumbel, sparsity_loss
from utils.rng import generator
from utils.runs.progress import LOGGER


def test_without_compensation_the_newcomer_dilutes() -> None:
    learner = grown(learner_of(tiny_config(growth_rule="none", gate_compensation=False)), range(2))
    before = logits(learner)
    learner.begin_task(2)
    assert (logits(learner)[:, :4] - before).abs().max() > 1e-3


def test_newcomer_starts_at_the_smallest_logit_of_the_support() -> None:
    learner = grown(learner_of(tiny_config(growth_rule="none")), range(2))
    learner.gate.replace(torch.tensor([0.9, 0.2]))
    learner.begin_task(2)
    assert learner.gate.logits[-1] == learner.gate.logits[0], "0.2 is outside of the support at tau_final 0.5"


@pytest.mark.parametrize("gate, function, noisy", [("gumbel_sparsemax", gumbel_sparsemax, True),
                                                   ("gumbel_softmax", gumbel_softmax, True),
                                                   ("sparsemax", gumbel_sparsemax, False)])
def test_a_step_has_the_weights_temperature_noise_and_loss_of_the_equations(gate, function, noisy: bool) -> None:
    """Each from its definition, with one draw of noise keyed by (seed, task, step); 0.3 is the factor on it."""
    changes = {"gate_noise": 0.3} if noisy else {}
    learner = grown(learner_of(tiny_config(gate=gate, growth_rule="none", lambda_sparsity=0.2, **changes)), range(2),
                    begin_next=True)
    learner.gate.replace(torch.tensor([0.4, 0.1, 0.3]))
    steps = learner.data.steps_per_epoch(2, 32)
    schedule = TemperatureScheduler(5.0, 0.5, "auto", steps)
    for step in (0, 3, 1, steps - 1):
        extra = learner.before_step(step)
        noise = 0.3 * sample_gumbel((3,), generator(1993, "gate", 2, step)) if noisy else None
        beta = function(learner.gate.logits, schedule.at(step), training=noisy, noise=noise)
        assert torch.allclose(learner.gate_weights(), beta) and learner.gate_weights().requires_grad
        assert torch.allclose(extra, 0.2 * sparsity_loss(beta))
        assert torch.allclose(learner.bank.layers[0].operands.new_c, beta[-1] * learner.bank.alpha[-1, 0])


def test_the_noise_moves_no_other_random_stream() -> None:
    starts = []
    for noise in (0.0, 1.0):
        learner = learn(learner_of(tiny_config(gate_noise=noise, nb_tasks=2)), range(1))
        learner.begin_task(1)
        starts.append((learner.bank.new_A.detach(), learner.head.new_weight.detach(),
                       *next(iter(learner.data.train_batches(1, 0, 32)))))
    assert all(torch.equal(first, second) for first, second in zip(*starts, strict=True))


def test_a_rate_that_does_not_arrive_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", said.append)
    learn(learner_of(tiny_config(gumbel_anneal_rate=0.999, nb_tasks=1)), range(1))
    assert len(said) == 1 and "0.999" in said[0] and "arrive" in said[0]
