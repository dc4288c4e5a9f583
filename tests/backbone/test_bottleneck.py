"""backbone/bottleneck.py: what an adapter adds, in every kind of block; dropout that any part of a batch agrees on."""

import functools

import pytest
import timm
import torch
from torch import Tensor, nn

from backbone.bottleneck import Bottleneck, BottleneckBank
from backbone.class_token import ClassTokenBlock, read_class_token_alone
from utils.errors import UserError
from utils.rng import generator

SMALL = {"num_classes": 0, "depth": 2, "embed_dim": 32, "num_heads": 2}
NETWORKS = [("test_vit", {}), ("test_vit", {"init_values": 0.5, "reg_tokens": 2}), ("test_vit", {"global_pool": "avg"}),
            ("vit_base_patch16_rpn_224", {}), ("vit_relpos_small_patch16_224", {}), ("vit_relpos_base_patch16_rpn_224", {}),
            ("deit_tiny_distilled_patch16_224", {})]


def network(name: str = "test_vit", **options) -> nn.Module:
    """A small network of timm's in float64, its tensors moved off their initial values."""
    options = {**SMALL, "img_size": 64, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(name, **options).eval().requires_grad_(False).double()
    draw = generator(0, "network")
    for parameter in vit.parameters():
        parameter += torch.randn(parameter.shape, generator=draw) * 0.05
    return vit


def bank_on(vit: nn.Module, size: int = 3, dropout: float = 0.0) -> BottleneckBank:
    """A bank with one stored and one current adapter, both as if trained; the current one is in force."""
    bank = BottleneckBank(vit, "tiny", size, 0.5, dropout).double()
    for number in range(2):
        if number:
            bank.commit()
        bank.add(generator(number, "adapter"))
        draw = generator(number, "trained")
        with torch.no_grad():
            for part in bank.current:
                part += torch.randn(part.shape, generator=draw) * 0.3
    return bank


def pixels(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=generator(0, "images")).double()


class Written(nn.Module):
    """A block with an adapter beside its MLP, as the docstring of the module writes it."""

    def __init__(self, block: nn.Module, adapter: list[Tensor], scale: float) -> None:
        super().__init__()
        self.block, self.adapter, self.scale = block, adapter, scale

    def forward(self, x: Tensor, **options) -> Tensor:
        block, (D, d, U, u) = self.block, self.adapter
        if "ResPost" in type(block).__name__:
            x = x + block.norm1(block.attn(x, **options))
            mlp = block.norm2(block.mlp(x))
        else:
            x = x + block.ls1(block.attn(block.norm1(x), **options))
            mlp = block.ls2(block.mlp(block.norm2(x)))
        return x + mlp + self.scale * (torch.relu(x @ D.T + d) @ U.T + u)


@pytest.mark.parametrize("name, options", NETWORKS, ids=[f"{name} {options}" for name, options in NETWORKS])
def test_features_and_gradients_are_those_of_the_formula(name: str, options: dict) -> None:
    vit, plain = network(name, **options), network(name, **options)
    read_class_token_alone(vit)
    assert isinstance(vit.blocks[-1], ClassTokenBlock) is (name == "test_vit" and "global_pool" not in options)
    bank, images = bank_on(vit), pixels()
    frozen, blocks = plain(images), list(plain.blocks)
    for number in (1, 0):
        bank.choose(number)
        adapter = Bottleneck(*(part.detach().clone().requires_grad_() for part in bank.chosen))
        written = [Written(block, [part[i] for part in adapter], 0.5) for i, block in enumerate(blocks)]
        plain.blocks = nn.Sequential(*written) if isinstance(plain.blocks, nn.Sequential) else nn.ModuleList(written)
        features, want = vit(images), plain(images)
        torch.testing.assert_close(features, want, rtol=1e-9, atol=1e-10)
        assert (features - frozen).abs().max() > 0.1
        if number == 1:  # the one that is trained
            features.square().sum().backward()
            want.square().sum().backward()
            for part, other in zip(bank.current, adapter, strict=True):
                torch.testing.assert_close(part.grad, other.grad, rtol=1e-8, atol=1e-9)
                assert part.grad.abs().max() > 1e-5
    bank.choose(None)
    torch.testing.assert_close(vit(images), frozen, rtol=1e-9, atol=1e-10)


def test_a_new_adapter_adds_nothing_and_a_restored_bank_the_same() -> None:
    vit = network()
    frozen = vit(pixels())
    bank = BottleneckBank(vit, "tiny", 3, 0.5, 0.0).double()
    bank.add(generator(0, "adapter"))
    assert torch.equal(vit(pixels()), frozen) and bank.new_down.abs().max() <= 32**-0.5
    bank, other = bank_on(vit := network()), network()
    copy = BottleneckBank(other, "tiny", 3, 0.5, 0.0).double()
    for _ in range(2):
        copy.restore(bank.snapshot())
        assert torch.equal(vit(pixels()), other(pixels())) and len(copy) == len(bank)
        if bank.current is not None:
            bank.commit()


def test_parts_of_a_batch_leave_out_what_the_whole_leaves_out() -> None:
    vit = network()
    bank, key = bank_on(vit, size=16, dropout=0.25), torch.tensor(12345)
    with bank.dropping(key, 0):
        whole = vit(pixels(5))
    parts = []
    for first, stop in ((0, 2), (2, 5)):
        with bank.dropping(key, first):
            parts.append(vit(pixels(5)[first:stop]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    with bank.dropping(torch.tensor(12346), 0):
        assert not torch.allclose(vit(pixels(5)), whole, atol=1e-3)
    assert torch.equal(vit(pixels(5)), vit(pixels(5))) and not torch.allclose(vit(pixels(5)), whole, atol=1e-3)


def test_what_is_left_out_is_a_fair_share_of_every_unit_and_block() -> None:
    bank = bank_on(network(), dropout=0.25)
    inner = torch.ones(40, 50, 16)
    with bank.dropping(torch.tensor(7), 0):
        kept = [bank._kept(inner, block) for block in range(2)]
    for mask in kept:
        assert sorted(mask.unique().tolist()) == [0, pytest.approx(4 / 3)]
        assert mask.mean().item() == pytest.approx(1, abs=0.02) and mask.mean((0, 1)).sub(1).abs().max() < 0.06
        neighbours = (mask[:, :-1] - 1) * (mask[:, 1:] - 1)
        assert neighbours.mean().abs() < 0.02
    assert ((kept[0] - 1) * (kept[1] - 1)).mean().abs() < 0.02


def test_compiled_it_is_one_graph_with_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = network()
    bank, images = bank_on(vit, dropout=0.2), pixels()
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    bank.choose(0)
    torch.testing.assert_close(compiled(images), vit(images))
    bank.choose(1)
    with bank.dropping(torch.tensor(3), 1):
        torch.testing.assert_close(compiled(images), vit(images))


def test_a_network_without_a_place_for_adapters_is_refused() -> None:
    vit = network()
    vit.blocks[1].mlp = None
    with pytest.raises(UserError, match="^backbone_type: 'tiny' has blocks without a 'norm2' and an 'mlp'.*choose another"):
        BottleneckBank(vit, "tiny", 3, 0.5, 0.0)
    assert functools.reduce(lambda count, block: count + len(block._forward_hooks), vit.blocks, 0) == 0
