"""Searches: trials that are made, pruned, made up for and reported.

Runs are a stand-in for main.py whose accuracies follow from the config (tests/studies/conftest.py).
"""

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from filelock import FileLock

from analysis.records import find_runs, group_runs
from studies import search as search_module
from studies.book import CLAIM, Book, Trial
from studies.search import Search, _Current
from studies.study import load_study
from studies.study import main as study_command
from studies.trials import best, known_trials
from tests.helpers import LONG, ROOT, once, wait_for
from tests.studies.conftest import STAND_IN, start, starts, write_search

needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="pip install optuna")


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "LOOK_SECONDS", 0.1)


def trials_of(path: Path) -> list[Trial]:
    return known_trials(load_study(path))


def test_the_best_and_the_front() -> None:
    def trial(number: int, *measured: float, **other) -> Trial:
        return Trial(number, "complete", {}, measured, **other)

    one = [Trial(0, "pruned", {}), trial(1, 50.0), trial(2, 70.0), trial(3, 70.0)]
    assert [each.number for each in best(one, ["last_accuracy"])] == [2]
    assert [each.number for each in best(one, ["stored_bytes"])] == [1]
    two = [trial(0, 50.0, 10), trial(1, 60.0, 20), trial(2, 55.0, 30), trial(3, 60.0, 20, same_as=1), trial(4, 70.0, 40)]
    assert [each.number for each in best(two, ["last_accuracy", "stored_bytes"])] == [0, 1, 4]


def test_missing_optuna_is_one_sentence(tmp_path: Path, stand_in: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert start(write_search(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "pip install optuna" in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_nothing_is_written_to_look_at_a_search(tmp_path: Path, capsys) -> None:
    for storage in (..., f"sqlite:///{tmp_path / 'search.db'}"):
        path = write_search(tmp_path, storage=storage)
        assert start(path, "--dry-run") == 0 and load_study(path).runs() == []
        assert "6 trials" in capsys.readouterr().out
        assert sorted(item.name for item in tmp_path.iterdir()) == ["base.json", "study.json"]


@needs_optuna
@pytest.mark.parametrize("storage", ["postgresql+nothing://host/search", "sqlite:////nowhere/search.db"])
def test_a_storage_that_cannot_be_used_is_one_sentence(storage: str, tmp_path: Path, stand_in: Path, capsys) -> None:
    assert start(write_search(tmp_path, storage=storage)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: storage: ") and storage in err and err.count("\n") == 1


@needs_optuna
def test_what_is_in_the_way_is_one_sentence(tmp_path: Path, stand_in: Path, capsys) -> None:
    """A file in place of the folder; another process at work; a study of Optuna's own."""
    import optuna

    runs, path = tmp_path / "runs", write_search(tmp_path)
    runs.touch()
    assert start(path) == 2 and "cannot be locked" in (err := capsys.readouterr().err) and err.count("\n") == 1
    runs.unlink()
    path = write_search(tmp_path, storage=f"sqlite:///{tmp_path / 'search.db'}")
    optuna.create_study(study_name="study", storage=f"sqlite:///{tmp_path / 'search.db'}").enqueue_trial({"x": 1})
    assert start(path, "--dry-run") == 2 and "no study has made" in (err := capsys.readouterr().err) and err.count("\n") == 1
    (runs / "trial_0").mkdir(parents=True)
    with FileLock(runs / "trial_0" / CLAIM):
        assert start(path, "--overwrite") == 2
    assert "in use by another process" in (err := capsys.readouterr().err) and err.count("\n") == 1


@needs_optuna
@pytest.mark.slow
def test_a_search_ends_with_its_table_and_reports(tmp_path: Path, stand_in: Path, lines: list[str], capsys) -> None:
    path = write_search(tmp_path, seed=[1, 2], report_seed=[3, 4], jobs=2, results="records")
    assert start(path) == 0
    trials = trials_of(path)
    (top,) = best(trials, ["last_accuracy"])
    assert [trial.number for trial in trials] == list(range(6))
    assert all(trial.over for trial in trials) and top.measured == [pytest.approx(70 - 100 * abs(top.values["init_lr"] - 0.1))]
    table = lines[lines.index(next(line for line in lines if line.startswith("trial "))):]
    assert [line.split()[0] for line in table[1:7]] == [str(number) for number in range(6)]
    assert table[7].startswith(f"Best: trial {top.number}, last_accuracy {top.measured[0]:.2f} (")
    assert table[8].startswith(f"Reported: chosen_{top.number} on 2 seeds, last_accuracy {top.measured[0]:.2f} ± 0.00")
    runs = load_study(path).runs()
    assert [(each.name, each.seed) for each in runs if each.reports] == [(f"chosen_{top.number}", seed) for seed in (3, 4)]
    assert all(each.own_record() for each in runs if each.reports or each.name == f"trial_{top.number}")

    lines.clear()
    assert start(path) == 0 and not any("Started" in line for line in lines)
    assert start(path, "--set", "trials=7") == 0 and len(trials_of(path)) == 7
    capsys.readouterr()
    assert start(path, "--dry-run") == 0
    assert f"Best: trial {best(trials_of(path), ['last_accuracy'])[0].number}," in capsys.readouterr().out

    assert study_command(["collect", str(path)]) == 0
    before = trials_of(path)
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert trials_of(path) == before and any(each.committed_record() for each in load_study(path).runs())


@needs_optuna
@pytest.mark.slow
def test_one_process_searches_the_same_every_time(tmp_path: Path, stand_in: Path) -> None:
    path = write_search(tmp_path, trials=4)
    assert start(path) == 0
    first = trials_of(path)
    assert start(path, "--overwrite") == 0
    assert trials_of(path) == first and (tmp_path / "runs.old-1" / "search.journal").exists()


@needs_optuna
@pytest.mark.slow
def test_two_measures_have_a_front_in_any_database(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    measures = ["last_accuracy", "stored_bytes"]
    path = write_search(tmp_path, measure=measures, search={"init_lr": [0.05, 0.1, 0.2]}, report_seed=3, trials=8,
                        storage=f"sqlite:///{tmp_path / 'search.db'}")
    assert start(path) == 0
    trials = trials_of(path)
    assert {tuple(trial.measured) for trial in trials} <= {(65.0, 50.0), (70.0, 100.0), (60.0, 200.0)}
    made = [trial for trial in trials if trial.same_as is None]
    assert len(made) <= 3 and sum(line.startswith("Started   trial") for line in lines) == len(made)
    assert sum(line.startswith("On the front: ") for line in lines) == len(best(trials, measures))
    assert any("as trial" in line for line in lines)


@needs_optuna
@pytest.mark.slow
def test_hopeless_trials_are_pruned_on_falling_curves(tmp_path: Path, stand_in: Path) -> None:
    """The sixth trial and the seventh are worse than the others after their first task, and worse than that later."""
    path = write_search(tmp_path, {"prefix": "late"}, trials=7)
    assert start(path) == 0
    assert [trial.state for trial in trials_of(path)] == ["complete"] * 5 + ["pruned"] * 2
    assert {trial.note for trial in trials_of(path)[5:]} == {"after 1 task"}
    (tmp_path / "go").touch()
    assert start(path, "--overwrite", "--set", "prune=false", "--set", "trials=6") == 0
    assert [trial.state for trial in trials_of(path)] == ["complete"] * 6


@needs_optuna
@pytest.mark.slow
def test_failed_trials_are_told_and_tried_again(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    path = write_search(tmp_path, {"prefix": "fail without gate"},
                        search={"gate": ["none", "gumbel_sparsemax"], "init_lr": [0.1, 0.2]})
    assert start(path) == 1
    failed = [trial for trial in trials_of(path) if trial.state == "failed"]
    assert failed and all("error: the reason" in trial.note and trial.values["gate"] == "none" for trial in failed)
    assert len([line for line in lines if line.startswith("Failed: trial_")]) == len(failed)
    stand_in.write_text(STAND_IN.replace('"fail without gate"', '"never"'))
    assert start(path) == 0
    assert {trial.state for trial in trials_of(path)} == {"complete"} and len(trials_of(path)) == 6


@needs_optuna
@pytest.mark.slow
def test_a_measure_that_runs_do_not_have(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    assert start(write_search(tmp_path, {"prefix": "joint"}, trials=1, measure="average_accuracy")) == 1
    assert any("no average_accuracy; name another 'measure'" in line for line in lines)


@needs_optuna
@pytest.mark.slow
def test_another_search_of_the_name_is_refused(tmp_path: Path, stand_in: Path, capsys) -> None:
    storage = str(tmp_path / "elsewhere.journal")
    assert start(write_search(tmp_path, trials=1, storage=storage)) == 0
    for changes, keys, word in (({}, {"search": {"rank": [2, 4]}}, "'search'"), ({"epochs": 3}, {}, "epochs (there 1, now 3)"),
                                ({}, {"filepath": str(tmp_path / "other")}, "not the folder")):
        assert start(write_search(tmp_path, changes, **{"trials": 1, "storage": storage, **keys})) == 2
        err = capsys.readouterr().err
        assert word in err and "--overwrite" in err and err.count("\n") == 1
    assert start(write_search(tmp_path, {"epochs": 3}, trials=2, storage=storage), "--overwrite") == 0
    assert len(trials_of(tmp_path / "study.json")) == 2


@needs_optuna
@pytest.mark.slow
def test_a_stopped_search_goes_on_in_the_same_folders(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    path = write_search(tmp_path, {"prefix": "hang"}, trials=2)
    first = tmp_path / "runs" / "trial_0" / "seed_1"
    once(lambda: starts(first), lambda: os.kill(os.getpid(), signal.SIGINT))
    assert start(path) == 130
    assert [trial.state for trial in trials_of(path)] == ["waiting"]
    values = trials_of(path)[0].values
    (tmp_path / "go").touch()
    assert start(path) == 0
    assert [trial.number for trial in trials_of(path)] == [0, 2] and trials_of(path)[0].values == values
    assert len(starts(first)) == 2 and not (tmp_path / "runs" / "trial_1").exists()


WORKER = """
import sys
import main, studies.search
main.__file__, studies.search.LOOK_SECONDS = sys.argv[1], 0.1
sys.exit(main.main(["--config", sys.argv[2]]))
"""


@needs_optuna
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_twenty_trials_by_two_processes_one_of_them_killed(tmp_path: Path, stand_in: Path, capsys) -> None:
    """The other makes up for the trial of the killed one, in its folder; the table names the best of twenty."""
    count = 20 if LONG else 8
    path = write_search(tmp_path, {"prefix": "hang"}, trials=count, report_seed=3)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(stand_in), str(path)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE) for _ in range(2)]
    wait_for(lambda: sum(map(bool, map(starts, tmp_path.glob("runs/trial_*/seed_1")))) == 2)  # each has a run that waits
    workers[0].kill()
    workers[0].wait()
    (tmp_path / "go").touch()
    out, _ = workers[1].communicate(timeout=300)
    assert workers[1].returncode == 0
    trials = trials_of(path)
    assert len(trials) == count and {trial.state for trial in trials} <= {"complete", "pruned"}
    assert "queued again: its process ended" in out and any(
        len(starts(folder)) == 2 for folder in tmp_path.glob("runs/trial_*/seed_1"))
    (top,) = best(trials, ["last_accuracy"])
    records = [json.loads(file.read_text()) for file in tmp_path.glob("runs/trial_*/seed_1/results.json")]
    assert top.measured[0] == max(record["metrics"]["last_accuracy"] for record in records if record["finished"])
    assert f"Best: trial {top.number}, last_accuracy {top.measured[0]:.2f}" in out and f"Reported: chosen_{top.number}" in out


@needs_optuna
@pytest.mark.slow
def test_the_comparison_reads_a_search(tmp_path: Path, stand_in: Path) -> None:
    """The chosen setting is a method of its own, on the reporting seeds alone."""
    path = write_search(tmp_path, report_seed=[3, 4], trials=3)
    assert start(path) == 0
    number = best(trials_of(path), ["last_accuracy"])[0].number
    (stream,) = group_runs(find_runs([path]).runs)
    assert {method.name: [draw.seed for draw in method.runs] for method in stream.methods} == {
        f"chosen_{number}": [3, 4], **{f"trial_{trial}": [1] for trial in range(3)}}


@needs_optuna
@pytest.mark.parametrize("measure", ["last_accuracy", "forgetting", "stored_bytes"])
def test_a_trial_of_low_accuracy_is_the_hopeless_one_whatever_is_measured(measure: str, tmp_path: Path) -> None:
    search = Search(load_study(write_search(tmp_path, measure=measure, trials=7)))

    def hopeless(*curve: float) -> bool:
        current = _Current(0, search.book.search.ask(), None, deque())
        search._report(current, {"metrics": {"top1_curve": curve}})
        search.book.search.tell(current.attempt, 10.0)
        return current.hopeless

    assert not any(hopeless(80.0, 70.0, 60.0) for _ in range(5))
    assert hopeless(50.0) and not hopeless(90.0)


@needs_optuna
def test_bytes_and_forgetting_are_minimised_and_accuracy_is_not(tmp_path: Path) -> None:
    book = Book.begin(load_study(write_search(tmp_path, measure=["last_accuracy", "stored_bytes"])))
    assert [direction.name for direction in book.search.directions] == ["MAXIMIZE", "MINIMIZE"]


@needs_optuna
@pytest.mark.slow
def test_a_trial_has_the_mean_of_its_seeds_and_a_report_their_spread(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    stand_in.write_text(STAND_IN.replace("curve = []", "curve, top = [], top + config['seed'][0]"))
    path = write_search(tmp_path, seed=[1, 4], report_seed=[7, 9], trials=1)
    assert start(path) == 0
    trial, = known_trials(load_study(path))
    alone = 70 - 100 * abs(trial.values["init_lr"] - 0.1)
    assert trial.measured == [pytest.approx(alone + 2.5)]
    assert f"on 2 seeds, last_accuracy {alone + 8:.2f} ± {statistics.stdev([7, 9]):.2f}" in "\n".join(lines)
