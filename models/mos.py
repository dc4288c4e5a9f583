"""MOS: model surgery (Sun, Zhou, Zhao, Gan, Zhan & Ye, AAAI 2025, arXiv 2412.09441).

Task t trains an adapter A_t, from where that of task t - 1 ended, and the rows W of a linear head that all tasks share. Loss:
cross-entropy over the task's classes + `gamma CE([M; F] [M; F]^T / 0.8, 0, 1, ..)`, F being the batch's features and M the
means of all earlier classes: every row is to resemble itself most. Merging, after every step: `A_t <- (1 - m) A_t +
m / t sum_{i < t} A_i`. After the task mean and covariance of each class's features with A_t are stored, and from the second
task on W is trained on samples of all classes' Gaussians; the next task goes on from there.

Retrieval: the class mean next to the feature with A_0, by cosine, says whose adapter comes first; then the class that W finds
with an adapter says which is next, until that is the same, K times at most. What answers is
`softmax(W f_j) + softmax((t + 1) cos(f_0, mean))`, j being the last adapter.

As in the official code, sun-hailong/AAAI25-MOS at 8d5e07c (the same in LAMDA-CL/LAMDA-PILOT at 5240714), but for the merging,
which it repeats in every forward, evaluation included (docs/BASELINES.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.bottleneck import BottleneckBank
from backbone.heads.aligned import ContinuedHead
from backbone.heads.linear import Features, Pause
from backbone.heads.proxy import class_sums
from models.adapted import ContinuedKeys, ContinuedLearner, SideBySide, saved_network
from models.artifacts import SavedNetwork, SavedRun
from models.optimisation import LaterTaskKeys, OptimisationKeys, learning_rate
from utils.config import Config, key
from utils.runs import distributed

TEMPERATURE = 0.8


def contrast(means: Tensor, features: Tensor) -> Tensor:
    """Mean cross-entropy of telling each row of means `[k, d]` and features `[b, d]` from all others by their products."""
    rows = torch.cat([means, features])
    return F.cross_entropy(rows @ rows.T / TEMPERATURE, torch.arange(len(rows), device=rows.device))


class RetrievingHead(ContinuedHead):
    """The rows W, and the class means with A_0: prototypes `[classes, d]`.

    Features `[b, 2 d]` in, those with A_0 and those with the adapter that was found; while a task is trained `[b, d]`, those
    with its adapter, and W answers alone.
    """

    kind = "mos"
    STATISTICS = (*ContinuedHead.STATISTICS, "prototypes")

    def __init__(self, width: int, config: Config, seed: int) -> None:
        super().__init__(width, config, seed)
        self.register_buffer("prototypes", torch.zeros(0, width))

    @torch.no_grad()
    def collect(self, features: Features, classes: int) -> list[Tensor]:
        """As the aligned head's of the newest adapter's features, the last d; then sums `[c, d]` of those with A_0."""
        first, _ = class_sums([], classes, self.prototypes)

        def newest() -> Features:
            for batch, labels, places in features:
                first.add_(class_sums([(batch[:, :self.width], labels, places)], classes, first)[0])
                yield batch[:, -self.width:], labels, places

        return [*super().collect(newest(), classes), first]

    @torch.no_grad()
    def absorb(self, sums: list[Tensor], task: int, pause: Pause) -> None:
        *gaussians, first = sums
        means = first / gaussians[0][:, None]
        self.prototypes = torch.cat([self.prototypes, means.to(self.prototypes)])
        super().absorb(gaussians, task, pause)

    # ---- prediction

    def cosines(self, first: Tensor) -> Tensor:
        """Of features with A_0 `[b, d]` and all class means."""
        return F.linear(F.normalize(first), F.normalize(self.prototypes).to(first.dtype))

    def first_task(self, first: Tensor) -> Tensor:
        """For features with A_0, int64 `[b]`: the task of the class whose mean is next to each."""
        return self._task_of(self.cosines(first))

    def next_task(self, found: Tensor) -> Tensor:
        """For features with any adapter: the task of the class that W takes each for."""
        return self._task_of(super().forward(found))

    def _task_of(self, logits: Tensor) -> Tensor:
        return (logits.argmax(1)[:, None] >= self.sizes.cumsum(0)).sum(1)

    def forward(self, features: Tensor) -> Tensor:
        if self.training_rows:
            return super().forward(features)
        first, found = features.split(self.width, 1)
        logits = torch.stack([super().forward(found), len(self.sizes) * self.cosines(first)])
        return logits.log_softmax(2).logsumexp(0)  # the published sum of probabilities, as logits

    def to_file(self) -> dict[str, Tensor]:
        return {**super().to_file(), "prototypes": self.prototypes.float(), "sizes": self.sizes}

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        super().from_file(tensors)
        self.prototypes, self.sizes = tensors["prototypes"], tensors["sizes"]


class Retrieval(SideBySide):
    """Images `[b, 3, S, S]` to features `[b, 2 d]` with A_0 and with the adapter that is found for each.

    Images that are to meet the same adapter go through the network together, and none meets one twice. grouped: false puts
    every image through all adapters, in the same operations whatever the images.
    """

    def __init__(self, backbone: FrozenViT, bank: BottleneckBank, head: RetrievingHead, rounds: int) -> None:
        super().__init__(backbone, bank)
        self.head, self.rounds, self.grouped = head, rounds, True

    def forward(self, images: Tensor) -> Tensor:
        first = self._with(0, images)
        chosen = self.head.first_task(first)
        features = torch.stack([first if number == 0 or self.grouped else self._with(number, images)
                                for number in range(len(self.bank))], 1)  # [b, tasks, d]
        missing = torch.ones(features.shape[:2], dtype=torch.bool)
        missing[:, 0] = False
        before = None
        for number in range(self.rounds):
            if self.grouped:
                met = chosen.cpu()  # all that a round waits for the device
                if before is not None and bool((met == before).all()):
                    break
                self._meet(images, met, features, missing)
                before = met
            found = features.gather(1, chosen[:, None, None].expand(-1, 1, first.shape[1]))[:, 0]
            if number + 1 < self.rounds:
                chosen = self.head.next_task(found)
        return torch.cat([first, found], 1)

    def _meet(self, images: Tensor, chosen: Tensor, features: Tensor, missing: Tensor) -> None:
        """Fills in the features of each image with the adapter chosen for it, where they are `missing`. That and `chosen` lie
        with the processor, which so knows who meets whom without asking the device."""
        for number in range(1, len(self.bank)):
            rows = (missing[:, number] & (chosen == number)).nonzero()[:, 0]
            if len(rows):
                there = rows.to(images.device)
                features[there, number] = self._with(number, images[there])
                missing[rows, number] = False

    def _with(self, number: int, images: Tensor) -> Tensor:
        self.bank.choose(number)
        return self.backbone(images)


class RetrievingNetwork(SavedNetwork):
    """The network of a finished run, in which every image finds its adapter."""

    def as_graph(self) -> nn.Module:
        graph = super().as_graph()
        graph[0].grouped = False
        return graph


class MOS(ContinuedLearner):
    """An adapter for every task, kept near those before by a moving average; the head aligned on Gaussian samples; every image
    finds its adapter by what it is taken for, again and again.

    A batch in parts, of several processes or by `grad_accum`, needs one more forward: the loss compares all of its images.
    """

    head: RetrievingHead

    class Keys(OptimisationKeys, LaterTaskKeys, ContinuedKeys):
        """Model surgery of MOS"""

        head_lr_scale: float = key(0.1, "Learning rate of the head rows over that of the adapter.", gt=0)
        adapter_momentum: float = key(
            0.1, "Share of the mean of all earlier adapters that a task's own takes on after every step; 0 keeps them apart.",
            ge=0, lt=1)
        contrast_coeff: float = key(
            0.1, "Weight of the loss that tells a batch's features from each other and from the means of earlier classes; 0 "
                 "leaves it out.", ge=0)
        retrieval_rounds: int = key(
            4, "Adapters at most that an image meets in turn, each of the class that it was taken for with the one before.",
            ge=1)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.network = Retrieval(self.backbone, self.bank, self.head, self.config.retrieval_rounds)
        self._batch: Tensor | None = None  # features [B, d] of the step's whole batch, where this process has them in parts

    def make_head(self) -> RetrievingHead:
        return RetrievingHead(self.backbone.width, self.config, self.seed)

    def groups(self) -> list[dict]:
        rate = learning_rate(self.config, self.task) * self.config.head_lr_scale
        return [{"params": list(self.bank.current)}, {"params": self.head.trainable(), "lr": rate}]

    # ---- a step

    def optimizer(self) -> torch.optim.Optimizer:
        """With the merging after every step."""
        optimizer, share = super().optimizer(), self.config.adapter_momentum
        if self.task > 0 and share > 0:
            current = self.bank.current
            means = [stack.mean(0) for stack in self.bank.stacks()]

            @torch.no_grad()
            def merge(*_) -> None:
                for own, mean in zip(current, means, strict=True):
                    own.lerp_(mean, share)

            optimizer.register_step_post_hook(merge)
        return optimizer

    def backward(self, images: Tensor, labels: Tensor, extra: Tensor | None, total: int) -> tuple[Tensor, Tensor, Tensor]:
        config, (_, processes) = self.config, self._process
        apart = processes > 1 or config.grad_accum > 1
        self._batch = self._whole_batch(images, total) if apart and config.contrast_coeff > 0 else None
        return super().backward(images, labels, extra, total)

    @torch.no_grad()
    def _whole_batch(self, images: Tensor, total: int) -> Tensor:
        """Features of all images of the step `[total, d]`, of which `images` are this process's."""
        batch, begin = self.head.means.new_zeros(total, self.backbone.width), self._drawn
        for piece in images.chunk(self.config.grad_accum) if len(images) else ():
            first = self._drawn[1]
            batch[first:first + len(piece)] = self.embed_dropping(piece)
        self._drawn = begin
        distributed.add_up(batch)
        return batch

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        first = self._drawn[1]
        features = self.embed_dropping(images)
        logits = self.head.current_logits(features)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        if self.config.contrast_coeff > 0:
            loss = loss + self.config.contrast_coeff * self._contrast(features, first)
        return loss, logits

    def _contrast(self, features: Tensor, first: int) -> Tensor:
        """What these images, of which the batch's `first` comes first, add to the contrast of the whole batch times its size.

        Their gradient is that of all rows, since each is compared with them; the value is shared out by images.
        """
        whole = features
        if self._batch is not None:
            whole = torch.cat([self._batch[:first], features, self._batch[first + len(features):]])
        value = contrast(self.head.means, whole)
        return len(whole) * value - (len(whole) - len(features)) * value.detach()

    # ---- what the head reads

    @classmethod
    def networks(cls, adapters: int) -> list[int | None]:
        return [0] if adapters == 1 else [0, adapters - 1]

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        network = saved_network(saved, cls.networks, saved.task + 1)
        head = RetrievingHead(network.backbone.width, saved.config, saved.seed)
        head.from_file(saved.tensors(f"head_task_{saved.task}.safetensors"))
        return RetrievingNetwork(Retrieval(network.backbone, network.bank, head, saved.config.retrieval_rounds), None, head)
