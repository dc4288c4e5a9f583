"""backbone/heads/: their mathematics against independent code, and the invariants of whole runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.linear_model import Ridge
from torch import Tensor

import trainer
from backbone.heads import HEADS
from backbone.heads.aligned import LOGIT_NORM, AlignedHead, factor, level
from backbone.heads.cosine import CosineHead
from backbone.heads.ridge import CANDIDATES, HELD_OUT, RidgeHead
from models import load_network
from tests.helpers import PRETRAINED, Watch, in_batches, learn, learner_of, resumed, same, test_images, tiny_config
from tests.tiny_backbone import WIDTH
from utils.errors import UserError

QUICK = {"ridge": {"ridge_dim": 48}, "aligned": {"align_epochs": 1, "align_samples": 16}}
COMBINATIONS = [(head, "gumbel_sparsemax") for head in HEADS] + [
    pytest.param(head, "none", marks=pytest.mark.slow) for head in HEADS]


def config_of(head: str, gate: str = "gumbel_sparsemax", **changes):
    return tiny_config(**{"head": head, "gate": gate, "nb_tasks": 2, **QUICK.get(head, {}), **changes})


def quiet(title: str, done: int, total: int) -> None:
    """Nobody watches."""


def stream_of_features(classes: int = 6, width: int = 8, images: int = 30) -> tuple[Tensor, Tensor]:
    """Gaussian classes with unequal means and covariances, class by class, float64."""
    stream = torch.Generator().manual_seed(0)
    options = {"generator": stream, "dtype": torch.float64}
    parts = [torch.randn(images + label, width, **options) @ torch.randn(width, width, **options) / 3
             + 2 * torch.randn(width, **options) for label in range(classes)]
    return torch.cat(parts), torch.repeat_interleave(torch.arange(classes), torch.tensor([len(part) for part in parts]))


def fed(kind: type, features: Tensor, labels: Tensor, batch: int = 7, **changes):
    """A head in float64 that has learned the features' classes as tasks of two, without training."""
    head = kind(features.shape[1], config_of(kind.kind, **changes), 0).double()
    for task in range(int(labels.max()) // 2 + 1):
        head.grow(2, torch.Generator().manual_seed(task))
        head.commit()
        mine = labels // 2 == task
        head.absorb(head.collect(in_batches(features[mine], labels[mine] - 2 * task, batch), 2), task, quiet)
    return head


# ---- linear


@pytest.mark.parametrize("kind", HEADS)
def test_rows_start_uniform_with_variance_one_over_the_width_and_bias_0(kind: str) -> None:
    """METHOD.md, section 4: U(-sqrt(3 / d), sqrt(3 / d))."""
    for width in (8, 128):
        head, bound = HEADS[kind](width, config_of(kind), 0), (3 / width) ** 0.5
        head.grow(40_000 // width, torch.Generator().manual_seed(0))
        drawn = head.new_weight.detach().double().flatten().numpy()
        assert 0.99 * bound < np.abs(drawn).max() <= bound * (1 + 1e-6)
        assert drawn.var() == pytest.approx(1 / width, rel=0.02) and abs(drawn.mean()) < 0.02 * bound
        assert stats.kstest(drawn, stats.uniform(-bound, 2 * bound).cdf).statistic < 0.02
        assert head.new_bias is None if kind == "cosine" else not head.new_bias.any()


# ---- cosine


def test_cosine_logits_are_scaled_cosines() -> None:
    features, _ = stream_of_features()
    head = CosineHead(8, config_of("cosine", cosine_scale=5.0), 0).double()
    head.grow(3, torch.Generator().manual_seed(0))
    vectors = head.new_weight.detach().numpy()
    x = features.numpy()
    expected = 5 * (x @ vectors.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)
    assert np.allclose(head.current_logits(features).detach(), expected) and np.allclose(head(features), expected)
    head.commit()
    assert np.allclose(head(features), expected) and np.allclose(head(7 * features), expected), "lengths do not count"


def test_the_scale_is_trained_with_the_first_task_and_moves_no_old_logit() -> None:
    learner = learner_of(config_of("cosine"))
    learner.begin_task(0)
    assert any(parameter is learner.head.scale for group in learner.groups() for parameter in group["params"])
    learner.train()
    learner.end_task()
    scale, rows = learner.head.scale.item(), learner.head.weight.clone()
    assert scale != learner.config.cosine_scale and rows.norm(dim=1).tolist() == pytest.approx([abs(scale)] * 2)
    learn(learner, range(1, 2))
    assert learner.head.scale.item() == scale and torch.equal(learner.head.weight[:2], rows)
    assert learner.head.trainable() == []


# ---- aligned


def test_aligned_statistics_are_mean_and_covariance_of_each_class() -> None:
    features, labels = stream_of_features()
    head = fed(AlignedHead, features, labels)
    assert head.sizes.tolist() == [2, 2, 2]
    for label in range(6):
        members = features[labels == label].numpy()
        assert np.allclose(head.means[label], members.mean(0)) and np.allclose(head.covariance(label), np.cov(members.T))


def test_samples_have_the_moments_of_their_class() -> None:
    features, labels = stream_of_features(classes=2)
    head = fed(AlignedHead, features, labels)
    factors = [factor(head.covariance(label)) for label in range(2)]
    samples, drawn = head.draw(factors, 50_000, torch.Generator().manual_seed(3))
    assert drawn.tolist() == [0] * 50_000 + [1] * 50_000
    for label in range(2):
        members = features[labels == label].numpy()
        wanted, got = np.cov(members.T), np.cov(samples[drawn == label].numpy().T)
        assert np.abs(samples[drawn == label].mean(0).numpy() - members.mean(0)).max() < 0.05
        assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_class_of_few_images_can_be_drawn_from() -> None:
    for images in (1, 3):
        features = torch.randn(2 * images, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        head = fed(AlignedHead, features, torch.arange(2).repeat_interleave(images))
        assert torch.isfinite(head.weight).all() and torch.isfinite(head.covariances).all()


def test_level_divides_by_the_mean_norm_over_tasks() -> None:
    logits = torch.tensor([[3.0, 4.0, 0.0, 0.0, 1.0]])
    assert torch.allclose(level(logits, [2, 3]), logits / 3 / LOGIT_NORM)  # norms 5 and 1


def test_alignment_tells_tasks_apart_that_were_trained_alone() -> None:
    features, labels = stream_of_features()
    head = fed(AlignedHead, features, labels, align_epochs=30, align_samples=64, align_lr=0.05)
    untrained = HEADS["linear"](8, config_of("linear"), 0).double()
    untrained.grow(6, torch.Generator().manual_seed(0))
    right = [(one(features).argmax(1) == labels).double().mean().item() for one in (head, untrained)]
    assert right[0] > 0.9 > 0.5 > right[1]


# ---- ridge


def test_ridge_over_tasks_is_ridge_on_all_images_at_once() -> None:
    features, labels = stream_of_features()
    head = fed(RidgeHead, features, labels, ridge_lambda=0.01)
    hidden = np.maximum(features.numpy() @ head.projection.numpy(), 0)
    penalty = 0.01 * np.mean(np.sum(hidden**2, axis=0))
    model = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky").fit(hidden, np.eye(6)[labels])
    assert np.allclose(head.readout, model.coef_, atol=1e-8)
    assert np.allclose(head(features), model.predict(hidden), atol=1e-8)


def test_auto_takes_the_penalty_with_the_smallest_error_on_images_left_out_of_all_tasks() -> None:
    features, labels = stream_of_features()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    features, labels = features[order], labels[order]
    head = fed(RidgeHead, features, labels)
    hidden, targets = np.maximum(features.numpy() @ head.projection.numpy(), 0), np.eye(6)[labels]
    out = np.zeros(len(labels), dtype=bool)
    for task in range(3):  # of every task its own fifth
        of_task = np.flatnonzero(labels // 2 == task)
        out[of_task[(np.arange(len(of_task)) + 1) % HELD_OUT == 0]] = True

    def best(hidden: np.ndarray, targets: np.ndarray, out: np.ndarray) -> float:
        errors = []
        for candidate in CANDIDATES:
            penalty = candidate * np.mean(np.sum(hidden[~out] ** 2, axis=0))
            model = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky").fit(hidden[~out], targets[~out])
            errors.append(np.square(model.predict(hidden[out]) - targets[out]).sum())
        return CANDIDATES[int(np.argmin(errors))]

    chosen, last = best(hidden, targets, out), (labels >= 4).numpy()
    assert chosen != best(hidden[last], targets[last], out[last]), "else this stream cannot tell"
    assert torch.allclose(head.readout, fed(RidgeHead, features, labels, ridge_lambda=chosen).readout)


@pytest.mark.parametrize("processes, size", [(1, 100), (2, 35), (2, 286), (3, 7)])
@pytest.mark.parametrize("changes", [{"model_name": "finetune_head", "head": "ridge"}, {"model_name": "ranpac"}])
def test_every_fifth_image_of_the_pass_is_held_out_whichever_process_sees_it(changes: dict, processes: int, size: int,
                                                                             monkeypatch) -> None:
    """Of the 287 images of a task, in passes as every process in turn would make them."""
    learner = learner_of(tiny_config(**changes, nb_tasks=2, ridge_dim=48, batch_size=size))
    learner.begin_task(0)
    (images, labels), = learner.data.eval_batches("train", range(2), 287)
    mixed = torch.randn(images[0].numel(), WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learner.features = lambda images: images.double().flatten(1) @ mixed  # sums by the network differ in more than the order
    parts = []
    for number in range(processes):
        monkeypatch.setattr("utils.runs.distributed.part", lambda part=(number, processes): part)
        parts.append(learner.head.collect(learner._task_features(), 2))
    h, y = learner.head.random_features(learner.features(images)), F.one_hot(labels, 2).double()
    out = torch.arange(1, 288) % 5 == 0
    for sums, rows in ((slice(0, 2), ~out), (slice(2, 4), out)):
        torch.testing.assert_close([sum(each) for each in list(zip(*parts))[sums]],
                                   [h[rows].T @ h[rows], h[rows].T @ y[rows]])


def test_a_penalty_that_is_too_small_is_one_sentence() -> None:
    features, labels = stream_of_features(classes=2, images=5)  # fewer images than random features
    with pytest.raises(UserError, match="^ridge_lambda: 1e-300 is too small"):
        fed(RidgeHead, features, labels, ridge_lambda=1e-300)


def test_a_head_that_is_read_from_a_file_has_no_sums() -> None:
    head = HEADS["ridge"].unfilled(768, 0)
    assert max(tensor.numel() for tensor in head.buffers()) < 1000, "the usual ones have 6,144 squared"


def test_linear_rows_answer_while_a_task_is_learned() -> None:
    features, labels = stream_of_features()
    head = fed(RidgeHead, features, labels)
    closed = head(features)
    head.grow(2, torch.Generator().manual_seed(9))
    assert torch.equal(head(features), F.linear(features, *head.rows())) and head(features).shape[1] == 8
    assert not torch.allclose(head(features)[:, :6], closed)


# ---- every head


@pytest.mark.parametrize("processes, size", [(2, 7), (2, 30), (3, 5)])
@pytest.mark.parametrize("kind", [AlignedHead, RidgeHead])
def test_sums_add_up_over_parts_of_the_images(kind: type, processes: int, size: int) -> None:
    """What several processes collect of a task is added up, also where some have nothing of its last batch."""
    features, labels = stream_of_features(classes=2)
    whole, parts = (kind(8, config_of(kind.kind), 0).double() for _ in range(2))
    for head in (whole, parts):
        head.grow(2, torch.Generator().manual_seed(0))
        head.commit()
    each = [parts.collect(in_batches(features, labels, size, (number, processes)), 2) for number in range(processes)]
    together, alone = [sum(sums) for sums in zip(*each)], whole.collect(in_batches(features, labels, len(labels)), 2)
    torch.testing.assert_close(together, alone)
    parts.absorb(together, 0, quiet)
    whole.absorb(alone, 0, quiet)
    for mine, theirs in zip(parts.buffers(), whole.buffers(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("head, gate", COMBINATIONS)
def test_i8_and_i9_neither_evaluations_nor_interruptions_change_a_bit(head: str, gate: str) -> None:
    plain = learn(learner_of(config_of(head, gate, eval_every=0)), range(2))
    learner, seen = learner_of(config_of(head, gate), Watch()), []
    for task in range(2):
        learner.begin_task(task)
        learner.train()
        seen += learner.session.evaluated
        learner = resumed(learner, Watch())  # in task 0 the scale of a cosine head is trained, in task 1 there are statistics
        learner.end_task()
    assert seen == [2, 4] and same(learner, plain)
    assert all(map(torch.equal, learner.head.to_file().values(), plain.head.to_file().values()))


def alone(head: str, **changes):
    """A config of a head on the frozen backbone."""
    return tiny_config(**{"model_name": "finetune_head", "head": head, "nb_tasks": 2, **QUICK.get(head, {}), **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple[str, str], tuple[Path, Tensor, Tensor]]:
    """Finished runs of every head, of one with the baseline, of one without adapters, and of the class means: folder, test
    images and their logits by the network that the run evaluated last."""
    configs = {(head, "gumbel_sparsemax"): config_of(head) for head in HEADS}
    configs["ridge", "none"] = config_of("ridge", "none")
    configs["ridge", "alone"] = alone("ridge")
    configs["means", "alone"] = tiny_config(model_name="simplecil", nb_tasks=2)
    finished = {}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp("runs") / "run"
        run = trainer.Run(config.model_copy(update={"filepath": str(folder)}), 1993, folder, torch.device("cpu"))
        run.finish()
        images = next(iter(run.data.eval_batches("test", range(4), 32)))[0]
        finished[name] = folder, images, run.learner.predict(images)
    return finished


def test_i3_the_network_of_every_head_is_rebuilt_to_the_bit(runs: dict) -> None:
    for folder, images, logits in runs.values():
        assert torch.equal(load_network(folder, 1)(images), logits), folder


def test_a_head_changes_neither_the_training_of_the_first_task_nor_the_gate(runs: dict) -> None:
    """Of one task the linear rows are trained alike under every head with linear rows, so the adapters are the same."""
    adapters = [load_network(runs[head, "gumbel_sparsemax"][0], 0).backbone.vit.blocks[0].attn.qkv.merged
                for head in ("linear", "aligned", "ridge")]
    assert torch.equal(adapters[0], adapters[1]) and torch.equal(adapters[0], adapters[2])


@pytest.mark.parametrize("head, extra", [
    ("linear", lambda c, d, m: 0), ("cosine", lambda c, d, m: 4),
    ("aligned", lambda c, d, m: 4 * c * (d + d * (d + 1) // 2) + 8 * c // 2),
    ("ridge", lambda c, d, m: 4 * m * (d + c) + 16 * m * (m + c))])  # of all images, and of those held out
def test_stored_bytes_count_statistics_and_no_images(head: str, extra) -> None:
    """Beside the linear rows: nothing that grows with the number of images."""
    learner = learner_of(alone(head))
    learn(learner, range(2))
    stored = sum(t.numel() * t.element_size() for t in learner.stored_tensors())
    assert stored == 4 * 4 * (WIDTH + 1) + extra(4, WIDTH, 48)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_held_out_losses_and_refits_work_with_every_head(head: str) -> None:
    learner = learner_of(config_of(head, growth_rule="val_loss", growth_margin=10.0, val_fraction=0.2, refit_epochs=1))
    learn(learner, range(2))
    assert learner.bank.tasks == [0] and torch.isfinite(learner.predict(test_images(learner))).all()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["aligned", "ridge"])
def test_heads_on_frozen_features_beat_the_linear_one(head: str) -> None:
    accuracies = []
    for name in ("linear", head):
        learner = learner_of(alone(name, nb_tasks=3, **PRETRAINED))
        learn(learner, range(3))
        right = [(learner.predict(x).argmax(1) == y) for x, y in learner.data.eval_batches("test", range(6), 64)]
        accuracies.append(torch.cat(right).double().mean().item())
    assert accuracies[1] > accuracies[0] + 0.1


@pytest.mark.slow
def test_heads_work_under_bf16() -> None:
    for head in ("cosine", "ridge"):
        learner = learner_of(config_of(head, precision="bf16", nb_tasks=1))
        learn(learner, range(1))
        assert learner.predict(test_images(learner)).dtype == torch.float32
