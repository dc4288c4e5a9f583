"""Configs from files, from the command line and from the records of runs, and what is wrong with them in one sentence."""

import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from utils.config.components import CHOICES, UnknownName, chosen, config_class, known_keys, one_of, owners
from utils.config.file import json_value, parse_overrides, read_config_file
from utils.config.keys import Config, told
from utils.config.rules import escaped, show
from utils.errors import UserError, nearest


def load_config(path: str | Path, overrides: Sequence[str] = (), **values: Any) -> Config:
    """The config in the file `path` with the changes of the command line, which win over the file.

    `overrides` are "key=value" texts as `--set` takes them; `values` come from options of their own
    (`seed=[1993]` from `--seed`) and are skipped where they are None. A key changed by both is an error.
    Without `filepath` the run goes to `./runs/<name of the file>/`.

    Raises UserError, one sentence that names the file or option, the key, its value and what is allowed.
    """
    merged = read_config_file(path)
    changes = command_line_changes(overrides, **values)
    merged |= {key: value for key, (value, _) in changes.items()}
    options = {key: option for key, (_, option) in changes.items()}
    name = "".join(letter if letter.isprintable() else "_" for letter in Path(path).stem)
    return config_from_dict(merged, escaped(str(path)), name=name, options=options)


def command_line_changes(overrides: Sequence[str], **values: Any) -> dict[str, tuple[Any, str]]:
    """What the command line changes, as key -> (value, option in words); arguments as for `load_config`."""
    texts = [key for key, field in known_keys().items() if kinds_of(field.annotation) == [str]]
    changes = parse_overrides(overrides, texts)
    for key, value in values.items():
        option = f"--{key.replace('_', '-')}"
        if value is not None and key in changes:
            raise UserError(f"{changes[key][1]}: '{key}' is given by {option} too; use one of the two.")
        if value is not None:
            changes[key] = value, option
    return changes


def config_from_dict(values: Mapping[str, Any], source: str = "config", *, name: str = "run",
                     options: Mapping[str, str] | None = None) -> Config:
    """The config with these `values`, keys as in a file.

    Messages name `source` as the origin of a key, or its entry in `options`; `name` names the run's folder where `filepath`
    is not given. Raises UserError, also for a key without effect for what the config chooses, unless it holds its default.
    """
    options, known = options or {}, known_keys()
    for key in values:
        if key not in known:
            hint = nearest(key, known) or " docs/CONFIG.md lists the keys."
            raise UserError(f"{options.get(key, source)}: '{escaped(key[:60])}' is not a key of the config.{hint}")
    try:
        choices = chosen(values)
    except UnknownName as error:
        raise UserError(f"{options.get(error.key, source)}: {error}") from None
    kind = config_class(choices)
    effective = {key: value for key, value in values.items()
                 if key in kind.model_fields and not (key in CHOICES and value is None)}
    try:
        config = kind.model_validate(effective, context={"name": name})
    except ValidationError as error:
        raise UserError(_sentence(error, effective, kind, source, options)) from None
    lost = [key for key in values if key not in effective and not _idle(key, values[key])]
    if lost:
        raise UserError(f"{options.get(lost[0], source)}: {_without_effect(lost, values[lost[0]], config)}")
    return config


def config_of_record(values: Mapping[str, Any], source: str) -> Config:
    """The config that a run has saved, of this version or an older one; keys without effect are left out, whatever they hold,
    and so are those that can hold a single value here, or no null: older versions wrote down what another choice would have
    had.

    Raises UserError.
    """
    try:
        kind = config_class(chosen(values))
    except UnknownName as error:
        raise UserError(f"{source}: {error}") from None
    fixed = {key for key, field in kind.model_fields.items()
             if len(kinds := kinds_of(field.annotation)) == 1 == len(_literals(kinds))}
    idle = known_keys().keys() - kind.model_fields.keys() | fixed
    unset = {key for key, field in kind.model_fields.items() if values.get(key) is None and field.default is not None}
    return config_from_dict({key: value for key, value in values.items() if key not in idle | unset}, source)


def config_warnings(config: Config) -> list[str]:
    """What to say once about a config that is valid."""
    return [line for part in config.components for line in part.warnings(config)]


def _idle(key: str, value: Any) -> bool:
    """Whether `value` asks for nothing: null, the key's default where a config chooses nothing, or what a declaration of it
    calls idle."""
    usual = config_class(chosen({})).model_fields.get(key, known_keys()[key]).default
    idle = (told(part.Keys.model_fields[key], "idle") for _, part in owners(key))
    nothing = [given for given in (usual, *idle) if given is not ...]
    return value is None or any(show(value) == show(given) or (_number(value) and _number(given) and value == given)
                                for given in nothing)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without_effect(keys: Sequence[str], value: Any, config: Config) -> str:
    """Names the innermost choice of the config that leaves the first of `keys`, with its `value`, without effect, and which
    others share its lot."""
    having = [choice for choice, _ in owners(keys[0]) if choice in type(config).model_fields]
    choice = max(having, key=list(CHOICES).index, default=next(iter(CHOICES)))
    others = f"; likewise {', '.join(map(repr, keys[1:]))}" if keys[1:] else ""
    return (f"'{keys[0]}' is {show(value)}, but it has no effect for {choice} {show(getattr(config, choice))}; leave it out "
            f"or make it null{others}.")


def _sentence(error: ValidationError, values: Mapping[str, Any], kind: type[Config], source: str,
              options: Mapping[str, str]) -> str:
    """The first problem in `error` in one sentence; missing keys are listed together."""
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "contradiction":
        sentence = first["ctx"]["sentence"]
        named = dict.fromkeys(option for key, option in options.items() if f"'{key}'" in sentence)
        return f"{' with '.join([source, *named])}: {sentence}."
    if first["type"] == "missing":
        missing = " and ".join(f"'{problem['loc'][0]}'" for problem in problems if problem["type"] == "missing")
        return f"{source}: {missing} must be given (docs/CONFIG.md describes the keys)."
    key = first["loc"][0]
    return f"{options.get(key, source)}: {_complaint(key, values, kind)}"


def _complaint(key: str, values: Mapping[str, Any], kind: type[Config]) -> str:
    """What is wrong with the value of `key` and what would be right."""
    value, field = values[key], kind.model_fields[key]
    wanted, kinds = allowed(key, field), kinds_of(field.annotation)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 and _fits(key, int(value), values, kind):
        return f"'{key}' is {show(value)}, a decimal number; write the integer {int(value)}."
    if names := _literals(item for kind in kinds if get_origin(kind) is list for item in get_args(kind)):
        given = value if isinstance(value, list) else [value]
        wrong = [item for item in given if isinstance(item, str) and item not in names]
        return f"'{key}' is {show(value)}; it must be {wanted}.{nearest(wrong[0], names) if wrong else ''}"
    if not isinstance(value, str):
        return f"'{key}' is {show(value)}; it must be {wanted}."
    if str in kinds:
        wanted = "text without control characters" if value else "text that is not empty"
        return f"'{key}' is {show(value)}; it must be {wanted}."
    meant = _without_quotes(value)
    if meant != value and _fits(key, meant, values, kind):
        right = f"the number {show(meant)}" if _number(meant) else f"{show(meant)} without quotes"
        return f"'{key}' is the text {show(value)}; write {right}."
    if not _literals(kinds):
        return f"'{key}' is the text {show(value)}; it must be {wanted}."
    return f"'{key}' is {show(value)}; it must be {wanted}.{nearest(value, _literals(kinds))}"


def _without_quotes(text: str) -> Any:
    """What a text was probably meant to be: a number, true, false, null or a list, this also without its brackets."""
    value = json_value(text)
    if value == text and isinstance(listed := json_value(f"[{text}]"), list) and len(listed) > 1:
        return listed
    try:
        return float(text) if value == text else value  # float also takes ".5" and "+1", which are no JSON
    except ValueError:
        return text


def _fits(key: str, value: Any, values: Mapping[str, Any], kind: type[Config]) -> bool:
    """Whether `key` would accept `value`."""
    try:
        kind.model_validate({**values, key: value})
    except ValidationError as error:
        return all(problem["loc"][:1] != (key,) for problem in error.errors(include_url=False))
    return True


def kinds_of(annotation: Any) -> list[Any]:
    """The types that `annotation` is made of, null aside and without their `Annotated` constraints."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for option in get_args(annotation) for kind in kinds_of(option)]
        return [kind for kind in kinds if kind is not type(None)]
    return [annotation]


def _literals(kinds: Iterable[Any]) -> list[str]:
    return [literal for kind in kinds if get_origin(kind) is Literal for literal in get_args(kind)]


# The limits of a field in words.
_LIMITS = {"ge": "of at least {:g}", "gt": "above {:g}", "le": "at most {:g}", "lt": "below {:g}"}


def allowed(key: str, field: FieldInfo) -> str:
    """What a key may be, in words: "an integer of at least 1"."""
    if told(field, "allowed"):
        return told(field, "allowed")
    if key in CHOICES:
        return one_of(CHOICES[key])
    kind = kinds_of(field.annotation)[0]
    literals = _literals([kind])
    if literals:
        return show(literals[0]) if len(literals) == 1 else one_of(literals)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    limits = {name: getattr(limit, name) for limit in field.metadata for name in _LIMITS if hasattr(limit, name)}
    if {"ge", "le"} <= set(limits):
        return f"{words[kind]} from {limits['ge']:g} to {limits['le']:g}"
    return f"{words[kind]} {' and '.join(_LIMITS[name].format(limits[name]) for name in limits)}".strip()
