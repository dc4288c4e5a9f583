"""models/rows.py: head rows fitted to a network that stays as it is."""

import pytest
import torch
import torch.nn.functional as F

from models.rows import RowFit
from tests.helpers import Interrupted, Watch, grown, learner_of, resumed, same, tiny_config
from utils.rng import generator


def ready(session: Watch | None = None, **changes):
    changes = {"refit_epochs": 2, "growth_threshold": 1.0, "nb_tasks": 2, "batch_size": 64, **changes}
    return grown(learner_of(tiny_config(**changes), session), range(1), begin_next=True)


def test_pruning_refits_the_new_head_rows_only() -> None:
    heads = []
    for epochs in (0, 2):
        learner = ready(refit_epochs=epochs)
        bank = learner.bank.A.clone()
        assert not learner.end_task().kept and torch.equal(learner.bank.A, bank)
        heads.append(learner.head.weight)
    assert torch.equal(heads[0][:2], heads[1][:2]) and not torch.allclose(heads[0][2:], heads[1][2:])


def test_rows_are_those_of_plain_sgd_on_the_features_of_the_views() -> None:
    """Two views in turn, three epochs: the third takes the first view again, its batches drawn anew."""
    learner = ready(refit_lr=0.05)
    weight, bias = (p.detach().clone().requires_grad_() for p in (learner.head.new_weight, learner.head.new_bias))
    learner.start_evaluation()
    views = []
    with torch.no_grad():
        for view in (1, 2):  # after the one epoch of training
            batches = list(learner.data.train_batches(1, view, 64))
            views.append((torch.cat([learner.embed(x) for x, _ in batches]), torch.cat([y for _, y in batches]) - 2))
    optimizer = torch.optim.SGD([weight, bias], lr=0.05, momentum=0.9)
    for epoch in range(3):
        x, y = views[epoch % 2]
        if epoch == 2:
            order = torch.randperm(len(y), generator=generator(1993, "rows", 1, 2))
            x, y = x[order], y[order]
        for features, labels in zip(x.split(64), y.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(features, weight, bias), labels).backward()
            optimizer.step()
    RowFit(learner, 3, 2).run()
    assert torch.allclose(learner.head.new_weight, weight, atol=1e-5)
    assert torch.allclose(learner.head.new_bias, bias, atol=1e-5)
    assert not torch.allclose(weight, learner.head.new_weight.new_zeros(()), atol=1e-3)


def test_a_fit_says_what_it_does_and_goes_on_from_a_view_that_was_seen() -> None:
    whole = ready(session := Watch())
    whole.end_task()
    batches = whole.data.steps_per_epoch(1, 64)
    looks = [call for call in session.calls if call == "Task 1: features for the row fit"]
    assert len(looks) == 2 * batches and session.calls.count("Task 1: row fit") == 2
    learner = ready(session := Watch())
    session.stop_at = len(session.calls) + batches + 2  # within the second view
    with pytest.raises(Interrupted):
        learner.end_task()
    again = resumed(learner, session := Watch())
    again.train()
    again.end_task()
    assert session.calls.count("Task 1: features for the row fit") == batches, "the first view is not looked at again"
    assert same(again, whole)


def test_a_longer_first_task_has_no_longer_a_fit() -> None:
    """Rows that were fitted for longer would be larger than those of all other tasks, and outshout them."""
    learner = learner_of(tiny_config(row_fit="alike", init_epoch=3, epochs=2, nb_tasks=2, batch_size=64), session := Watch())
    grown(learner, range(2))
    fits = [session.calls.count(f"Task {task}: row fit") for task in range(2)]
    assert fits == [2, 2] and learner.epochs() == 2


def test_the_rates_of_a_fit_are_those_of_training_stretched_over_its_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, epoch = [], RowFit._epoch
    monkeypatch.setattr(RowFit, "_epoch", lambda fit, optimizer, *rest: (
        rates.append(optimizer.param_groups[0]["lr"]), epoch(fit, optimizer, *rest))[1])
    grown(learner_of(tiny_config(row_fit="alike", row_epochs=4, init_epoch=2, refit_lr=0.5, nb_tasks=1, scheduler="steplr",
                                 milestones=[1], lrate_decay=0.1)), range(1))
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05])
