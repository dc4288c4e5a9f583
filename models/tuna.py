"""TUNA: task-specific and universal adapters (Wang, Zhou & Ye, ICCV 2025, arXiv 2508.08165).

Task t trains an adapter A_t, from where that of task t - 1 ended, and class vectors w without bias. Loss: cross-entropy over
the task's classes on `s (cos(f, w_c) - m [c = y])` + `lambda e^-(t + 1) sum_{i < t} mean_l |u_l . v_il|`, u_l and v_il being
the mean of the rows, as unit vectors, of the up-projections of A_t and A_i in block l. After the task mean and covariance of
each class's features with A_t are stored, and from the second task on all w are trained on samples of all classes' Gaussians
by cross-entropy on `s cos`; the next task goes on from there.

The universal adapter: of every weight the largest of its values in A_0..A_t that have the sign of their mean. An image's
specific adapter is the one with which the entropy of `softmax(s cos)` over all classes is least; what answers is the sum of
this softmax and that of the universal adapter. Every image needs t + 2 forwards.

As in the official code, LAMDA-CL/ICCV2025-TUNA at 77d4f10, in which, however, the universal adapter is never in force
(docs/BASELINES.md).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.bottleneck import Bottleneck
from backbone.heads.aligned import ContinuedHead
from models.adapted import ContinuedKeys, ContinuedLearner, SideBySide, saved_network
from models.artifacts import SavedNetwork, SavedRun
from models.optimisation import LaterTaskKeys, OptimisationKeys
from utils.config import key


def overlap(up: Tensor, earlier: Tensor) -> Tensor:
    """What up-projections `[L, d, r]` share with `earlier` ones `[n, L, d, r]`: the sum over these of the mean over blocks of
    `|mean of all products of unit rows|`, which is the product of the mean unit rows."""
    own, others = F.normalize(up, dim=-1).mean(-2), F.normalize(earlier, dim=-1).mean(-2)  # (12, 16), (9, 12, 16)
    return (own * others).sum(-1).abs().mean(-1).sum()


def fused(adapters: Bottleneck) -> Bottleneck:
    """One adapter of several, stacked along the first dimension: of each number the one furthest from 0 among those with the
    sign of their mean, which counts as negative at 0."""
    def part(stack: Tensor) -> Tensor:
        sign = torch.where(stack.mean(0) > 0, 1.0, -1.0).to(stack)
        return sign * (stack * sign).amax(0).clamp_min(0)

    return Bottleneck(*map(part, adapters))


class EntropyHead(ContinuedHead):
    """Class vectors w; logits `s cos(f, w)`. There is no bias, the rows' bias stays empty.

    Features `[b, (n + 1) d]` in: those with each of n adapters, and with the universal one; while a task is trained, and after
    a single one, `[b, d]`.
    """

    kind = "tuna"
    period = 5  # epochs in which the rate of the alignment falls, and in which it rises again

    def trainable(self) -> list[torch.nn.Parameter]:
        return [self.new_weight]

    def rows(self) -> tuple[Tensor, Tensor]:
        return super().rows()[0], self.bias

    def cosines(self, features: Tensor, weight: Tensor) -> Tensor:
        return self.config.logit_scale * F.linear(F.normalize(features, dim=-1), F.normalize(weight).to(features.dtype))

    def current_logits(self, features: Tensor) -> Tensor:
        return self.cosines(features, self.new_weight[len(self.means):])

    def sampled_logits(self, samples: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
        return self.cosines(samples, weight)

    def centres(self) -> Tensor:
        return self.shrunk() if self.config.shrink_means else self.means

    def forward(self, features: Tensor) -> Tensor:
        logits = self.cosines(features.unflatten(1, (-1, self.width)), self.rows()[0])  # [b, n + 1, classes]
        if logits.shape[1] == 1:
            return logits[:, 0]
        logs = logits.log_softmax(2)
        specific, universal = logs[:, :-1], logs[:, -1]
        surest = (specific.exp() * specific).sum(2).argmax(1)  # the least entropy
        chosen = specific.gather(1, surest[:, None, None].expand(-1, 1, logs.shape[2]))[:, 0]
        return torch.stack([chosen, universal]).logsumexp(0)  # the published sum of probabilities, as logits

    def to_file(self) -> dict[str, Tensor]:
        return {"weight": self.weight.float()}

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        self.weight = tensors["weight"]


class EveryAdapter(SideBySide):
    """Images to their features with each stored adapter and, if there are several, with the universal one."""

    def forward(self, images: Tensor) -> Tensor:
        bank, features = self.bank, []
        universal = [fused(bank.stacks())] if len(bank) > 1 else []
        for adapter in [*(bank.stored(number) for number in range(len(bank))), *universal]:
            bank.chosen = adapter
            features.append(self.backbone(images))
        return torch.cat(features, 1)


class TUNA(ContinuedLearner):
    """An adapter for every task and one fused of all; an image's answer is that of the adapter that is surest of it together
    with the fused one's."""

    head: EntropyHead

    class Keys(OptimisationKeys, LaterTaskKeys, ContinuedKeys):
        """Specific and universal adapters of TUNA"""

        logit_scale: float = key(20.0, "Factor s on the cosines.", gt=0)
        logit_margin: float = key(
            0.0, "Margin m by which an image's cosine with its own class has to lead while a task is trained.", ge=0)
        orthogonality_coeff: float = key(
            1e-3, "Weight of the loss that keeps the up-projections of an adapter apart from those of earlier ones, times "
                  "e^-(t + 1) in task t; 0 leaves it out.", ge=0)
        shrink_means: bool = key(
            False, "Draw the samples of older classes around shorter means, as SLCA.")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.network = EveryAdapter(self.backbone, self.bank)

    def make_head(self) -> EntropyHead:
        return EntropyHead(self.backbone.width, self.config, self.seed)

    # ---- a step

    def before_step(self, step: int) -> Tensor | None:
        super().before_step(step)
        coefficient = self.config.orthogonality_coeff * math.exp(-(self.task + 1))
        return coefficient * overlap(self.bank.current.up, self.bank.up) if self.task > 0 and coefficient > 0 else None

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, config = self.head.current_logits(self.embed_dropping(images)), self.config
        lead = config.logit_scale * config.logit_margin * F.one_hot(targets, logits.shape[1])
        return F.cross_entropy(logits - lead, targets, reduction="sum"), logits

    # ---- what is stored

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        plain = saved_network(saved, cls.networks, saved.task + 1)
        head = EntropyHead(plain.backbone.width, saved.config, saved.seed)
        head.from_file(saved.tensors(f"head_task_{saved.task}.safetensors"))
        return SavedNetwork(EveryAdapter(plain.backbone, plain.bank), None, head)
