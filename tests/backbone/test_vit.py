"""backbone/vit.py: names and tags, local weights in every naming, refusals in one sentence, identity, frozenness."""

import argparse
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from backbone import FrozenViT, create_backbone
from backbone.lora import inject
from backbone.vit import _full_name, data_config, fused_qkv, load_vit, weights_sha256
from tests.helpers import small_config, tiny_config
from utils.errors import UserError

TINY = "test_vit"  # timm's own test network: 160 pixels, patches of 16, 6 blocks of width 64
CLIP = "vit_xsmall_patch16_clip_224"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def random_vit(name: str = TINY, seed: int = 1, **kwargs) -> nn.Module:
    """A network in which no tensor is at its initial value, zeros and ones included."""
    vit = timm.create_model(name, **{"num_classes": 0, **kwargs}).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return vit


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return random_vit(num_classes=5)


def loaded(path: Path, name: str = TINY) -> nn.Module:
    vit, identity = load_vit(name, pretrained=True, weights=str(path), seed=0)
    assert identity.source == str(path) and identity.sha256 == weights_sha256(vit.state_dict())
    return vit


def assert_same_features(vit: nn.Module, source: nn.Module, size: int) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(vit(images), source.forward_head(source.forward_features(images), pre_logits=True))


def refusal(path: Path | str | None = None, name: str = TINY, pretrained: bool = True) -> str:
    """The sentence with which a backbone is refused."""
    with pytest.raises(UserError) as caught:
        load_vit(name, pretrained=pretrained, weights=None if path is None else str(path), seed=0)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 900
    assert name in text and text.startswith("backbone_type: " if path is None else "backbone_weights: ")
    return text


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# Local weights


WRAPPED = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "arch": "vit"},
    "data parallel": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "dino": lambda state: {"student": {}, "args": argparse.Namespace(arch="vit"), "epoch": 3,
                           "teacher": {**{f"backbone.{key}": value for key, value in state.items()},
                                       "head.last_layer.weight_g": torch.ones(1)}},
    "half": lambda state: {key: value.half() for key, value in state.items()},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_pth_gives_the_outputs_of_its_source(wrapping: str, suffix: str, source: nn.Module, tmp_path: Path) -> None:
    vit = loaded(saved(tmp_path / f"weights{suffix}", WRAPPED[wrapping](source.state_dict())))
    if wrapping == "half":
        source = timm.create_model(TINY, num_classes=5).eval()
        source.load_state_dict(torch.load(tmp_path / f"weights{suffix}"))
    assert_same_features(vit, source, 160)


def test_safetensors_gives_the_outputs_of_its_source(source: nn.Module, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    assert_same_features(loaded(tmp_path / "weights.safetensors"), source, 160)


def flax_arrays(vit: nn.Module) -> dict[str, np.ndarray]:
    """The weights of `vit` as AugReg's .npz files name and shape them."""
    state = {key: value.numpy() for key, value in vit.state_dict().items()}
    width, heads = vit.num_features, vit.blocks[0].attn.num_heads
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"], "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"], "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}
    for i in range(len(vit.blocks)):
        block, at = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for norm, flax in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays |= {f"{at}{flax}/scale": state[f"{block}{norm}.weight"], f"{at}{flax}/bias": state[f"{block}{norm}.bias"]}
        attention = f"{at}MultiHeadDotProductAttention_1/"
        weights, biases = np.split(state[f"{block}attn.qkv.weight"], 3), np.split(state[f"{block}attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{block}attn.proj.weight"].reshape(width, heads, -1).transpose(1, 2, 0)
        arrays[f"{attention}out/bias"] = state[f"{block}attn.proj.bias"]
        for r in (0, 1):
            arrays[f"{at}MlpBlock_3/Dense_{r}/kernel"] = state[f"{block}mlp.fc{r + 1}.weight"].T
            arrays[f"{at}MlpBlock_3/Dense_{r}/bias"] = state[f"{block}mlp.fc{r + 1}.bias"]
    return arrays


def test_npz_of_augreg_gives_the_outputs_of_its_source(source: nn.Module, tmp_path: Path) -> None:
    np.savez(tmp_path / "S_16.npz", **flax_arrays(source))
    assert_same_features(loaded(tmp_path / "S_16.npz"), source, 160)


def test_npz_that_does_not_fit_or_lacks_something(source: nn.Module, tmp_path: Path) -> None:
    arrays = flax_arrays(source)
    np.savez(tmp_path / "other.npz", **{key: value for key, value in arrays.items() if "encoderblock_5/" not in key})
    assert "encoderblock_5" in refusal(tmp_path / "other.npz")
    np.savez(tmp_path / "wide.npz", **flax_arrays(random_vit(num_classes=5, embed_dim=96)))
    assert "wide.npz" in refusal(tmp_path / "wide.npz")
    coarse = arrays["embedding/kernel"].repeat(2, 0).repeat(2, 1)
    np.savez(tmp_path / "S_32.npz", **{**arrays, "embedding/kernel": coarse})
    assert "32 x 32" in refusal(tmp_path / "S_32.npz")
    for name, content in (("short.npz", (tmp_path / "other.npz").read_bytes()[:9000]), ("no.npz", b""), ("text.npz", b"abc")):
        (tmp_path / name).write_bytes(content)
        assert name in refusal(tmp_path / name)


def openai_clip(vit: nn.Module) -> dict[str, Tensor]:
    """The weights of `vit` under the names of OpenAI's CLIP, with something of the text tower."""
    state = {}
    for key, value in vit.state_dict().items():
        for ours, theirs in (("patch_embed.proj", "conv1"), ("blocks.", "transformer.resblocks."), ("norm_pre.", "ln_pre."),
                             ("qkv.", "in_proj_"), ("attn.proj.", "attn.out_proj."), ("mlp.fc1", "mlp.c_fc"),
                             ("mlp.fc2", "mlp.c_proj"), ("norm1", "ln_1"), ("norm2", "ln_2")):
            key = key.replace(ours, theirs)
        key = f"ln_post{key.removeprefix('norm')}" if key.startswith("norm.") else key
        state[f"visual.{key}"] = value
    state["visual.class_embedding"] = state.pop("visual.cls_token")[0, 0]
    state["visual.positional_embedding"] = state.pop("visual.pos_embed")[0]
    return {**state, "visual.proj": torch.zeros(vit.num_features, 8), "token_embedding.weight": torch.zeros(3, 8),
            "logit_scale": torch.ones(())}


def test_clip_is_injected_and_takes_openai_names(tmp_path: Path) -> None:
    source = random_vit(CLIP)
    vit = loaded(saved(tmp_path / "clip.pt", openai_clip(source)), CLIP)
    assert_same_features(vit, source, 224)
    assert len(inject(vit, CLIP)) == 10
    assert_same_features(vit, source, 224)
    mean, std = data_config(vit)[1]
    assert (*mean, *std) == pytest.approx((0.4815, 0.4578, 0.4082, 0.2686, 0.2613, 0.2758), abs=1e-3)


def test_dino_is_created_and_injected() -> None:
    vit, identity = load_vit("vit_small_patch16_224.dino", pretrained=False, weights=None, seed=1)
    assert (identity.name, identity.tag, identity.source) == ("vit_small_patch16_224", "dino", "random")
    assert data_config(vit) == (224, IMAGENET) and len(inject(vit, "x")) == 12 and vit.num_features == 384


@pytest.mark.slow
@pytest.mark.parametrize("name, registers", [("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4)])
def test_dinov2_takes_its_own_names_and_another_image_size(name: str, registers: int, tmp_path: Path) -> None:
    source = random_vit(name, img_size=56)  # a grid of 4 x 4 where the model has 37 x 37
    state = {**source.state_dict(), "mask_token": torch.zeros(1, 384)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.ones(1, 1, 384), state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - 1
    vit = loaded(saved(tmp_path / "dinov2_vits14_pretrain.pth", state), name)
    prefix = 0 if registers else 1
    resized = resample_abs_pos_embed(source.pos_embed, new_size=[37, 37], old_size=[4, 4], num_prefix_tokens=prefix)
    assert vit.pos_embed.shape[1] == 37 * 37 + prefix and torch.equal(vit.pos_embed, resized)
    assert torch.allclose(vit.cls_token, source.cls_token, atol=1e-6)
    same = [key for key in vit.state_dict() if key not in ("pos_embed", "cls_token")]
    assert all(torch.equal(vit.state_dict()[key], source.state_dict()[key]) for key in same) and len(same) > 170
    assert FrozenViT(vit, None).image_size == 518 and data_config(vit)[1] == IMAGENET
    layers = inject(vit, name)
    images = torch.rand(1, 3, 518, 518)
    assert len(layers) == 12 and torch.isfinite(vit(images)).all()


# Weights that are refused


def test_misfitting_weights_are_named_with_what_is_wrong(source: nn.Module, tmp_path: Path) -> None:
    state = source.state_dict()
    cases = {
        "lacks.pth": ({key: value for key, value in state.items() if "blocks.5" not in key}, "it lacks 'blocks.5."),
        "empty.pth": ({}, "it lacks 'blocks.0."),
        "deeper.pth": ({**state, "blocks.6.norm1.weight": torch.ones(64)}, "'blocks.6.norm1.weight', which the model lacks"),
        "clip.pth": ({**state, "norm_pre.weight": torch.ones(64)}, "'norm_pre.weight', which the model lacks"),
        "wider.pth": (random_vit(embed_dim=96).state_dict(), "has shape (1, 1, 96) where (1, 1, 64)"),
        "shape.pth": ({**state, "norm.bias": torch.zeros(65)}, "'norm.bias' has shape (65,) where (64,) is needed"),
        "patch.pth": ({**state, "patch_embed.proj.weight": torch.ones(64, 3, 32, 32)}, "32 x 32 pixels where 16 x 16"),
        "other.pth": (timm.create_model("resnet10t").state_dict(), "it lacks"),
    }
    for name, (content, words) in cases.items():
        text = refusal(saved(tmp_path / name, content))
        assert name in text and words in text, text


class Foreign:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_files_that_hold_no_weights(source: nn.Module, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pth", source.state_dict()).read_bytes()
    save_file(source.state_dict(), tmp_path / "whole.safetensors")
    contents = {"truncated.pth": whole[: len(whole) // 2], "nothing.pth": b"", "text.pth": b"<html>not found</html>",
                "truncated.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-100], "nothing.safetensors": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert name in refusal(tmp_path / name)
    for name, content in {"list.pth": [torch.zeros(1)], "tensor.pth": torch.zeros(1), "mixed.pth": {"a": "b"}}.items():
        with pytest.raises(UserError, match=f"{name}' does not hold a state dict of tensors"):
            load_vit(TINY, pretrained=True, weights=str(saved(tmp_path / name, content)), seed=0)


def test_a_foreign_pickle_is_refused_and_does_not_run(source: nn.Module, tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    for number, content in enumerate([Foreign(f"touch {marker}"), {**source.state_dict(), "x": Foreign(f"touch {marker}")}]):
        text = refusal(saved(tmp_path / f"foreign_{number}.pth", content))
        assert "more than tensors" in text and "weights_only" not in text
    assert not marker.exists()


def test_paths_that_are_no_weights_file(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "missing.pth")
    assert "there is no file" in refusal(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="weights.ckpt' has an unknown ending; give a .safetensors, .pth or .npz file"):
        load_vit(TINY, pretrained=True, weights=str(tmp_path / "weights.ckpt"), seed=0)


def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets timm create networks without weights only; returns the names whose weights were asked for."""
    asked, create = [], timm.create_model

    def offline(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
        if not pretrained:
            return create(name, **kwargs)
        asked.append(name)
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)  # its retries, one by one
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files.")

    monkeypatch.setattr(timm, "create_model", offline)
    return asked


def test_no_network_is_one_sentence_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = no_network(monkeypatch)
    text = refusal(name=TINY)
    assert "'backbone_weights'" in text and "'pretrained'" in text and asked == ["test_vit.r160_in1k"]


# Names


def test_names_resolve_to_tags() -> None:
    assert _full_name("vit_base_patch16_224") == "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert _full_name("vit_base_patch16_224_litelora") == _full_name("vit_base_patch16_224")  # as LiteLoRA's files call it
    assert _full_name("vit_base_patch16_224.dino") == "vit_base_patch16_224.dino"
    assert _full_name("vit_small_patch14_dinov2") == "vit_small_patch14_dinov2.lvd142m"
    assert _full_name("vit_glyph_tiny_patch8_32") == "vit_glyph_tiny_patch8_32"


@pytest.mark.parametrize("name, words", [
    ("vit_base_patch16_242", ["not a timm model", "Did you mean 'vit_base_patch16_224'?"]),
    ("vit_base_patch16_224.augreg3", ["vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.mae"]),
    ("vit_glyph_tiny_patch8_32.x", ["choose one of vit_glyph_tiny_patch8_32."]),
    ("timm/vit_tiny_patch16_224", ["not a timm model"]),
    ("", ["not a timm model"]),
])
def test_unknown_names_and_tags(name: str, words: list[str]) -> None:
    text = refusal(name=name)
    assert all(word in text for word in words), text


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_an_old_name_is_recorded_as_what_it_stands_for() -> None:
    _, identity = load_vit("vit_tiny_patch16_224_in21k", pretrained=False, weights=None, seed=1)
    assert (identity.name, identity.tag) == ("vit_tiny_patch16_224", "augreg_in21k")


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "convnext_atto"])
def test_a_network_without_fused_qkv_is_refused_before_its_weights_are_fetched(name: str, monkeypatch) -> None:
    asked = no_network(monkeypatch)
    assert "has no fused attn.qkv linear" in refusal(name=name) and asked == []


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva_giant_patch14_224"])
def test_a_network_with_separate_qkv_biases_is_refused(name: str) -> None:
    vit = timm.create_model(name, depth=2, embed_dim=32, num_heads=2)
    assert isinstance(vit.blocks[0].attn.qkv, nn.Linear)
    with pytest.raises(UserError, match=f"'{name}' has no fused attn.qkv"):
        fused_qkv(vit, name)


# Random weights, identity, frozenness


def test_random_weights_follow_the_seed_and_leave_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    vits, identities = zip(*(load_vit(TINY, pretrained=False, weights=None, seed=seed) for seed in (1, 1, 2)), strict=True)
    assert identities[0] == identities[1] and identities[0].sha256 != identities[2].sha256
    assert torch.equal(vits[0].blocks[3].attn.qkv.weight, vits[1].blocks[3].attn.qkv.weight)
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])
    torch.manual_seed(6)
    again = load_vit(TINY, pretrained=False, weights=None, seed=1)[1]
    assert again == identities[0] and again.source == "random"


def test_the_sum_changes_with_a_bit_a_name_and_a_shape() -> None:
    state = {"a": torch.arange(6.0), "b": torch.tensor(1, dtype=torch.int64), "c": torch.ones(2, 2, dtype=torch.bfloat16)}
    sums = [weights_sha256(state), weights_sha256(dict(reversed(state.items())))]
    assert sums[0] == sums[1]
    flipped = state["a"].clone()
    flipped.view(torch.int32)[3] ^= 1
    changed = [{**state, "a": flipped}, {**state, "a": state["a"].view(2, 3)}, {**state, "c": state["c"].half()},
               {("d" if key == "c" else key): value for key, value in state.items()}]
    assert len({weights_sha256(other) for other in changed} | set(sums)) == 5


def test_size_and_normalisation_come_from_the_model() -> None:
    vit, _ = load_vit(TINY, pretrained=False, weights=None, seed=1)
    assert data_config(vit) == (160, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


def test_the_backbone_is_frozen_and_stays_in_evaluation_mode() -> None:
    backbone = create_backbone(small_config(backbone_type=TINY, pretrained=False))
    backbone.vit.blocks[0].attn.proj_drop = nn.Dropout(0.5)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.train() is backbone and not any(module.training for module in backbone.modules())
    nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    images = torch.rand(2, 3, backbone.image_size, backbone.image_size)
    assert torch.equal(backbone(images), backbone(images))
    assert backbone(images).shape == (2, backbone.width) == (2, 64) and not backbone(images).requires_grad


def test_the_config_s_first_seed_draws_the_weights() -> None:
    config = small_config(backbone_type=TINY, pretrained=False, seed=[4, 5])
    sums = [create_backbone(config, seed).identity.sha256 for seed in (None, 4, 5)]
    assert sums[0] == sums[1] != sums[2]


@torch.no_grad()
def test_early_tokens_are_the_patches_after_a_sixth_of_the_blocks_before_any_norm() -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    backbone = create_backbone(tiny_config(backbone_type="vit_glyph_tiny_patch8_32", pretrained=True))
    vit = backbone.vit
    tokens = torch.cat([vit.cls_token.expand(3, -1, -1), vit.patch_embed(images)], 1) + vit.pos_embed
    torch.testing.assert_close(backbone.early_tokens(images), vit.blocks[0](tokens)[:, 1:])
    depths = {depth: FrozenViT(timm.create_model("test_vit", depth=depth), None).early_block for depth in (2, 6, 12, 24)}
    assert depths == {2: 1, 6: 1, 12: 2, 24: 4}
