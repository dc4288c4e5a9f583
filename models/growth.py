"""Conditional growth: which adapters stay after a task (METHOD.md, section 2, equation 4). One function per rule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.lora import AdapterBank, frobenius_norm
from utils.config import Config
from utils.rng import generator


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at: `beta` `[n]` at `tau_final` without noise, the bank, and, when asked for, the held-out loss
    (with, without) the current adapter, the new head rows fitted both times. seed and nb_tasks: those of the stream."""

    beta: Tensor
    bank: AdapterBank
    held_out_losses: Callable[[], tuple[float, float]]
    seed: int
    nb_tasks: int


@dataclass(frozen=True)
class Decision:
    """The adapters to keep, by task; the number that decided and the limit it was held against, for log and results."""

    keep: list[int]
    value: float | None = None
    limit: float | None = None
    refit: bool = True  # whether the new head rows must be fitted again once an adapter has gone


def by_threshold(config: Config, evidence: Evidence) -> Decision:
    """Keep the current adapter if `beta_t > delta`."""
    beta = evidence.beta[-1]
    threshold = torch.tensor(config.growth_threshold).to(beta)  # rounded as beta is: 0.1 is not above 0.1
    return Decision(_with_current(evidence.bank, bool(beta > threshold)), beta.item(), threshold.item())


def by_rank(config: Config, evidence: Evidence) -> Decision:
    """Task 0 and the `growth_topk - 1` others with the largest weights stay; of equal weights the older one."""
    tasks = evidence.bank.tasks
    others = sorted(tasks[1:], key=lambda task: (-evidence.beta[tasks.index(task)].item(), task))
    return Decision(sorted([tasks[0], *others[:config.growth_topk - 1]]), limit=float(config.growth_topk))


def by_held_out_loss(config: Config, evidence: Evidence) -> Decision:
    """Keep the current adapter if the held-out loss without it is worse by more than the margin, relatively."""
    if len(evidence.bank.tasks) == 1:
        return Decision(list(evidence.bank.tasks), limit=config.growth_margin)
    with_it, without = evidence.held_out_losses()
    gain = (without - with_it) / max(with_it, torch.finfo(torch.float32).tiny)
    return Decision(_with_current(evidence.bank, gain > config.growth_margin), gain, config.growth_margin)


def by_residual(config: Config, evidence: Evidence) -> Decision:
    """SD-LoRA-KD: drop the current adapter if its direction is a combination of earlier ones in every block and projection;
    its magnitude then goes to the earlier adapters, in the proportions of the combination (METHOD.md, section 4)."""
    bank = evidence.bank
    if len(bank.tasks) == 1:
        return Decision(list(bank.tasks), limit=config.kd_residual)
    coefficients, residual = combination_of_stored(bank)
    largest = residual.max().item()
    kept = largest > config.kd_residual
    if not kept:
        magnitude = bank.magnitudes()[-1].detach() * frobenius_norm(bank.new_A, bank.new_B)
        bank.absorbed[:-1] += (coefficients * magnitude).to(bank.absorbed)
    return Decision(_with_current(bank, kept), largest, config.kd_residual, refit=False)


def by_chance(config: Config, evidence: Evidence) -> Decision:
    """A control: task 0 and `growth_topk - 1` others, drawn from the seed, whatever they are worth."""
    others = torch.randperm(evidence.nb_tasks - 1, generator=generator(evidence.seed, "growth")) + 1
    drawn = others[:config.growth_topk - 1].tolist()
    return Decision(_with_current(evidence.bank, evidence.bank.current in drawn), limit=float(config.growth_topk))


def by_order(config: Config, evidence: Evidence) -> Decision:
    """A control: the first `growth_topk` tasks."""
    return Decision(_with_current(evidence.bank, evidence.bank.current < config.growth_topk), limit=float(config.growth_topk))


def keep_all(config: Config, evidence: Evidence) -> Decision:
    """No pruning."""
    return Decision(list(evidence.bank.tasks))


RULES: dict[str, Callable[[Config, Evidence], Decision]] = {
    "threshold": by_threshold,
    "topk": by_rank,
    "val_loss": by_held_out_loss,
    "kd": by_residual,
    "random": by_chance,
    "first_k": by_order,
    "none": keep_all,
}


@torch.no_grad()
def combination_of_stored(bank: AdapterBank) -> tuple[Tensor, Tensor]:
    """Least squares of the current unit direction on the stored ones, per block and projection.

    Returns coefficients `[n - 1, L, 2]` and the squared Frobenius norm of what they leave `[L, 2]`, in float64. The Gram
    matrix of directions comes from `<B_i A_i, B_j A_j> = <B_i^T B_j, A_i A_j^T>`; no `d x d` matrix is formed.
    """
    A = torch.cat([bank.A, bank.new_A.detach()], 2).double()
    B = torch.cat([bank.B, bank.new_B.detach()], 3).double()
    members = torch.block_diag(*[torch.ones(1, rank) for rank in bank.ranks]).to(A)  # [n, R + r]
    gram = members @ ((B.mT @ B) * (A @ A.mT)) @ members.T  # [L, 2, n, n]
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().clamp_min(torch.finfo(A.dtype).tiny)
    gram = gram / norms[..., :, None] / norms[..., None, :]
    earlier, cross = gram[..., :-1, :-1], gram[..., :-1, -1:]
    coefficients = torch.linalg.pinv(earlier, hermitian=True) @ cross  # [L, 2, n - 1, 1]
    left = gram[..., -1, -1] - (cross.mT @ coefficients)[..., 0, 0]
    return coefficients[..., 0].permute(2, 0, 1), left.clamp_min(0)


def _with_current(bank: AdapterBank, kept: bool) -> list[int]:
    """Every active adapter, the current one only if it is kept; task 0 always is."""
    return [task for task in bank.tasks if task != bank.current or kept or task == 0]
