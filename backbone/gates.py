"""The gates: from one logit per active adapter to the weight with which each adapter enters. One class per function.

What is done with a gate in the course of a task, and when growth is decided, is a recipe's business (models/recipes/).
"""

import torch
from torch import Tensor, nn

from utils.gumbel_utils import gumbel_softmax, gumbel_sparsemax


class Gate(nn.Module):
    """One logit `[n]` per active adapter, in the order of the bank; `forward` gives the gate weights beta `[n]`.

    scale: METHOD.md, `gate_scale`: `scale * beta * alpha` enters equation 1. trained: whether the logits get gradients.
    """

    trained = False

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(0), requires_grad=self.trained)
        self.scale = 1.0

    def replace(self, logits: Tensor) -> None:
        """New logits after the active set has changed; the parameter is a new one, so optimizers start afresh."""
        self.logits = nn.Parameter(logits.detach().clone(), requires_grad=self.trained)


class GumbelGate(Gate):
    """Gumbel-Sparsemax gate over the active adapters (METHOD.md, equation 2).

    tau: the one temperature; it lives here alone, so setting it changes the very next forward of every block.
    """

    trained = True
    function = staticmethod(gumbel_sparsemax)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tau", torch.tensor(1.0), persistent=False)

    def set_temperature(self, tau: float) -> None:
        """Temperature of every forward from now on."""
        self.tau.fill_(tau)

    def forward(self, noise: Tensor | None = None, logits: Tensor | None = None, tau: float | None = None) -> Tensor:
        """Gate weights beta `[n]`, on the simplex; `logits` and `tau` replace the gate's own for a what-if."""
        return self.function(self.logits if logits is None else logits, self.tau if tau is None else tau,
                             training=noise is not None, noise=noise)

    def smallest_in_support(self, tau: float) -> float:
        """The smallest logit in the noise-free support at `tau`: where a newcomer starts."""
        return self.logits.masked_fill(self(tau=tau) <= 0, float("inf")).min().item()


class GumbelSoftmaxGate(GumbelGate):
    """Softmax in place of sparsemax: every active adapter always takes part."""

    function = staticmethod(gumbel_softmax)


class OpenGate(Gate):
    """SD-LoRA: every adapter enters with weight 1 and nothing is learned here (METHOD.md, section 4)."""

    def forward(self, noise: Tensor | None = None) -> Tensor:
        return torch.ones_like(self.logits)


class EqualGate(Gate):
    """Every adapter enters with its full magnitude: beta is `1 / n`, on the simplex, and `scale` is n, so that nothing is
    diluted as the stream grows."""

    def forward(self, noise: Tensor | None = None) -> Tensor:
        return torch.full_like(self.logits, 1 / max(len(self.logits), 1))

    def replace(self, logits: Tensor) -> None:
        super().replace(logits)
        self.scale = float(max(len(logits), 1))
