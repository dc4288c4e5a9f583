"""The house rules that a reader relies on: imports go one way, seams have no branches, files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

from models import LEARNERS
from tests.helpers import ROOT
from utils.data import DATASETS

# Who may import whom, besides itself.
MAY_IMPORT = {
    "main": {"studies", "trainer", "utils"},
    "studies": {"trainer", "models", "backbone", "utils"},
    "trainer": {"models", "backbone", "utils"},
    "models": {"backbone", "utils"},
    "backbone": {"utils"},
    "utils": set(),
    "analysis": {"main", "studies", "trainer", "models", "backbone", "utils", "benchmarks"},
    "benchmarks": {"main", "studies", "trainer", "models", "backbone", "utils", "analysis"},
    "tools": {"main", "studies", "trainer", "models", "backbone", "utils"},
}
FILES = [path for part in MAY_IMPORT for path in [ROOT / f"{part}.py", *sorted((ROOT / part).rglob("*.py"))] if path.exists()]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import, those inside functions included."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package"
            yield node.lineno, node.module.split(".")[0]


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
    assert packages <= {*MAY_IMPORT, "tests"}, "a new package needs a line in MAY_IMPORT"


def test_imports_go_one_way() -> None:
    found = []
    for path in FILES:
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        forbidden = {*MAY_IMPORT, "tests"} - MAY_IMPORT[part] - {part}
        found += [f"{named(path)}:{line}: imports {name}" for line, name in imported(tree(path)) if name in forbidden]
    assert found == []


def test_nothing_branches_on_the_name_of_a_data_set_or_method() -> None:
    found = []
    for path in FILES:
        here = named(path)
        names = [name for name in DATASETS if not here.startswith("utils/data")]
        names += [name for name in LEARNERS if here != "models/__init__.py"]
        found += [f"{here}:{line}: compares with '{text}'" for line, text in compared_texts(tree(path)) if text in names]
    assert found == []


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
    assert sorted(text for _, text in compared_texts(module)) == ["cub", "digits", "folder", "glyphs", "x"]
