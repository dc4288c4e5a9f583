"""models/sema.py and backbone/mixture.py against the paper and its code on plain tensors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.mixture import ADAPTER, DESCRIPTOR, ROUTER
from models.sema import SEMA
from tests.helpers import ROOT, learner_of, small_config, test_images, with_images_in_float64
from tests.models.plain_adapters import fresh
from utils.config import load_config
from utils.errors import UserError
from utils.rng import generator

CLOSE = {"rtol": 1e-8, "atol": 1e-11}
GROWING = [4, 5]
Cells = list[dict[str, list[Tensor]]]  # of every block, of every part one tensor per adapter


def begun(**changes) -> SEMA:
    """A learner in float64 that has begun task 0, its adapters as if trained."""
    changes = {"bottleneck": 5, "rd_dim": 4, "nb_tasks": 2, "growing_share": 1 / 3, "rd_epochs": 1, "eval_every": 0, **changes}
    learner = with_images_in_float64(learner_of(small_config(model_name="sema", **changes)))
    learner.begin_task(0)
    look_trained(learner)
    return learner


@torch.no_grad()
def look_trained(learner: SEMA) -> None:
    draw = generator(learner.task, "trained")
    for part in learner.bank.current(*ADAPTER, *ROUTER, *DESCRIPTOR):
        part += torch.randn(part.shape, generator=draw) * 0.2


def leaves(learner: SEMA) -> Cells:
    """All adapters as tensors of their own, the current one of a block last."""
    cells = []
    for cell in learner.bank.cells:
        parts = {name: list(getattr(cell, name).clone().unbind()) for name in cell.shapes}
        for name in cell.shapes if cell.new_down is not None else ():
            parts[name].append(getattr(cell, f"new_{name}").detach().clone().requires_grad_())
        cells.append(parts)
    return cells


def plain_features(vit: nn.Module, images: Tensor, cells: Cells, means: dict[int, Tensor] | None = None) -> Tensor:
    """Class-token features; the mean tokens that the routers see go to `means`."""
    x = vit.patch_embed(images)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
    for number, (block, parts) in enumerate(zip(vit.blocks, cells, strict=True)):
        x = x + block.attn(block.norm1(x))
        outputs = [torch.relu(x @ D.T + d) @ U.T + u for D, d, U, u in zip(*(parts[name] for name in ADAPTER), strict=True)]
        beside = outputs[0]
        if number in GROWING:
            mean = sum(x[:, token] for token in range(x.shape[1])) / x.shape[1]
            if means is not None:
                means[number] = mean.detach()
            scores = torch.stack([mean @ column + bias for column, bias in zip(*(parts[r] for r in ROUTER), strict=True)], 1)
            beside = sum(w[:, None, None] * out for w, out in zip(scores.softmax(1).unbind(1), outputs, strict=True))
        x = x + block.mlp(block.norm2(x)) + beside
    return vit.norm(x)[:, 0]


def descriptor_error(parts: dict[str, list[Tensor]], number: int, mean: Tensor) -> Tensor:
    E, e, D, d = (parts[name][number] for name in DESCRIPTOR)
    return torch.stack([F.mse_loss((row @ E.T + e) @ D.T + d, row) for row in mean])


def check_gradients(learner: SEMA, cells: Cells, names: tuple[str, ...]) -> None:
    for number, (cell, parts) in enumerate(zip(learner.bank.cells, cells, strict=True)):
        for name in names if cell.new_down is not None else ():
            if name in cell.shapes:
                torch.testing.assert_close(getattr(cell, f"new_{name}").grad, parts[name][-1].grad, **CLOSE,
                                           msg=lambda text, where=(number, name): f"{where}: {text}")


def test_loss_and_gradients_of_adapters_routers_and_descriptors() -> None:
    learner, vit = begun(), fresh()
    for task in range(2):
        if task:
            learner.end_task()
            learner.begin_task(1)
            learner.bank.cells[5].add(generator(0, "more"))
            look_trained(learner)
        images, labels = next(iter(learner.data.train_batches(task, 0, 6)))
        cells, means, head = leaves(learner), {}, learner.head
        rows = [row.detach().clone().requires_grad_() for row in (head.new_weight, head.new_bias)]
        loss = F.cross_entropy(plain_features(vit, images, cells, means) @ rows[0].T + rows[1], labels - 2 * task)
        loss.backward()
        learner._prepare(False, 0)
        found, _ = learner.loss(images, labels - 2 * task)
        torch.testing.assert_close(found / 6, loss, **CLOSE)
        (found / 6).backward()
        check_gradients(learner, cells, (*ADAPTER, *ROUTER))
        assert learner.bank.cells[5].new_up.grad.abs().max() > 1e-6 and head.new_weight.grad.abs().max() > 1e-6
        assert (learner.bank.cells[5].new_router.grad.abs().max() > 1e-8) == bool(task), "one adapter has all the weight"
        torch.testing.assert_close(head.new_weight.grad, rows[0].grad, **CLOSE)
        torch.testing.assert_close(head.new_bias.grad, rows[1].grad, **CLOSE)
        trained = GROWING if task == 0 else [5]
        errors = [descriptor_error(cells[number], -1, means[number]) for number in trained]
        sum(error.mean() for error in errors).backward()
        learner._prepare(True, 0)
        learner.bank.zero_grad()
        clf, _, _ = learner.backward(images, labels, None, 6)
        assert clf.item() == pytest.approx(sum(error.mean().item() for error in errors), rel=1e-5)
        check_gradients(learner, cells, DESCRIPTOR)
        for number, error in zip(trained, errors, strict=True):
            torch.testing.assert_close(learner.bank.cells[number].recent, error.detach(), **CLOSE)
        assert learner.bank.cells[5].new_up.grad is None, "descriptors move nothing else"


def test_scores_and_prediction_are_those_of_all_adapters() -> None:
    learner, vit = begun(), fresh()
    images, tested = next(iter(learner.data.train_batches(0, 0, 8)))[0], test_images(learner, 5).double()
    for cell in learner.bank.cells:
        if cell.grows:
            cell.recent = torch.rand(9, generator=generator(0, "recent")).double()
    learner.end_task()
    learner.begin_task(1)
    for number in GROWING:
        learner.bank.cells[number].add(generator(number, "more"))
        learner.bank.cells[number].remember(torch.rand(9, generator=generator(1, "recent")).double() + 1)
    look_trained(learner)
    cells, means = leaves(learner), {}
    rows, bias = learner.head.rows()
    with torch.no_grad():
        want = plain_features(vit, tested, cells) @ rows.T + bias
        plain_features(vit, images, cells, means)
        learner.bank.commit()
        found = learner._scores(images, len(images))
    torch.testing.assert_close(learner.predict(tested), want, **CLOSE)
    for number in GROWING:
        z = []
        for k in range(2):
            recent = torch.rand(9, generator=generator(k, "recent")).double() + k
            deviation = math.sqrt(((recent - recent.mean()) ** 2).sum().item() / 8)
            error = descriptor_error(cells[number], k, means[number]).detach()
            z.append(((error - recent.mean()) / deviation).abs().mean().item())
        assert found[number] == pytest.approx(min(z), rel=1e-8)
    adapter, more = 2 * 128 * 5 + 5 + 128, 129 + 2 * 128 * 4 + 4 + 128 + 2
    learner.end_task()
    assert sum(tensor.numel() for tensor in learner.stored_tensors()) == 8 * adapter + 4 * more + 4 * 129


def test_what_is_new_grows_the_shallowest_block_first_and_leaves_the_rest_alone() -> None:
    learner = begun(expansion_threshold=0.0, detect_batch_size=8)
    learner.train()
    assert [len(cell.recent) for cell in learner.bank.cells if cell.grows] == [40, 40], "an epoch of 40 images"
    learner.end_task()
    before = [{name: part[0].clone() for name, part in cell.named_buffers() if len(part)} for cell in learner.bank.cells]
    learner.begin_task(1)
    learner.train()
    last = learner.bank.cells[5]
    adapter = sum(part[0].numel() for name, part in last.named_buffers() if name in last.shapes)
    assert learner.trainable_parameters() == 2 * adapter + 2 * 129, "what has grown, and the rows"
    assert learner._grown == GROWING and learner.epochs() == 4 and learner.steps_done() == 4 * 2
    learner.end_task()
    assert [len(cell) for cell in learner.bank.cells] == [1, 1, 1, 1, 2, 2]
    for cell, parts in zip(learner.bank.cells, before, strict=True):
        assert all(torch.equal(getattr(cell, name)[0], part) for name, part in parts.items())
    report = learner.bank.cells[5]
    assert report.mean.shape == report.std.shape == (2,) and report.std.min() > 0


def test_what_is_not_new_trains_head_rows_alone() -> None:
    learner = begun(expansion_threshold=1e9)
    learner.train()
    learner.end_task()
    before = [tensor.clone() for tensor in learner.bank.buffers()]
    learner.begin_task(1)
    start = learner.head.new_weight.detach().clone()
    assert start.abs().max() <= 128**-0.5 and start.std() > 0.03 and learner.head.new_bias.abs().max() == 0
    learner.train()
    assert learner._grown == [] and learner.epochs() == 1 and not torch.equal(learner.head.new_weight, start)
    learner.end_task()
    assert all(torch.equal(a, b) for a, b in zip(before, learner.bank.buffers(), strict=True))


def test_the_rate_of_the_descriptors_falls_along_a_cosine() -> None:
    learner = begun(rd_epochs=4)
    assert [learner.phases(0)[1].rate(epoch) for epoch in (0, 2)] == [1, pytest.approx(0.5)]


def test_few_errors_find_nothing_new() -> None:
    cell = begun().bank.cells[5]
    cell.remember(torch.ones(2).double())
    cell.commit()
    assert cell.scores(torch.ones(3, 128).double()).tolist() == [[0, 0, 0]]


def test_a_descriptor_remembers_its_last_errors() -> None:
    cell = begun(rd_buffer=5).bank.cells[5]
    for step in range(3):
        cell.remember(torch.arange(3).double() + 3 * step)
    assert cell.recent.tolist() == [4, 5, 6, 7, 8]
    cell.commit()
    assert cell.mean.item() == 6 and cell.std.item() == pytest.approx(math.sqrt(2.5)) and len(cell.recent) == 0


@pytest.mark.parametrize("changes, word", [
    ({"growing_share": 0}, "'growing_share'"), ({"growing_share": 1.1}, "'growing_share'"),
    ({"bottleneck": 0}, "'bottleneck'"),
    ({"expansion_threshold": -1}, "'expansion_threshold'"), ({"rd_dim": 0}, "'rd_dim'"), ({"rd_buffer": 2}, "'rd_buffer'"),
    ({"detect_batch_size": 0}, "'detect_batch_size'"), ({"rd_lr": 0}, "'rd_lr'"),
    ({"adapter_scale": 0.2}, "'adapter_scale'.*no effect for")])
def test_bad_values_are_one_sentence(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        begun(**changes)


@pytest.mark.parametrize("name, epochs", [("sema_c100", 5), ("sema_inr", 20)])
def test_configs_follow_the_published_protocol(name: str, epochs: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.init_cls, config.increment, config.batch_size, config.detect_batch_size) == (10, 10, 32, 128)
    assert (config.init_epoch, config.epochs, config.rd_epochs) == (epochs, epochs, 20)
    assert (config.init_lr, config.lrate, config.rd_lr, config.weight_decay) == (0.005, 0.005, 0.01, 5e-4)
    assert (config.optimizer, config.momentum, config.scheduler, config.min_lr) == ("sgd", 0.9, "cosine", 0)
    assert (config.bottleneck, config.rd_dim, config.rd_buffer, config.expansion_threshold) == (16, 128, 500, 2)
    assert config.growing_share == 0.25
