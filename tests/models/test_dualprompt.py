"""models/dualprompt.py against plain tensor code that follows the paper."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.dualprompt import DualPrompt
from tests.helpers import ROOT, test_images
from tests.models.plain_prefixes import batch_of, begun, check_gradients, leaf, learner, plain_features
from tests.tiny_backbone import BLOCKS, WIDTH
from utils.config import load_config
from utils.errors import UserError
from utils.rng import generator


def plain_prefixes(blocks: tuple[list[int], list[int]], general: list[Tensor], expert: list[list[Tensor]]
                   ) -> dict[int, tuple[Tensor, Tensor]]:
    """By block: keys, and values, of the general prefix `[2, L, d]` and of every image's expert, one after the other."""
    found: dict[int, list[list[Tensor]]] = {}
    for block, part in zip(blocks[0], general, strict=True):
        found.setdefault(block, []).append([part for _ in expert])
    for number, block in enumerate(blocks[1]):
        found.setdefault(block, []).append([parts[number] for parts in expert])
    return {block: tuple(torch.stack([torch.cat([part[i][half] for part in parts]) for i in range(len(expert))])
                         for half in (0, 1)) for block, parts in found.items()}


@torch.no_grad()
def apart(learner: DualPrompt) -> None:
    """Moves the pool off its start, and every key to the query of an image of its own."""
    pool, draw, queries = learner.pool, generator(0, "apart"), learner.backbone(test_images(learner).double())
    for part in (pool.general, pool.experts, pool.new_experts):
        part += torch.randn(part.shape, generator=draw) * 0.5
    pool.keys[0], pool.new_keys[0] = queries[0] * 0.3, queries[-1] * 2


@pytest.mark.parametrize("changes", [{}, {"pull_constraint_coeff": 0.3, "grad_accum": 3},
                                     {"general_blocks": [], "expert_blocks": [1]}])
def test_loss_gradients_and_prediction_are_those_of_the_paper(changes: dict) -> None:
    learner = begun("dualprompt", **changes)
    apart(learner)
    pool, head, vit, config = learner.pool, learner.head, learner.backbone.vit, learner.config
    with torch.no_grad():
        head.new_weight += torch.randn(head.new_weight.shape, generator=generator(0, "rows"))
    blocks = (config.general_blocks, config.expert_blocks)
    images, targets = batch_of(learner)
    general, expert, key = leaf(pool.general), leaf(pool.new_experts), leaf(pool.new_keys)
    rows = [leaf(part) for part in (head.new_weight, head.new_bias)]
    with torch.no_grad():
        queries = plain_features(vit, images, {})
    features = plain_features(vit, images, plain_prefixes(blocks, list(general), [list(expert[0])] * len(images)))
    cosines = torch.stack([query @ key[0] / (query.norm() * key[0].norm()) for query in queries])
    want = F.cross_entropy(features @ rows[0].T + rows[1], targets) - config.pull_constraint_coeff * cosines.mean()
    want.backward()
    clf, _, _ = learner.backward(images, targets + 2, None, len(images))
    assert abs(clf.item() - want.item()) < 1e-6  # the sum over the parts is kept in float32
    pairs = [(pool.new_experts, expert), (pool.new_keys, key), (head.new_weight, rows[0]), (head.new_bias, rows[1])]
    check_gradients(pairs + ([(pool.general, general)] if blocks[0] else []))
    assert pool.experts.grad is None and all(part.grad is None for part in vit.parameters())

    images, experts, keys = test_images(learner).double(), pool.whole("experts"), pool.whole("keys")
    with torch.no_grad():
        queries = plain_features(vit, images, {})
        nearest = [int(torch.stack([query @ key / key.norm() for key in keys]).argmax()) for query in queries]
        features = plain_features(vit, images, plain_prefixes(blocks, list(pool.general), [list(experts[t]) for t in nearest]))
        weight, bias = head.rows()
        assert set(nearest) == {0, 1}, "images must differ in the expert that is theirs"
        torch.testing.assert_close(learner.predict(images), features @ weight.T + bias, rtol=1e-9, atol=1e-9)
        alone = torch.cat([learner.predict(image[None]) for image in images[-3:]])
        torch.testing.assert_close(learner.predict(images)[-3:], alone, rtol=1e-9, atol=1e-9)


def test_an_expert_starts_from_the_one_before_and_is_trained_by_its_task_alone() -> None:
    made = learner("dualprompt")
    made.begin_task(0)
    pool, head = made.pool, made.head
    for part in (pool.general, pool.new_experts, pool.new_keys):
        assert 0 <= part.min() and 0.009 < part.max() <= 0.01, "U(0, 0.01)"
    assert head.new_weight.abs().max() == head.new_bias.abs().max() == 0
    first, general = pool.new_experts.detach().clone(), pool.general.detach().clone()
    made.train()
    made.end_task()
    kept = [pool.experts.clone(), pool.keys.clone(), pool.general.detach().clone()]
    assert (kept[0] - first).abs().max() > 1e-3 and (kept[2] - general).abs().max() > 1e-3
    made.begin_task(1)
    assert torch.equal(pool.new_experts, kept[0]) and not torch.equal(pool.new_keys, kept[1])
    key = pool.new_keys.detach().clone()
    made.train()
    made.end_task()
    assert torch.equal(pool.experts[:1], kept[0]) and torch.equal(pool.keys[:1], kept[1])
    assert not torch.equal(pool.experts[1:], kept[0]) and not torch.equal(pool.keys[1:], key)
    assert not torch.equal(pool.general, kept[2]), "the general prefix goes on"


def test_parameters_are_counted() -> None:
    made = learner("dualprompt")
    for task in range(2):
        made.begin_task(task)
        expert, general = 2 * 2 * 3 * WIDTH + WIDTH, 2 * 2 * WIDTH
        assert made.trainable_parameters() == expert + general + 2 * (WIDTH + 1)
        made.settle()
        made.head.commit()
        stored = sum(tensor.numel() for tensor in made.stored_tensors())
        assert stored == (task + 1) * (expert + 2 * (WIDTH + 1)) + general


def test_with_compile_the_whole_network_is_one_graph_that_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    found = []
    for value in (True, False):
        made = learner("dualprompt", compile=value)
        made.begin_task(0)
        made.head.new_weight.data += 1
        images, targets = batch_of(made)
        loss, _ = made.loss(images, targets)
        loss.backward()
        found.append((loss.detach(), made.pool.general.grad, made.pool.new_experts.grad, made.predict(images)))
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("changes, words", [
    ({"expert_blocks": [1, BLOCKS]}, [f"expert_blocks: {BLOCKS} is none of the {BLOCKS} blocks", f"0 to {BLOCKS - 1}"]),
    ({"general_blocks": [5]}, ["general_blocks: 5 is none"]), ({"expert_blocks": []}, ["'expert_blocks'", "not empty"]),
    ({"general_blocks": [1, 0]}, ["'general_blocks'", "ascending"]), ({"general_length": 0}, ["'general_length'"]),
    ({"expert_length": 0}, ["'expert_length'"]), ({"pull_constraint_coeff": -1}, ["'pull_constraint_coeff'"]),
    ({"scheduler": "quarter"}, ["'scheduler'"])])
def test_bad_values_are_one_sentence(changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        learner("dualprompt", **changes)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("name, classes, epochs, length, rate", [("dualprompt_c100", 10, 5, 5, 0.03),
                                                                 ("dualprompt_inr", 20, 50, 20, 0.005)])
def test_configs_follow_the_published_protocol(name: str, classes: int, epochs: int, length: int, rate: float) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.model_name, config.init_cls, config.increment, config.batch_size) == ("dualprompt", classes, classes, 24)
    assert (config.init_epoch, config.epochs, config.expert_length, config.general_length) == (epochs, epochs, length, 5)
    assert config.init_lr == config.lrate == rate * 24 / 256 and config.pull_constraint_coeff == 1
    assert (config.optimizer, config.scheduler, config.weight_decay, config.max_grad_norm) == ("adam", "constant", 0, 1)
    assert (config.general_blocks, config.expert_blocks) == ([0, 1], [2, 3, 4])
