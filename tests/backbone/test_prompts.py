"""backbone/prompts.py: prefixes in the attention of every kind of network that takes them."""

import copy
from types import SimpleNamespace

import pytest
import timm
import timm.layers
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.embedded import EMBEDDED
from backbone.prompts import GrowingPool, Pool, PrefixedViT
from backbone.vit import fused_qkv, load_vit
from tests.helpers import images, tiny_vit
from tests.tiny_backbone import NAME
from utils.errors import UserError


class Given(Pool):
    """Prefixes that a test has chosen."""

    method = "given"
    prefixes: dict[int, Tensor]

    def forward(self, queries: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        return self.prefixes, queries


def frozen(vit: nn.Module) -> FrozenViT:
    made = FrozenViT.__new__(FrozenViT)
    nn.Module.__init__(made)
    made.vit, made.identity, made.image_size, made.width = vit, SimpleNamespace(name="tiny"), 16, vit.num_features
    return made


def own_keys_and_values(vit: nn.Module, batch: Tensor, block: int) -> Tensor:
    """Keys and values `[b, 2, N, d]` that the attention of a block computes for its tokens, positions in them."""
    attention, seen = vit.blocks[block].attn, {}

    def note(module: nn.Module, arguments: tuple, options: dict) -> None:
        seen.update(x=arguments[0], rope=options.get("rope"))

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    vit(batch)
    handle.remove()
    k, v = attention.qkv(seen["x"]).chunk(3, 2)[1:]
    if seen["rope"] is not None:
        split = k.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        first = attention.num_prefix_tokens
        turned = apply_rot_embed_cat(split[:, :, first:], seen["rope"], half=getattr(attention, "rotate_half", False))
        k = torch.cat([split[:, :, :first], turned], 2).transpose(1, 2).flatten(2)
    return torch.stack([k, v], 1)


OPEN = [(NAME, {}), (NAME, {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True}), (NAME, {"global_pool": "avg"}),
        (NAME, {"attn_layer": "diff", "qkv_bias": False}), (EMBEDDED, {}), ("test_vit3", {}), ("cait_xxs24_224", {"depth": 2}),
        ("vit_small_patch16_rope_224", {"depth": 2}), ("vit_small_patch16_dinov3", {"depth": 2, "img_size": 64}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2})]


@pytest.mark.parametrize("name, options", OPEN, ids=[f"{name} {options}" for name, options in OPEN])
def test_every_key_twice_weighs_as_once_and_others_weigh_in(name: str, options: dict) -> None:
    """A softmax over two copies of every key, each with its value, gives what it gave over one: so a prefix of the tokens'
    own keys and values has to change nothing. It says that every kind of attention takes prefixes where they belong."""
    if not timm.is_model(name) or options.get("attn_layer") == "diff" and not hasattr(timm.layers, "DiffAttention"):
        pytest.skip("this version of timm has no such network")
    vit = timm.create_model(name, num_classes=0, **options).requires_grad_(False).eval()
    fused_qkv(vit, name)
    draw = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        parameter += torch.randn(parameter.shape, generator=draw) * 0.05
    if name.startswith("cait"):
        vit.blocks[1].attn.proj_w.bias.zero_()  # is added to the weight of every key: two copies have it twice
    vit.double()
    size = vit.patch_embed.img_size[0]
    batch = torch.rand(2, 3, size, size, generator=draw, dtype=torch.float64)
    before, own = vit(batch), own_keys_and_values(vit, batch, 1)
    network = PrefixedViT(frozen(vit), Given(), blocks=[1])
    network.pool.prefixes = {1: own}
    torch.testing.assert_close(network(batch), before, rtol=1e-8, atol=1e-8)
    network.pool.prefixes = {1: torch.randn(2, 2, 3, own.shape[3], generator=draw).double()}
    assert (network(batch) - before).abs().max() > 1e-5, "other prefixes change the features"
    torch.testing.assert_close(vit(batch), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "xcit_nano_12_p16_224"])
def test_attention_without_a_place_for_keys_is_refused(name: str) -> None:
    backbone = FrozenViT(*load_vit(name, pretrained=False, weights=None, seed=0))
    with pytest.raises(UserError, match=f"backbone_type: the attention of '{name}'.*'given'; choose another"):
        PrefixedViT(backbone, Given(), blocks=[0])


def test_a_copy_has_sites_of_its_own() -> None:
    network = PrefixedViT(frozen(tiny_vit()), Given(), blocks=[0])
    network.pool.prefixes = {0: torch.randn(4, 2, 3, 32).double()}
    copied = copy.deepcopy(network)
    copied.pool.prefixes = {0: torch.zeros(4, 2, 3, 32).double()}
    assert torch.equal(network(images()), network(images())) and not torch.allclose(network(images()), copied(images()))
    assert not torch.allclose(network(images()), network.backbone.vit(images()))


def test_a_pool_is_put_together_from_the_files_of_its_tasks() -> None:
    def empty() -> GrowingPool:
        pool = GrowingPool({"keys": (3,)})
        pool.general = nn.Parameter(torch.zeros(2))
        return pool

    pool, files = empty(), []
    for task in range(3):
        pool.grow({"keys": torch.full((2, 3), float(task))})
        assert pool.whole("keys").shape == (2 * task + 2, 3) and pool.keys.shape == (2 * task, 3)
        middle, again = pool.snapshot(), empty()
        with torch.no_grad():
            pool.new_keys += 0.5
            pool.general += 1
        again.restore(middle)
        assert again.new_keys.requires_grad and torch.equal(again.keys, pool.keys)
        assert again.new_keys.tolist() == [[task] * 3] * 2 and again.general.tolist() == [task] * 2
        pool.commit()
        files.append({name: part.clone() for name, part in pool.to_file(task).items()})
        assert files[-1]["keys"].tolist() == [[task + 0.5] * 3] * 2 and files[-1]["general"].tolist() == [task + 1] * 2
    assert pool.files_of(2) == range(3)
    again = empty()
    again.from_files(files)
    assert torch.equal(again.keys, pool.keys) and torch.equal(again.general, pool.general) and again.new_keys is None
