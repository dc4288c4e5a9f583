"""The aligned classifier: after each task the whole linear head is trained again, on features drawn from Gaussians that
stand for the classes (classifier alignment of SLCA, Zhang et al., 2023).

Shapes: d width, c classes of a task, P = d (d + 1) / 2 entries of a symmetric matrix, n images or samples of a class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.heads.linear import Features, GrowingHead, Pause
from utils.config import Config, KeyGroup, key
from utils.rng import generator

LOGIT_NORM = 0.1  # SLCA's: logits are trained at a norm of 1 / 0.1, so that no task's can outgrow the others'
MOMENTUM = 0.9
JITTER = 1e-4  # SLCA's; the head of this name takes it relative to the mean variance


class AlignedHead(GrowingHead):
    """Linear, trained again after each task on samples from stored class means and covariances, as SLCA.

    Every row is trained against every other, though the tasks' images are gone.

    Statistics, per class: means `[classes, d]` and covariances `[classes, P]` (divisor `n - 1`, lower triangle row by row),
    float32. sizes: classes of each task. Classes that come back have a Gaussian for every task; those of later tasks stand
    behind those of earlier ones, in the order of the classes, and a class is drawn from all of its own.
    """

    class Keys(KeyGroup):
        """Aligned head"""

        align_epochs: int = key(5, "Epochs in which the whole head is trained after each task.", ge=1)
        align_samples: int = key(256, "Features drawn per class and epoch.", ge=1)
        align_lr: float = key(0.01, "Learning rate at the start; it falls along a cosine.", gt=0)

    kind = "aligned"
    decay = 0.0  # weight decay of the alignment
    period: int | None = None  # epochs in which its learning rate falls, if not all
    STATISTICS = ("means", "covariances", "sizes")

    def __init__(self, width: int, config: Config, seed: int) -> None:
        super().__init__(width, config, seed)
        self.register_buffer("means", torch.zeros(0, width))
        self.register_buffer("covariances", torch.zeros(0, width * (width + 1) // 2))
        self.register_buffer("sizes", torch.zeros(0, dtype=torch.long))

    @torch.no_grad()
    def collect(self, features: Features, classes: int) -> list[Tensor]:
        """Per class the number of images `[c]`, the sum of features `[c, d]` and of their outer products `[c, d, d]`."""
        options = {"dtype": torch.float64, "device": self.weight.device}
        counts = torch.zeros(classes, **options)
        sums, products = (torch.zeros(classes, *shape, **options) for shape in ((self.width,), (self.width, self.width)))
        for batch, labels, _ in features:
            wide = batch.double()
            for label in range(classes):  # whichever are in the batch: to ask would be to wait for the device
                chosen = (labels == label)[:, None]
                members = wide * chosen
                counts[label] += chosen.sum()
                sums[label] += members.sum(0)
                products[label] += members.T @ wide
        return [counts, sums, products]

    @torch.no_grad()
    def absorb(self, sums: list[Tensor], task: int, pause: Pause) -> None:
        counts, totals, products = sums
        means = totals / counts[:, None]
        scatter = products - counts[:, None, None] * means[:, :, None] * means[:, None, :]
        covariances = scatter / (counts - 1).clamp_min(1)[:, None, None]
        rows, columns = torch.tril_indices(self.width, self.width, device=covariances.device)
        self.means = torch.cat([self.means, means.to(self.means)])
        self.covariances = torch.cat([self.covariances, covariances[:, rows, columns].to(self.covariances)])
        self.sizes = torch.cat([self.sizes, self.sizes.new_tensor([len(counts)])])
        self.align(task, pause)

    def covariance(self, label: int) -> Tensor:
        """Covariance `[d, d]` of the features of class `label`, float64."""
        rows, columns = torch.tril_indices(self.width, self.width, device=self.weight.device)
        full = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.weight.device)
        full[rows, columns] = self.covariances[label].double()
        return full + full.tril(-1).T

    def draw(self, factors: list[Tensor], samples: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """`samples` features of every Gaussian, one after another, `[Gaussians n, d]`, and their labels."""
        parts = []
        for mean, lower in zip(self.centres(), factors, strict=True):
            noise = torch.randn(samples, self.width, generator=stream).to(self.weight)
            parts.append(mean.to(self.weight) + noise @ lower.T.to(self.weight))
        labels = torch.arange(len(factors), device=self.weight.device) % len(self.weight)
        return torch.cat(parts), labels.repeat_interleave(samples)

    def centres(self) -> Tensor:
        """Where the samples of every Gaussian lie around, `[Gaussians, d]`."""
        return self.means

    def factor(self, label: int) -> Tensor:
        """Lower triangular factor `[d, d]` of the covariance that samples of a class have."""
        return factor(self.covariance(label))

    def sampled_logits(self, samples: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
        """Logits `[b, classes]` of samples `[b, d]`, as the rows are trained on them; sizes: classes of each task."""
        return level(F.linear(samples, weight, bias), sizes)

    def keep(self, weight: Tensor, bias: Tensor) -> None:
        """Takes the rows that alignment has arrived at."""
        self.weight, self.bias = weight, bias

    @torch.enable_grad()
    def align(self, task: int, pause: Pause) -> None:
        """Trains all rows from where they are, in batches of as many images as a class has samples, by SGD along a cosine.

        Every draw is keyed by (seed, task), so each process of a run arrives at the same rows.
        """
        config, stream = self.config, generator(self.seed, "align", task)
        weight, bias = (tensor.clone().requires_grad_() for tensor in (self.weight, self.bias))
        optimizer = torch.optim.SGD([weight, bias], lr=config.align_lr, momentum=MOMENTUM, weight_decay=self.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.period or config.align_epochs)
        factors = [self.factor(label) for label in range(len(self.means))]
        sizes = self.sizes.tolist() if self.first is None else [len(self.weight)]  # of classes that came together
        for epoch in range(config.align_epochs):
            features, labels = self.draw(factors, config.align_samples, stream)
            order = torch.randperm(len(labels), generator=stream).to(labels.device)
            batches = order.split(config.align_samples)
            for number, batch in enumerate(batches, epoch * len(batches)):
                pause("aligning the head", number, config.align_epochs * len(batches))
                F.cross_entropy(self.sampled_logits(features[batch], weight, bias, sizes), labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
        self.keep(weight.detach(), bias.detach())


class OfficialHead(AlignedHead):
    """What the official code of SLCA does otherwise, and after it that of MOS and TUNA.

    Covariances get 1e-4 I, the alignment has the weight decay of training, and the first task is not followed by one. Rows
    start from N(0, 0.02^2) and biases from 0.
    """

    def __init__(self, width: int, config: Config, seed: int) -> None:
        super().__init__(width, config, seed)
        self.decay = config.weight_decay

    def grow(self, classes: int, generator: torch.Generator) -> None:
        super().grow(classes, generator)
        rows = nn.init.trunc_normal_(torch.empty(classes, self.width), std=0.02, generator=generator)
        self.new_weight = nn.Parameter(rows.to(self.weight))

    def shrunk(self) -> Tensor:
        """Means times `0.9 + 0.1 (i + 1) / (t + 1)`, i being the class's task and t the current one, `[classes, d]`."""
        tasks, classes = len(self.sizes), len(self.means)
        shares = (torch.arange(tasks, device=self.sizes.device) + 1) / tasks
        factors = (0.9 + 0.1 * shares).repeat_interleave(self.sizes, output_size=classes)  # told how many, it asks no device
        return self.means * factors[:, None].to(self.means)

    def factor(self, label: int) -> Tensor:
        covariance = self.covariance(label)
        return torch.linalg.cholesky(covariance + JITTER * torch.eye(len(covariance)).to(covariance))

    def align(self, task: int, pause: Pause) -> None:
        if task > 0 and self.config.align_epochs > 0:
            super().align(task, pause)


class ContinuedHead(OfficialHead):
    """As MOS and TUNA: samples have plain logits, and every task goes on with the aligned rows, of all classes in one
    parameter; while a task is trained, weight decay is all that moves those of earlier ones."""

    @property
    def training_rows(self) -> bool:
        """Whether a task is being trained."""
        return self.new_weight is not None

    def grow(self, classes: int, generator: torch.Generator) -> None:
        super().grow(classes, generator)
        weight, bias = self.rows()
        self.new_weight, self.new_bias = nn.Parameter(weight), nn.Parameter(bias)
        self.weight, self.bias = weight.new_zeros(0, self.width), bias.new_zeros(0)

    def current_logits(self, features: Tensor) -> Tensor:
        return super().current_logits(features)[:, len(self.means):]

    def sampled_logits(self, samples: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
        return F.linear(samples, weight, bias)


def level(logits: Tensor, sizes: list[int]) -> Tensor:
    """Logits `[b, classes]` over the mean, over tasks of `sizes` classes, of their norm, times `1 / LOGIT_NORM`."""
    norms = torch.stack([part.norm(dim=1) for part in logits.split(sizes, 1)]).mean(0)
    return logits / (norms[:, None] + 1e-7) / LOGIT_NORM


def factor(covariance: Tensor) -> Tensor:
    """Lower triangular `L [d, d]` with `L L^T = C + JITTER tr(C) / d I`: a class of no more than d images has a singular C."""
    jitter = JITTER * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny
    return torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance)).to(covariance))
