"""The ridge classifier: closed-form ridge regression on randomly projected features (RanPAC, McDonnell et al., 2023).

Shapes: d width, M = `ridge_dim` random features, c classes of a task, classes: of all tasks so far.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from backbone.heads.linear import Features, GrowingHead, Pause
from utils.config import Config, KeyGroup, key
from utils.errors import UserError
from utils.rng import generator
from utils.runs.progress import LOGGER

HELD_OUT = 5  # every fifth image is left out of the fit by which "auto" chooses
CANDIDATES = [10.0**-exponent for exponent in range(6)]  # of equally good ones the first, the strongest


class RidgeHead(GrowingHead):
    """Closed-form ridge on a random projection, as RanPAC.

    Predicts with `argmin_W sum ||W h - y||^2 + lambda ||W||^2`, `h = relu(f P)`, `y` one-hot, over the images of all tasks.

    projection: P `[d, M]`, Gaussian, fixed by the seed. Statistics: gram `sum h h^T` `[M, M]` and cross `sum h y^T`
    `[M, classes]`, float64, since a small lambda drowns in the rounding of float32; held_gram, held_cross: those of every
    fifth image, by which lambda is chosen; readout: W `[classes, M]`.

    The adapters are trained against the linear rows, which also answer for all classes while a task is being learned: the
    closed form has nothing to say of its classes yet.
    """

    class Keys(KeyGroup):
        """Ridge head"""

        ridge_dim: int | None = key(
            None, "Random features; memory grows with its square.", unset="8 times the width of the backbone", ge=1)
        ridge_lambda: Annotated[float, Field(gt=0)] | Literal["auto"] = key(
            "auto",
            'Penalty relative to the mean square of a random feature over all images so far; `"auto"` takes, after every task '
            "anew, the power of ten with the smallest error on every fifth of these images, fitted on the others, all classes "
            "competing, for which it keeps twice the sums.",
            allowed='a number above 0, or "auto"')

    kind = "ridge"
    predicts = "F.linear(F.relu(features @ projection), weight)"
    candidates = CANDIDATES
    STATISTICS = ("projection", "gram", "cross", "held_gram", "held_cross", "readout")

    def __init__(self, width: int, config: Config, seed: int) -> None:
        super().__init__(width, config, seed)
        size = config.ridge_dim or self.usual_size(width)
        stream = generator(seed, "projection")
        self.register_buffer("projection", torch.randn(width, size, generator=stream) / math.sqrt(width))
        self.register_buffer("gram", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("cross", torch.zeros(size, 0, dtype=torch.float64))
        held = size if self.pools(config) else 0
        self.register_buffer("held_gram", torch.zeros(held, held, dtype=torch.float64))
        self.register_buffer("held_cross", torch.zeros(held, 0, dtype=torch.float64))
        self.register_buffer("readout", torch.zeros(0, size))

    @staticmethod
    def pools(config: Config) -> bool:
        """Whether lambda is chosen by the images of all tasks, so that those held out are kept apart in the sums."""
        return config.ridge_lambda == "auto"

    @staticmethod
    def usual_size(width: int) -> int:
        """Random features where the config does not say."""
        return 8 * width

    def random_features(self, features: Tensor) -> Tensor:
        """`relu(f P)` `[b, M]`."""
        return F.relu(features @ self.projection.to(features.dtype))

    @torch.no_grad()
    def collect(self, features: Features, classes: int) -> list[Tensor]:
        """gram `[M, M]` and cross `[M, c]` of the images to fit, then of those held out."""
        size, options = len(self.gram), {"dtype": torch.float64, "device": self.weight.device}
        sums = [torch.zeros(size, columns, **options) for columns in (size, classes) * 2]
        for batch, labels, places in features:
            h, y = self.random_features(batch).double(), F.one_hot(labels, classes).double()
            held_out = (places + 1) % HELD_OUT == 0
            for part, rows in ((0, ~held_out), (2, held_out)):
                chosen = h * rows[:, None]  # to pick rows by a mask would be to wait for the device
                sums[part] += chosen.T @ h
                sums[part + 1] += chosen.T @ y
        return sums

    @torch.no_grad()
    def absorb(self, sums: list[Tensor], task: int, pause: Pause) -> None:
        fit_gram, fit_cross, held_gram, held_cross = sums
        self.gram, self.cross = self.gram + fit_gram + held_gram, self._joined(self.cross, fit_cross + held_cross)
        penalty = self.config.ridge_lambda
        penalties = self._best_first(self.asked(sums), pause) if isinstance(penalty, str) else [penalty]
        for penalty in penalties:  # the best, unless it is too small for the sums over all images
            W = solve(self.gram, self.cross, self.strength(self.gram, penalty))
            if W is not None:
                break
        else:
            raise UserError(f"ridge_lambda: {penalties[0]:g} is too small to solve for the ridge head; choose a larger one.")
        if len(penalties) > 1:
            LOGGER.info(f"Task {task}: ridge_lambda {penalty:g}")
        self.readout = W.T.to(self.readout)

    def _joined(self, cross: Tensor, new: Tensor) -> Tensor:
        """The sums `[M, classes]` with those of the task `[M, c]`: of new classes behind the others, else added to theirs."""
        if self.first is None:
            return torch.cat([cross, new], 1)
        return cross + F.pad(new, (self.first, cross.shape[1] - self.first - new.shape[1]))

    def asked(self, sums: list[Tensor]) -> list[Tensor]:
        """What candidates are fitted on and judged by, in the order of `collect`, once a task's sums have joined the others.

        A task's images alone know nothing of other classes, and are so few that they ask for a penalty which is too strong for
        all, or for none (docs/LOG.md, 2026-11-26): so it is the images of all tasks where those held out are kept.
        """
        if not len(self.held_gram):
            return sums
        self.held_gram, self.held_cross = self.held_gram + sums[2], self._joined(self.held_cross, sums[3])
        return [self.gram - self.held_gram, self.cross - self.held_cross, self.held_gram, self.held_cross]

    def _best_first(self, sums: list[Tensor], pause: Pause) -> list[float]:
        """The candidates by their error on the images that are held out; of equal ones the first stays first."""
        fit_gram, fit_cross, held_gram, held_cross = sums
        errors = []
        for number, each in enumerate(self.candidates):
            pause("ridge_lambda", number, len(self.candidates))
            W = solve(fit_gram, fit_cross, self.strength(fit_gram, each))
            errors.append(math.inf if W is None else held_out_error(W, held_gram, held_cross).item())
        return [self.candidates[number] for number in sorted(range(len(errors)), key=errors.__getitem__)]

    def strength(self, gram: Tensor, penalty: float) -> Tensor:
        """lambda of equation `(G + lambda I) W = C` for a `penalty` as the config gives it."""
        return penalty * gram.diagonal().mean()

    def forward(self, features: Tensor) -> Tensor:
        if self.new_weight is not None:
            return super().forward(features)
        return F.linear(self.random_features(features), self.readout.to(features.dtype))

    def as_linear(self) -> None:
        """Between features and logits lies a relu."""

    def to_file(self) -> dict[str, Tensor]:
        return {"weight": self.readout.float(), "projection": self.projection.float()}

    @classmethod
    def unfilled(cls, width: int, seed: int) -> "RidgeHead":
        return cls(width, cls.Keys(ridge_dim=1), seed)  # the usual one's sums would take gigabytes, for nothing

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        self.readout, self.projection = tensors["weight"], tensors["projection"]
        for name in ("gram", "cross", "held_gram", "held_cross"):  # a file has nothing to learn on from
            setattr(self, name, self.gram.new_zeros(0, 0))


def held_out_error(W: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """`sum ||W^T h - y||^2 - ||y||^2` over the images whose gram `[M, M]` and cross `[M, c]` are given."""
    return ((gram @ W) * W).sum() - 2 * (cross * W).sum()


def solve(gram: Tensor, cross: Tensor, strength: Tensor) -> Tensor | None:
    """`(G + lambda I)^-1 C` `[M, classes]` for lambda = `strength`; None where that is too small for the rounding."""
    lower, failed = torch.linalg.cholesky_ex(gram + strength * torch.eye(len(gram)).to(gram))
    return None if failed.item() else torch.cholesky_solve(cross, lower)
