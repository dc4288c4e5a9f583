"""The embedded backbone, its shipped weights, as timm loads them."""

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import is_model_pretrained
from torch import nn

from backbone.embedded import EMBEDDED, WEIGHTS


@pytest.fixture(scope="module")
def shipped() -> nn.Module:
    return timm.create_model(EMBEDDED, pretrained=True, num_classes=0).eval()


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safetensors.safe_open(WEIGHTS, "pt") as file:
        return file.metadata()


def test_timm_loads_every_tensor_of_the_shipped_file(shipped):
    state, stored = shipped.state_dict(), safetensors.torch.load_file(WEIGHTS)
    assert is_model_pretrained(EMBEDDED) and state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float32 and torch.equal(state[name], tensor), name


def test_a_new_head_leaves_the_backbone_as_shipped(shipped):
    model = timm.create_model(EMBEDDED, pretrained=True, num_classes=7).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model(images).shape == (2, 7)
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), shipped.forward_features(images))


def test_features_are_finite_and_differ_between_images(shipped):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = shipped(images)
    assert found.shape == (5, 128) and torch.isfinite(found).all()
    assert torch.pdist(found).min() > 1e-3


def test_every_block_has_one_linear_for_q_k_and_v(shipped):
    assert len(shipped.blocks) == 6
    for block in shipped.blocks:
        assert isinstance(block.attn.qkv, nn.Linear) and block.attn.qkv.weight.shape == (384, 128)
        assert block.attn.qkv.bias is not None


def test_the_data_config_comes_from_the_model(shipped):
    config = resolve_model_data_config(shipped)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0, 0, 0) and config["std"] == (1, 1, 1)  # it was pretrained on 0..1


def test_the_shipped_file_is_small_and_says_how_it_was_made(metadata):
    assert WEIGHTS.stat().st_size <= 5_000_000
    assert metadata["command"].startswith("python -m tools.pretrain_embedded --")
    assert int(metadata["classes"]) == len(set(metadata["characters"])) >= 200
    assert float(metadata["accuracy_on_unseen_faces"]) > 50 and "torch" in metadata["versions"]


