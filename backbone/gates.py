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

    gated = True  # the weights sum to 1; those of OpenGate are all 1
    learned = True  # the logits are trained, with the magnitudes, while the temperature falls
    noisy = True  # Gumbel noise while training
    early = False  # decides before a task is trained, and what it keeps is not trained again

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

    def decide(self) -> Tensor:
        """The gate weights `[n]` that the growth decision reads, without noise."""
        return self()

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
    learned = False
    noisy = False

    def forward(self, noise: Tensor | None = None, logits: Tensor | None = None, tau: float | None = None) -> Tensor:
        return torch.ones_like(self.logits if logits is None else logits).detach()

    def replace(self, logits: Tensor) -> None:
        self.logits = nn.Parameter(logits.detach().clone(), requires_grad=False)


class EvidenceGate(GumbelGate):
    """Decides before a task is trained, from what its images look like to the frozen network (backbone/keys.py).

    The logit of an old adapter is minus the logarithm of how far the new images have moved from those that it was learned
    on, an F ratio; the newcomer's is minus the logarithm of `gate_price`, the shift at which an old adapter and a new one
    weigh the same. `decide` is the sparsemax of these logits at `tau_final`. An adapter that has been kept enters with its
    full magnitude from then on: beta is `1 / n` and `scale` is n, so nothing is diluted as the stream grows.
    """

    learned = False
    noisy = False
    early = True

    def forward(self, noise: Tensor | None = None, logits: Tensor | None = None, tau: float | None = None) -> Tensor:
        count = len(self.logits if logits is None else logits)
        return torch.full_like(self.logits if logits is None else logits, 1 / max(count, 1)).detach()

    def decide(self) -> Tensor:
        return self._gate(gumbel_sparsemax, None, None, None).detach()

    def weigh(self, shifts: list[float], price: float) -> None:
        """New logits from the shift `F` against every old adapter, in the order of the bank, and the newcomer's price."""
        ratios = torch.tensor([*shifts, price], dtype=self.logits.dtype, device=self.logits.device)
        self.replace(-ratios.clamp_min(torch.finfo(ratios.dtype).tiny).log())

    def replace(self, logits: Tensor) -> None:
        self.logits = nn.Parameter(logits.detach().clone(), requires_grad=False)
        self.scale = float(max(len(logits), 1))


GATES: dict[str, type[GumbelGate]] = {
    "gumbel_sparsemax": GumbelGate,
    "sparsemax": SparsemaxGate,
    "gumbel_softmax": GumbelSoftmaxGate,
    "evidence": EvidenceGate,
    "none": OpenGate,
}
