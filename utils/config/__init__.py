"""Configs: load a file with the command line's changes, put mistakes into words, describe the keys.

`python -m utils.config table` prints every key as Markdown (the table in `docs/CONFIG.md`), and
`python -m utils.config schema` the JSON Schema by which editors complete and check configs
(`exps/config.schema.json`).
"""

import argparse
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from utils.config.file import json_value, parse_overrides, read_config_file
from utils.config.keys import GROUPS, Config
from utils.config.rules import default_value, escaped, show, unused_by_evidence
from utils.errors import UserError, nearest

__all__ = [
    "Config",
    "command_line_changes",
    "config_from_dict",
    "config_schema",
    "config_table",
    "config_warnings",
    "load_config",
    "non_default",
    "refuse_inactive",
]

# Keys of the official SD-LoRA files that its code never uses: it trains with SGD and steps whatever they say.
_MEMORY_KEYS = ("memory_size", "memory_per_class", "fixed_memory")
_OFFICIALLY_IGNORED = ("optimizer", "scheduler", "min_lr", "tuned_epoch", "weight_decay", "init_weight_decay")


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
    texts = [key for key, field in Config.model_fields.items() if _options(field.annotation) == [str]]
    changes = parse_overrides(overrides, texts)
    for key, value in values.items():
        option = f"--{key.replace('_', '-')}"
        if value is not None and key in changes:
            raise UserError(f"{changes[key][1]}: '{key}' is given by {option} too; use one of the two.")
        if value is not None:
            changes[key] = value, option
    return changes


def config_from_dict(
    values: Mapping[str, Any],
    source: str = "config",
    *,
    name: str = "run",
    options: Mapping[str, str] | None = None,
) -> Config:
    """The config with these `values`, keys as in a file.

    Messages name `source` as the origin of a key, or its entry in `options`; `name` names the run's folder
    where `filepath` is not given. Raises UserError.
    """
    options = options or {}
    for key in values:
        if key not in Config.model_fields:
            hint = nearest(key, Config.model_fields) or " docs/CONFIG.md lists the keys."
            origin = options.get(key, source)
            raise UserError(f"{origin}: '{escaped(key[:60])}' is not a key of the config.{hint}")
    try:
        return Config.model_validate(dict(values), context={"name": name})
    except ValidationError as error:
        raise UserError(_sentence(error, values, source, options)) from None


def non_default(config: Config) -> dict[str, Any]:
    """The keys that were given a value other than the one they would have had anyway, with that value."""
    given = {key: getattr(config, key) for key in Config.model_fields if key in config.model_fields_set}
    return {key: value for key, value in given.items() if value != default_value(config, key)}


def refuse_inactive(config: Config, model_name: str, inactive: Iterable[str]) -> None:
    """Refuses `inactive` keys, those without effect for `model_name`, where they hold no default.

    Raises UserError for the first one.
    """
    changed = non_default(config)
    for key in inactive:
        assert key in Config.model_fields, key
        if key in changed:
            default = show(default_value(config, key))
            raise UserError(
                f"'{key}' is {show(changed[key])}, but it has no effect for model_name '{model_name}'; "
                f"leave it out or give its default, {default}."
            )


def config_warnings(config: Config, given: Iterable[str] | None = None) -> list[str]:
    """What to say once about a config that is valid; `given` are its keys (default: those it was made with).

    Rehearsal keys or `init_weight_decay` mark a file of SD-LoRA's, whose code does not use all of its keys:
    the warning lists them. A file with every key is a resolved config that a run has saved, and gets none.
    """
    given = config.model_fields_set if given is None else set(given)
    unused = unused_by_evidence(config)
    warnings = [f"gate \"evidence\" is not trained and does not use {', '.join(unused)}."] if unused else []
    if given >= set(Config.model_fields) or not given & {*_MEMORY_KEYS, "init_weight_decay"}:
        return warnings
    memory = [key for key in _MEMORY_KEYS if key in given]
    honoured = [key for key in _OFFICIALLY_IGNORED if key in given]
    parts = []
    if memory:
        parts.append(f"{', '.join(memory)} (no meaning here: nothing is rehearsed)")
    if honoured:
        parts.append(f"{', '.join(honoured)} (honoured here)")
    return [
        *warnings,
        f"The official SD-LoRA code ignores these keys of the config: {'; '.join(parts)}. It always trains "
        "with SGD, momentum 0.9, no weight decay, and steps at init_milestones and milestones; the configs "
        "exps/*_original.json do as it does."
    ]


def _sentence(
    error: ValidationError, values: Mapping[str, Any], source: str, options: Mapping[str, str]
) -> str:
    """The first problem in `error` in one sentence; missing keys are listed together."""
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "contradiction":
        sentence = first["ctx"]["sentence"]
        named = dict.fromkeys(option for key, option in options.items() if f"'{key}'" in sentence)
        return f"{' with '.join([source, *named])}: {sentence}."
    if first["type"] == "missing":
        missing = " and ".join(
            f"'{problem['loc'][0]}'" for problem in problems if problem["type"] == "missing"
        )
        return f"{source}: {missing} must be given (docs/CONFIG.md describes the keys)."
    key = first["loc"][0]
    return f"{options.get(key, source)}: {_complaint(key, values)}"


def _complaint(key: str, values: Mapping[str, Any]) -> str:
    """What is wrong with the value of `key` and what would be right."""
    value, wanted = values[key], allowed(key)
    kinds = _options(Config.model_fields[key].annotation)
    if (
        isinstance(value, float)
        and value.is_integer()
        and abs(value) < 2**53
        and _fits(key, int(value), values)
    ):
        return f"'{key}' is {show(value)}, a decimal number; write the integer {int(value)}."
    if not isinstance(value, str):
        return f"'{key}' is {show(value)}; it must be {wanted}."
    if str in kinds:
        wanted = "text without control characters" if value else "text that is not empty"
        return f"'{key}' is {show(value)}; it must be {wanted}."
    meant = _without_quotes(value)
    if meant != value and _fits(key, meant, values):
        is_number = isinstance(meant, int | float) and not isinstance(meant, bool)
        right = f"the number {show(meant)}" if is_number else f"{show(meant)} without quotes"
        return f"'{key}' is the text {show(value)}; write {right}."
    if not _choices(kinds):
        return f"'{key}' is the text {show(value)}; it must be {wanted}."
    return f"'{key}' is {show(value)}; it must be {wanted}.{nearest(value, _choices(kinds))}"


def _without_quotes(text: str) -> Any:
    """What a text was probably meant to be: a number, true, false, null or a list."""
    value = json_value(text)
    try:
        return float(text) if value == text else value  # float also takes ".5" and "+1", which are no JSON
    except ValueError:
        return text


def _fits(key: str, value: Any, values: Mapping[str, Any]) -> bool:
    """Whether `key` would accept `value`."""
    try:
        Config.model_validate({**values, key: value})
    except ValidationError as error:
        return all(problem["loc"][:1] != (key,) for problem in error.errors(include_url=False))
    return True


def _options(annotation: Any) -> list[Any]:
    """The types that `annotation` is made of, null aside and without their `Annotated` constraints."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for option in get_args(annotation) for kind in _options(option)]
        return [kind for kind in kinds if kind is not type(None)]
    return [annotation]


def _choices(kinds: Iterable[Any]) -> list[str]:
    return [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]


def allowed(key: str) -> str:
    """What `key` may be, in words: "an integer of at least 1"."""
    field = Config.model_fields[key]
    if field.json_schema_extra["allowed"]:
        return field.json_schema_extra["allowed"]
    kind = _options(field.annotation)[0]
    choices = [show(choice) for choice in _choices([kind])]
    if choices:
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    limits = {
        name: getattr(limit, name) for limit in field.metadata for name in _LIMITS if hasattr(limit, name)
    }
    if {"ge", "le"} <= set(limits):
        return f"{words[kind]} from {limits['ge']:g} to {limits['le']:g}"
    return f"{words[kind]} {' and '.join(_LIMITS[name].format(limits[name]) for name in limits)}".strip()


# The limits of a field in words.
_LIMITS = {"ge": "of at least {:g}", "gt": "above {:g}", "le": "at most {:g}", "lt": "below {:g}"}


def config_table() -> str:
    """Every key with what it may be, its default and its meaning: Markdown, one table per group."""
    tables = []
    for group, title in GROUPS.items():
        rows = [
            f"| `{key}` | {_cell(allowed(key))} | {_cell(_default_text(key))} | {_cell(field.description)} |"
            for key, field in Config.model_fields.items()
            if field.json_schema_extra["group"] == group
        ]
        head = ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
        tables.append("\n".join([f"### {title}", "", *head, *rows]))
    return "\n\n".join(tables) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default_text(key: str) -> str:
    field = Config.model_fields[key]
    if field.is_required():
        return "must be given"
    return field.json_schema_extra["unset"] or f"`{json.dumps(field.default)}`"


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, made from the class, with comment keys and `$schema` allowed."""
    made = Config.model_json_schema()
    properties: dict[str, Any] = {
        "$schema": {"type": "string", "description": "Where this schema lies, for editors; ignored."}
    }
    for key, entry in made["properties"].items():
        entry = {name: entry[name] for name in entry if name not in ("title", "group", "unset", "allowed")}
        if "const" in entry:  # versions of pydantic differ on whether a single choice has an enum too
            entry["enum"] = [entry.pop("const")]
        if entry.get("default", ...) is None:
            del entry["default"]
            entry["description"] += f" Default: {_default_text(key)}."
        properties[key] = entry
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Gumbel CL-LoRA config",
        "type": "object",
        "properties": properties,
        "patternProperties": {"^_comment": {"description": "A comment; ignored."}},
        "required": made["required"],
        "additionalProperties": False,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table or the schema of the config's keys."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.config", description="Describe the keys of a config."
    )
    parser.add_argument(
        "what", choices=["table", "schema"], help="Markdown table, or JSON Schema for editors"
    )
    what = parser.parse_args(arguments).what
    print(config_table().rstrip() if what == "table" else json.dumps(config_schema(), indent=2))


if __name__ == "__main__":
    main()
