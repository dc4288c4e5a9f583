"""models/litelora.py: both phases against plain tensor code written from the formulas, the decision, and what a run leaves."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import trainer
from analysis.gates import main
from backbone.vit import load_vit
from models import load_network
from models.litelora import LiteLoRA
from tests.helpers import in_float64, learn, learner_of, test_images
from tests.tiny_backbone import BLOCKS, NAME, TINY, WIDTH
from trainer import Quiet
from utils.config import Config, config_from_dict, config_warnings
from utils.errors import UserError
from utils.gumbel_utils import sample_gumbel
from utils.rng import generator
from utils.runs.runtime import log_to_console
from utils.runs.signals import Stopped

SMALL = {"dataset": "digits", "init_cls": 2, "increment": 2, "nb_tasks": 3, "model_name": "litelora",
         **TINY, "init_epoch": 1, "epochs": 1, "batch_size": 32, "batch_size_p2": 32, "init_lr": 0.01,
         "lrate": 0.04, "rank": 4, "device": "cpu", "filepath": "./unused/", "weight_decay": 0.1}

# What LiteLoRA's own file for CIFAR-100 says, key by key.
OWN_FILE = {
    "prefix": "reproduce", "dataset": "cifar224", "memory_size": 0, "memory_per_class": 0, "fixed_memory": False, "shuffle":
    True, "init_cls": 10, "increment": 10, "model_name": "litelora", "backbone_type": "vit_base_patch16_224_litelora",
    "device": "0", "seed": [1993], "order_seed": [1993], "scheduler": "cosine", "min_lr": 0.005, "tuned_epoch": 20,
    "filepath": "./results/litelora_c100/", "init_epoch": 20, "init_lr": 0.008, "init_milestones": [60, 120, 170],
    "init_lr_decay": 0.1, "init_weight_decay": 0.0005, "lrate": 0.008, "milestones": [40, 70], "lrate_decay": 0, "batch_size":
    128, "weight_decay": 0.0002, "init_alpha": 1.0, "init_logit": 0.5, "alpha_epochs": 20, "beta_epochs": 1,
    "lambda_sparsity": 0.035, "binary_beta": True, "batch_size_p2": 128, "alpha_lr": 0.008, "beta_lr": 0.05}


def small_config(**changes) -> Config:
    return config_from_dict({**SMALL, **changes})


class PlainLiteLoRA:
    """Equation by equation: adapters as lists of factors, dense products, nothing merged, nothing kept between calls.

    The learner was also held against the forward of the published gate and layer (tanguy8001/LiteLoRA at 0fcb287, typed anew,
    in float64, with one draw of noise in place of one per block and projection) on the batch of `prepared`, over eight draws:
    all gradients and the prediction of phase 1 and the logit's gradient of phase 2 differ by less than 1e-8, relatively; the
    losses, which the learner sums in float32, by less than 1e-7.
    """

    def __init__(self, adapters: list[tuple[Tensor, Tensor]], alphas: Tensor, head: tuple[Tensor, Tensor]) -> None:
        self.vit = load_vit(NAME, pretrained=False, weights=None, seed=1993)[0].double()
        self.adapters, self.alphas, self.head = adapters, alphas, head
        self.betas = torch.ones(len(adapters), dtype=torch.float64)
        for number, block in enumerate(self.vit.blocks):
            block.attn.qkv.register_forward_hook(lambda m, x, y, number=number: self.add(number, x[0], y))

    def add(self, block: int, x: Tensor, y: Tensor) -> Tensor:
        parts = list(y.chunk(3, -1))
        for task, (A, B) in enumerate(self.adapters):
            for p, place in ((0, 0), (1, 2)):
                product = B[block, p] @ A[block, p]
                if task + 1 < len(self.adapters):
                    product = product / (torch.linalg.norm(B[block, p]) * torch.linalg.norm(A[block, p]))
                parts[place] = parts[place] + self.betas[task] * self.alphas[task] * (x @ product.T)
        return torch.cat(parts, -1)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(self.vit(images), *self.head), targets)


def prepared(**changes) -> tuple[LiteLoRA, PlainLiteLoRA, Tensor, Tensor]:
    """A learner in float64 that has begun task 2, with factors as after training, the same in plain tensors, and a batch."""
    learner = learner_of(small_config(**changes))
    in_float64(learner)
    adapters = []
    for task in range(3):
        learner.begin_task(task)
        bank = learner.bank
        with torch.no_grad():
            bank.new_B.copy_(torch.randn(bank.new_B.shape, generator=generator(task, "B"), dtype=torch.float64) * 0.2)
            bank.alpha.copy_(torch.tensor([1.3, 0.7, 1.1])[:task + 1])
        adapters.append((bank.new_A.detach().clone(), bank.new_B.detach().clone()))
        if task < 2:
            learner.end_task()
    leaf = [part.requires_grad_() for part in adapters[2]]
    alphas = learner.bank.alpha.detach().clone().requires_grad_()
    head = tuple(part.detach().clone().requires_grad_() for part in (learner.head.new_weight, learner.head.new_bias))
    plain = PlainLiteLoRA([*adapters[:2], tuple(leaf)], alphas, head)
    images = torch.rand(6, 3, 16, 16, generator=generator(0, "x"), dtype=torch.float64)
    return learner, plain, images, torch.tensor([4, 5, 5, 4, 4, 5])


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


# ---- fidelity


def test_phase_1_has_the_loss_gradients_and_prediction_of_the_formulas() -> None:
    learner, plain, images, labels = prepared()
    assert learner.phases(2)[0].optimizer().param_groups and learner.phases(2)[0].step(0) is None
    clf, sparse, _ = learner.backward(images, labels, None, len(images))
    loss = plain.loss(images, labels - 4)
    loss.backward()
    assert close(clf, loss.detach()) and sparse == 0
    A, B = plain.adapters[2]
    for mine, theirs in ((learner.bank.new_A, A), (learner.bank.new_B, B), (learner.bank.alpha, plain.alphas),
                         (learner.head.new_weight, plain.head[0]), (learner.head.new_bias, plain.head[1])):
        assert theirs.grad.abs().max() > 0 and close(mine.grad, theirs.grad)
    learner.start_evaluation()
    rows = [torch.cat([learner.head.weight, plain.head[0].detach()]), torch.cat([learner.head.bias, plain.head[1].detach()])]
    assert close(learner.predict(images), F.linear(plain.vit(images), *rows).detach())


@pytest.mark.parametrize("is_open", [True, False])
def test_phase_2_has_the_loss_and_the_one_gradient_of_the_formulas(is_open: bool) -> None:
    learner, plain, images, labels = prepared(batch_size_p2=1, lambda_sparsity=0.3)
    draws = {step: sample_gumbel((1,), generator(1993, "gate", 2, step)).double() for step in range(60)}
    step = next(number for number, draw in draws.items() if bool(0.5 + draw > 0) is is_open)
    optimizer = learner.phases(2)[1].optimizer()
    extra = learner.phases(2)[1].step(step)
    clf, sparse, _ = learner.backward(images, labels, extra, len(images))

    beta = torch.tensor(float(is_open), dtype=torch.float64, requires_grad=True)  # at 0 the slope of |beta| is 0
    plain.betas = torch.stack([*plain.betas[:2], beta])
    loss = plain.loss(images, labels - 4)
    (loss + 0.3 * beta.abs()).backward()
    soft = torch.sigmoid(0.5 + draws[step])
    assert close(clf, loss.detach()) and sparse == 0.3 * is_open
    (logit,) = (parameter for group in optimizer.param_groups for parameter in group["params"])
    assert logit.shape == (1,) and close(logit.grad, beta.grad * soft * (1 - soft))
    assert all(p.grad is None for p in (learner.bank.new_A, learner.bank.new_B, learner.bank.alpha, learner.head.new_weight))
    assert set(learner.gate.parameters()) == {learner.gate.logits, logit} and learner.gate.logits.grad is None


def test_one_step_moves_what_the_phase_trains_and_nothing_else() -> None:
    learner, plain, images, labels = prepared(alpha_lr=0.02, momentum=0.0)
    first, second = learner.phases(2)
    optimizer = first.optimizer()
    first.step(0)
    learner.backward(images, labels, None, len(images))
    A, alpha = learner.bank.new_A, learner.bank.alpha
    expected = [A - 0.04 * A.grad, alpha - 0.02 * (alpha.grad + 0.1 * alpha)]  # weight decay on the magnitudes alone
    optimizer.step()
    assert close(A.detach(), expected[0].detach()) and close(alpha.detach(), expected[1].detach())

    optimizer = second.optimizer()
    before = learner.bank.snapshot()
    learner.backward(images, labels, second.step(3), len(images))
    sign = learner.gate.newest.grad.sign()
    optimizer.step()
    after = learner.bank.snapshot()
    assert all(torch.equal(after[name], before[name]) for name in ("new_A", "new_B", "alpha", "A", "B"))
    assert torch.equal(after["logits"][:2], before["logits"][:2])
    moved = 0.5 * (1 - 0.05 * 0.1) - 0.05 * sign  # AdamW's first step is its learning rate long
    assert after["logits"][2].item() == pytest.approx(moved.item(), abs=1e-6)


def test_a_stored_adapter_is_divided_by_both_norms_once_the_next_task_begins() -> None:
    learner = learner_of(small_config())
    learn(learner, range(1), end_last=False)
    A, B = learner.bank.new_A.detach().double(), learner.bank.new_B.detach().double()
    learner.end_task()
    unit = (learner.bank.B.double() @ learner.bank.A.double())
    assert torch.allclose(unit * learner.bank.magnitudes()[0][..., None, None], B @ A, atol=1e-6), "evaluated as trained"
    learner.begin_task(1)
    norms = torch.linalg.matrix_norm(B) * torch.linalg.matrix_norm(A)
    assert torch.allclose(unit * learner.bank.magnitudes()[0][..., None, None], B @ A / norms[..., None, None], atol=1e-6)


def test_the_start_is_that_of_the_code() -> None:
    learner = learner_of(small_config())
    learn(learner, range(1))
    assert learner.bank.alpha.tolist() == [1.0], "the first task's magnitude is not trained in it"
    learner.begin_task(1)
    bound, rows = math.sqrt(3 / WIDTH), learner.head.new_weight.detach()
    assert 0.9 * bound < rows.abs().max() <= bound and learner.head.new_bias.abs().max() == 0
    assert 0 < learner.bank.new_A.abs().max() <= 1 / math.sqrt(WIDTH) and learner.bank.new_B.abs().max() == 0
    assert learner.gate.logits.tolist() == [0.5, 0.5]
    learner.train()
    alpha = learner.bank.alpha.detach().clone()
    assert alpha[0] != 1 and alpha[1] != 1
    learner.end_task()
    learner.begin_task(2)
    assert torch.equal(learner.bank.alpha[:2], alpha) and learner.bank.alpha[2] == 1


def test_rates_are_cut_at_60_and_80_percent_of_phase_1_alone() -> None:
    learner = learner_of(small_config(init_epoch=20, epochs=20, init_milestones=[5], init_lr_decay=0.2, beta_epochs=2))
    (only,), (first, second) = learner.phases(0), learner.phases(1)
    assert [only.rate(epoch) for epoch in (0, 4, 5, 19)] == [1, 1, 0.2, 0.2]
    assert [first.rate(epoch) for epoch in (11, 12, 15, 16, 19)] == [1, 0.5, 0.5, 0.25, 0.25]
    assert (second.epochs, second.batch_size, second.rate(1)) == (2, 32, 1.0)
    assert learner_of(small_config(epochs=10, lrate_decay=0.1)).phases(1)[0].rate(9) == pytest.approx(0.01)


def test_noise_is_keyed_by_its_step_and_the_same_wherever_one_begins() -> None:
    learner = learner_of(small_config(batch_size_p2=4))
    learner.begin_task(1)
    whole = [learner.recipe.noise(step) for step in range(10, 20)]
    again = learner_of(small_config(batch_size_p2=4))
    again.begin_task(1)
    assert torch.equal(again.recipe.noise(15), whole[5]) and torch.equal(again.recipe.noise(12), whole[2])
    assert len({draw.item() for draw in whole}) == 10


# ---- decision and what is left behind


@pytest.mark.parametrize("logit, kept", [(0.0, True), (-1e-3, False)])
def test_the_newcomer_stays_from_one_half_on(logit: float, kept: bool) -> None:
    learner = learner_of(small_config())
    learn(learner, range(1))
    learn(learner, range(1, 2), end_last=False)
    with torch.no_grad():
        learner.gate.logits[-1] = logit
    rows = learner.head.new_weight.detach().clone()
    report = learner.end_task()
    assert report.kept is kept and report.beta == pytest.approx(torch.sigmoid(torch.tensor(logit)).item())
    assert report.beta_after == [1.0, float(kept)] and report.pruning_mask == [1, int(kept), 1]
    assert torch.equal(learner.head.weight[2:], rows), "rows are not fitted again"
    learner.begin_task(2)
    assert learner.bank.tasks == ([0, 1, 2] if kept else [0, 2])
    assert all(parameter.requires_grad for parameter in (*learner.head.trainable(), learner.bank.alpha, learner.bank.new_A))


def run_files(folder: Path) -> dict[str, Tensor]:
    saved = {f"{path.name}:{name}": tensor
             for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return saved | {f"{path.name}:{name}": value for path in folder.glob("*.pt") for name, value in torch.load(path).items()
                    if isinstance(value, Tensor)}


def test_a_run_says_what_decided_and_can_be_loaded(tmp_path: Path) -> None:
    log_to_console()
    config = small_config(filepath=str(tmp_path), lambda_sparsity=100.0, beta_lr=0.2, eval_every=1)
    (result,) = trainer.run(config)
    record = torch.load(tmp_path / "beta_values_task_2.pt")
    values = record["beta_values"].tolist()
    assert values[0] == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item()) and values[1] == 0 < values[2] < 0.5
    assert record["pruning_mask"].tolist() == [1, 0, 0] and record["beta_after"].tolist() == [1, 0, 0]
    assert (record["threshold"], record["growth_rule"], record["gate_scale"]) == (0.5, "threshold", 1.0)
    assert result["order_seed"] == 1993 and result["tasks"][2]["active_adapters"] == 1
    assert [path.name for path in tmp_path.glob("adapter_*")] == ["adapter_task_0.safetensors"]
    log = (tmp_path / "train.log").read_text()
    assert "Task 1, Epoch 2/2 => " in log and "sparse=" in log and f"(beta={values[2]:.4f} < 0.5000)" in log
    assert load_network(tmp_path, 2)(torch.rand(2, 3, 16, 16)).shape == (2, 6)
    assert load_network(tmp_path, 0).bank.tasks == [0]
    report = gates(tmp_path)
    assert report.startswith("# What the gate learned: digits, litelora, seed 1993, 3 tasks")


STOPPED = {"nb_tasks": 2, "batch_size_p2": 8, "eval_every": 0, "head": "cosine"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Tensor]:
    """What a run leaves that nobody has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    trainer.run(small_config(filepath=str(folder), **STOPPED))
    return run_files(folder)


def gates(folder: Path) -> str:
    """What `python -m analysis.gates` writes."""
    assert main([str(folder)]) == 0
    return (folder / "gates" / "gates.md").read_text()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_run_stopped_within_phase_2_ends_with_the_same_tensors(tmp_path: Path, monkeypatch, whole: dict,
                                                                 share: float) -> None:
    """`share` of phase 2 is done: at 0 the last step of phase 1 was the newest."""
    log_to_console()
    learner = learner_of(small_config(**STOPPED))
    per_epoch = learner.data.steps_per_epoch
    stop_at = per_epoch(0, 32) + per_epoch(1, 32) + int(share * per_epoch(1, 8))

    class Stopping(trainer.Run):
        def after_step(self) -> None:
            if self.steps + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            super().after_step()

    config = small_config(filepath=str(tmp_path), **STOPPED)
    monkeypatch.setattr(trainer, "Run", Stopping)
    with pytest.raises(Stopped):
        trainer.run(config)
    monkeypatch.undo()
    trainer.run(config)
    parts = run_files(tmp_path)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (tmp_path / "train.log").read_text().count("Continuing within task 1") == 1


def test_evaluating_within_a_task_changes_no_result() -> None:
    ends = []
    for every in (0, 1):
        session = Quiet()
        learner = learner_of(small_config(eval_every=every, nb_tasks=2), session)

        def evaluate(learner: LiteLoRA = learner) -> float:
            learner.start_evaluation()
            return float(learner.predict(test_images(learner)).sum())

        session.evaluate = evaluate
        learn(learner, range(2))
        ends.append((learner.bank.snapshot(), learner.head.weight))
    assert torch.equal(ends[0][1], ends[1][1])
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ("alpha", "A", "B", "logits"))


def test_parameters_and_bytes_are_counted() -> None:
    learner = learner_of(small_config(nb_tasks=2))
    learner.begin_task(0)
    factors = BLOCKS * 2 * 2 * 4 * WIDTH
    assert learner.trainable_parameters() == factors + 2 * WIDTH + 2
    learner.train()
    learner.end_task()
    learner.begin_task(1)
    assert learner.trainable_parameters() == factors + 2 * WIDTH + 2 + 2 + 1  # two magnitudes, one logit


# ---- config


def test_its_own_file_loads_and_trains_as_its_code_does() -> None:
    config = config_from_dict(OWN_FILE)
    assert (config.order_seed, config.device, config.alpha_epochs, config.alpha_optimizer) == (1993, ["0"], 20, "sgd")
    (warning,) = config_warnings(config)
    assert all(name in warning for name in ("scheduler", "min_lr", "tuned_epoch", "milestones", "init_weight_decay"))
    assert config_from_dict(config.model_dump(mode="json")) == config and not config_warnings(
        config_from_dict(config.model_dump(mode="json")))
    own = {**OWN_FILE, **{name: SMALL[name] for name in ("dataset", "init_cls", "increment", "nb_tasks", "backbone_type",
                                                         "filepath", "pretrained")}, "device": "cpu"}
    learner = learner_of(config_from_dict(own))
    assert [learner.phases(1)[0].rate(epoch) for epoch in (11, 12, 16)] == [1, 0.5, 0.25], "0 stands for 0.5; no cosine"


def test_alpha_epochs_fall_back_to_those_of_later_tasks() -> None:
    assert small_config(epochs=7).alpha_epochs == 7 and small_config(epochs=7, alpha_epochs=3).alpha_epochs == 3


@pytest.mark.parametrize("change, named", [
    ({"binary_beta": False}, "binary_beta"), ({"beta_epochs": 0}, "beta_epochs"), ({"alpha_epochs": 0}, "alpha_epochs"),
    ({"batch_size_p2": 0}, "batch_size_p2"), ({"beta_lr": -0.1}, "beta_lr"), ({"lambda_sparsity": -1}, "lambda_sparsity"),
    ({"init_logit": "high"}, "init_logit"), ({"init_alpha": 0}, "init_alpha"), ({"growth_threshold": 1.5}, "growth_threshold"),
    ({"gate": "evidence"}, "gate"), ({"growth_rule": "topk"}, "growth_rule"), ({"order_seed": -1}, "order_seed"),
    ({"order_seed": [1, 2]}, "order_seed"), ({"grad_accum": 65}, "grad_accum"),
    ({"alpha_optimizer": "lion"}, "alpha_optimizer")])
def test_bad_values_are_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"'{named}'"):
        small_config(**change)


def test_its_keys_have_no_effect_for_another_method() -> None:
    with pytest.raises(UserError, match="'beta_lr'"):
        config_from_dict({"dataset": "digits", "init_cls": 2, "beta_lr": 0.1})
