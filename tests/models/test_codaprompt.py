"""models/codaprompt.py against plain tensor code that follows the paper and its official code."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.codaprompt import CODAPrompt, orthonormal
from tests.helpers import ROOT, test_images
from tests.models.plain_prefixes import CLOSE, batch_of, begun, check_gradients, leaf, learner, plain_features
from tests.tiny_backbone import BLOCKS, WIDTH
from utils.config import load_config
from utils.errors import UserError
from utils.rng import generator


def plain_prefixes(blocks: list[int], queries: Tensor, P: Tensor, K: Tensor, A: Tensor
                   ) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values by block, image by image and component by component."""
    found = {}
    for number, block in enumerate(blocks):
        prompts = []
        for q in queries:
            looked = [q * a for a in A[:, number]]
            cosines = [x @ k / (x.norm() * k.norm()) for x, k in zip(looked, K[:, number], strict=True)]
            prompts.append(sum(cosine * p.flatten(0, 1) for cosine, p in zip(cosines, P[:, number], strict=True)))  # [2L, d]
        tokens = torch.stack(prompts)
        half = tokens.shape[1] // 2
        found[block] = tokens[:, :half], tokens[:, half:]
    return found


def plain_penalty(*parts: Tensor) -> Tensor:
    total = 0
    for part in parts:
        for number in range(part.shape[1]):
            B = part[:, number].flatten(1)
            total = total + (B @ B.T - torch.eye(len(B)).double()).square().sum() / len(B) ** 2
    return total


@torch.no_grad()
def apart(learner: CODAPrompt) -> None:
    """Moves the pool off its start."""
    draw = generator(0, "apart")
    for part in (*learner.pool.buffers(), *learner.pool.parameters()):
        part += torch.randn(part.shape, generator=draw) * 0.3


@pytest.mark.parametrize("changes", [{}, {"ortho_mu": 0.0}, {"prompt_blocks": [1], "grad_accum": 3, "ortho_mu": 2.0}])
def test_loss_gradients_and_prediction_are_those_of_the_paper(changes: dict) -> None:
    learner = begun("codaprompt", **changes)
    apart(learner)
    pool, head, vit, config = learner.pool, learner.head, learner.backbone.vit, learner.config
    images, targets = batch_of(learner)
    old = {name: getattr(pool, name) for name in pool.growing}
    new = {name: leaf(getattr(pool, f"new_{name}")) for name in pool.growing}
    rows = [leaf(part) for part in (head.new_weight, head.new_bias)]
    P, K, A = (torch.cat([old[name], new[name]]) for name in ("prompts", "keys", "attentions"))
    assert len(P) == 6 and len(old["keys"]) == 3
    with torch.no_grad():
        queries = plain_features(vit, images, {})
    features = plain_features(vit, images, plain_prefixes(config.prompt_blocks, queries, P, K, A))
    clf = F.cross_entropy(features @ rows[0].T + rows[1], targets)
    penalty = config.ortho_mu * plain_penalty(P, K, A)
    (clf + penalty).backward()
    got, extra, _ = learner.backward(images, targets + 2, learner.before_step(0), len(images))
    assert abs(got.item() - clf.item()) < 1e-6  # the sum over the parts is kept in float32
    assert abs(extra.item() - float(penalty)) < 1e-10 and (float(penalty) > 0.1) == (config.ortho_mu > 0)
    check_gradients([(getattr(pool, f"new_{name}"), new[name]) for name in pool.growing]
                    + [(head.new_weight, rows[0]), (head.new_bias, rows[1])])
    assert all(part.grad is None for part in (*vit.parameters(), *pool.buffers()))

    images = test_images(learner, 9).double()
    with torch.no_grad():
        queries = plain_features(vit, images, {})
        features = plain_features(vit, images, plain_prefixes(config.prompt_blocks, queries, P, K, A))
        weight, bias = head.rows()
        torch.testing.assert_close(learner.predict(images), features @ weight.T + bias, rtol=1e-9, atol=1e-9)
        before = learner.predict(images)
        learner.settle()
        assert torch.equal(learner.predict(images), before)


def gram_schmidt(old: Tensor, draws: Tensor) -> Tensor:
    """As the official code: rows `[m, x]` that were there, whether or not they are orthogonal, then one by one."""
    rows = list(old)
    for draw in draws:
        rows.append(draw - sum((draw @ u) / (u @ u) * u for u in rows))
    return torch.stack([row / row.norm() for row in rows[len(old):]])


def test_components_start_orthonormal_to_those_before() -> None:
    draw = generator(0, "rows")
    old, draws = (torch.randn(count, 2, 12, generator=draw).double() for count in (3, 4))
    found = orthonormal(old, draws)
    for block in range(2):
        torch.testing.assert_close(found[:, block], gram_schmidt(old[:, block], draws[:, block]), **CLOSE)
    made = learner("codaprompt")
    for task in range(2):
        made.begin_task(task)
        for name in made.pool.growing:
            parts = made.pool.whole(name).flatten(2).transpose(0, 1)
            torch.testing.assert_close(parts @ parts.mT, torch.eye(3 * task + 3).double().expand(2, -1, -1), rtol=0, atol=1e-9)
        assert made.pool.penalty() < 1e-15
        made.settle()  # as it started: orthonormal, so that the next task's can be orthogonal to all of it
        made.head.commit()


def test_only_the_newest_components_are_trained() -> None:
    made = begun("codaprompt")
    pool, head = made.pool, made.head
    assert head.new_weight.abs().max() <= WIDTH**-0.5 and 0 < head.new_bias.abs().max() <= WIDTH**-0.5
    fixed = {name: tensor.clone() for name, tensor in pool.named_buffers()}
    started = {name: getattr(pool, f"new_{name}").detach().clone() for name in pool.growing}
    made.train()
    made.end_task()
    for name in pool.growing:
        assert torch.equal(getattr(pool, name)[:3], fixed[name])
        assert (getattr(pool, name)[3:] - started[name]).abs().max() > 1e-3


def test_parameters_are_counted() -> None:
    made = learner("codaprompt", prompt_components=7)
    for task in range(2):
        made.begin_task(task)
        task_s = 3 * 2 * (4 + 2) * WIDTH + 2 * (WIDTH + 1)  # 7 / 2 rounded down; 2 blocks; 4 tokens, a key, an attention
        assert made.trainable_parameters() == task_s
        made.settle()
        made.head.commit()
        assert sum(tensor.numel() for tensor in made.stored_tensors()) == (task + 1) * task_s


def test_the_learning_rate_is_a_quarter_of_a_cosine() -> None:
    rate = learner("codaprompt", epochs=20).phases(1)[0].rate
    for epoch in (0, 7, 19):
        assert rate(epoch) == pytest.approx(math.cos(99 * math.pi * epoch / (200 * 19)))


def test_with_compile_the_whole_network_is_one_graph_that_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    found = []
    for value in (True, False):
        made = learner("codaprompt", compile=value)
        made.begin_task(0)
        images, targets = batch_of(made)
        loss, _ = made.loss(images, targets)
        loss.backward()
        found.append((loss.detach(), made.pool.new_prompts.grad, made.pool.new_keys.grad, made.predict(images)))
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("changes, words", [
    ({"prompt_components": 1}, ["prompt_components: 1 leaves none for each of the 2 tasks", "at least 2"]),
    ({"prompt_components": 33}, ["prompt_components: 33 of width 32", "at most 32"]),
    ({"prompt_components": 0}, ["'prompt_components'"]), ({"prompt_length": 3}, ["'prompt_length'", "even"]),
    ({"prompt_length": 0}, ["'prompt_length'"]), ({"prompt_blocks": []}, ["'prompt_blocks'", "not empty"]),
    ({"prompt_blocks": [-1]}, ["'prompt_blocks'"]), ({"prompt_blocks": [0, BLOCKS]}, [f"prompt_blocks: {BLOCKS} is none"]),
    ({"ortho_mu": -0.1}, ["'ortho_mu'"]), ({"rank": 3}, ["'rank'", "codaprompt"])])
def test_bad_values_are_one_sentence(changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        learner("codaprompt", **changes)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("name, classes, epochs", [("codaprompt_c100", 10, 20), ("codaprompt_inr", 20, 50)])
def test_configs_follow_the_published_protocol(name: str, classes: int, epochs: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.model_name, config.init_cls, config.increment, config.batch_size) == ("codaprompt", classes, classes, 128)
    assert (config.init_epoch, config.epochs, config.init_lr, config.lrate) == (epochs, epochs, 1e-3, 1e-3)
    assert (config.optimizer, config.scheduler, config.weight_decay) == ("adam", "quarter", 0)
    assert (config.prompt_components, config.prompt_length, config.ortho_mu) == (100, 8, 0)
    assert config.prompt_blocks == [0, 1, 2, 3, 4]
