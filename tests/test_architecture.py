"""The house rules that a reader relies on: imports go one way, seams have no branches, files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

from backbone.heads import HEADS
from models import LEARNERS
from models.growth import RULES
from models.recipes import GATES
from tests.helpers import ROOT
from utils.data import DATASETS

# Who may import whom, besides itself. A room of a package, named with a dot, is nobody's but of those that name it.
_BASE = {"utils.errors", "utils.rng", "utils.gumbel_utils"}
_CONFIG = _BASE | {"utils.config"}
_RUNS = _CONFIG | {"utils.runs"}
_UTILS = _RUNS | {"utils.data", "utils.data_manager", "utils.results"}
_ALL = {"main", "studies", "trainer", "models", "backbone", "analysis", "benchmarks", *_UTILS}
MAY_IMPORT = {
    "utils.errors": set(),
    "utils.rng": set(),
    "utils.gumbel_utils": set(),
    "utils.config": _BASE,
    "utils.runs": _CONFIG,
    "utils.results": _RUNS,
    "utils.data": _RUNS,
    "utils.data_manager": _RUNS | {"utils.data"},
    "backbone": _UTILS,
    "models": {"backbone", *_UTILS},
    "trainer": {"models", "backbone", *_UTILS},
    "studies": {"trainer", "models", "backbone", *_UTILS},
    "main": {"studies", "trainer", "models", *_UTILS},
    "analysis": _ALL,
    "benchmarks": _ALL,
    "tools": _ALL,
}
PACKAGES = {part.split(".")[0] for part in MAY_IMPORT}
FILES = [path for part in sorted(PACKAGES) for path in [ROOT / f"{part}.py", *sorted((ROOT / part).rglob("*.py"))]
         if path.exists()]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(name: str) -> str:
    """The room of a dotted module name: `utils.data.sources` -> `utils.data`."""
    return ".".join(name.split(".")[:2]) if name.startswith("utils.") else name.split(".")[0]


def imported(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and room of every import, those inside functions included."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, room_of(alias.name)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package"
            names = [f"utils.{alias.name}" for alias in node.names] if node.module == "utils" else [node.module]
            yield from ((node.lineno, room_of(name)) for name in names)


def compared_texts(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string that something is compared with: `==`, `in (...)`, `case`, `startswith`."""
    for node in ast.walk(module):
        match node:
            case ast.Compare(left=left, comparators=others):
                sides = [left, *others]
            case ast.MatchValue(value=value):
                sides = [value]
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith"), args=sides):
                pass
            case _:
                continue
        for side in sides:
            parts = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
            texts = [part for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            yield from ((text.lineno, text.value) for text in texts)


def test_the_files_are_found() -> None:
    assert {"main.py", "trainer.py", "models/sdlora.py", "backbone/lora.py", "utils/gumbel_utils.py"} <= set(map(named, FILES))
    packages = {path.parent.name for path in ROOT.glob("*/*.py")} | {path.stem for path in ROOT.glob("*.py")}
    assert packages <= {*PACKAGES, "tests"}, "a new package needs a line in MAY_IMPORT"


def test_imports_go_one_way() -> None:
    found = []
    for path in FILES:
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if here == "utils.__init__":
            continue
        ours = [(line, name) for line, name in imported(tree(path)) if name.split(".")[0] in PACKAGES | {"tests"}]
        found += [f"{named(path)}:{line}: imports {name}" for line, name in ours if name not in MAY_IMPORT[here] | {here}]
    assert found == []


def test_the_rooms_have_an_order() -> None:
    """Nothing that may be imported may import back; so there is no circle, and nothing uses the tools at the end."""
    for room, below in MAY_IMPORT.items():
        assert all(room not in MAY_IMPORT[other] for other in below if room not in ("analysis", "benchmarks")), room
    used = set().union(*(below for room, below in MAY_IMPORT.items() if room not in ("analysis", "benchmarks", "tools")))
    assert not used & {"analysis", "benchmarks", "tools", "main"}


def test_nothing_branches_on_the_name_of_a_data_set_or_method() -> None:
    found = []
    for path in FILES:
        here = named(path)
        names = [name for name in DATASETS if not here.startswith("utils/data")]
        names += [name for name in LEARNERS if here != "models/__init__.py"]
        found += [f"{here}:{line}: compares with '{text}'" for line, text in compared_texts(tree(path)) if text in names]
    assert found == []


def test_utils_names_no_component() -> None:
    """Nor any of their keys' values; `none` and `random` are words of others too, and one method has to be the default."""
    names = {*LEARNERS, *GATES, *RULES, *HEADS} - {"none", "random"}
    found = [f"{named(path)}:{node.lineno}: {node.value}" for path in FILES if named(path).startswith("utils/")
             for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and node.value in names]
    default = [line for line in found if line.startswith("utils/config/keys.py") and line.endswith(": sdlora")]
    assert found == default and len(default) == 1


def test_files_are_at_most_400_lines() -> None:
    assert [named(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []


def test_no_device_is_written_into_the_code() -> None:
    calls = [(path, node) for path in FILES for node in ast.walk(tree(path))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert [f"{named(path)}:{node.lineno}: .cuda()" for path, node in calls if node.func.attr == "cuda"] == []


def test_the_entry_point_is_short() -> None:
    assert len((ROOT / "main.py").read_text().splitlines()) < 80


def test_the_checks_see_what_they_look_for() -> None:
    source = ("import torch\ndef f(name):\n    from trainer import run\n    if name == 'digits' or name in ('cub', 'x'):\n"
              "        return name.startswith('glyphs')\n    match name:\n        case 'folder':\n            return 1\n")
    module = ast.parse(source)
    assert list(imported(module)) == [(1, "torch"), (3, "trainer")]
    assert [name for _, name in imported(ast.parse("from utils import config\nimport utils.data.sets"))] == [
        "utils.config", "utils.data"]
    assert sorted(text for _, text in compared_texts(module)) == ["cub", "digits", "folder", "glyphs", "x"]
