"""models/l2p.py against plain tensor code that follows the paper, image by image.

Against the PyTorch port of the official code (JH-LEE-KR/l2p-pytorch: its network and its pool, a choice per image, no position
for prompts; 2 blocks of width 32, 16 images, float64) the differences were: loss 0, features 2e-16, gradients of prompts, keys
and head rows 3e-17, logits 3e-17.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import trainer
from backbone import FrozenViT
from backbone.embedded import EMBEDDED
from backbone.vit import load_vit
from models import load_network
from models.l2p import L2P, PromptedViT, PromptPool
from tests.helpers import LONG, PRETRAINED, ROOT, in_float64, learn, learner_of, test_images
from tests.tiny_backbone import NAME, TINY, WIDTH
from utils.config import Config, config_from_dict, load_config
from utils.errors import UserError

SMALL = {"model_name": "l2p", "dataset": "digits", "init_cls": 2, "nb_tasks": 2, "init_epoch": 1, **TINY,
         "epochs": 1, "batch_size": 32, "optimizer": "adam", "init_lr": 0.01, "lrate": 0.01, "max_grad_norm": 1.0,
         "scheduler": "constant", "device": "cpu", "eval_every": 0, "pool_size": 6, "prompt_length": 2, "top_k": 3}


def config_of(folder: Path | str = "./unused/", **changes: Any) -> Config:
    return config_from_dict({**SMALL, "filepath": str(folder), **changes})


class PlainL2P:
    """The method as the paper writes it, one image at a time, on timm's network as it comes."""

    def __init__(self, vit: nn.Module, pool: PromptPool, pull: float = 0.1) -> None:
        self.vit, self.pull, self.top_k = vit, pull, pool.top_k
        self.prompts = [prompt.detach().clone().requires_grad_() for prompt in pool.prompts]
        self.keys = [key.detach().clone().requires_grad_() for key in pool.keys]

    def feature(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Feature `[d]`, and the sum of the cosines of the chosen keys."""
        vit = self.vit
        query = vit(image[None])[0].detach()
        cosines = [query @ key / (query.norm() * key.norm()) for key in self.keys]
        chosen = sorted(range(len(cosines)), key=lambda m: -cosines[m].item())[:self.top_k]
        x = vit.patch_embed.proj(image[None]).flatten(2).mT[0]
        prefix = [token[0] for token in (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token) if token is not None]
        x = torch.cat([*prefix, x])
        if vit.pos_embed is not None:
            own = vit.pos_embed[0]
            x = torch.cat([x[:len(x) - len(own)], x[len(x) - len(own):] + own])
        x = torch.cat([vit.norm_pre(x), *(self.prompts[m] for m in chosen)])[None]  # at the end: order means nothing here
        for block in vit.blocks:
            x = block(x)
        length = self.top_k * len(self.prompts[0])
        return vit.fc_norm(vit.norm(x)[0, -length:].mean(0)), sum(cosines[m] for m in chosen)

    def loss(self, images: Tensor, targets: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        """Mean over the images."""
        terms = []
        for image, target in zip(images, targets, strict=True):
            feature, cosines = self.feature(image)
            terms.append(-F.log_softmax(rows[0] @ feature + rows[1], 0)[target] - self.pull * cosines)
        return torch.stack(terms).mean()

    def parameters(self) -> list[Tensor]:
        return [*self.prompts, *self.keys]


def plain_of(learner: L2P) -> tuple[PlainL2P, tuple[Tensor, Tensor]]:
    plain = PlainL2P(learner.backbone.vit, learner.pool, learner.config.pull_constraint_coeff)
    return plain, tuple(row.detach().clone().requires_grad_() for row in (learner.head.new_weight, learner.head.new_bias))


def batch_of(learner: L2P, count: int = 12) -> tuple[Tensor, Tensor]:
    images, labels = next(iter(learner.data.train_batches(learner.task, 0, count)))
    return images.double(), labels


@pytest.mark.parametrize("changes", [{}, {"pull_constraint_coeff": 0.5, "top_k": 1}, {"top_k": 6, "grad_accum": 3}])
def test_loss_gradients_and_prediction_are_those_of_the_paper(changes: dict) -> None:
    learner = learner_of(config_of(**changes))
    learn(learner, range(1))
    learner.begin_task(1)
    in_float64(learner)
    images, labels = batch_of(learner)
    plain, rows = plain_of(learner)
    want = plain.loss(images, labels - 2, rows)
    want.backward()
    clf, _, correct = learner.backward(images, labels, None, len(labels))
    assert abs(clf.item() - want.item()) < 1e-6  # the sum over the parts is kept in float32
    pool, head = learner.pool, learner.head
    for got, wanted in [(pool.prompts.grad, plain.prompts), (pool.keys.grad, plain.keys), (head.new_weight.grad, rows[:1]),
                        (head.new_bias.grad, rows[1:])]:
        stacked = torch.stack([torch.zeros_like(part) if part.grad is None else part.grad for part in wanted])
        torch.testing.assert_close(got, stacked.view_as(got), rtol=1e-9, atol=1e-12)
        assert got.abs().max() > 1e-4
    weight, bias = head.rows()
    with torch.no_grad():
        features = torch.stack([plain.feature(image)[0] for image in images])
    assert weight.shape == (4, WIDTH) and weight[:2].abs().max() > 0
    torch.testing.assert_close(learner.predict(images), features @ weight.T + bias, rtol=1e-9, atol=1e-10)
    assert correct == (learner.predict(images)[:, 2:].argmax(1) == labels - 2).sum()
    assert all(parameter.grad is None for parameter in learner.backbone.parameters())


@pytest.mark.slow
def test_two_tasks_of_training_give_the_same_pool_and_logits() -> None:
    learner = learner_of(config_of(batch_size=64))
    images = test_images(learner, 8)
    frozen = copy.deepcopy(learner.backbone.state_dict())
    plain, heads = PlainL2P(learner.backbone.vit, learner.pool), []
    for task in range(2):
        learner.begin_task(task)
        heads.append([row.detach().clone().requires_grad_() for row in (learner.head.new_weight, learner.head.new_bias)])
        for prompt in plain.parameters():
            prompt.grad = torch.zeros_like(prompt)  # one that nobody chose has a gradient of 0, and Adam's moments
        trained = [*plain.parameters(), *heads[-1]]
        optimizer = torch.optim.Adam(trained, lr=0.01)
        for x, y in learner.data.train_batches(task, 0, 64):
            optimizer.zero_grad(set_to_none=False)
            plain.loss(x, y - 2 * task, heads[-1]).backward()
            norm = torch.stack([part.grad.norm() for part in trained]).norm()
            for part in trained:
                part.grad *= min(1.0, 1.0 / norm)
            optimizer.step()
        start = learner.pool.prompts.detach().clone()
        learner.train()
        learner.end_task()
        assert (learner.pool.prompts - start).abs().max() > 0.02, "the prompts must move"
        torch.testing.assert_close(learner.pool.prompts, torch.stack(plain.prompts), rtol=0, atol=2e-3)
        torch.testing.assert_close(learner.pool.keys, torch.stack(plain.keys), rtol=0, atol=2e-3)
    with torch.no_grad():
        features = torch.stack([plain.feature(image)[0] for image in images])
        want = torch.cat([F.linear(features, *head) for head in heads], 1)
    torch.testing.assert_close(learner.predict(images), want, rtol=0, atol=2e-2)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in learner.backbone.state_dict().items())


NETWORKS = [(NAME, {}), (NAME, {"reg_tokens": 2, "init_values": 0.5}), (NAME, {"global_pool": "avg"}),
            (NAME, {"class_token": False, "global_pool": "avg"}), ("test_vit2", {}), (EMBEDDED, {}),
            (NAME, {"no_embed_class": True, "reg_tokens": 1}), (NAME, {"pre_norm": True}),
            ("deit_tiny_distilled_patch16_224", {"depth": 2})]


@pytest.mark.parametrize("name, options", NETWORKS, ids=[f"{name} {options}" for name, options in NETWORKS])
def test_every_plain_vision_transformer_takes_prompts(name: str, options: dict) -> None:
    backbone = FrozenViT(*load_vit(name, pretrained=False, weights=None, seed=0))
    backbone.vit = timm.create_model(name, num_classes=0, **options).requires_grad_(False).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in backbone.vit.parameters():
        parameter += torch.randn(parameter.shape, generator=draw) * 0.05
    width = backbone.vit.num_features
    pool = PromptPool(torch.randn(4, 3, width, generator=draw), torch.randn(4, width, generator=draw), 2)
    network, plain = PromptedViT(backbone, pool).double(), PlainL2P(backbone.vit, pool.double())
    images = torch.rand(3, 3, backbone.image_size, backbone.image_size, generator=draw).double()
    with torch.no_grad():
        features, cosines = network.look(images)
        wanted = [plain.feature(image) for image in images]
    torch.testing.assert_close(features, torch.stack([feature for feature, _ in wanted]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cosines.sum(1), torch.stack([total for _, total in wanted]))
    assert not torch.allclose(features, backbone(images), atol=1e-2), "the prompts must matter"


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "test_vit3"])
def test_a_network_without_a_place_for_prompts_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"backbone_type: '{name}'.*choose another") as caught:
        learner_of(config_of(backbone_type=name, pretrained=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, words", [
    ({"top_k": 7}, ["'top_k' is 7", "'pool_size' of 6"]), ({"pool_size": 0}, ["'pool_size' is 0", "at least 1"]),
    ({"prompt_length": 0}, ["'prompt_length'"]), ({"top_k": 0}, ["'top_k'"]),
    ({"pull_constraint_coeff": -0.1}, ["'pull_constraint_coeff'"]), ({"max_grad_norm": 0}, ["'max_grad_norm'", "above 0"]),
    ({"rank": 3}, ["'rank'", "l2p"]), ({"model_name": "finetune_head"}, ["no effect", "finetune_head"])])
def test_bad_values_are_one_sentence(changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config_of(**changes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count("\n") == 0


def test_the_gradients_of_parts_of_a_batch_add_up() -> None:
    """What several processes do: each sees its part of a batch and divides by the whole."""
    learner = learner_of(config_of())
    learner.begin_task(0)
    in_float64(learner)
    images, labels = batch_of(learner, 13)
    learner.backward(images, labels, None, 13)
    whole = [parameter.grad.clone() for parameter in learner.pool.parameters()]
    learner.pool.zero_grad()
    for part in (slice(0, 7), slice(7, 13)):
        learner.backward(images[part], labels[part], None, 13)
    for parameter, gradient in zip(learner.pool.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_what_an_image_gets_depends_on_no_other_image() -> None:
    learner = learner_of(config_of())
    learn(learner, range(1))
    images = test_images(learner, 9)
    alone = torch.cat([learner.predict(image[None]) for image in images])
    torch.testing.assert_close(learner.predict(images), alone, rtol=1e-4, atol=1e-4)


# In bfloat16 a run takes a minute on a processor without instructions for it.
@pytest.fixture(scope="module", params=["fp32", "bf16"] if LONG else ["fp32"])
def run(request, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return folder, trainer.run(config_of(folder, precision=request.param, init_epoch=2, epochs=2, **PRETRAINED))[0]


def test_a_run_is_far_above_chance(run: tuple[Path, dict]) -> None:
    assert run[1]["metrics"]["last_accuracy"] > 60, "four classes: chance is 25"


def test_the_network_is_rebuilt_from_the_files(run: tuple[Path, dict]) -> None:
    folder, _ = run
    for task in range(2):
        network = load_network(folder, task)  # is checked against logits that the run noted
        file = load_file(folder / f"prompts_task_{task}.safetensors")
        assert all(torch.equal(file[name], tensor) for name, tensor in network.backbone.pool.state_dict().items())


def test_parameters_and_bytes_are_counted(run: tuple[Path, dict]) -> None:
    pool = 6 * 2 * 128 + 6 * 128
    for task, record in enumerate(run[1]["tasks"]):
        assert record["trainable_parameters"] == pool + 2 * 129
        assert record["stored_parameters"] == pool + 2 * (task + 1) * 129
        assert record["stored_bytes"] == 4 * record["stored_parameters"]


def test_with_compile_the_whole_network_is_one_graph_that_gives_the_same(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    losses = []
    for value in (True, False):
        learner = learner_of(config_of(compile=value, precision="bf16"))
        learner.begin_task(0)
        images, labels = batch_of(learner)
        loss, _ = learner.loss(images.float(), labels)
        loss.backward()
        losses.append((loss.detach(), learner.pool.prompts.grad, learner.pool.keys.grad))
    for compiled, plain in zip(*losses, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name, dataset, classes, epochs, batch", [("l2p_c100", "cifar224", 10, 5, 16),
                                                                   ("l2p_inr", "imagenetr", 20, 10, 32)])
def test_configs_follow_the_published_protocol(name: str, dataset: str, classes: int, epochs: int, batch: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.model_name, config.dataset, config.init_cls, config.increment) == ("l2p", dataset, classes, classes)
    assert (config.init_epoch, config.epochs, config.batch_size) == (epochs, epochs, batch)
    assert config.init_lr == config.lrate == 0.03 * 16 / 256
    assert (config.optimizer, config.scheduler, config.weight_decay, config.max_grad_norm) == ("adam", "constant", 0, 1)
    assert (config.pool_size, config.prompt_length, config.top_k, config.pull_constraint_coeff) == (10, 5, 5, 0.1)
