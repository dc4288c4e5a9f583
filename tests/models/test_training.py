"""models/training.py: the step, its parts and its memory, and what happens when a number is not finite."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from models.optimisation import make_optimizer, schedule_factor
from models.sdlora import SDLoRA
from models.training import GradientLearner, Meter
from tests.helpers import (
    ROOT,
    SMALL,
    Interrupted,
    Watch,
    grown,
    learn,
    learner_of,
    resumed,
    small_config,
    test_images,
    tiny_config,
)
from trainer import Quiet
from utils.config import Config
from utils.errors import UserError


def ready(make: Callable[..., Config] = tiny_config, **changes) -> tuple[SDLoRA, torch.Tensor, torch.Tensor]:
    """A learner before the first step of task 1, and its first batch."""
    learner = grown(learner_of(make(**changes)), range(1), begin_next=True)
    return learner, *next(iter(learner.data.train_batches(1, 0, learner.config.batch_size)))


def test_a_batch_in_parts_has_the_same_gradients_and_the_gates_loss_once() -> None:
    found = []
    for parts in (1, 5):
        learner, images, labels = ready(grad_accum=parts, lambda_sparsity=10.0)
        clf, sparse, correct = learner.backward(images, labels, learner.before_step(0), len(labels))
        found.append([clf, sparse, correct.float(), *(p.grad for group in learner.groups() for p in group["params"])])
        assert sparse > 1
    for whole, split in zip(*found, strict=True):
        assert torch.allclose(whole, split, rtol=1e-3, atol=1e-5)


def test_memory_falls_with_the_number_of_parts() -> None:
    """Bytes alive at the peak of forward and backward, as the allocator counts them."""
    peaks = {}
    for parts in (1, 2, 4, 8):
        learner, images, labels = ready(small_config, grad_accum=parts, batch_size=64)
        extra = learner.before_step(0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            learner.backward(images, labels, extra, len(labels))
        events = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
                        if event.name() == "[memory]")
        alive = torch.tensor([size for _, size in events]).cumsum(0)
        peaks[parts] = alive.max().item()
    assert peaks[1] > 20 * 2**20, "the activations are what is measured"
    for parts in (2, 4, 8):
        assert peaks[parts] * parts == pytest.approx(peaks[1], rel=0.15), peaks


class Traced(Quiet):
    """Notes which files of the repository one optimizer step enters, from one call of `after_step` to the next."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.files = step, set()

    def after_step(self) -> None:
        self.step -= 1
        sys.setprofile(self.note if self.step == 0 else None)

    def note(self, frame, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            name = path.relative_to(ROOT)
            if name.parts[0] in ("models", "backbone", "utils", "trainer.py"):  # a virtual environment may be here too
                self.files.add(name.as_posix())


@pytest.mark.parametrize("gate", ["gumbel_sparsemax", "none"])
def test_a_step_enters_few_files(gate: str) -> None:
    session = Traced(3)
    learner, *_ = ready(gate=gate)
    learner.session, before = session, sys.getprofile()
    try:
        learner.train()
    finally:
        sys.setprofile(before)
    assert {"models/training.py", "models/sdlora.py", "backbone/gated_linear.py"} <= session.files
    assert len(session.files) <= 14, sorted(session.files)


def test_the_loop_reads_in_one_place() -> None:
    module = ast.parse((ROOT / "models" / "training.py").read_text())
    kind = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == GradientLearner.__name__)
    train = next(node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "_train_phase")
    assert train.end_lineno - train.lineno < 60


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the extra term of the loss NaN at these steps of task 1."""
    original = SDLoRA.before_step

    def before_step(self: SDLoRA, step: int) -> torch.Tensor:
        return original(self, step) * (float("nan") if self.task == 1 and step in steps else 1)

    monkeypatch.setattr(SDLoRA, "before_step", before_step)


def test_a_loss_that_is_not_finite_stops_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3})
    with pytest.raises(UserError) as caught:
        learn(learner_of(tiny_config(nb_tasks=2)), range(2))
    words = ("The loss", "task 1", "epoch 1", "step 3", "tau", "init_lr", "gumbel_tau_final")
    assert all(word in str(caught.value) for word in words)


def test_steps_that_are_not_finite_are_left_out_up_to_a_limit(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    poison(monkeypatch, {0, 3})
    monkeypatch.setattr("models.training.LOGGER.propagate", True)
    learner = learn(learner_of(tiny_config(nb_tasks=2, nan_policy="skip", nan_limit=2)), range(2))
    assert all(torch.isfinite(tensor).all() for tensor in learner.stored_tensors())
    said = list(dict.fromkeys(record.message for record in caplog.records if "is skipped" in record.message))
    assert len(said) == 2 and "step 0: the loss is not finite" in said[0]
    with pytest.raises(UserError, match="loss .* step 3"):
        learn(learner_of(tiny_config(nb_tasks=2, nan_policy="skip", nan_limit=1)), range(2))


def test_epochs_and_learning_rates_of_the_first_task_are_its_own() -> None:
    learner = learner_of(tiny_config(init_epoch=2, init_lr=0.02, scheduler="steplr", milestones=[1], lrate_decay=0.5))
    rates: list[tuple[int, float]] = []

    class Rates(Quiet):
        def after_step(self) -> None:
            rates.append((learner.task, learner._optimizer.param_groups[0]["lr"]))

    learner.session = Rates()
    learn(learner, range(2))
    steps = [learner.data.steps_per_epoch(task, SMALL["batch_size"]) for task in (0, 1)]
    assert rates == [(0, 0.02)] * steps[0] + [(0, 0.01)] * steps[0] + [(1, 0.01)] * steps[1]


def test_the_cosine_falls_from_each_task_s_rate_to_min_lr_and_stays_there() -> None:
    config = tiny_config(init_epoch=2, epochs=4, init_lr=0.02, lrate=0.01, min_lr=0.002)
    assert [schedule_factor(config, 0, epoch) for epoch in range(3)] == pytest.approx([1, 0.55, 0.1])
    assert [schedule_factor(config, 1, epoch) for epoch in (0, 2, 4, 6)] == pytest.approx([1, 0.6, 0.2, 0.2])
    short = tiny_config(epochs=4, tuned_epoch=2)
    assert [schedule_factor(short, 1, epoch) for epoch in range(4)] == pytest.approx([1, 0.5, 0, 0])


def test_the_first_task_has_a_weight_decay_of_its_own() -> None:
    config, group = tiny_config(weight_decay=0.2, init_weight_decay=0.1), {"params": [nn.Parameter(torch.zeros(1))]}
    assert [make_optimizer(config, [group], task).param_groups[0]["weight_decay"] for task in (0, 1, 2)] == [0.1, 0.2, 0.2]


def test_steps_that_were_left_out_count_after_a_checkpoint_too(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {0, 3})
    learner, *_ = ready(nan_policy="skip", nan_limit=1)
    learner.session = Watch(stop_at=2)
    with pytest.raises(Interrupted):
        learner.train()
    with pytest.raises(UserError, match="loss .* step 3"):
        resumed(learner).train()


def test_a_meter_gives_means_over_steps_and_accuracy_over_images() -> None:
    meter = Meter(torch.device("cpu"))
    for clf, sparse, correct, images in ((1.0, 0.5, 3, 4), (2.0, 0.0, 1, 1)):
        meter.add(torch.tensor(clf), torch.tensor(sparse), torch.tensor(correct), images)
    assert meter.read() == {"loss": 1.75, "clf": 1.5, "sparse": 0.25, "accuracy": 80.0}


@pytest.mark.parametrize("precision, kind", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_the_backbone_and_features_are_float32(precision: str, kind: torch.dtype) -> None:
    learner, seen = learner_of(tiny_config(precision=precision)), []
    learner.backbone.vit.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert learner.embed(test_images(learner, 2)).dtype == torch.float32 and seen == [kind]
