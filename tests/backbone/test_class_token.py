"""backbone/class_token.py: the same features, gradients and names as timm's own last block."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn

from backbone import create_backbone
from backbone.class_token import ClassTokenBlock, read_class_token_alone
from backbone.embedded import EMBEDDED
from models import BaseLearner
from tests.helpers import learner_of, small_config

TOKEN = [("test_vit", {}), ("test_vit", {"reg_tokens": 2, "init_values": 0.5}), (EMBEDDED, {})]


def pair(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """A network in float64 whose every tensor was moved off its initial value, and a copy that reads the class token alone."""
    vit = timm.create_model(name, num_classes=0, **options).eval().double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    short = copy.deepcopy(vit)
    read_class_token_alone(short)
    return vit, short


def pixels(vit: nn.Module) -> torch.Tensor:
    size = vit.patch_embed.img_size
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name, options", TOKEN, ids=["plain", "registers and layer scale", "embedded"])
def test_features_and_gradients_are_those_of_the_whole_block(name: str, options: dict) -> None:
    vit, short = pair(name, **options)
    assert isinstance(short.blocks[-1], ClassTokenBlock)
    images = pixels(vit)
    features = []
    for network in (vit, short):
        network.zero_grad()
        features.append(network(images))
        features[-1].square().sum().backward()
    assert torch.allclose(*features, rtol=0, atol=1e-12)
    for (key, want), (same, got) in zip(vit.named_parameters(), short.named_parameters(), strict=True):
        assert key == same and torch.allclose(want.grad, got.grad, rtol=1e-10, atol=1e-10), key


def test_the_last_mlp_sees_one_token_and_the_others_all() -> None:
    _, short = pair(EMBEDDED)
    seen = []
    for block in short.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    short(pixels(short))
    assert seen == [17] * (len(short.blocks) - 1) + [1]


@pytest.mark.parametrize("name, options", [("test_vit", {"global_pool": "avg"}), ("test_vit2", {}), ("test_vit3", {}),
                                           ("test_vit", {"global_pool": ""}), ("deit_tiny_distilled_patch16_224", {})])
def test_networks_that_read_other_tokens_stay_as_they_are(name: str, options: dict) -> None:
    vit, short = pair(name, **options)
    assert name.startswith("deit") or options or vit.global_pool != "token"
    assert not any(isinstance(block, ClassTokenBlock) for block in short.blocks)
    assert torch.equal(vit(pixels(vit)), short(pixels(vit)))


def test_timm_gets_its_own_block_back() -> None:
    backbone = create_backbone(small_config(model_name="finetune_head"))
    backbone.read_class_token_alone()
    whole = backbone.as_timm()
    assert type(whole.blocks[-1]) is Block and isinstance(backbone.vit.blocks[-1], ClassTokenBlock)
    size = backbone.image_size
    images = torch.rand(2, 3, size, size)
    assert whole.forward_features(images).shape[1] > 1
    torch.testing.assert_close(whole(images), backbone(images))


@pytest.mark.parametrize("alone", [True, False])
def test_a_learner_says_what_it_reads_and_names_stay(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseLearner, "reads_class_token_alone", alone)
    learner = learner_of(small_config(model_name="finetune_head"))
    last = learner.backbone.vit.blocks[-1]
    assert isinstance(last, ClassTokenBlock) is alone and not last.training
    assert list(learner.backbone.vit.state_dict()) == list(create_backbone(learner.config).vit.state_dict())
