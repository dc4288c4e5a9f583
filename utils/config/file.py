"""What a config file or a `--set` says, before it means anything: strict JSON with `//` comments.

Mistakes are located by line and column.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.config.rules import escaped
from utils.errors import UserError, nearest

# A whole string is matched first, so that what looks like a comment or NaN inside it is left alone.
_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|NaN|-?Infinity')


class _DuplicateKey(Exception):
    pass


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The object in the JSON file `path`, without comments (`//` and `_comment...` keys) and `$schema`.

    Raises UserError for a file that is missing, unreadable or not UTF-8, for malformed JSON (with line and
    column), NaN, infinity, a key given twice, and anything but an object at the top.
    """
    source = escaped(str(path))
    text = _read_text(Path(path), source)
    if not text.strip():
        raise UserError(f"{source}: the file is empty; a config is a JSON object.")
    values = _parse(text, source)
    if not isinstance(values, dict):
        raise UserError(f"{source}: the file holds {_kind(values)}; a config is a JSON object, {{...}}.")
    return {
        key: value for key, value in values.items() if not key.startswith("_comment") and key != "$schema"
    }


def parse_overrides(overrides: Sequence[str], is_text: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """`--set` arguments "key=value" as key -> (value, option in words); keys in `is_text` hold text.

    A value is JSON where it parses as JSON, else text. Raises UserError without a "=" or for a key set twice.
    """
    parsed: dict[str, tuple[Any, str]] = {}
    for argument in overrides:
        option = f"--set {escaped(argument if len(argument) <= 60 else argument[:57] + '...')}"
        key, equals, text = (part.strip() for part in argument.partition("="))
        if not equals or not key:
            raise UserError(f"{option}: write it as key=value.")
        if key in parsed:
            raise UserError(f"{option}: '{escaped(key[:60])}' is set twice on the command line.")
        value = json_value(text)
        if key in is_text and value is not None and not isinstance(value, str):
            value = text
        parsed[key] = value, option
    return parsed


def json_value(text: str) -> Any:
    """`text` as JSON, or as it stands where it is none."""
    try:
        return _loads(text)
    except (ValueError, RecursionError, _DuplicateKey):
        return text


def _read_text(path: Path, source: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # Windows editors begin a file with a byte order mark
    except FileNotFoundError:
        folder = path.parent
        others = [str(folder / other.name) for other in folder.glob("*.json")] if folder.is_dir() else []
        raise UserError(f"{source}: there is no such file.{nearest(str(path), others)}") from None
    except IsADirectoryError:
        raise UserError(f"{source}: this is a folder; name a config file in it.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: byte {error.start + 1} is not UTF-8 text; a config is a JSON file."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{source}: the file cannot be read ({reason}).") from None


def _parse(text: str, source: str) -> Any:
    def blank(match: re.Match) -> str:
        token = match[0]
        if token.startswith('"'):
            return token
        if not token.startswith("//"):
            line = text.count("\n", 0, match.start()) + 1
            column = match.start() - text.rfind("\n", 0, match.start())
            raise UserError(f"{source}: line {line}, column {column}: {token} is not a value that JSON has.")
        return " " * len(token)  # as many characters, so that later columns keep their numbers

    try:
        return _loads(_TOKEN.sub(blank, text))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        what = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
        raise UserError(f"{source}: {place}: malformed JSON ({what}).") from None
    except _DuplicateKey as error:
        raise UserError(f"{source}: '{error}' is given twice; keep one of the two.") from None
    except RecursionError:
        raise UserError(f"{source}: lists or objects are nested too deeply; a config is flat.") from None


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int | float:
    """Digits beyond 64 bits make a float: no integer key takes it, and no code meets a million digits."""
    return int(digits) if len(digits) <= 20 and -2**63 <= int(digits) < 2**63 else float(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and not key.startswith("_comment"):
            raise _DuplicateKey(escaped(key))
        values[key] = value
    return values


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "text" if isinstance(value, str) else f"only {json.dumps(value)}"
