"""Conditional growth: which adapters stay after a task (METHOD.md, section 2, equation 4). One class per rule."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbone.lora import AdapterBank, frobenius_norm
from utils.config import Component, Config, KeyGroup, choice_of, key
from utils.rng import generator

# What a rule may need of the recipe that asks it, in words; a recipe names what it offers.
RANKED = "trained weights of older adapters, which can be evicted"
TRAINED_NEWCOMER = "a newcomer that has been trained before the decision"
FREE_MAGNITUDES = "magnitudes that no gate ties together"


@dataclass(frozen=True)
class Grounds:
    """What a rule may look at: `beta` `[n]` at `tau_final` without noise, the bank, and, when asked for, the held-out loss
    (with, without) the current adapter, the new head rows fitted both times. seed and nb_tasks: those of the stream."""

    beta: Tensor
    bank: AdapterBank
    held_out_losses: Callable[[], tuple[float, float]]
    seed: int
    nb_tasks: int


@dataclass(frozen=True)
class Decision:
    """The adapters to keep, by task, and the words for the log.

    criterion: what the rule holds the newcomer against. reasons: for every adapter in question the numbers that decided.
    value: the number that the rule compared. refit: whether the new head rows must be fitted again once an adapter has gone.
    """

    keep: list[int]
    criterion: str
    reasons: dict[int, str]
    value: float | None = None
    refit: bool = True
    absorbed: Tensor | None = None  # [n - 1, L, 2], by which the magnitudes of the older adapters grow


class Rule(Component):
    """A growth rule. name: its `growth_rule` in configs. needs: of `RANKED` and the like, what the recipe has to offer."""

    always_known = True
    name: str
    needs: frozenset[str] = frozenset()

    @classmethod
    def contradictions(cls, config: Config) -> Iterator[str]:
        for recipe in (part for part in config.components if hasattr(part, "offers")):
            choice = choice_of(recipe)
            for lacking in cls.needs - recipe.offers:
                yield (f"'growth_rule' is \"{config.growth_rule}\" but '{choice}' is \"{getattr(config, choice)}\"; the rule "
                       f"needs {lacking}; choose another rule")

    @classmethod
    def held_out(cls, config: Config) -> float:
        """Share of the training images that it wants held out."""
        return 0.0

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        """Which of the bank's adapters stay; task 0 always does."""
        raise AssertionError("every rule decides in its own way")

    @classmethod
    def _by_name(cls, bank: AdapterBank, kept: bool) -> Decision:
        """The decision of a rule that compares nothing."""
        return Decision(_with_current(bank, kept), f"rule: {cls.name}", {bank.current: f"growth_rule={cls.name}"})


class Threshold(Rule):
    """The gate weight of the newcomer exceeds `growth_threshold`."""

    name = "threshold"

    class Keys(KeyGroup):
        """Growth rule threshold"""

        growth_threshold: float = key(0.1, "Gate weight that a newcomer has to exceed; high prunes more.", ge=0, le=1)

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        beta = grounds.beta[-1]
        threshold = torch.tensor(config.growth_threshold).to(beta)  # rounded as beta is: 0.1 is not above 0.1
        kept = bool(beta > threshold)
        return _compared(grounds.bank, "beta", beta.item(), "threshold", threshold.item(), ".{}f", kept, is_beta=True)


class CountKeys(KeyGroup):
    """Growth rules that keep a number"""

    growth_topk: int = key(5, "Adapters that are kept, the first task's included.", ge=1)


class TopK(Rule):
    """Task 0 and the `growth_topk - 1` others with the largest gate weights; of equal weights the older one."""

    name = "topk"
    Keys = CountKeys
    needs = frozenset({RANKED})

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        tasks = grounds.bank.tasks
        beta = dict(zip(tasks, grounds.beta.tolist(), strict=True))
        others = sorted(tasks[1:], key=lambda task: (-beta[task], task))
        keep = sorted([tasks[0], *others[:config.growth_topk - 1]])
        reasons = {task: f"beta={beta[task]:.4f}, {'in' if task in keep else 'not in'} the top {config.growth_topk}"
                   for task in tasks}
        return Decision(keep, f"topk: {config.growth_topk}", reasons)


class HeldOutLoss(Rule):
    """The loss on held-out images gains from the newcomer by more than `growth_margin`, relatively."""

    name = "val_loss"

    class Keys(KeyGroup):
        """Growth rule val_loss"""

        growth_margin: float = key(0.05, "Relative gain in held-out loss that a newcomer has to exceed: 0.05 is 5 %.")
        val_fraction: float = key(
            0.1, 'Share of a task\'s training images that `"val_loss"` holds out, per class; the other rules hold out none.',
            gt=0, le=0.5)

    needs = frozenset({TRAINED_NEWCOMER})

    @classmethod
    def contradictions(cls, config: Config) -> Iterator[str]:
        yield from super().contradictions(config)
        if getattr(config, "refit_epochs", None) == 0:
            yield "'growth_rule' is \"val_loss\" but 'refit_epochs' is 0; the losses are compared with the head refitted"

    @classmethod
    def held_out(cls, config: Config) -> float:
        return config.val_fraction

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        gain = None
        if len(grounds.bank.tasks) > 1:
            with_it, without = grounds.held_out_losses()
            gain = (without - with_it) / max(with_it, torch.finfo(torch.float32).tiny)
        return _compared(grounds.bank, "gain", gain, "margin", config.growth_margin, ".{}f",
                         gain is not None and gain > config.growth_margin)


class Residual(Rule):
    """SD-LoRA-KD: dropped if its direction is, in every block and projection, a combination of earlier ones."""

    name = "kd"

    class Keys(KeyGroup):
        """Growth rule kd"""

        kd_residual: float = key(
            9e-4, "Squared Frobenius residual up to which a direction counts as a combination of earlier ones.", gt=0)

    needs = frozenset({TRAINED_NEWCOMER, FREE_MAGNITUDES})

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        """The magnitude of a dropped adapter goes to the earlier ones, in the proportions of the combination (METHOD.md,
        section 4)."""
        bank, largest, absorbed = grounds.bank, None, None
        if len(bank.tasks) > 1:
            coefficients, residual = combination_of_stored(bank)
            largest = residual.max().item()
            if not largest > config.kd_residual:
                magnitude = bank.magnitudes()[-1].detach() * frobenius_norm(bank.new_A, bank.new_B)
                absorbed = (coefficients * magnitude).cpu()
        kept = largest is not None and largest > config.kd_residual
        return replace(_compared(bank, "residual", largest, "kd_residual", config.kd_residual, ".{}e", kept),
                       refit=False, absorbed=absorbed)


class Chance(Rule):
    """A control: task 0 and `growth_topk - 1` others, drawn from the seed, whatever they are worth."""

    name = "random"
    Keys = CountKeys

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        others = torch.randperm(grounds.nb_tasks - 1, generator=generator(grounds.seed, "growth")) + 1
        return cls._by_name(grounds.bank, grounds.bank.current in others[:config.growth_topk - 1].tolist())


class FirstK(Rule):
    """A control: the first `growth_topk` tasks."""

    name = "first_k"
    Keys = CountKeys

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        return cls._by_name(grounds.bank, grounds.bank.current < config.growth_topk)


class KeepAll(Rule):
    """All adapters stay."""

    name = "none"

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        return cls._by_name(grounds.bank, True)


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Threshold, TopK, HeldOutLoss, Residual, Chance, FirstK, KeepAll)}


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


def _compared(bank: AdapterBank, quantity: str, value: float | None, name: str, limit: float, style: str, kept: bool,
              is_beta: bool = False) -> Decision:
    """The decision of a rule that holds a number of the newcomer against a limit. Task 0 stays whatever its numbers say: no
    comparison is then shown that did not decide."""
    shown, bound = _digits(value, limit, style)
    first = bank.current == 0
    reason = f"{quantity}={shown} {'>' if kept else '<='} {bound}" if kept or not first else "task 0 is always kept"
    criterion = f"{name}: {bound}" if is_beta else f"{quantity}: {shown}, {name}: {bound}"
    return Decision(_with_current(bank, kept), criterion, {bank.current: reason}, value)


def _digits(value: float | None, limit: float, style: str) -> tuple[str, str]:
    """Value and limit with as many digits as it takes to tell them apart (four at least, ten at most); squared residuals span
    many orders of magnitude and have exponents, with two digits fewer."""
    for digits in (4, 6, 8, 10):
        form = style.format(digits - 2 if style.endswith("e") else digits)
        texts = ("-" if value is None else format(value, form), format(limit, form))
        if texts[0] != texts[1] or value == limit:
            break
    return texts


def _with_current(bank: AdapterBank, kept: bool) -> list[int]:
    """Every active adapter, the current one only if it is kept; task 0 always is."""
    return [task for task in bank.tasks if task != bank.current or kept or task == 0]
