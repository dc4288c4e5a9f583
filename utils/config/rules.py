"""Types of config keys beyond numbers and choices, and values in words."""

import json
import math
import os
import re
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

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


def as_list(value: Any) -> Any:
    """A bare value as a list of one."""
    return value if isinstance(value, list) else [value]


def _as_device_names(value: Any) -> Any:
    return [str(item) if type(item) is int else item for item in as_list(value)]


def distinct(values: list) -> list:
    """Refuses a list that holds an entry twice."""
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
    return distinct(devices)


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


def _one_or_list(item: dict[str, Any], distinct: bool = True, most: int | None = None, least: int = 1) -> WithJsonSchema:
    limits = {**({"uniqueItems": True} if distinct else {}), **({"maxItems": most} if most else {})}
    several = {"type": "array", "items": item, "minItems": least, **limits}
    return WithJsonSchema({"anyOf": [item, several]})


Text = Annotated[str, AfterValidator(_printable)]
Name = Annotated[Text, Field(min_length=1)]
# A list of one is the name alone, so that one stream has one spelling.
NameOrNames = Annotated[
    Name | Annotated[list[Name], Field(min_length=2), AfterValidator(distinct)],
    BeforeValidator(lambda value: value[0] if isinstance(value, list) and len(value) == 1 else value),
    _one_or_list({"type": "string", "minLength": 1}),
]
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
    BeforeValidator(as_list),
    AfterValidator(distinct),
    _one_or_list({"type": "integer", "minimum": 0, "maximum": MAX_SEED}),
]
# SD-LoRA's descendants write the seed of the class order as a list of one.
OneSeed = Annotated[
    int,
    Field(ge=0, le=MAX_SEED),
    BeforeValidator(lambda value: value[0] if isinstance(value, list) and len(value) == 1 else value),
    _one_or_list({"type": "integer", "minimum": 0, "maximum": MAX_SEED}, most=1),
]
Epochs = Annotated[list[Annotated[int, Field(ge=1)]], AfterValidator(_ascending)]
Blocks = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_ascending)]
RankSteps = Annotated[
    list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]],
    Field(min_length=1),
    AfterValidator(_rank_steps),
]
Tracker = Literal["tensorboard", "wandb", "mlflow"]  # those of utils/runs/tracking.py
Trackers = Annotated[
    list[Tracker],
    BeforeValidator(as_list),
    AfterValidator(distinct),
    _one_or_list({"enum": list(get_args(Tracker))}, least=0),
]
NoMemory = Annotated[int, AfterValidator(_falsy), WithJsonSchema({"enum": [0]})]
NoFixedMemory = Annotated[bool, AfterValidator(_falsy), WithJsonSchema({"enum": [False]})]


def above(config: Any, key: str, limit: str, reason: str) -> str:
    """The sentence for a `key` that is above another key, its `limit`."""
    value, bound = show(getattr(config, key)), show(getattr(config, limit))
    return f"'{key}' is {value}, above '{limit}' of {bound}; {reason}"
