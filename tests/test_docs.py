"""The documentation against what it speaks of: the README's size and commands, links, excerpts of code, methods and tests by
name, studies."""

import re
from pathlib import Path

import pytest

from tests.helpers import ROOT

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "GUMBEL_CL_LORA_IMPLEMENTATION.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_short_and_marks_its_two_commands() -> None:
    assert len(README.read_bytes()) <= 10_000
    lines = README.read_text(encoding="utf-8").splitlines()
    for mark, end in (("# install and run the tests", "pytest -q"),
                      ("# install and run the quick start", "main.py --config=exps/quickstart.json")):
        assert lines.count(mark) == 1 and lines[lines.index(mark) + 1].endswith(end)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    assert [link for link in links if not (page.parent / link).exists()] == []
    if page.stem not in ("LOG", "METHOD"):  # what was tried before, and what is asked for
        rooms = "analysis|backbone|benchmarks|docs|exps|models|studies|tests|tools|utils"
        named = re.findall(rf"`((?:{rooms})/[\w/]+\.\w+)`", text)
        assert [name for name in named if not (ROOT / name).exists()] == []


def excerpts() -> list[tuple[str, list[str]]]:
    """File and lines of every excerpt of the code on the implementation page; it begins with the file's name as a comment."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n# (\S+\.py)\b[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(file, lines.splitlines()) for file, lines in blocks]


@pytest.mark.parametrize("file, lines", excerpts(), ids=lambda value: value if isinstance(value, str) else "")
def test_excerpts_stand_in_the_code(file: str, lines: list[str]) -> None:
    """Up to where lines are broken and what is commented."""
    code = " ".join((ROOT / file).read_text(encoding="utf-8").split())
    assert lines
    for line in lines:
        assert " ".join(line.split("  #")[0].split()) in code


def test_the_tests_that_the_implementation_page_names_are_there() -> None:
    named = re.findall(r"`([\w/]*test_\w+\.py)::(\w+)", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, test in named:
        path = ROOT / "tests" / file.removeprefix("tests/")
        assert f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)


def test_the_methods_of_classes_that_the_implementation_page_names_are_there() -> None:
    rooms = ("backbone", "models", "utils")
    files = [ROOT / "trainer.py", *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    code = [path.read_text(encoding="utf-8") for path in files]
    named = sorted(set(re.findall(r"\b([A-Z]\w+)\.([a-z_]\w+)", PAGE.read_text(encoding="utf-8"))))
    homes = {kind: text for text in code for kind in re.findall(r"^class (\w+)", text, re.MULTILINE)}
    known = [(kind, method) for kind, method in named if kind in homes]
    assert len(known) > 20
    assert [each for each in known if not re.search(rf"^    def {each[1]}\(", homes[each[0]], re.MULTILINE)] == []


def test_every_shipped_study_is_described() -> None:
    text = (ROOT / "docs" / "STUDIES.md").read_text(encoding="utf-8").partition("## Shipped studies")[2]
    assert {path.stem for path in (ROOT / "exps" / "studies").glob("*.json")} == set(re.findall(r"`(\w+)`", "".join(
        line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))))
