"""Records that the tests of analysis share."""

from pathlib import Path

import pytest

from analysis.compare import main
from analysis.records import Stream, find_runs, group_runs
from tests.helpers import refusal, save, true_record, varied
from utils.runs.files import read_sealed_json

SEEDS = range(1993, 1998)
KEPT_SET = {"truth": [True, False, False], "kept": [True, True, False], "precision": 0.5, "recall": 1.0, "f1": 2 / 3,
            "auc": 0.75}


def streams(*paths: Path, **labels: Path) -> list[Stream]:
    """The runs under `paths`, grouped; `labels` name methods."""
    return group_runs(find_runs(paths, {path: name for name, path in labels.items()}).runs)


def refused(capsys, *arguments: str | Path) -> str:
    """The sentence with which the command refuses."""
    return refusal(main, capsys, *arguments)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A finished run on two tasks of the digits."""
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    true_record(folder)
    return folder


@pytest.fixture(scope="session")
def base(trained) -> dict:
    return read_sealed_json(trained / "results.json")


@pytest.fixture
def runs(base, tmp_path) -> Path:
    """`gated` and `sdlora` over five seeds; the first is better, by unlike amounts, with fewer adapters."""
    folder = tmp_path / "runs"
    for index, seed in enumerate(SEEDS):
        save(folder / "gated", varied(base, seed, last=62 + index, adapters=[1, 2, 2], kept_set=KEPT_SET))
        save(folder / "sdlora", varied(base, seed, last=60 + index % 2, parameters=3000, gate="none"))
    return folder
