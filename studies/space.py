"""What a search draws from: a list of values or a range for each of some config keys.

A key takes part in a trial where it has an effect for what that trial has drawn: `lambda_sparsity` beside `gate`
["gumbel_sparsemax", "none"] is drawn for the first gate alone, and so is a key of the base left out that the drawn gate has no
use for.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from utils.config import KeyGroup, key, known_keys
from utils.config.components import CHOICES, UnknownName, chosen, config_class
from utils.config.load import allowed, kinds_of
from utils.config.rules import escaped, show
from utils.errors import UserError, nearest

if TYPE_CHECKING:
    from optuna import Trial

DIGITS = 4  # significant digits of a drawn number: what the tables show is what ran
EXAMPLE = '{"low": 0.001, "high": 0.1, "log": true}'


class Range(KeyGroup):
    """Numbers from `low` to `high`, both included."""

    low: int | float = key(..., "The smallest value.", allowed="a number")
    high: int | float = key(..., "The largest value.", allowed="a number")
    log: bool = key(False, "Draw evenly on a logarithmic scale.")
    step: int | float | None = key(None, "Draw `low` plus a multiple of this.", unset="any value", allowed="a number above 0",
                                   gt=0)

    def ends(self) -> list[int | float]:
        return [self.low, self.high]


@dataclass(frozen=True)
class Space:
    """The drawn keys in the order in which they are drawn: what chooses components first.

    items: key -> its values or range. whole: keys whose range is over integers. base: the config's values before anything is
    drawn.
    """

    items: Mapping[str, list[Any] | Range]
    whole: frozenset[str]
    base: Mapping[str, Any]

    def draw(self, trial: "Trial") -> dict[str, Any]:
        """The values of an Optuna trial, drawn or as they were queued."""
        values: dict[str, Any] = {}
        for name, item in self.items.items():
            if not self._takes_part(name, values):
                continue
            if isinstance(item, list):
                trial.suggest_categorical(name, [_plain(value) for value in item])
            elif name in self.whole:
                trial.suggest_int(name, item.low, item.high, log=item.log, step=item.step or 1)
            else:
                trial.suggest_float(name, item.low, item.high, log=item.log, step=item.step)
            values[name] = self.value(name, trial.params[name])
        return values

    def value(self, name: str, drawn: Any) -> Any:
        """The value of a config key for what Optuna has drawn: of a list its entry, of a range the number, rounded."""
        item = self.items[name]
        if isinstance(item, list):
            return next(value for value in item if show(_plain(value)) == show(drawn))
        return drawn if name in self.whole else float(min(max(float(f"{drawn:.{DIGITS}g}"), item.low), item.high))

    def effective(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` of a config without those keys that have an effect for other choices of the search alone."""
        fields = config_class(chosen(values)).model_fields
        return {name: value for name, value in values.items() if name in fields or name not in self._sometimes}

    def extremes(self) -> Iterator[dict[str, Any]]:
        """Drawn values such that every choice of components meets every pair of ends of ranges and of listed values: whatever
        is wrong with a value, or with two together, is wrong in one of them."""
        for choices in self._choices():
            rest = {name: item if isinstance(item, list) else item.ends() for name, item in self.items.items()
                    if name not in CHOICES and self._takes_part(name, choices)}
            first = choices | {name: values[0] for name, values in rest.items()}
            seen = set()
            for one, other in itertools.combinations_with_replacement(rest, 2):
                for pair in itertools.product(rest[one], rest[other]):
                    point = first | dict(zip((one, other), pair, strict=True))
                    if json.dumps(point) not in seen:
                        seen.add(json.dumps(point))
                        yield point
            if not rest:
                yield first

    def idle(self) -> list[str]:
        """Drawn keys without effect whatever the trials choose."""
        return [name for name in self.items if name not in self._sometimes]

    def _choices(self) -> Iterator[dict[str, Any]]:
        """Every combination of components that can be drawn, once."""
        names, seen = [name for name in self.items if name in CHOICES], set()
        for values in itertools.product(*(self.items[name] for name in names)):
            drawn: dict[str, Any] = {}
            for name, value in zip(names, values, strict=True):
                if self._takes_part(name, drawn):
                    drawn[name] = value
            if json.dumps(drawn) not in seen:
                seen.add(json.dumps(drawn))
                yield drawn

    @cached_property
    def _sometimes(self) -> frozenset[str]:
        """Keys that have an effect for some of the choices."""
        return frozenset(name for values in self._choices()
                         for name in config_class(chosen({**self.base, **values})).model_fields)

    def _takes_part(self, name: str, values: Mapping[str, Any]) -> bool:
        return name in config_class(chosen({**self.base, **values})).model_fields


def read_space(given: Mapping[str, Any], base: Mapping[str, Any], where: str) -> Space:
    """The space that `given`, the value of the study's `search`, describes over the values `base` of a config. Raises
    UserError, naming `where`."""
    items = {name: _item(name, value, where) for name, value in given.items()}
    ordered = {name: items[name] for name in [*(name for name in CHOICES if name in items), *items]}
    whole = frozenset(name for name, item in ordered.items() if isinstance(item, Range) and float not in _kinds(name))
    space = Space(ordered, whole, base)
    try:
        for name in space.idle():
            raise UserError(f"{where}: '{name}' has no effect, whatever else a trial draws; leave it out.")
    except UnknownName as error:
        raise UserError(f"{where}: {error}") from None
    return space


def _item(name: str, value: Any, where: str) -> list[Any] | Range:
    """The values or range given for the key."""
    if name not in known_keys():
        raise UserError(f"{where}: '{escaped(name[:60])}' is not a key of the config."
                        f"{nearest(name, known_keys()) or ' docs/CONFIG.md lists the keys.'}")
    if isinstance(value, list) and value:
        texts = [show(entry) for entry in value]
        for number, text in enumerate(texts):
            if text in texts[:number]:
                raise UserError(f"{where}: '{name}' holds {text} twice; leave out one of the two.")
        return value
    if not isinstance(value, dict):
        raise UserError(f"{where}: '{name}' is {show(value)}; it must be a list of values, or a range such as {EXAMPLE}.")
    if bool in _kinds(name) or not {int, float} & set(_kinds(name)):
        raise UserError(f"{where}: '{name}' is no number and cannot have a range; give a list of values.")
    try:
        found = Range.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}: {_complaint(name, value, error)}") from None
    for sentence in _mistakes(name, found):
        raise UserError(f"{where}: {sentence}")
    return found


def _kinds(name: str) -> list[Any]:
    return kinds_of(known_keys()[name].annotation)


def _complaint(name: str, value: Mapping[str, Any], error: ValidationError) -> str:
    """The first problem with a range."""
    problem = error.errors(include_url=False)[0]
    part, fields = problem["loc"][0], Range.model_fields
    if problem["type"] == "missing":
        return f"the range of '{name}' has no '{part}'; write one such as {EXAMPLE}."
    if part not in fields:
        return f"'{escaped(str(part)[:60])}' is not part of a range; '{name}' can have {', '.join(fields)}."
    return f"'{part}' of '{name}' is {show(value[part])}; it must be {allowed(part, fields[part])}."


def _mistakes(name: str, item: Range) -> Iterator[str]:
    """What the types of a range let pass."""
    numbers = {"low": item.low, "high": item.high, "step": item.step}
    for part, number in numbers.items():
        if float not in _kinds(name) and isinstance(number, float):
            yield f"'{part}' of '{name}' is {show(number)}, but the key takes integers alone."
    if item.low >= item.high:
        yield f"'low' of '{name}' is {show(item.low)}, not below its 'high' of {show(item.high)}."
    if item.log and item.low <= 0:
        yield f"'low' of '{name}' is {show(item.low)}; with 'log' it must be above 0."
    if item.log and item.step is not None:
        yield f"'{name}' has a 'step' and a 'log' scale; leave out one of the two."
    if item.step is not None and item.step > item.high - item.low:
        yield f"'step' of '{name}' is {show(item.step)}, more than the range is wide."


def _plain(value: Any) -> Any:
    """`value` as a choice that Optuna can store: lists and objects as their JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value
