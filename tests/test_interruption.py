"""SIGTERM in the middle of every kind of work: the run answers within two parts of it, and ends as if nothing had happened.

Of every method one moment within its last task. `GCL_LONG_FAULTS=1` adds every kind of work of every method, and a process
of its own for each.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer
from main import main
from models import LEARNERS
from tests.helpers import LONG, PRETRAINED, ROOT, method_values, small_values
from tests.tiny_backbone import TINY

long = pytest.mark.skipif(not LONG, reason="part of the long form")

# Runs whose work, taken together, is of every kind. Task 1 is refused where rows are to be fitted again.
_TWO = {"nb_tasks": 2, "batch_size": 64}
_EVIDENCE = {**_TWO, "gate": "evidence", "growth_threshold": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "gated": {**_TWO, "growth_threshold": 1.0},
    "evidence": {**_EVIDENCE, "init_epoch": 2, "epochs": 2},
    "held out": {**_TWO, "growth_rule": "val_loss", "growth_margin": 10.0, "val_fraction": 0.4, "batch_size": 32},
    "ridge": {**_TWO, "model_name": "finetune_head", "head": "ridge", "ridge_dim": 48},
    "aligned": {**_TWO, "model_name": "finetune_head", "head": "aligned", "align_epochs": 1, "align_samples": 32},
    "means": {**_TWO, "model_name": "simplecil"},
}
# The second task of the routed gate is of a new domain, so that its adapter is decided on and kept.
METHODS: dict[str, dict[str, Any]] = {
    **{name: method_values(name) for name in LEARNERS},
    "routed": {**_TWO, "inference": "routed", "epochs": 2, "task_domains": ["negative", "plain"]},
    "domains": {**_TWO, "inference": "routed", "epochs": 2, "task_domains": ["negative", "plain"], "scenario": "domain"},
}
# The run, the kind of work, and the call of that kind at which the signal comes: within task 1 where there is one.
CASES = [("gated", "features for the row fit", 2), ("ridge", "ridge_lambda", 8), ("means", "class means", 7)]
MORE = [
    ("gated", "step", 7), ("gated", "evaluation", 7), ("gated", "row fit", 1),
    ("evidence", "how far its images have moved", 8), ("evidence", "features for the row fit", 7), ("evidence", "row fit", 1),
    ("evidence", "evaluation", 3),
    ("held out", "held-out loss", 2), ("held out", "features for the row fit", 5), ("held out", "row fit", 3),
    ("ridge", "class statistics of the head", 7),
    ("aligned", "class statistics of the head", 7), ("aligned", "aligning the head", 5),
    ("means", "evaluation", 4),
]


class Record:
    """Counts a run's calls of `after_step` and `work` by their kind; at one of them the process gets a signal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "", number: int = 0) -> None:
        self.counts: dict[str, int] = {}
        self.kind, self.number, self.since = kind, number, 0
        step, work = trainer.Run.after_step, trainer.Run.work
        monkeypatch.setattr(trainer.Run, "after_step", lambda run: (self.note("step"), step(run)))
        monkeypatch.setattr(trainer.Run, "work", lambda run, title, *a, **k: (self.note(title), work(run, title, *a, **k)))

    def note(self, title: str) -> None:
        kind = title.split(": ")[-1]
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.since += bool(self.number and self.sent)
        if kind == self.kind and self.counts[kind] == self.number:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def sent(self) -> bool:
        return self.counts.get(self.kind, 0) >= self.number


def config_file(folder: Path, name: str, **changes: Any) -> str:
    path = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    values = small_values(**{**TINY, **{**RUNS, **METHODS}[name], **changes})
    path.write_text(json.dumps({**values, "filepath": str(folder / "run")}))
    return str(path)


def files(folder: Path) -> list[dict[str, Any]]:
    result = json.loads((folder / "run" / "results.json").read_text())
    assert result["finished"] and not list((folder / "run").glob("*.ckpt"))
    keys = ("files", "counts", "probe", "kept", "trainable_parameters")
    return [{key: task[key] for key in keys} for task in result["tasks"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[str], tuple[list, dict[str, int]]]:
    """What a run of `RUNS` or `METHODS` leaves and the calls it makes; each is run once."""
    done: dict[str, tuple[list, dict[str, int]]] = {}

    def of(name: str) -> tuple[list, dict[str, int]]:
        if name not in done:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                record = Record(patch)
                assert main(["--config", config_file(folder, name)]) == 0
            done[name] = files(folder), record.counts
        return done[name]

    return of


def interrupted(name: str, kind: str, number: int, undisturbed: Callable, folder: Path) -> None:
    """A run that gets a signal at call `number` of a `kind` of work, and goes on."""
    expected, counts = undisturbed(name)
    assert number < counts[kind], f"the run has {counts} of each"
    path = config_file(folder, name)
    with pytest.MonkeyPatch.context() as patch:
        record = Record(patch, kind, number)
        assert main(["--config", path]) == 143
        assert record.sent and record.since <= 2, "answered at once"
    assert main(["--config", path]) == 0
    assert files(folder) == expected


@pytest.mark.parametrize("name, kind, number", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_a_signal_is_answered_and_the_run_ends_with_the_same_bits(name: str, kind: str, number: int, undisturbed,
                                                                  tmp_path: Path) -> None:
    interrupted(name, kind, number, undisturbed, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_within_a_task_to_the_same_bits(name: str, undisturbed, tmp_path: Path) -> None:
    """Three quarters through its steps, or through most of what it does where it has none."""
    counts = undisturbed(name)[1]
    kind = "step" if "step" in counts else max(counts, key=counts.get)
    interrupted(name, kind, 3 * counts[kind] // 4, undisturbed, tmp_path)


@long
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_work_of_every_method(name: str, undisturbed, tmp_path: Path) -> None:
    for kind, count in undisturbed(name)[1].items():
        if count > 1:
            interrupted(name, kind, count - 1, undisturbed, tmp_path / kind.replace(" ", "_"))


@pytest.mark.slow
def test_every_kind_of_work_is_interrupted(undisturbed) -> None:
    kinds = {kind for name in RUNS for kind in undisturbed(name)[1]}
    assert kinds == {kind for _, kind, _ in CASES + MORE}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", *(pytest.param(name, marks=long) for name in METHODS if name != "joint")])
def test_a_real_signal_to_a_real_process(name: str, tmp_path: Path) -> None:
    """Sent once the log shows that task 0 is over: task 1, which joint training lacks, has steps, a row fit and an evaluation
    ahead, on the embedded network so many that the signal comes in time on a busy machine too."""
    assert main(["--config", config_file(tmp_path / "whole", name, **PRETRAINED)]) == 0
    path = config_file(tmp_path, name, **PRETRAINED)
    command = [sys.executable, "main.py", "--config", path]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("Saved: "):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143 and line.startswith("Stopped by SIGTERM")
    assert main(["--config", path]) == 0
    ours, theirs = files(tmp_path), files(tmp_path / "whole")
    assert [task["files"] for task in ours] == [task["files"] for task in theirs]
