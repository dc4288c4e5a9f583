"""The gates: from one logit per active adapter to the weight with which each adapter enters. One class per gate."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.gumbel_utils import gumbel_softmax, gumbel_sparsemax


class GumbelGate(nn.Module):
    """Gumbel-Sparsemax gate over the active adapters (METHOD.md, equation 2).

    logits: `[n]`, one per active adapter, in the order of the bank. tau: the one temperature; it lives here alone, so
    setting it changes the very next forward of every block.
    """

    gated = True  # beta is learned; OpenGate's is not
    noisy = True  # Gumbel noise while training

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(0))
        self.register_buffer("tau", torch.tensor(1.0), persistent=False)
        self.scale = 1.0  # METHOD.md, `gate_scale`

    def set_temperature(self, tau: float) -> None:
        """Temperature of every forward from now on."""
        self.tau.fill_(tau)

    def forward(self, noise: Tensor | None = None, logits: Tensor | None = None, tau: float | None = None) -> Tensor:
        """Gate weights beta `[n]`, on the simplex; `logits` and `tau` replace the gate's own for a what-if."""
        return self._gate(gumbel_sparsemax, noise, logits, tau)

    def _gate(self, function: Callable[..., Tensor], noise: Tensor | None, logits: Tensor | None, tau: float | None) -> Tensor:
        return function(self.logits if logits is None else logits, self.tau if tau is None else tau,
                        training=noise is not None, noise=noise)

    def newcomer_logit(self, tau_final: float) -> float:
        """The smallest logit in the noise-free support at `tau_final`: where a newcomer starts."""
        support = self(tau=tau_final) > 0
        return self.logits[support].min().item()

    def replace(self, logits: Tensor) -> None:
        """New logits after the active set has changed; the parameter is a new one, so optimizers start afresh."""
        self.logits = nn.Parameter(logits.detach().clone())


class SparsemaxGate(GumbelGate):
    """Sparsemax without noise."""

    noisy = False


class GumbelSoftmaxGate(GumbelGate):
    """Softmax in place of sparsemax: every active adapter always takes part."""

    def forward(self, noise: Tensor | None = None, logits: Tensor | None = None, tau: float | None = None) -> Tensor:
        return self._gate(gumbel_softmax, noise, logits, tau)


class OpenGate(GumbelGate):
    """SD-LoRA: every adapter enters with weight 1 and nothing is learned here (METHOD.md, section 4)."""

    gated = False
    noisy = False

    def forward(self, noise: Tensor | None = None, logits: Tensor | None = None, tau: float | None = None) -> Tensor:
        return torch.ones_like(self.logits if logits is None else logits).detach()

    def replace(self, logits: Tensor) -> None:
        self.logits = nn.Parameter(logits.detach().clone(), requires_grad=False)


GATES: dict[str, type[GumbelGate]] = {
    "gumbel_sparsemax": GumbelGate,
    "sparsemax": SparsemaxGate,
    "gumbel_softmax": GumbelSoftmaxGate,
    "none": OpenGate,
}
