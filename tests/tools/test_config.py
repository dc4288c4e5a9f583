"""tools/config.py: the tables and the schema, made from the declarations; the schema takes what the loader takes."""

import json

import pytest

from models import LEARNERS
from tests.helpers import ROOT
from tools.config import main
from utils.config import config_from_dict, known_keys
from utils.config.describe import config_schema, config_table
from utils.config.keys import told
from utils.errors import UserError

EXPS = ROOT / "exps"
SHIPPED = sorted(path for path in EXPS.glob("*.json") if not path.name.endswith(".schema.json"))
MINIMAL = {"dataset": "digits", "init_cls": 2}


def test_every_key_is_documented_and_told_once() -> None:
    table = config_table()
    for key, field in known_keys().items():
        assert field.description and field.description.endswith("."), key
        assert told(field, "unset") or field.default is not None, key
        assert f"\n| `{key}` |" in table
    assert all(f'`"{name}"`' in table for name in LEARNERS)


def test_the_page_and_the_schema_are_those_made_from_the_declarations(capsys) -> None:
    main(["table"])
    table = capsys.readouterr().out
    assert table.strip() == config_table().strip()
    assert table.strip() in (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8")
    main(["schema"])
    assert json.loads(capsys.readouterr().out) == config_schema() == json.loads((EXPS / "config.schema.json").read_text())


_JSON_TYPES = {
    "string": str,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def is_type(name: str, value: object) -> bool:
    if name in ("integer", "number"):
        return isinstance(value, int if name == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, _JSON_TYPES[name])


def conforms(schema: dict, value: object) -> bool:
    """JSON Schema validation with the keywords that the schema of the configs uses; any other is an error."""
    limits = {
        "minimum": lambda limit: value >= limit,
        "maximum": lambda limit: value <= limit,
        "exclusiveMinimum": lambda limit: value > limit,
        "exclusiveMaximum": lambda limit: value < limit,
        "minLength": lambda limit: len(value) >= limit,
        "minItems": lambda limit: len(value) >= limit,
        "maxItems": lambda limit: len(value) <= limit,
        "items": lambda inner: all(conforms(inner, item) for item in value),
        "uniqueItems": lambda unique: not unique or len(set(map(repr, value))) == len(value),
        "enum": lambda choices: any(value == choice and type(value) is type(choice) for choice in choices),
        "const": lambda choice: value == choice,
        "anyOf": lambda options: any(conforms(option, value) for option in options),
        "description": lambda text: True,
        "default": lambda default: True,
    }
    kinds = schema.get("type", [])
    if kinds and not any(is_type(kind, value) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    return all(limits[word](limit) for word, limit in schema.items() if word != "type")


def file_conforms(values: dict) -> bool:
    schema = config_schema()
    assert schema["additionalProperties"] is False and list(schema["patternProperties"]) == ["^_comment"]
    known = {key: value for key, value in values.items() if not key.startswith("_comment")}
    return set(schema["required"]) <= set(known) <= set(schema["properties"]) and all(
        conforms(schema["properties"][key], value) for key, value in known.items()
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_conform_to_the_schema(path):
    assert file_conforms(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "values",
    [
        {**MINIMAL, "device": 0, "seed": 5, "gumbel_anneal_rate": 0.5, "prefix": "", "_comment_more": [1]},
        {**MINIMAL, "device": ["cpu"], "seed": [5, 6], "increment": None, "init_lr": 1, "nb_tasks": 3},
        {
            **MINIMAL,
            "memory_size": 0,
            "memory_per_class": 0,
            "fixed_memory": False,
            "init_milestones": [1, 2],
        },
        {**MINIMAL, "gate": "none", "rank_schedule": [[0, 4], [2, 2]], "growth_rule": "kd"},
    ],
)
def test_the_schema_takes_what_the_loader_takes(values):
    assert file_conforms(values)
    given = {key: value for key, value in values.items() if not key.startswith("_comment")}
    assert file_conforms(config_from_dict(given).model_dump(mode="json"))


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": "3"},
        {"gate": "soft"},
        {"seed": [1, 1]},
        {"seed": -1},
        {"device": []},
        {"momentum": 1},
        {"gumbel_anneal_rate": 0},
        {"gumbel_anneal_rate": "fast"},
        {"memory_size": 5},
        {"fixed_memory": True},
        {"head": "nearest"},
        {"dataset": ""},
        {"rank_schedule": [[0, 1, 2]]},
        {"milestones": [0]},
        {"rnk": 3},
    ],
)
def test_the_schema_marks_what_the_loader_refuses(change):
    assert not file_conforms({**MINIMAL, **change})
    with pytest.raises(UserError):
        config_from_dict({**MINIMAL, **change})
