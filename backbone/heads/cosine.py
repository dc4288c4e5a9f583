"""The cosine classifier: only the angle between feature and class vector counts (LUCIR, Hou et al., 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.heads.linear import GrowingHead, placed
from utils.config import Config, KeyGroup, key


class CosineHead(GrowingHead):
    """Angles only.

    Logits `s cos(f, w)`: neither the length of a class vector nor a bias can favour the classes of one task.

    scale: s, one scalar for all classes, begins at `cosine_scale`, is trained with task 0 and then fixed: every later task
    meets the same temperature, and no old logit moves by it. weight: `s w / ||w||`, so that a product with unit features
    gives the logits; bias: zeros, there because the file of a head has one.
    """

    class Keys(KeyGroup):
        """Cosine head"""

        cosine_scale: float = key(
            8.0, "Factor on the cosines at the start; trained with the first task, then fixed.", gt=0)

    kind = "cosine"
    predicts = "F.linear(F.normalize(features), weight, bias)"
    _ROWS = (*GrowingHead._ROWS, "scale")

    def __init__(self, width: int, config: Config, seed: int) -> None:
        super().__init__(width, config, seed)
        self.scale = nn.Parameter(torch.tensor(config.cosine_scale))

    def grow(self, classes: int, generator: torch.Generator) -> None:
        super().grow(classes, generator)
        self.new_bias = None

    def clear(self) -> None:
        """Rows are directions here, all of one length: they stay as they are."""

    @torch.no_grad()
    def commit(self) -> None:
        super().commit()
        self.scale.requires_grad_(False)

    def rows(self) -> tuple[Tensor, Tensor]:
        if self.new_weight is None:
            return self.weight, self.bias
        weight = placed(self.weight, (self.scale * F.normalize(self.new_weight)).detach(), self.first)
        return weight, weight.new_zeros(len(weight))

    def current_logits(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.new_weight))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.normalize(features))

    def as_linear(self) -> None:
        """A linear layer does not divide by the length of its input."""

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.scale.requires_grad_(len(self.weight) == 0)
