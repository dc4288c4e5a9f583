"""utils/config/file.py: reading config files and `--set`: comments, mistakes with their place, and what wins over what."""

import json
from pathlib import Path

import pytest

from utils.config import file as config_file
from utils.config import load_config
from utils.errors import UserError

MINIMAL = {"dataset": "digits", "init_cls": 2}


def write(folder: Path, content: object, name: str = "x.json") -> Path:
    """`content` in a file: text and bytes as they are, anything else as JSON."""
    path = folder / name
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def refusal(folder: Path, content: object, *arguments: object, **values: object) -> str:
    """The message with which a config is refused, the folder taken out."""
    with pytest.raises(UserError) as caught:
        load_config(write(folder, content), *arguments, **values)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?")) and "pydantic" not in message
    return message.replace(f"{folder}/", "")


def test_comments_are_left_out(tmp_path):
    text = """// what this is
    {"$schema": "./config.schema.json", "_comment": {"any": [1]}, "_comment_2": 3, "_comment": "again",
     "dataset": "digits", // the data
     "prefix": "https://example.org // no comment \\" // nor this", "init_cls": 2} // end"""
    config = load_config(write(tmp_path, text))
    assert config.prefix == 'https://example.org // no comment " // nor this'
    assert config.model_fields_set == {"dataset", "prefix", "init_cls"}


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    assert load_config(write(tmp_path, b"\xef\xbb\xbf" + json.dumps(MINIMAL).encode())).init_cls == 2


@pytest.mark.parametrize(
    ("content", "line", "column"),
    [
        ('{\n  "dataset": "digits",\n  "init_cls" 2\n}', 3, 14),
        ('{ // "a": 1, "b"\n  "dataset": "digits", // text\n  "rank": 4,, // x\n}', 3, 13),
        ('{"dataset": "a // b" "init_cls": 2}', 1, 22),
        ('{"dataset": "unfinished\n}', 1, 24),
        ("{'dataset': 1}", 1, 2),
        ('{"init_lr": NaN}', 1, 13),
        ('{"prefix": "NaN",\r\n "init_lr":\r\n   -Infinity}', 3, 4),
        ('{"a": 1} {"b": 2}', 1, 10),
        ("// nothing", 1, 11),
        ('{"seed": [1, 2', 1, 15),
        ('{"rank": 01}', 1, 11),
    ],
)
def test_malformed_json_is_located(content, line, column, tmp_path):
    assert f"x.json: line {line}, column {column}: " in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.json: the file is empty; a config is a JSON object."),
        ("[1]", "x.json: the file holds a list; a config is a JSON object, {...}."),
        ('"text"', "x.json: the file holds text; a config is a JSON object, {...}."),
        ("null", "x.json: the file holds only null; a config is a JSON object, {...}."),
        (b'{"prefix": "\xe9"}', "x.json: byte 13 is not UTF-8 text; a config is a JSON file."),
        ('{"rank": 1, "rank": 1}', "x.json: 'rank' is given twice; keep one of the two."),
        ('{"prefix": {"a": 1, "a": 2}}', "x.json: 'a' is given twice; keep one of the two."),
        ('{"seed": ' + "[" * 100_000, "x.json: lists or objects are nested too deeply; a config is flat."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_hold_no_config(content, message, tmp_path):
    assert refusal(tmp_path, content) == message


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ('"epochs": 1' + "0" * 30, "'epochs' is 1e+30; it must be an integer of at least 1."),
        ('"init_lr": 1e999', "'init_lr' is not a finite number; it must be a number above 0."),
        ('"init_lr": ' + "9" * 5000, "'init_lr' is not a finite number; it must be a number above 0."),
        ('"epochs": ' + "9" * 19, "'epochs' is 1e+19; it must be an integer of at least 1."),
        ('"epochs": ' + "9" * 5000, "'epochs' is not a finite number; it must be an integer of at least 1."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_numbers_that_are_too_large(text, ending, tmp_path):
    assert refusal(tmp_path, '{"dataset": "digits", "init_cls": 2, ' + text + "}").endswith(ending)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, MINIMAL, "quickstart.json")
    with pytest.raises(
        UserError, match=r"quikstart\.json: there is no such file\. Did you mean '.*quickstart\.json'\?"
    ):
        load_config(tmp_path / "quikstart.json")
    with pytest.raises(UserError, match=r"there is no such file\.$"):
        load_config(tmp_path / "no folder" / "x.json")
    with pytest.raises(UserError, match="this is a folder"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "quickstart.json" / "x.json")
    with pytest.raises(UserError, match=r"a\\u0000b: the file cannot be read"):
        load_config("a\0b")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / ("x" * 5000))

    def deny(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(config_file.Path, "read_bytes", deny)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        load_config(tmp_path / "quickstart.json")


# The command line


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, {**MINIMAL, "rank": 4, "seed": [1], "device": "0", "shuffle": True})
    changes = [
        "rank=8",
        "gate=none",
        "shuffle=false",
        "init_lr=1e-3",
        "rank_schedule=[[0, 8], [2, 4]]",
        "prefix=007",
    ]
    config = load_config(path, changes, seed=[2, 3], device=None)
    assert (config.rank, config.gate, config.shuffle, config.init_lr) == (8, "none", False, 1e-3)
    assert (config.seed, config.device, config.prefix) == ([2, 3], ["0"], "007")
    assert {"rank", "gate", "seed"} <= config.model_fields_set


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("backbone_weights=null", "backbone_weights", None),
        ('prefix="quoted"', "prefix", "quoted"),
        ('prefix="NaN"', "prefix", "NaN"),
        ("prefix=a=b", "prefix", "a=b"),
        ('prefix={"a": 1, "a": 2}', "prefix", '{"a": 1, "a": 2}'),
        ("prefix=" + "[" * 100_000, "prefix", "[" * 100_000),
        ("prefix=", "prefix", ""),
        ("prefix=true", "prefix", "true"),
        (" rank = 3 ", "rank", 3),
        ("device=1", "device", ["1"]),
        ("seed=5", "seed", [5]),
        ("gumbel_anneal_rate=auto", "gumbel_anneal_rate", "auto"),
        ("gumbel_anneal_rate=0.5", "gumbel_anneal_rate", 0.5),
        ("init_lr=1", "init_lr", 1.0),
    ],
    ids=lambda value: str(value)[:30],
)
def test_set_is_typed_by_the_config(change, key, value, tmp_path):
    assert getattr(load_config(write(tmp_path, MINIMAL), [change]), key) == value


@pytest.mark.parametrize(
    ("changes", "values", "message"),
    [
        (["rank"], {}, "--set rank: write it as key=value."),
        (["=3"], {}, "--set =3: write it as key=value."),
        (["rnk=3"], {}, "--set rnk=3: 'rnk' is not a key of the config. Did you mean 'rank'?"),
        (["rank=0"], {}, "--set rank=0: 'rank' is 0; it must be an integer of at least 1."),
        (["init_lr=.5"], {}, "--set init_lr=.5: 'init_lr' is the text \".5\"; write the number 0.5."),
        (
            ["init_lr=NaN"],
            {},
            "--set init_lr=NaN: 'init_lr' is the text \"NaN\"; it must be a number above 0.",
        ),
        (["r" * 70 + "=1"], {}, f"--set {'r' * 57}...: '{'r' * 60}' is not a key of the config."),
        (["rank=1", "rank=2"], {}, "--set rank=2: 'rank' is set twice on the command line."),
        (["seed=1"], {"seed": [2]}, "--set seed=1: 'seed' is given by --seed too; use one of the two."),
        (
            [],
            {"seed": [-1]},
            "--seed: 'seed' is [-1]; it must be an integer from 0 to 4294967295, or a list of",
        ),
        ([], {"device": ["gpu"]}, '--device: \'device\' is ["gpu"]; it must be "auto", "cpu", or a list of'),
        (["gate=none", "rank=2"], {}, "x.json with --set gate=none: 'growth_rule' is \"topk\" but 'gate' is"),
    ],
)
def test_mistakes_on_the_command_line(changes, values, message, tmp_path):
    assert message in refusal(tmp_path, {**MINIMAL, "growth_rule": "topk"}, changes, **values)
