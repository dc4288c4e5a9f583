"""The keys of a config described: Markdown tables for `docs/CONFIG.md`, and a JSON Schema for editors."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from utils.config.components import CHOICES, known_keys
from utils.config.keys import Config, KeyGroup, told
from utils.config.load import allowed


def config_table() -> str:
    """Every key with what it may be, its default and its meaning: one table per group, each with what it belongs to."""
    tables = []
    for group, belongs in _groups():
        rows = [f"| `{key}` | {_cell(allowed(key, field))} | {_cell(_default_text(field))} | {_cell(_meaning(key, field))} |"
                for key, field in group.model_fields.items() if key in group.__dict__.get("__annotations__", {})]
        head = ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
        tables.append("\n".join([f"### {group.__doc__}", "", *([belongs, ""] if belongs else []), *head, *rows]))
    return "\n\n".join(tables) + "\n"


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a config file: every key of every component, with comment keys and `$schema` allowed."""
    properties: dict[str, Any] = {
        "$schema": {"type": "string", "description": "Where this schema lies, for editors; ignored."}}
    made: dict[str, list[dict[str, Any]]] = {}
    for group in [Config, *(group for group, _ in _groups())]:
        for key, entry in group.model_json_schema()["properties"].items():
            made.setdefault(key, []).append(entry)
    for key, field in known_keys().items():
        entry = {name: value for name, value in made[key][0].items() if name not in ("title", "const")}
        entry["description"] = _meaning(key, field)
        # Versions of pydantic differ on whether a single choice is a const; of several owners each may have its own.
        options = [option for each in made[key] for option in each.get("enum", [each["const"]] if "const" in each else [])]
        if options:
            entry["enum"] = list(dict.fromkeys(options))
        if key in CHOICES:
            entry["enum"] = list(CHOICES[key])
        if entry.get("default", ...) is None:
            del entry["default"]
            entry["description"] += f" Default: {_default_text(field)}."
        properties[key] = entry
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Gumbel CL-LoRA config",
        "type": "object",
        "properties": properties,
        "patternProperties": {"^_comment": {"description": "A comment; ignored."}},
        "required": [key for key, field in Config.model_fields.items() if field.is_required()],
        "additionalProperties": False,
    }


def _groups() -> Iterator[tuple[type[KeyGroup], str]]:
    """Every group that declares keys, outermost first, and which choices bring it in words ("" for those of every run)."""
    bringing: dict[type[KeyGroup], list[tuple[str, str]]] = {group: [] for group in Config.__bases__}
    for choice, table in CHOICES.items():
        for name, part in table.items():
            for group in reversed(part.Keys.__mro__):
                if issubclass(group, KeyGroup) and group.__dict__.get("__annotations__"):
                    bringing.setdefault(group, []).append((choice, name))
    for group, brought in bringing.items():
        choices = {choice: [name for other, name in brought if other == choice] for choice, _ in brought}
        texts = [f"`{choice}` " + ", ".join(f'`"{name}"`' for name in names) for choice, names in choices.items()]
        yield group, f"With {' and '.join(texts)}." if texts else ""


def _meaning(key: str, field: FieldInfo) -> str:
    """The key's description, and that of everything it can name."""
    names = [f'`"{name}"`: {_first_sentence(part.__doc__)}' for name, part in CHOICES.get(key, {}).items()]
    return " ".join([field.description, *names])


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    return told(field, "unset") or f"`{json.dumps(field.default)}`"
