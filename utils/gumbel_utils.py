"""The gate's mathematics: sparsemax, Gumbel noise, the sparsity loss and the temperature.

Shapes: a gate has one logit per active adapter, `[n]`; every function also takes leading batch dimensions.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sparsemax(z: Tensor, dim: int = -1) -> Tensor:
    """Exact Euclidean projection of `z` onto the probability simplex along `dim` (Martins & Astudillo, 2016).

    Entries of `-inf` get exactly 0. Half precisions are computed in float32. Raises ValueError where all entries are
    `-inf`; looking for that waits for the device.
    """
    if torch.isneginf(z).all(dim).any():
        raise ValueError("sparsemax needs at least one entry above -inf along its dimension.")
    return _project(z, dim)


def _project(z: Tensor, dim: int) -> Tensor:
    """The support is found by sorting; given the support the projection is affine, so autograd through what follows it
    yields the exact Jacobian `diag(s) - s s^T / |s|`, `s` being the indicator of the support."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32)).transpose(dim, -1)
    with torch.no_grad():
        top = wide.amax(-1, keepdim=True)
        ordered = torch.sort(wide - top, dim=-1, descending=True).values
        count = torch.arange(1, wide.shape[-1] + 1, device=z.device, dtype=wide.dtype)
        inside = 1 + count * ordered > ordered.cumsum(-1)
        size = inside.sum(-1, keepdim=True)
        threshold = (ordered.masked_fill(~inside, 0).sum(-1, keepdim=True) - 1) / size
        support = wide - top > threshold
    shifted = torch.where(support, wide - top, 0)
    mean = (shifted.sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return torch.where(support, shifted - mean, 0).transpose(dim, -1).to(z.dtype)


def sample_gumbel(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent draws of Gumbel(0, 1), `-log(-log U)`, finite always (Jang et al., 2017).

    Drawn on the generator's device (the CPU without one), so that the numbers do not depend on `device`.
    """
    where = "cpu" if generator is None else generator.device
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=where)
    uniform = uniform.clamp_min(torch.finfo(torch.float64).tiny)
    return -torch.log(-torch.log(uniform)).to(device=device, dtype=dtype)


def gumbel_sparsemax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    training: bool = True,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Gate weights `sparsemax((logits + G) / tau)` along `dim` (METHOD.md, equation 2).

    `training` adds Gumbel noise G, drawn from `generator`; `noise`, of the shape of `logits`, is used in its place.
    `hard` gives the one-hot vector of the largest weight with the gradient of the soft weights (straight-through).
    Raises ValueError for a `tau` that is not positive.
    """
    return _gumbel(_project, logits, tau, hard, dim, training, generator, noise)


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    training: bool = True,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """`gumbel_sparsemax` with softmax in place of sparsemax: every weight stays positive (Jang et al., 2017)."""
    return _gumbel(torch.softmax, logits, tau, hard, dim, training, generator, noise)


def _gumbel(
    project: Callable[[Tensor, int], Tensor],
    logits: Tensor,
    tau: float | Tensor,
    hard: bool,
    dim: int,
    training: bool,
    generator: torch.Generator | None,
    noise: Tensor | None,
) -> Tensor:
    if not isinstance(tau, Tensor) and not tau > 0:
        raise ValueError(f"tau is {tau}; a temperature must be positive.")
    if training and noise is None:
        noise = sample_gumbel(logits.shape, generator, logits.dtype, logits.device)
    soft = project((logits + noise if training else logits) / tau, dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one_hot + soft - soft.detach()


def sparsity_loss(beta: Tensor, eps: float = 1e-8) -> Tensor:
    """Entropy `Omega(beta) = -sum_i beta_i log(beta_i + eps)` of gate weights `[n]` (METHOD.md, equation 3).

    Computed in float32 or wider. Exactly 0 for a single adapter, whose weight cannot be anything but 1.
    """
    beta = beta.to(torch.promote_types(beta.dtype, torch.float32))
    if beta.shape[-1] == 1:
        return beta.new_zeros(beta.shape[:-1])
    return -(beta * torch.log(beta + eps)).sum(-1)


class TemperatureScheduler:
    """`tau_s = tau_final + (tau_init - tau_final) * rate^s`, `s` counting the optimizer steps of a task from 0.

    `anneal_rate="auto"` picks the rate with which the last of `total_steps` steps is within 1 % of `tau_final`. `step`
    moves on by one step, `reset` goes back to the first one of a task.
    """

    ARRIVED = 0.01

    def __init__(
        self,
        tau_init: float = 5.0,
        tau_final: float = 0.5,
        anneal_rate: float | str = 0.999,
        total_steps: int | None = None,
    ) -> None:
        if anneal_rate == "auto" and total_steps is None:
            raise ValueError('anneal_rate "auto" needs total_steps, the optimizer steps of the task.')
        self.tau_init, self.tau_final, self.total_steps = tau_init, tau_final, total_steps
        self.anneal_rate = self.arriving_rate() if anneal_rate == "auto" else float(anneal_rate)
        self._step = 0

    def get_temperature(self) -> float:
        """Temperature of the current step."""
        return self.at(self._step)

    def step(self) -> float:
        """Moves to the next optimizer step; returns its temperature."""
        self._step += 1
        return self.get_temperature()

    def reset(self, step: int = 0) -> None:
        """Goes to the first step of a task, or to `step` of one that is resumed."""
        self._step = step

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
