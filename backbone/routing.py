"""Which key an image belongs to: how likely each makes what the image looks like to the frozen network (METHOD.md, section 9).

Shapes: b images, n tokens, d width, q statistics of an image, K keys.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.rng import generator

STATISTICS = 128  # q: that many random mixtures of the 2 d means and deviations of an image's tokens
PRIOR = 1.0  # times q images: how much the covariance within all keys backs that of one key
_FLOOR = 1e-3  # of the mean variance: a statistic that hardly varies decides nothing


class Moments(NamedTuple):
    """The statistics of a key's images: their number, mean `[q]`, and scatter `[q, q]` about it, as they are kept: float32."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, count: int, total: Tensor, products: Tensor) -> "Moments":
        """From the sum `[q]` of the statistics of `count` images and of their outer products `[q, q]`, both float64."""
        mean = total / count
        return cls(count, mean.float(), (products - count * torch.outer(mean, mean)).float())

    def joined(self, other: "Moments") -> "Moments":
        """Those of the images of both (Chan, Golub & LeVeque, 1983)."""
        count, mean = self.count + other.count, self.mean.double()
        apart = other.mean.double() - mean
        scatter = self.scatter.double() + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, (mean + apart * (other.count / count)).float(), scatter.float())


class Router(nn.Module):
    """Sends every image to the key that makes its statistics most likely: a Gaussian per key.

    The covariance of a key is backed by that within all keys, as if `PRIOR` q images more had been seen (regularised
    discriminant analysis, Friedman 1989): a key of few images is told apart by its mean, one of many by its shape as well.
    A key costs q + q (q + 1) / 2 numbers, 8,384; the mixtures are drawn from the seed and not stored.

    tasks: the tasks that founded the keys, ascending.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        size = min(STATISTICS, 2 * width)
        drawn = torch.randn(2 * width, size, generator=generator(seed, "router"), dtype=torch.float64)
        self.register_buffer("mixtures", drawn / math.sqrt(2 * width), persistent=False)
        self.tasks: list[int] = []
        self.register_buffer("means", torch.zeros(0, size))
        self.register_buffer("factors", torch.zeros(0, size, size))  # lower triangular, of the covariances
        self.moments: dict[int, Moments] = {}

    def statistics(self, tokens: Tensor) -> Tensor:
        """What patch tokens `[b, n, d]` say of the look of an image, wherever and whatever: `[b, q]` float64."""
        tokens = tokens.double()
        return torch.cat([tokens.mean(1), tokens.std(1, correction=0)], 1) @ self.mixtures

    def forward(self, tokens: Tensor) -> Tensor:
        """For every image the number of its key in `tasks`, int64 `[b]`."""
        apart = self.statistics(tokens)[None] - self.means.double()[:, None]  # (3, 1, 128) -> (3, 16, 128)
        factors = self.factors.double()
        white = torch.linalg.solve_triangular(factors, apart.mT, upper=False)  # [K, q, b]
        spread = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        return (-white.square().sum(1) / 2 - spread[:, None]).argmax(0)

    # ---- learning

    def found(self, task: int, moments: Moments) -> None:
        """A key of its own for the images of `task`."""
        self.moments[task] = moments
        self._refresh()

    def join(self, task: int, into: int) -> None:
        """The key of `task` becomes part of the key `into`."""
        self.moments[into] = self.moments[into].joined(self.moments.pop(task))
        self._refresh()

    def _refresh(self) -> None:
        self.tasks = sorted(self.moments)
        keys = [self.moments[task] for task in self.tasks]
        size = self.means.shape[1]
        scatters = [key.scatter.double() for key in keys]
        within = sum(scatters) / sum(key.count for key in keys)
        covariances = torch.stack([(scatter + PRIOR * size * within) / (key.count + PRIOR * size)
                                   for scatter, key in zip(scatters, keys, strict=True)])
        floor = _FLOOR * covariances.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float64).tiny
        covariances = covariances + floor[:, None, None] * torch.eye(size, dtype=torch.float64, device=within.device)
        self.means = torch.stack([key.mean for key in keys]).to(self.means)
        self.factors = torch.linalg.cholesky(covariances).to(self.factors)

    # ---- what is stored

    def tensors(self) -> list[Tensor]:
        """What learning needs of the keys: means, and the triangles of the scatters, from which the factors are made."""
        rows, columns = torch.tril_indices(*self.factors.shape[1:])
        return [tensor for key in self.moments.values() for tensor in (key.mean, key.scatter[rows, columns])]

    def to_file(self) -> dict[str, Tensor]:
        """The tensors of `keys_task_<t>.safetensors`."""
        rows, columns = torch.tril_indices(*self.factors.shape[1:])
        return {"tasks": torch.tensor(self.tasks), "means": self.means, "factors": self.factors[:, rows, columns]}

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        """The router whose `to_file` gave `tensors`."""
        self.tasks, self.means = tensors["tasks"].tolist(), tensors["means"]
        size = self.means.shape[1]
        rows, columns = torch.tril_indices(size, size)
        self.factors = torch.zeros(len(self.tasks), size, size)
        self.factors[:, rows, columns] = tensors["factors"]

    def state(self) -> dict[int, tuple]:
        """Everything that learning goes on with, as plain values and tensors."""
        return {task: tuple(moments) for task, moments in self.moments.items()}

    def load(self, state: dict[int, tuple], device: torch.device) -> None:
        """The router as it was at `state`."""
        self.moments = {task: Moments(count, mean.to(device), scatter.to(device))
                        for task, (count, mean, scatter) in state.items()}
        if self.moments:
            self._refresh()
