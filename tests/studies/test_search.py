"""Searches: what a file may draw from, what is wrong with one, and trials that are made, pruned, made up for and reported.

Runs are a stand-in for main.py whose accuracies follow from the config within milliseconds.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

pytest.importorskip("optuna", reason="searches need optuna (pip install optuna)")

import main as command
from analysis.records import find_runs, group_runs
from studies import search as search_module
from studies.book import CLAIM, Trial
from studies.study import Study, load_study
from studies.study import main as study_command
from studies.trials import best, known_trials
from tests.helpers import LONG, ROOT, SMALL
from utils.errors import UserError

# Stands in for main.py: three tasks, whose accuracy is best where init_lr is 0.1; `prefix` says what else it does.
STAND_IN = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
folder, deed = Path(config["filepath"]), config["prefix"]
stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stopped.append(number))
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(config))
with open(folder / "begun", "a") as file:
    file.write(f"{os.getpid()}\\n")
if deed == "fail" and config["gate"] == "none":
    sys.exit("error: the reason")
late = deed == "late" and int(folder.parent.name.removeprefix("trial_")) >= 5  # these are worse, and wait after every task
top = 50 if late else 90 - 100 * abs(config["init_lr"] - 0.1)
curve = []
for task in range(3):
    curve.append(top - 10 * task)
    entry = {"seen_classes": 2 * task + 2, "counts": {"images": [1]}, "stored_bytes": int(1000 * config["init_lr"])}
    record = {"finished": task == 2, "config": config, "seed": config["seed"][0], "tasks": [entry] * (task + 1),
              "class_order_sha256": str(config["seed"][0]),
              "backbone": {"name": "vit", "tag": "", "source": "random", "sha256": ""},
              "metrics": {"top1_curve": curve, "last_accuracy": curve[-1],
                          "average_accuracy": None if deed == "joint" else sum(curve) / len(curve)}}
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / "part").write_text(json.dumps(record))
    os.replace(folder / "part", folder / "results.json")
    end = time.time() + {"hang": 1e9, "late": 60 * late}.get(deed, 0)
    while time.time() < end and not stopped and not Path(sys.argv[0]).with_name("go").exists():
        time.sleep(0.01)
    if stopped:
        sys.exit(128 + stopped[0])
"""

SPACE = {"init_lr": {"low": 0.01, "high": 0.5}, "gate": ["gumbel_sparsemax", "none"],
         "lambda_sparsity": {"low": 0.001, "high": 0.1, "log": True}}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(command, "__file__", str(script))
    monkeypatch.setattr(search_module, "LOOK_SECONDS", 0.1)
    return script


def write_search(folder: Path, changes: dict | None = None, **keys) -> Path:
    """A search of six trials on the digits in `folder`, which writes its runs to `folder/runs`."""
    (folder / "base.json").write_text(json.dumps({**SMALL, "nb_tasks": 2, **(changes or {})}))
    path = folder / "study.json"
    values = {"base": "base.json", "seed": 1, "filepath": str(folder / "runs"), "search": SPACE, "trials": 6, **keys}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return path


def run(path: Path, *arguments: str) -> int:
    return command.main(["--config", str(path), *arguments])


def trials_of(path: Path) -> list[Trial]:
    return known_trials(load_study(path))


# ---- what a file may hold

BAD = {
    "range and list": ({"search": {"rank": 4}}, ["search", "'rank' is 4", "list of values", "range"]),
    "empty list": ({"search": {"rank": []}}, ["'rank' is []"]),
    "unknown key": ({"search": {"rnk": [4]}}, ["search", "'rnk' is not a key", "'rank'"]),
    "twice": ({"search": {"rank": [4, 4]}}, ["'rank' holds 4 twice"]),
    "no high": ({"search": {"rank": {"low": 2}}}, ["'rank' has no 'high'"]),
    "part": ({"search": {"rank": {"low": 2, "high": 4, "lgo": True}}}, ["'lgo' is not part of a range", "log"]),
    "low text": ({"search": {"rank": {"low": "2", "high": 4}}}, ["'low' of 'rank' is \"2\"", "a number"]),
    "reversed": ({"search": {"rank": {"low": 4, "high": 2}}}, ["'low' of 'rank' is 4, not below"]),
    "whole numbers": ({"search": {"rank": {"low": 1, "high": 2.5}}}, ["'high' of 'rank' is 2.5", "integers"]),
    "log from 0": ({"search": {"init_lr": {"low": 0, "high": 1, "log": True}}}, ["'low' of 'init_lr' is 0", "above 0"]),
    "log and step": ({"search": {"init_lr": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}}, ["'step'", "'log'"]),
    "step 0": ({"search": {"init_lr": {"low": 0.1, "high": 1, "step": 0}}}, ["'step' of 'init_lr' is 0", "above 0"]),
    "step too wide": ({"search": {"rank": {"low": 1, "high": 4, "step": 5}}}, ["'step' of 'rank' is 5", "wide"]),
    "range of names": ({"search": {"gate": {"low": 1, "high": 2}}}, ["'gate' is no number"]),
    "beyond the limits": ({"search": {"init_lr": {"low": -1, "high": 1}}}, ["study.json, search", "'init_lr' is -1"]),
    "listed value": ({"search": {"rank": [4, 0]}}, ["study.json, search", "'rank' is 0"]),
    "choice": ({"search": {"gate": ["none", "nune"]}}, ["study.json, search", "nune", "'none'"]),
    "two at odds": ({"search": {"gumbel_tau_init": {"low": 0.2, "high": 5.0}, "gumbel_tau_final": {"low": 0.1, "high": 0.5}}},
                    ["study.json, search", "'gumbel_tau_final' is 0.5", "'gumbel_tau_init' of 0.2"]),
    "without effect": ({"search": {"gate": ["none"], "lambda_sparsity": [0.1, 0.2]}}, ["'lambda_sparsity' has no effect"]),
    "base without effect": ({"changes": {"prompt_length": 7}}, ["'prompt_length'", "no effect"]),
    "seeds": ({"search": {"seed": [1, 2]}}, ["'seed' cannot vary"]),
    "grid": ({"grid": {"rank": [4]}}, ["'grid' and 'search'"]),
    "variants": ({"variants": {"a": {}}}, ["'variants' and 'search'"]),
    "no trials": ({"trials": ...}, ["'trials' must be given", "at least 1"]),
    "trials 0": ({"trials": 0}, ["'trials' is 0"]),
    "trials of no search": ({"search": ...}, ["'trials' has no effect without 'search'"]),
    "measure": ({"measure": "accuracy"}, ["'measure' is \"accuracy\"", "last_accuracy"]),
    "three measures": ({"measure": ["last_accuracy", "forgetting", "stored_bytes"]}, ["'measure' is"]),
    "a measure twice": ({"measure": ["forgetting", "forgetting"]}, ["'measure' is"]),
    "pruning of two": ({"measure": ["last_accuracy", "stored_bytes"], "prune": True}, ["'prune' is true", "two measures"]),
    "selecting seed reports": ({"report_seed": [1, 2]}, ["1 is in 'seed'", "'report_seed'"]),
    "storage": ({"storage": 5}, ["'storage' is 5"]),
}


@pytest.mark.parametrize("keys, words", BAD.values(), ids=BAD)
def test_a_bad_search_is_one_sentence(keys: dict, words: list[str], tmp_path: Path) -> None:
    path = write_search(tmp_path, **keys)
    with pytest.raises(UserError) as caught:
        load_study(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert sorted(item.name for item in tmp_path.iterdir()) == ["base.json", "study.json"]


def drawn(study: Study, params: dict) -> dict:
    """What the study's space draws where Optuna draws these."""
    import optuna

    return study.space.draw(optuna.trial.FixedTrial(params))


def test_a_key_is_drawn_where_it_has_an_effect(tmp_path: Path) -> None:
    """The base's gate_lr and the drawn lambda_sparsity mean nothing without a trained gate."""
    study = load_study(write_search(tmp_path))
    params = {"init_lr": 0.123456, "gate": "none", "lambda_sparsity": 0.01}
    assert drawn(study, params) == {"gate": "none", "init_lr": 0.1235}
    config = study.run_of("trial", drawn(study, params), 1).config
    assert (config.gate, config.init_lr, hasattr(config, "gate_lr")) == ("none", 0.1235, False)
    values = drawn(study, {**params, "gate": "gumbel_sparsemax"})
    assert values == {"gate": "gumbel_sparsemax", "init_lr": 0.1235, "lambda_sparsity": 0.01}
    assert study.run_of("trial", values, 1).config.gate_lr == SMALL["gate_lr"]


def test_methods_lists_integers_and_null_are_drawn(tmp_path: Path) -> None:
    space = {"rank": {"low": 2, "high": 8, "step": 2}, "model_name": ["sdlora", "simplecil"],
             "gate": ["none", "gumbel_sparsemax"], "milestones": [[1], [1, 2], None], "scheduler": ["steplr"]}
    study = load_study(write_search(tmp_path, search=space))
    params = {"rank": 6, "model_name": "sdlora", "gate": "none", "milestones": "[1, 2]", "scheduler": "steplr"}
    values = drawn(study, params)
    assert values["milestones"] == [1, 2] and study.run_of("trial", values, 1).config.rank == 6
    assert study.run_of("trial", drawn(study, {**params, "milestones": None}), 1).config.milestones == []
    assert drawn(study, {**params, "model_name": "simplecil"}) == {"model_name": "simplecil"}


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
    assert run(write_search(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "pip install optuna" in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_nothing_is_written_to_look_at_a_search(tmp_path: Path, capsys) -> None:
    for storage in (..., f"sqlite:///{tmp_path / 'search.db'}"):
        path = write_search(tmp_path, storage=storage)
        assert run(path, "--dry-run") == 0 and load_study(path).runs() == []
        assert "6 trials" in capsys.readouterr().out
        assert sorted(item.name for item in tmp_path.iterdir()) == ["base.json", "study.json"]


@pytest.mark.parametrize("storage", ["postgresql+nothing://host/search", "sqlite:////nowhere/search.db"])
def test_a_storage_that_cannot_be_used_is_one_sentence(storage: str, tmp_path: Path, stand_in: Path, capsys) -> None:
    assert run(write_search(tmp_path, storage=storage)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: storage: ") and storage in err and err.count("\n") == 1


def test_what_is_in_the_way_is_one_sentence(tmp_path: Path, stand_in: Path, capsys) -> None:
    """A file in place of the folder; another process at work; a study of Optuna's own."""
    import optuna

    runs, path = tmp_path / "runs", write_search(tmp_path)
    runs.touch()
    assert run(path) == 2 and "cannot be locked" in (err := capsys.readouterr().err) and err.count("\n") == 1
    runs.unlink()
    path = write_search(tmp_path, storage=f"sqlite:///{tmp_path / 'search.db'}")
    optuna.create_study(study_name="study", storage=f"sqlite:///{tmp_path / 'search.db'}").enqueue_trial({"x": 1})
    assert run(path, "--dry-run") == 2 and "no study has made" in (err := capsys.readouterr().err) and err.count("\n") == 1
    (runs / "trial_0").mkdir(parents=True)
    with FileLock(runs / "trial_0" / CLAIM):
        assert run(path, "--overwrite") == 2
    assert "in use by another process" in (err := capsys.readouterr().err) and err.count("\n") == 1


# ---- trials, with a stand-in for main.py


@pytest.mark.slow
def test_a_search_ends_with_its_table_and_reports(tmp_path: Path, stand_in: Path, lines: list[str], capsys) -> None:
    path = write_search(tmp_path, seed=[1, 2], report_seed=[3, 4], jobs=2, results="records")
    assert run(path) == 0
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
    assert run(path) == 0 and not any("Started" in line for line in lines)
    assert run(path, "--set", "trials=7") == 0 and len(trials_of(path)) == 7
    capsys.readouterr()
    assert run(path, "--dry-run") == 0
    assert f"Best: trial {best(trials_of(path), ['last_accuracy'])[0].number}," in capsys.readouterr().out

    assert study_command(["collect", str(path)]) == 0
    before = trials_of(path)
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert trials_of(path) == before and any(each.committed_record() for each in load_study(path).runs())


@pytest.mark.slow
def test_one_process_searches_the_same_every_time(tmp_path: Path, stand_in: Path) -> None:
    path = write_search(tmp_path, trials=4)
    assert run(path) == 0
    first = trials_of(path)
    assert run(path, "--overwrite") == 0
    assert trials_of(path) == first and (tmp_path / "runs.old-1" / "search.journal").exists()


@pytest.mark.slow
def test_two_measures_have_a_front_in_any_database(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    measures = ["last_accuracy", "stored_bytes"]
    path = write_search(tmp_path, measure=measures, search={"init_lr": [0.05, 0.1, 0.2]}, report_seed=3, trials=8,
                        storage=f"sqlite:///{tmp_path / 'search.db'}")
    assert run(path) == 0
    trials = trials_of(path)
    assert {tuple(trial.measured) for trial in trials} <= {(65.0, 50.0), (70.0, 100.0), (60.0, 200.0)}
    made = [trial for trial in trials if trial.same_as is None]
    assert len(made) <= 3 and sum(line.startswith("Started   trial") for line in lines) == len(made)
    assert sum(line.startswith("On the front: ") for line in lines) == len(best(trials, measures))
    assert any("as trial" in line for line in lines)


@pytest.mark.slow
def test_hopeless_trials_are_pruned_on_falling_curves(tmp_path: Path, stand_in: Path) -> None:
    """The sixth trial and the seventh are worse than the others after their first task, and worse than that later."""
    path = write_search(tmp_path, {"prefix": "late"}, trials=7)
    assert run(path) == 0
    assert [trial.state for trial in trials_of(path)] == ["complete"] * 5 + ["pruned"] * 2
    assert {trial.note for trial in trials_of(path)[5:]} == {"after 1 task"}
    (tmp_path / "go").touch()
    assert run(path, "--overwrite", "--set", "prune=false", "--set", "trials=6") == 0
    assert [trial.state for trial in trials_of(path)] == ["complete"] * 6


@pytest.mark.slow
def test_failed_trials_are_told_and_tried_again(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    path = write_search(tmp_path, {"prefix": "fail"}, search={"gate": ["none", "gumbel_sparsemax"], "init_lr": [0.1, 0.2]})
    assert run(path) == 1
    failed = [trial for trial in trials_of(path) if trial.state == "failed"]
    assert failed and all("error: the reason" in trial.note and trial.values["gate"] == "none" for trial in failed)
    assert len([line for line in lines if line.startswith("Failed: trial_")]) == len(failed)
    stand_in.write_text(STAND_IN.replace('"fail"', '"never"'))
    assert run(path) == 0
    assert {trial.state for trial in trials_of(path)} == {"complete"} and len(trials_of(path)) == 6


@pytest.mark.slow
def test_a_measure_that_runs_do_not_have(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    assert run(write_search(tmp_path, {"prefix": "joint"}, trials=1, measure="average_accuracy")) == 1
    assert any("no average_accuracy; name another 'measure'" in line for line in lines)


@pytest.mark.slow
def test_another_search_of_the_name_is_refused(tmp_path: Path, stand_in: Path, capsys) -> None:
    storage = str(tmp_path / "elsewhere.journal")
    assert run(write_search(tmp_path, trials=1, storage=storage)) == 0
    for changes, keys, word in (({}, {"search": {"rank": [2, 4]}}, "'search'"), ({"epochs": 3}, {}, "epochs (there 1, now 3)"),
                                ({}, {"filepath": str(tmp_path / "other")}, "not the folder")):
        assert run(write_search(tmp_path, changes, **{"trials": 1, "storage": storage, **keys})) == 2
        err = capsys.readouterr().err
        assert word in err and "--overwrite" in err and err.count("\n") == 1
    assert run(write_search(tmp_path, {"epochs": 3}, trials=2, storage=storage), "--overwrite") == 0
    assert len(trials_of(tmp_path / "study.json")) == 2


@pytest.mark.slow
def test_a_stopped_search_goes_on_in_the_same_folders(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    path = write_search(tmp_path, {"prefix": "hang"}, trials=2)
    begun = tmp_path / "runs" / "trial_0" / "seed_1" / "begun"
    signal_when(begun.exists, signal.SIGINT)
    assert run(path) == 130
    assert [trial.state for trial in trials_of(path)] == ["waiting"]
    values = trials_of(path)[0].values
    (tmp_path / "go").touch()
    assert run(path) == 0
    assert [trial.number for trial in trials_of(path)] == [0, 2] and trials_of(path)[0].values == values
    assert len(begun.read_text().split()) == 2 and not (tmp_path / "runs" / "trial_1").exists()


WORKER = """
import sys
import main, studies.search
main.__file__, studies.search.LOOK_SECONDS = sys.argv[1], 0.1
sys.exit(main.main(["--config", sys.argv[2]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_twenty_trials_by_two_processes_one_of_them_killed(tmp_path: Path, stand_in: Path, capsys) -> None:
    """The other makes up for the trial of the killed one, in its folder; the table names the best of twenty."""
    count = 20 if LONG else 8
    path = write_search(tmp_path, {"prefix": "hang"}, trials=count, report_seed=3)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(stand_in), str(path)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE) for _ in range(2)]
    wait_for(lambda: len(list(tmp_path.glob("runs/trial_*/seed_1/begun"))) == 2)  # each has a run that waits
    workers[0].kill()
    workers[0].wait()
    (tmp_path / "go").touch()
    out, _ = workers[1].communicate(timeout=300)
    assert workers[1].returncode == 0
    trials = trials_of(path)
    assert len(trials) == count and {trial.state for trial in trials} <= {"complete", "pruned"}
    assert "queued again: its process ended" in out and any(
        len(file.read_text().split()) == 2 for file in tmp_path.glob("runs/trial_*/seed_1/begun"))
    (top,) = best(trials, ["last_accuracy"])
    records = [json.loads(file.read_text()) for file in tmp_path.glob("runs/trial_*/seed_1/results.json")]
    assert top.measured[0] == max(record["metrics"]["last_accuracy"] for record in records if record["finished"])
    assert f"Best: trial {top.number}, last_accuracy {top.measured[0]:.2f}" in out and f"Reported: chosen_{top.number}" in out


@pytest.mark.slow
def test_the_comparison_reads_a_search(tmp_path: Path, stand_in: Path) -> None:
    """The chosen setting is a method of its own, on the reporting seeds alone."""
    path = write_search(tmp_path, report_seed=[3, 4], trials=3)
    assert run(path) == 0
    number = best(trials_of(path), ["last_accuracy"])[0].number
    (stream,) = group_runs(find_runs([path]).runs)
    assert {method.name: [draw.seed for draw in method.runs] for method in stream.methods} == {
        f"chosen_{number}": [3, 4], **{f"trial_{trial}": [1] for trial in range(3)}}


# ---- helpers


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def signal_when(condition: Callable[[], bool], number: signal.Signals) -> None:
    """Sends this process the signal once the condition holds."""
    def watch() -> None:
        wait_for(condition)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
