"""Rules of a config: types beyond numbers and choices, defaults that follow from other keys,
contradictions.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema

MAX_SEED = 2**32 - 1  # numpy.random.RandomState, which draws the class order, takes no larger seed

_UNPRINTABLE = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"


def escaped(text: str) -> str:
    """`text` on one line, characters that a terminal or a file cannot take written as escapes."""
    return re.sub(_UNPRINTABLE, lambda match: f"\\u{ord(match[0]):04x}", text)


def show(value: Any) -> str:
    """`value` on one line as a config file would have it, shortened to 60 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    try:
        text = escaped(json.dumps(value, ensure_ascii=False, default=repr))
    except (RecursionError, ValueError):  # deep nesting; an integer of thousands of digits
        return f"too large a value ({type(value).__name__})"
    return text if len(text) <= 60 else text[:57] + "..."


def _printable(value: str) -> str:
    """Refuses control characters and lone surrogates, which some file name, log or table cannot hold."""
    if re.search(_UNPRINTABLE, value):
        raise ValueError("control character")
    return value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_device_names(value: Any) -> Any:
    return [str(item) if type(item) is int else item for item in _as_list(value)]


def _distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("repeated entries")
    return values


def _devices(names: list[str]) -> list[str]:
    """CUDA devices become their bare number, so that "cuda:1" and "1" are the same device everywhere; the CPU may be named
    once for every process that is to run on it."""
    devices = []
    for name in names:
        match = re.fullmatch("cuda|(?:cuda:)?([0-9]{1,4})", name)
        if match is None and name not in ("auto", "cpu"):
            raise ValueError("unknown device")
        devices.append(name if match is None else str(int(match[1] or 0)))
    if set(devices) == {"cpu"}:
        return devices
    if len(devices) > 1 and {"auto", "cpu"} & set(devices):
        raise ValueError("auto stands alone, and cpu beside no other device")
    return _distinct(devices)


def _ascending(values: list[int]) -> list[int]:
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise ValueError("not ascending")
    return values


def _rank_steps(steps: list[list[int]]) -> list[list[int]]:
    """Pairs [first task, rank], the first for task 0."""
    _ascending([task for task, _ in steps])
    if steps[0][0] != 0 or any(rank < 1 for _, rank in steps):
        raise ValueError("not a schedule from task 0 on")
    return steps


def _falsy(value: int) -> int:
    if value:
        raise ValueError("rehearsal")
    return value


def _one_or_list(item: dict[str, Any], distinct: bool = True) -> WithJsonSchema:
    several = {"type": "array", "items": item, "minItems": 1, **({"uniqueItems": True} if distinct else {})}
    return WithJsonSchema({"anyOf": [item, several]})


Text = Annotated[str, AfterValidator(_printable)]
Name = Annotated[Text, Field(min_length=1)]
# `~` is expanded, so that no reader of the config has to.
FilePath = Annotated[Name, AfterValidator(os.path.expanduser)]
# A bare name or number stands for a list of one.
Devices = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_as_device_names),
    AfterValidator(_devices),
    _one_or_list({"type": ["string", "integer"]}, distinct=False),
]
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_SEED)]],
    Field(min_length=1),
    BeforeValidator(_as_list),
    AfterValidator(_distinct),
    _one_or_list({"type": "integer", "minimum": 0, "maximum": MAX_SEED}),
]
Epochs = Annotated[list[Annotated[int, Field(ge=1)]], AfterValidator(_ascending)]
RankSteps = Annotated[
    list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]],
    Field(min_length=1),
    AfterValidator(_rank_steps),
]
NoMemory = Annotated[int, AfterValidator(_falsy), WithJsonSchema({"enum": [0]})]
NoFixedMemory = Annotated[bool, AfterValidator(_falsy), WithJsonSchema({"enum": [False]})]


# Defaults that follow from keys that always hold a value.
DERIVED = {
    "increment": lambda config: config.init_cls,
    "rank": lambda config: config.rank_schedule[0][1] if config.rank_schedule else 10,
    "alpha_scope": lambda config: "task" if config.gate == "none" else "layer",
    "init_alpha": lambda config: 0.8 if config.gate == "none" else 1.0,
    "init_weight_decay": lambda config: config.weight_decay,
    "init_milestones": lambda config: list(config.milestones),
    "init_lr_decay": lambda config: config.lrate_decay,
    "growth_rule": lambda config: "none" if config.gate == "none" else "threshold",
}

_GATE_KEYS = (
    "gate_compensation",
    "gate_noise",
    "gate_lr",
    "gumbel_tau_init",
    "gumbel_tau_final",
    "gumbel_anneal_rate",
    "lambda_sparsity",
)


def default_value(config: BaseModel, key: str) -> Any:
    """What `key` would hold had it not been given, all other keys being as they are."""
    return DERIVED[key](config) if key in DERIVED else type(config).model_fields[key].default


def contradictions(config: BaseModel) -> Iterator[str]:
    """Sentences on keys that cannot stand together; each names its keys in single quotes."""
    if config.backbone_weights is not None and not config.pretrained:
        yield "'pretrained' is false although 'backbone_weights' names a file; leave out one of the two"
    if config.rank_schedule and config.rank != config.rank_schedule[0][1]:
        first = show(config.rank_schedule[0][1])
        yield f"'rank' is {show(config.rank)} but 'rank_schedule' starts with rank {first}; leave out 'rank'"
    if config.scheduler == "cosine" and config.min_lr > min(config.init_lr, config.lrate):
        limit = "init_lr" if config.init_lr <= config.lrate else "lrate"
        yield _above(config, "min_lr", limit, 'a learning rate of scheduler "cosine" can only fall')
    if config.grad_accum > config.batch_size:
        yield _above(config, "grad_accum", "batch_size", "each part of a batch needs at least one image")
    if config.growth_rule == "val_loss" and config.refit_epochs == 0:
        yield "'growth_rule' is \"val_loss\" but 'refit_epochs' is 0; the losses are compared with the head refitted"
    if config.gumbel_tau_final > config.gumbel_tau_init:
        yield _above(config, "gumbel_tau_final", "gumbel_tau_init", "the temperature can only fall")
    yield from _without_gate(config) if config.gate == "none" else _with_gate(config)
    if config.gate == "evidence":
        yield from _with_evidence(config)
    elif config.gate_price != default_value(config, "gate_price"):
        yield f"'gate_price' is {show(config.gate_price)} but 'gate' is {show(config.gate)}; it belongs to gate \"evidence\""


def _above(config: BaseModel, key: str, limit: str, reason: str) -> str:
    value, bound = show(getattr(config, key)), show(getattr(config, limit))
    return f"'{key}' is {value}, above '{limit}' of {bound}; {reason}"


def _with_gate(config: BaseModel) -> Iterator[str]:
    if config.growth_rule == "kd":
        yield f'\'growth_rule\' is "kd" but \'gate\' is {show(config.gate)}; "kd" belongs to gate "none"'
    if config.gate == "sparsemax" and config.gate_noise != default_value(config, "gate_noise"):
        noise = show(config.gate_noise)
        yield f"'gate_noise' is {noise} but 'gate' is \"sparsemax\", which has none; leave out 'gate_noise'"


def _with_evidence(config: BaseModel) -> Iterator[str]:
    if config.growth_rule in ("topk", "val_loss"):
        yield (f"'growth_rule' is {show(config.growth_rule)} but 'gate' is \"evidence\", which decides before training; "
               'choose "threshold"')
    if config.alpha_scope == "task":
        yield ("'alpha_scope' is \"task\" but 'gate' is \"evidence\", which moves the norm of every block and projection into "
               "its magnitude; leave out 'alpha_scope'")


def unused_by_evidence(config: BaseModel) -> list[str]:
    """Keys of a trained gate that hold no default under gate "evidence", where they do nothing: a config that is switched
    from one gate to the other may keep them."""
    if config.gate != "evidence":
        return []
    keys = [key for key in (*_GATE_KEYS, "alpha_lr") if key != "gumbel_tau_final"]
    return [key for key in keys if getattr(config, key) != default_value(config, key)]


def _without_gate(config: BaseModel) -> Iterator[str]:
    without = "but 'gate' is \"none\""
    if config.alpha_scope == "layer":
        yield f"'alpha_scope' is \"layer\" {without}, with one magnitude per task; leave out 'alpha_scope'"
    if config.growth_rule == "topk":
        yield f"'growth_rule' is \"topk\" {without}, which has no gate weights to rank; choose another rule"
    for key in _GATE_KEYS:
        value = getattr(config, key)
        if value != default_value(config, key) and not (key == "lambda_sparsity" and value == 0):
            yield f"'{key}' is {show(value)} {without}, where it has no effect; leave out '{key}'"
