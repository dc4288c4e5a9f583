"""The mathematics of METHOD.md, equation 1, written out adapter by adapter: what the fast code is held against."""

from collections.abc import Callable

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from backbone.gates import GATES
from backbone.lora import AdapterBank, inject
from benchmarks.references import loop_layers
from utils.rng import generator


def tiny_vit(seed: int = 0, dtype: torch.dtype = torch.float64) -> VisionTransformer:
    """A frozen ViT with 2 blocks of width 32 for 16x16 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return vit.requires_grad_(False).eval().to(dtype)


def images(count: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Random images for `tiny_vit`."""
    return torch.rand(count, 3, 16, 16, generator=generator(seed, "images"), dtype=dtype)


def bank_on(vit: nn.Module, gate: str = "gumbel_sparsemax", scope: str = "layer") -> AdapterBank:
    """An empty bank injected into `vit`, in its precision."""
    dtype = next(vit.parameters()).dtype
    return AdapterBank(inject(vit, "tiny"), GATES[gate](), scope).to(dtype)


def trained(bank: AdapterBank, task: int, logit: float = 0.0, rank: int = 3) -> None:
    """Adds an adapter whose factors look trained: `B` is not zero, magnitudes differ."""
    bank.add(task, rank, 1.0, logit, generator(task, "A"))
    stream = generator(task, "B")
    with torch.no_grad():
        bank.new_B.copy_(torch.randn(bank.new_B.shape, generator=stream, dtype=torch.float64) * 0.3)
        bank.alpha[-1] *= 0.5 + torch.rand(bank.alpha[-1].shape, generator=stream, dtype=torch.float64)


def filled_bank(vit: nn.Module, count: int = 3, **options) -> AdapterBank:
    """A bank with `count` adapters of unequal logits and ranks, the last of them current."""
    bank = bank_on(vit, **options)
    for task in range(count):
        if bank.current is not None:
            bank.commit()
        trained(bank, task, logit=0.2 * (task % 3) - 0.05 * task, rank=3 + task % 2)
    return bank


def loop_network(vit: VisionTransformer, bank: AdapterBank, beta: Tensor,
                 layers: Callable[[AdapterBank, Tensor], list[nn.Module]] = loop_layers) -> VisionTransformer:
    """A copy of the injected `vit` that computes with a loop over adapters; gradients reach the bank's parameters."""
    copy = tiny_vit(dtype=next(vit.parameters()).dtype)
    copy.load_state_dict({name.replace("qkv.merged", ""): value for name, value in vit.state_dict().items()})
    for block, layer in zip(copy.blocks, layers(bank, beta), strict=True):
        block.attn.qkv = layer
    return copy
