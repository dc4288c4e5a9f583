"""The gate's mathematics: sparsemax, Gumbel noise, the sparsity loss and the temperature.

Shapes: a gate has one logit per active adapter, `[n]`; every function also takes leading batch dimensions.
"""

import math

import torch
from torch import Tensor


def sparsemax(z: Tensor, dim: int = -1) -> Tensor:
    """Exact Euclidean projection of `z` onto the probability simplex along `dim`.

    Martins & Astudillo (2016), "From Softmax to Sparsemax". Entries of `-inf` get weight 0. The support is found by
    sorting; given the support the projection is affine, so autograd through the last two lines yields the exact
    Jacobian `diag(s) - s s^T / |s|`, `s` being the indicator of the support.
    """
    z = z.transpose(dim, -1)
    with torch.no_grad():
        top = z.amax(-1, keepdim=True)
        ordered = torch.sort(z - top, dim=-1, descending=True).values
        count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        inside = 1 + count * ordered > ordered.cumsum(-1)
        size = inside.sum(-1, keepdim=True)
        threshold = (ordered.masked_fill(~inside, 0).sum(-1, keepdim=True) - 1) / size
        support = z - top > threshold
    shifted = torch.where(support, z - top, 0)
    mean = (shifted.sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return torch.where(support, shifted - mean, 0).transpose(dim, -1)


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent draws of Gumbel(0, 1), on the CPU, from the gate's own generator (Jang et al., 2017)."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    return -torch.log(-torch.log(uniform)).to(dtype)


def gumbel_sparsemax(logits: Tensor, tau: float | Tensor = 1.0, noise: Tensor | None = None, dim: int = -1) -> Tensor:
    """Gate weights `sparsemax((logits + noise) / tau)` (METHOD.md, equation 2); without `noise` deterministic."""
    return sparsemax((logits if noise is None else logits + noise) / tau, dim)


def gumbel_softmax(logits: Tensor, tau: float | Tensor = 1.0, noise: Tensor | None = None, dim: int = -1) -> Tensor:
    """The same with softmax in place of sparsemax: every weight stays positive (Jang et al., 2017)."""
    return torch.softmax((logits if noise is None else logits + noise) / tau, dim)


def sparsity_loss(beta: Tensor, eps: float = 1e-8) -> Tensor:
    """Entropy `Omega(beta) = -sum_i beta_i log(beta_i + eps)` of gate weights `[n]` (METHOD.md, equation 3).

    Computed in float32 or wider. Exactly 0 for a single adapter, whose weight cannot be anything but 1.
    """
    beta = beta.to(torch.promote_types(beta.dtype, torch.float32))
    if beta.shape[-1] == 1:
        return beta.new_zeros(beta.shape[:-1])
    return -(beta * torch.log(beta + eps)).sum(-1)


class TemperatureScheduler:
    """`tau_s = tau_final + (tau_init - tau_final) * rate^s` for the optimizer steps `s = 0 .. total_steps - 1` of a task.

    `anneal_rate="auto"` picks the rate with which the last step is within 1 % of `tau_final`.
    """

    ARRIVED = 0.01

    def __init__(self, tau_init: float, tau_final: float, anneal_rate: float | str, total_steps: int) -> None:
        self.tau_init, self.tau_final, self.total_steps = tau_init, tau_final, total_steps
        self.anneal_rate = self.arriving_rate() if anneal_rate == "auto" else float(anneal_rate)

    def at(self, step: int) -> float:
        """Temperature of optimizer step `step`, counted from 0 within the task."""
        return self.tau_final + (self.tau_init - self.tau_final) * self.anneal_rate**step

    def arriving_rate(self) -> float:
        """The largest rate whose last step is within 1 % of `tau_final` (1.0 where there is nothing to anneal)."""
        gap = self.tau_init - self.tau_final
        if gap <= self.ARRIVED * self.tau_final or self.total_steps < 2:
            return 1.0
        return (self.ARRIVED * self.tau_final / gap) ** (1 / (self.total_steps - 1))

    def warning(self) -> str | None:
        """One sentence if the last step does not arrive at `tau_final`, with the rate that would."""
        end = self.at(self.total_steps - 1)
        if end <= self.tau_final * (1 + self.ARRIVED) or math.isclose(self.anneal_rate, self.arriving_rate()):
            return None
        return (f"gumbel_anneal_rate {self.anneal_rate:g} ends this task's {self.total_steps} steps at tau {end:.2f}, "
                f"not at gumbel_tau_final {self.tau_final:g}; {self.arriving_rate():.4f} or \"auto\" would arrive.")
