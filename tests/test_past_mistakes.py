"""METHOD.md, section 8: the mistakes of earlier implementations that no other test covers.

Where the others are: 1 test_lora (I6), 2 test_lora (I7), 3 and 4 test_lora, 7 test_metrics (200 classes), 8, 10 and 11
test_trainer.
"""

import random

import numpy as np
import pytest
import torch

from tests.helpers import learn, learner_of, test_images, tiny_config


def test_5_evaluation_sees_neither_a_pruned_adapter_nor_the_training_gate() -> None:
    learner = learner_of(tiny_config(growth_threshold=1.0, refit_epochs=0))
    learn(learner, range(1))
    learner.start_evaluation()
    before = learner.predict(test_images(learner))
    learn(learner, range(1, 2), end_last=False)
    beta = learner.gate(tau=0.5)[0]
    alpha = learner.bank.alpha[0].detach().clone()
    learner.end_task()
    assert torch.allclose(learner.bank.magnitudes()[0], beta * alpha), "magnitudes, not the mask alone"
    after = learner.predict(test_images(learner))[:, :2]
    assert not torch.allclose(before, after), "the kept adapter's magnitude was trained in task 1"


def test_5_all_kept_adapters_are_summed() -> None:
    learner = learner_of(tiny_config(growth_rule="none"))
    learn(learner, range(3))
    x = test_images(learner)
    outputs = []
    for beta in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 1.0], [0.0, 0, 0]):
        learner.bank.merge(torch.tensor(beta) * 20)
        outputs.append(learner.backbone(x).detach())
    assert all(not torch.allclose(outputs[i], outputs[3], atol=1e-5) for i in (0, 1, 2, 4))


def test_6_masks_and_magnitudes_survive_the_next_task() -> None:
    learner = learner_of(tiny_config())
    learn(learner, range(1))
    learn(learner, range(1, 2), end_last=False)
    learner.gate.replace(torch.tensor([3.0, 0.0]))
    assert not learner.end_task().kept
    magnitude = learner.bank.magnitudes()[0].detach().clone()
    learner.begin_task(2)
    beta = learner.gate()[0]
    assert torch.allclose(beta * learner.bank.magnitudes()[0], magnitude), "the newcomer changed nothing"
    learner.train()
    report = learner.end_task()
    assert report.pruning_mask[:2] == [1, 0] and report.beta_values[1] == 0 and report.beta_after[1] == 0


def test_9_nothing_draws_from_or_moves_the_global_streams() -> None:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = (torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
        learner = learner_of(tiny_config(nb_tasks=2))
        learn(learner, range(2))
        assert torch.equal(before[0], torch.random.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()
        states.append((learner.head.weight, learner.bank.A, learner.bank.alpha.detach()))
    assert all(torch.equal(first, second) for first, second in zip(*states))


@pytest.mark.slow
def test_12_more_than_twenty_tasks_any_rank() -> None:
    learner = learner_of(tiny_config(dataset="glyphs", init_cls=2, increment=2, nb_tasks=23, rank=3, growth_rule="none",
                                      batch_size=128))
    learn(learner, range(23))
    assert learner.bank.tasks == list(range(23)) and learner.bank.A.shape[2] == 69
    learner.start_evaluation()
    assert learner.predict(test_images(learner)).shape[1] == 46
