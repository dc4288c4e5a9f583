"""RanPAC: one adapter, then ridge regression on random features (McDonnell, Gong, Parvaneh, Abbasnejad & van den Hengel,
NeurIPS 2023, arXiv 2307.02251).

Phase 1, first task alone: an adapter and proxy rows, cross-entropy. Phase 2, every task: `h = relu(f(x) W)` with `W [d, M]`
drawn once from N(0, 1), `G += sum h h^T`, `Q += sum h y^T`; the class is the largest of `h^T (G + lambda I)^-1 Q` (algorithm
1). lambda, of 10^-8 to 10^8, is the one with the least squared error on a fifth of the task's images, fitted on the others.

As in the official code (RanPAC/RanPAC at 012927f), but for rounding and one choice: sums are in float64, there in float32, and
the fifth is every fifth image of the pass, there the last fifth of a shuffled one.
"""

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from backbone.heads.proxy import ProxyHead
from backbone.heads.ridge import RidgeHead
from models.adapted import FirstTaskLearner
from utils.config import Config, key


class RandomRidge(ProxyHead, RidgeHead):
    """The ridge head with RanPAC's scale of W and choice of lambda; its file is that of a ridge head."""

    candidates = [10.0**exponent for exponent in range(-8, 9)]  # of equally good ones the first, the weakest

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.projection.mul_(math.sqrt(self.width))

    @staticmethod
    def pools(config: Config) -> bool:
        return config.ridge_lambda == "pooled"

    @staticmethod
    def usual_size(width: int) -> int:
        return min(10_000, 16 * width)

    def strength(self, gram: Tensor, penalty: float) -> Tensor:
        return gram.new_tensor(penalty)

    def forward(self, features: Tensor) -> Tensor:
        return self.current_logits(features) if self.training_rows else RidgeHead.forward(self, features)


class RanPAC(FirstTaskLearner):
    """An adapter trained on the first task, then ridge regression in closed form on random features of all tasks."""

    scenarios = ("class", "domain")

    class Keys(FirstTaskLearner.Keys):
        """Random features of RanPAC"""

        ridge_dim: int | None = key(
            None, "Random features M; their sums take 8 M^2 bytes.",
            unset="10,000 as published, or 16 times the width of the backbone where that is less", ge=1)
        ridge_lambda: Annotated[float, Field(gt=0)] | Literal["auto", "pooled"] = key(
            "auto",
            'Ridge penalty lambda; `"auto"`, as published, takes for every task anew the power of ten with the smallest error '
            'on every fifth image of the task, fitted on the others; `"pooled"` on every fifth image of all tasks so far, all '
            "classes competing, for which it keeps twice the sums.", allowed='a number above 0, "auto" or "pooled"')

    def make_head(self) -> RandomRidge:
        return RandomRidge(self.backbone.width, self.config, self.seed)
