"""A routed network (METHOD.md, section 9) as one graph, for formats that know no other: what happens to an image is the same
operations for all, with the gate weights of its key as numbers among them.

Shapes: b images, N tokens, d width, R summed rank of the adapters, K keys, q statistics of an image, p = 0 for q and 1 for v.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.gated_linear import GatedQKV, Operands
from backbone.lora import AdapterBank
from backbone.routing import Router


class _Choice:
    """The keys `[b]` of the images that are in the network, None for the frozen network. No module: a graph has no memory."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    @contextmanager
    def of(self, keys: Tensor) -> Iterator[None]:
        self.keys = keys
        try:
            yield
        finally:
            self.keys = None


class KeyedQKV(nn.Module):
    """A block's fused qkv, `x (W0 + sum_i c_i B_i A_i)^T + b`, with the coefficients of each image's key; nothing is merged.

    c `[K, 2, R]`: `gate_scale * beta^(k)_i * alpha_i` of every rank-one term.
    """

    def __init__(self, layer: GatedQKV, operands: Sequence[Operands], choice: _Choice) -> None:
        super().__init__()
        self.weight, self.bias, self.choice = layer.weight, layer.bias, choice
        self.register_buffer("A", operands[0].stored_A)
        self.register_buffer("B", operands[0].stored_B)
        self.register_buffer("c", torch.stack([of_key.stored_c for of_key in operands]))

    def forward(self, x: Tensor) -> Tensor:
        frozen = F.linear(x, self.weight, self.bias)
        if self.choice.keys is None:
            return frozen
        c = self.c[self.choice.keys]  # [b, 2, R]
        q, v = (F.linear(F.linear(x, self.A[p]) * c[:, None, p], self.B[p]) for p in range(2))  # (16, 197, 20) @ (20, 768)
        return frozen + torch.cat([q, torch.zeros_like(q), v], 2)


class RoutedGraph(nn.Module):
    """Images `[b, 3, S, S]` to logits `[b, classes]`, each image by the network of its key.

    betas: gate weights `[n]` of every key, in the order of the router's. classes: bool `[K, classes]`, those that compete for
    the images of each key; None for all. Equal to the routed network up to rounding: weights are not merged, and the factors
    of the keys' covariances are inverted beforehand, since not every format can solve.
    """

    @torch.no_grad()
    def __init__(self, backbone: FrozenViT, bank: AdapterBank, head: nn.Module, router: Router, betas: Sequence[Tensor],
                 classes: Tensor | None) -> None:
        super().__init__()
        self.backbone, self.head, self.choice = copy.deepcopy(backbone), head, _Choice()
        by_block = zip(*(bank.operands(beta) for beta in betas), strict=True)
        for block, layer, operands in zip(self.backbone.vit.blocks, bank.layers, by_block, strict=True):
            block.attn.qkv = KeyedQKV(layer, operands, self.choice)
        factors = router.factors.double()
        identity = torch.eye(factors.shape[1]).to(factors).expand_as(factors)
        self.register_buffer("mixtures", router.mixtures)
        self.register_buffer("means", router.means.double())
        self.register_buffer("whitening", torch.linalg.solve_triangular(factors, identity, upper=False))  # [K, q, q]
        self.register_buffer("spread", factors.diagonal(dim1=1, dim2=2).log().sum(1))
        self.register_buffer("classes", classes)

    def forward(self, images: Tensor) -> Tensor:
        keys = self.key_of(self.backbone.early_tokens(images))
        with self.choice.of(keys):
            logits = self.head(self.backbone(images))
        return logits if self.classes is None else logits.masked_fill(~self.classes[keys], float("-inf"))

    def key_of(self, tokens: Tensor) -> Tensor:
        """As `Router.forward`: the number of every image's key, int64 `[b]`, from early tokens `[b, n, d]` of the frozen
        network."""
        tokens = tokens.double()
        mean = tokens.mean(1)
        deviation = (tokens - mean[:, None]).square().mean(1).sqrt()
        apart = (torch.cat([mean, deviation], 1) @ self.mixtures)[None] - self.means[:, None]  # [K, b, q]
        white = apart @ self.whitening.mT
        return (-white.square().sum(2) / 2 - self.spread[:, None]).argmax(0)
