"""How a task is optimised: optimizers, learning rates and their schedule, and the config keys that say so."""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from utils.config import Config, KeyGroup, key
from utils.config.rules import Epochs, Name, above

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

_MEMORY_KEYS = ("memory_size", "memory_per_class", "fixed_memory")
_OFFICIALLY_IGNORED = ("optimizer", "scheduler", "min_lr", "tuned_epoch", "weight_decay", "init_weight_decay")


class Phase(NamedTuple):
    """A part of a task's training with an optimizer of its own, made when the phase begins.

    step: prepares an optimizer step, counted within the task; returns a term to add to the loss, if there is one. rate: of an
    epoch, counted within the phase, the learning rates over the initial ones.
    """

    epochs: int
    batch_size: int
    optimizer: Callable[[], torch.optim.Optimizer]
    step: Callable[[int], Tensor | None]
    rate: Callable[[float], float]


class OptimisationKeys(KeyGroup):
    """Optimisation"""

    init_epoch: int = key(20, "Epochs of training in the first task.", ge=1)
    init_lr: float = key(0.01, "Learning rate in the first task.", gt=0)
    optimizer: Literal["sgd", "adam", "adamw"] = key("sgd", "The optimizer; SD-LoRA's code always trains with SGD.")
    momentum: float = key(0.9, "Momentum of SGD; the other optimizers do not use it.", ge=0, lt=1)
    weight_decay: float = key(0.0, "Weight decay of all that is trained; SD-LoRA's code uses none.", ge=0)
    init_weight_decay: float | None = key(
        None, "Weight decay in the first task.", unset="`weight_decay`", derive=lambda config: config.weight_decay, ge=0)
    scheduler: Literal["cosine", "steplr", "constant"] = key(
        "cosine",
        'The learning rate within a task, set once per epoch: `"cosine"` falls to `min_lr`, `"steplr"` is '
        'multiplied by `lrate_decay` at each of the `milestones`, `"constant"` stays.')
    min_lr: float = key(0.0, 'Learning rate at which `"cosine"` ends.', ge=0)
    tuned_epoch: int | None = key(
        None, 'Epochs in which `"cosine"` falls to `min_lr`.', unset="the task's epochs", ge=1)
    milestones: Epochs = key(
        [], 'Epochs after which `"steplr"` multiplies the learning rate; those past the end of the task never come.',
        allowed="a list of ascending integers of at least 1")
    lrate_decay: float = key(0.1, 'Factor of `"steplr"` at each milestone.', ge=0, le=1)
    init_milestones: Epochs | None = key(
        None, "The `milestones` of the first task.", unset="`milestones`", derive=lambda config: list(config.milestones),
        allowed="a list of ascending integers of at least 1")
    init_lr_decay: float | None = key(
        None, "The `lrate_decay` of the first task.", unset="`lrate_decay`", derive=lambda config: config.lrate_decay,
        ge=0, le=1)
    grad_accum: int = key(
        1, "Compute every batch in so many parts: the same result up to rounding with less memory. At most `batch_size`.",
        ge=1)
    max_grad_norm: float | None = key(
        None, "Longest gradient of a step, all that is trained together; a longer one is shortened to it.",
        unset="no limit", gt=0)
    eval_every: int = key(
        1,
        "Evaluate every so many epochs within a task and in its last one; 0 only after it. Costs time and changes no "
        "training result.", ge=0)
    nan_policy: Literal["stop", "skip"] = key(
        "stop",
        'What to do when loss, gradient or gate is not finite: `"stop"` the run, or `"skip"` that optimizer step, which '
        "has the processor wait for the device in every step.")
    nan_limit: int = key(10, 'Steps of one task that `"skip"` leaves out before it stops the run after all.', ge=0)


class LaterTaskKeys(KeyGroup):
    """Optimisation of later tasks"""

    epochs: int = key(20, "Epochs of training in every later task.", ge=1)
    lrate: float = key(0.01, "Learning rate in every later task.", gt=0)


class QuarterKeys(OptimisationKeys):
    """Optimisation along a quarter of a cosine"""

    scheduler: Literal["quarter", "cosine", "steplr", "constant"] = key(
        "quarter", 'The learning rate within a task, set once per epoch: `"quarter"` of a cosine as published, from the '
                   "whole to a 64th of it; the others as elsewhere.")


class HeadKeys(KeyGroup):
    """Head"""

    head: Name = key("linear", "The classifier; every one trains the adapters through the rows of the task's classes.")


def contradictions(config: Config) -> Iterator[str]:
    """As `Component.contradictions`, for these keys."""
    rates = {name: getattr(config, name) for name in ("init_lr", "lrate") if hasattr(config, name)}
    lowest = min(rates, key=rates.get)
    if config.scheduler == "cosine" and config.min_lr > rates[lowest]:
        yield above(config, "min_lr", lowest, 'a learning rate of scheduler "cosine" can only fall')
    yield from too_many_parts(config)


def too_many_parts(config: Config) -> Iterator[str]:
    """The same of `grad_accum` alone."""
    if config.grad_accum > config.batch_size:
        yield above(config, "grad_accum", "batch_size", "each part of a batch needs at least one image")


def warnings(config: Config) -> list[str]:
    """Rehearsal keys or `init_weight_decay` mark a file of SD-LoRA's, whose code does not use all of its keys: the warning
    lists them. A file with every key is a resolved config that a run has saved, and gets none."""
    given = config.model_fields_set
    if given >= set(type(config).model_fields) or not given & {*_MEMORY_KEYS, "init_weight_decay"}:
        return []
    memory = [name for name in _MEMORY_KEYS if name in given]
    honoured = [name for name in _OFFICIALLY_IGNORED if name in given]
    parts = [f"{', '.join(memory)} (no meaning here: nothing is rehearsed)"] if memory else []
    parts += [f"{', '.join(honoured)} (honoured here)"] if honoured else []
    return [f"The official SD-LoRA code ignores these keys of the config: {'; '.join(parts)}. It always trains with SGD, "
            "momentum 0.9, no weight decay, and steps at init_milestones and milestones; the configs exps/*_original.json do "
            "as it does."]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rates now, by the names of the parameter groups, or their numbers where they have none."""
    return {str(group.get("name", number)): group["lr"] for number, group in enumerate(optimizer.param_groups)}


def learning_rate(config: Config, task: int) -> float:
    """Initial learning rate of `task`."""
    return config.init_lr if task == 0 else config.lrate


def epochs_of(config: Config, task: int) -> int:
    """Epochs that `task` is trained for."""
    return config.init_epoch if task == 0 else config.epochs


def make_optimizer(config: Config, groups: list[dict], task: int) -> torch.optim.Optimizer:
    """The task's optimizer, groups as for `optimizer_of`: `weight_decay` 0 where none applies."""
    decay = config.init_weight_decay if task == 0 else config.weight_decay
    return optimizer_of(config.optimizer, groups, learning_rate(config, task), config.momentum, decay)


def optimizer_of(kind: str, groups: list[dict], rate: float, momentum: float, decay: float) -> torch.optim.Optimizer:
    """The optimizer named `kind`, `momentum` being SGD's; groups may carry their own `weight_decay`, and `lr`, kept as
    `initial_lr`."""
    options = {"momentum": momentum} if kind == "sgd" else {}
    groups = [{**group, "initial_lr": group.get("lr", rate)} for group in groups]
    return OPTIMIZERS[kind](groups, lr=rate, weight_decay=decay, fused=True, **options)


def make_row_optimizer(config: Config, rows: list[nn.Parameter], task: int) -> torch.optim.Optimizer:
    """The optimizer for head rows alone, over a network that stays as it is: SGD at `refit_lr`, if that is given."""
    if config.refit_lr is None:
        return make_optimizer(config, [{"params": rows}], task)
    group = {"params": rows, "initial_lr": config.refit_lr}
    return torch.optim.SGD([group], lr=config.refit_lr, momentum=config.momentum, fused=True)


def scale_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Gives every parameter group its initial learning rate times `factor`, such as `schedule_factor` of an epoch."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def schedule_factor(config: Config, task: int, epoch: float) -> float:
    """Learning rate of `epoch` over the initial one.

    Cosine (Loshchilov & Hutter, 2017) falls to `min_lr` over `tuned_epoch` epochs and stays there.
    """
    if config.scheduler == "cosine":
        period = config.tuned_epoch or epochs_of(config, task)
        floor = config.min_lr / learning_rate(config, task)
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(epoch / period, 1))) / 2
    if config.scheduler == "steplr":
        milestones, decay = ((config.init_milestones, config.init_lr_decay) if task == 0
                             else (config.milestones, config.lrate_decay))
        return decay ** sum(epoch >= milestone for milestone in milestones)
    if config.scheduler == "quarter":
        return quarter(epochs_of(config, task), epoch)
    return 1.0


def quarter(epochs: int, epoch: float) -> float:
    """Learning rate of `epoch` over the initial one: from 1 to `cos(0.495 pi)` in the last epoch, and so after it."""
    return math.cos(0.495 * math.pi * min(epoch / (epochs - 1), 1)) if epochs > 1 else 1.0
