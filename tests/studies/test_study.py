"""Studies: what a file stands for, what is wrong with one, and a runner that skips, goes on, and survives its runs.

Most runs here are a stand-in for main.py that writes the record of a run within milliseconds; the last tests run main.py.
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

import main as command
from backbone.embedded import EMBEDDED
from studies import job
from studies.file import _MARKS
from studies.study import is_study, load_study
from studies.study import main as study_command
from tests.helpers import ROOT, SMALL
from utils.config import Config, config_from_dict, load_config
from utils.errors import UserError
from utils.runs.files import read_sealed_json, write_sealed_json
from utils.runs.lock import lock

SHIPPED = sorted((ROOT / "exps" / "studies").glob("*.json"))

# Stands in for main.py: what it does is in the config's `prefix`, when and how it did it in `trace`.
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
trace = {"begin": time.time(), "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "device": config["device"]}
(folder / "trace").write_text(json.dumps(trace))
print("on stdout")
if deed == "fail":
    sys.exit("first line\\nerror: the reason")
if deed == "die":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
while deed == "hang" and not stopped and not (folder.parent / "go").exists():
    time.sleep(0.01)
if stopped:
    (folder / "saved").touch()
    sys.exit(128 + stopped[0])
record = {"finished": True, "config": config, "seed": config["seed"][0], "metrics": {"last_accuracy": 50.0}}
record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
(folder / "results.json").write_text(json.dumps(record))
(folder / "trace").write_text(json.dumps({**trace, "end": time.time()}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(command, "__file__", str(script))
    return script


def write_study(folder: Path, changes: dict | None = None, **keys) -> Path:
    """A study of small runs on the digits in `folder`, which writes its runs to `folder/runs`."""
    (folder / "base.json").write_text(json.dumps({**SMALL, "nb_tasks": 2, **(changes or {})}))
    path = folder / "study.json"
    values = {"base": "base.json", "seed": [1, 2], "filepath": str(folder / "runs"), **keys}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return path


def refused(path: Path, overrides: tuple[str, ...] = (), **flags) -> str:
    with pytest.raises(UserError) as caught:
        load_study(path, overrides, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def trace(run) -> dict:
    return json.loads((run.folder / "trace").read_text())


# ---- what a file stands for


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_loads_and_is_strict_json(path: Path) -> None:
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert is_study(path)
    study = load_study(path)
    assert study.filepath == Path(f"runs/studies/{path.stem}")
    for run in study.runs():
        given = {key: value for key, value in run.changes.items() if value is not None}
        assert json.dumps(given) == json.dumps({key: getattr(run.config, key) for key in given})


def test_no_shipped_config_is_taken_for_a_study() -> None:
    assert SHIPPED and not set(_MARKS) & set(Config.model_fields)
    assert not any(is_study(path) for path in (ROOT / "exps").glob("*.json"))


def test_the_grid_of_the_gate_is_every_combination() -> None:
    runs = load_study(ROOT / "exps" / "studies" / "gumbel_grid.json").runs()
    points = {(run.config.lambda_sparsity, run.config.growth_threshold) for run in runs}
    assert points == {(weight, threshold) for weight in (0.001, 0.01, 0.05, 0.1) for threshold in (0.05, 0.1, 0.15)}
    assert len({run.folder for run in runs}) == len(runs) == len(points) * len({run.seed for run in runs})


def test_variants_times_grid_times_seeds(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.json").write_text(json.dumps({**SMALL, "rank": 3}))
    path = write_study(
        tmp_path / "sub", variants={"sdlora": {"gate": "none", "gate_lr": None, "_comment_a": 1}, "_comment": "x",
                                    "other": {"base": "../other.json"}},
        grid={"epochs": [1, 2], "batch_size": [16], "_comment": []}, results="../records")
    study = load_study(path)
    runs = study.runs()
    assert [(run.name, run.seed) for run in runs] == [
        (f"{variant},epochs={epochs},batch_size=16", seed)
        for seed in (1, 2) for variant in ("sdlora", "other") for epochs in (1, 2)]
    first = runs[0]
    assert (first.variant, dict(first.changes)) == ("sdlora", {"gate": "none", "gate_lr": None, "epochs": 1, "batch_size": 16})
    assert (first.config.gate, first.config.epochs, first.config.batch_size) == ("none", 1, 16)
    assert first.folder == tmp_path / "sub" / "runs" / first.name / "seed_1" == Path(first.config.filepath)
    assert first.recorded == tmp_path / "records" / first.name / "seed_1.json"
    assert {run.config.rank for run in runs if run.variant == "other"} == {3}
    assert {run.config.rank for run in runs if run.variant == "sdlora"} == {4}
    assert all(run.config.seed == [run.seed] for run in runs) and study.jobs == 1
    assert (study.name, study.results) == ("study", tmp_path / "records")


def test_a_variant_has_a_grid_of_its_own(tmp_path: Path) -> None:
    path = write_study(tmp_path, seed=5, grid={"epochs": [1, 2]}, variants={
        "sdlora": {"gate": "none", "gate_lr": None},
        "gumbel": {"rank": 2, "grid": {"lambda_sparsity": [0.1, 0.2], "_comment": "its knob"}}})
    assert [run.name for run in load_study(path).runs()] == [
        "sdlora,epochs=1", "sdlora,epochs=2", *(f"gumbel,epochs={epochs},lambda_sparsity={weight}"
                                                for epochs in (1, 2) for weight in (0.1, 0.2))]
    last = load_study(path).runs()[-1]
    assert dict(last.changes) == {"rank": 2, "epochs": 2, "lambda_sparsity": 0.2} and last.config.lambda_sparsity == 0.2


def test_a_study_of_seeds_alone_and_comments(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    path.write_text("// a comment\n" + path.read_text().replace('"seed": [1, 2]', '"seed": 5, "_comment": "one"'))
    assert [(run.name, run.variant, run.seed, run.changes) for run in load_study(path).runs()] == [("base", "", 5, {})]


@pytest.mark.parametrize("change", [{"variants": {"a": {"batch_size": None}}}, {"grid": {"batch_size": [None]}}])
def test_null_is_as_if_the_base_did_not_give_the_key(change: dict, tmp_path: Path) -> None:
    (run,) = load_study(write_study(tmp_path, {"batch_size": 7}, seed=1, **change)).runs()
    default = config_from_dict({key: value for key, value in SMALL.items() if key != "batch_size"}).batch_size
    assert run.config.batch_size == default != 7 and dict(run.changes) == {"batch_size": None}


def test_a_variant_of_another_method_drops_what_has_no_effect_for_it(tmp_path: Path) -> None:
    without = dict.fromkeys(["rank", "gate_lr", "init_epoch", "epochs", "init_lr", "lrate"])
    path = write_study(tmp_path, seed=1, variants={"means": {"model_name": "simplecil", **without}})
    assert load_study(path).runs()[0].config.model_name == "simplecil"
    path = write_study(tmp_path, seed=1, variants={"means": {"model_name": "simplecil"}})
    with pytest.raises(UserError, match="no effect"):
        load_study(path)


def test_names_are_safe_as_folders(tmp_path: Path) -> None:
    grid = {"rank_schedule": [[[0, 4]], [[0, 4], [1, 2]], None], "prefix": ["a/b c"], "lambda_sparsity": [1e-5],
            "growth_margin": [-0.5], "compile": [True]}
    names = [run.name for run in load_study(write_study(tmp_path, {"rank": None}, grid=grid, seed=1)).runs()]
    tail = "prefix=a-b-c,lambda_sparsity=1e-05,growth_margin=-0.5,compile=true"
    assert names == [f"rank_schedule={part},{tail}" for part in ("0-4", "0-4-1-2", "null")]


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = write_study(tmp_path, grid={"rank": [2, 3]}, results="records")
    study = load_study(path, ["epochs=7", "jobs=3", "results=null", f"filepath={tmp_path / 'else'}"], seed=[9], device=["cpu"])
    assert [(run.config.epochs, run.config.rank, run.seed) for run in study.runs()] == [(7, 2, 9), (7, 3, 9)]
    assert (study.jobs, study.results, study.filepath) == (3, None, tmp_path / "else")
    assert all(run.config.device == ["cpu"] and run.recorded is None for run in study.runs())
    assert "'rank' is varied by the study" in refused(path, ("rank=5",))
    assert refused(path, ("epoch=5",)).startswith("--set epoch=5: 'epoch' is not a key")
    assert "--set jobs=0" in refused(path, ("jobs=0",))
    assert "--seed" in refused(path, seed=[1, 1])


# ---- what is wrong with a file

BAD = {
    "no base": ({"base": ...}, ["'base' must be given"]),
    "no seed": ({"seed": ...}, ["'seed' must be given"]),
    "missing base": ({"base": "bas.json"}, ["study.json", "'base'", "bas.json", "no such file"]),
    "a study as base": ({"base": "study.json"}, ["'base'", "a study itself"]),
    "base no text": ({"base": 5}, ["'base' is 5"]),
    "unknown key": ({"sed": 1}, ["'sed' is not a key of a study", "'seed'"]),
    "config key": ({"epochs": 5}, ["'epochs' is not a key of a study", "'variants'", "'grid'"]),
    "seed twice": ({"seed": [1, 1]}, ["'seed' is [1, 1]", "different"]),
    "seed text": ({"seed": "1993"}, ["'seed' is \"1993\""]),
    "jobs 0": ({"jobs": 0}, ["'jobs' is 0", "at least 1"]),
    "jobs decimal": ({"jobs": 2.0}, ["'jobs' is 2.0"]),
    "filepath number": ({"filepath": 5}, ["'filepath' is 5"]),
    "results list": ({"results": []}, ["'results' is []"]),
    "grid list": ({"grid": [1]}, ["'grid' is [1]"]),
    "grid no list": ({"grid": {"rank": 4}}, ["'rank' in 'grid' is 4"]),
    "grid empty": ({"grid": {"rank": []}}, ["'rank' in 'grid' is []"]),
    "grid key": ({"grid": {"rnk": [4]}}, ["study.json, grid", "'rnk' is not a key of the config", "'rank'"]),
    "grid value": ({"grid": {"rank": [4, "x"]}}, ["study.json, grid", "'rank'", '"x"']),
    "grid twice": ({"grid": {"init_lr": [1, 0.1, 1.0]}}, ["'init_lr' holds 1.0 twice"]),
    "grid of seeds": ({"grid": {"seed": [1, 2]}}, ["'seed' cannot vary", "top of the study"]),
    "grid of devices": ({"grid": {"device": ["0", "1"]}}, ["'device' cannot vary", "command line"]),
    "same folder": ({"grid": {"prefix": ["a b", "a-b"]}}, ["prefix=a-b", "share a folder"]),
    "long name": ({"grid": {"prefix": ["x" * 250]}}, ["too long"]),
    "variant no object": ({"variants": {"a": 1}}, ["'a' in 'variants' is 1"]),
    "variant name": ({"variants": {"a/b": {}}}, ['"a/b"', "folder"]),
    "variant dots": ({"variants": {"..": {}}}, ['".."']),
    "variant key": ({"variants": {"a": {"gat": "none"}}}, ["variant 'a'", "'gat'", "'gate'"]),
    "variant value": ({"variants": {"a": {"gate": "nune"}}}, ["variant 'a'", "nune", "'none'"]),
    "variant folder": ({"variants": {"a": {"filepath": "x"}}}, ["variant 'a'", "'filepath' cannot vary"]),
    "variant base": ({"variants": {"a": {"base": "x.json"}}}, ["'base'", "x.json", "no such file"]),
    "variant base empty": ({"variants": {"a": {"base": ""}}}, ["variant 'a'", "'base' is \"\""]),
    "variant and grid": ({"variants": {"a": {"rank": 2}}, "grid": {"rank": [4]}}, ["'rank'", "variant 'a'", "'grid'"]),
    "variant grid list": ({"variants": {"a": {"grid": [1]}}}, ["variant 'a'", "'grid' is [1]"]),
    "variant grid no list": ({"variants": {"a": {"grid": {"rank": 4}}}}, ["variant 'a'", "'grid' is {\"rank\": 4}"]),
    "variant grid key": ({"variants": {"a": {"grid": {"rnk": [4]}}}}, ["variant 'a'", "'rnk'", "'rank'"]),
    "variant grid value": ({"variants": {"a": {"grid": {"rank": ["x"]}}}}, ["variant 'a'", "'rank'", '"x"']),
    "variant grid twice": ({"variants": {"a": {"grid": {"rank": [4, 4]}}}}, ["variant 'a'", "'rank' holds 4 twice"]),
    "variant and its grid": ({"variants": {"a": {"rank": 2, "grid": {"rank": [4]}}}}, ["'rank'", "variant 'a'", "'grid'"]),
    "two grids": ({"variants": {"a": {"grid": {"rank": [4]}}}, "grid": {"rank": [2]}}, ["'rank'", "variant 'a'", "'grid'"]),
    "contradiction": ({"variants": {"ok": {}, "a": {"gate": "none"}}}, ["base.json", "'gate_lr'", 'gate "none"']),
    "contradictory grid": ({"grid": {"gumbel_tau_init": [5.0, 0.2], "gumbel_tau_final": [0.1, 0.5]}},
                           ["'gumbel_tau_final' is 0.5", "'gumbel_tau_init' of 0.2", "study.json, grid"]),
}


@pytest.mark.parametrize("keys, words", BAD.values(), ids=BAD)
def test_a_bad_study_is_one_sentence(keys: dict, words: list[str], tmp_path: Path) -> None:
    message = refused(write_study(tmp_path, **keys))
    assert all(word in message for word in words), message
    assert message.count(", grid") <= 1


@pytest.mark.parametrize("changes, word", [
    ({"model_name": "sdlroa"}, "'sdlora'"), ({"dataset": "digit"}, "'digits'"),
    ({"model_name": "simplecil", "rank": 4, "gate": "sparsemax"}, '"simplecil"'), ({"rank": 0}, "'rank'")])
def test_nothing_starts_when_one_config_is_bad(changes: dict, word: str, tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path, variants={"good": {}, "bad": changes})
    assert command.main(["--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["base.json", "stand_in.py", "study.json"]


# ---- the runner, with a stand-in for main.py


@pytest.mark.slow
def test_runs_are_made_skipped_and_made_again(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    path = write_study(tmp_path, grid={"rank": [2, 3]})
    assert command.main(["--config", str(path)]) == 0
    runs = load_study(path).runs()
    records, begun = [run.record() for run in runs], [trace(run)["begin"] for run in runs]
    assert [(record["config"]["rank"], record["seed"]) for record in records] == [(2, 1), (3, 1), (2, 2), (3, 2)]
    assert begun == sorted(begun) and sum(line.startswith("Finished ") for line in lines) == 4
    assert "Finished  rank=3 seed 2" in lines[-2] and "last accuracy 50.00; 0 left" in lines[-2]
    assert lines[-1] == f"Compare: python -m analysis.compare {path}"
    assert (runs[0].folder.parent / "seed_1.log").read_text() == "on stdout\n"
    assert not (runs[0].folder.parent / "seed_1.err").exists()
    assert load_config(runs[0].folder.parent / "seed_1.config.json") == runs[0].config  # runs by itself, too

    (runs[2].folder / "results.json").unlink()
    lines.clear()
    assert command.main(["--config", str(path)]) == 0
    assert [trace(run)["begin"] == at for run, at in zip(runs, begun, strict=True)] == [True, True, False, True]
    assert "3 finished already" in lines[0]
    lines.clear()
    assert command.main(["--config", str(path)]) == 0 and not any("Started" in line for line in lines)

    assert command.main(["--config", str(path), "--overwrite"]) == 0
    assert all(trace(run)["begin"] != at and run.folder.with_name(f"{run.folder.name}.old-1").is_dir()
               for run, at in zip(runs, begun, strict=True))


@pytest.mark.slow
def test_failures_do_not_stop_the_others(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    path = write_study(tmp_path, seed=1, jobs=2,
                       variants={name: {"prefix": name} for name in ("fail", "die", "good")})
    assert command.main(["--config", str(path)]) == 1
    fail, die, good = load_study(path).runs()
    assert good.record() and not fail.record() and not die.record()
    summary = [line for line in lines if line.startswith("Failed: ")]
    assert [line.split(" (log")[0] for line in sorted(summary)] == [
        "Failed: die seed 1: killed by SIGKILL, nothing on stderr", "Failed: fail seed 1: exit status 1, error: the reason"]
    assert (fail.folder.parent / "seed_1.err").read_text() == "first line\nerror: the reason\n"


@pytest.mark.slow
def test_a_run_of_another_config_in_the_way_is_refused(tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path)
    assert command.main(["--config", str(path)]) == 0
    for arguments in (["--set", "epochs=3"], ["--set", "epochs=3", "--dry-run"]):
        assert command.main(["--config", str(path), *arguments]) == 2
        err = capsys.readouterr().err
        assert "another config" in err and "epochs (there 1, now 3)" in err and err.count("\n") == 1


@pytest.mark.slow
def test_as_many_at_a_time_as_jobs_say_with_their_share_of_threads(tmp_path: Path, stand_in: Path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(job, "cores", lambda: 7)
    path = write_study(tmp_path, seed=[1, 2, 3, 4, 5], jobs=3)
    assert command.main(["--config", str(path)]) == 0
    traces = [trace(run) for run in load_study(path).runs()]
    at_once = [sum(other["begin"] <= one["begin"] < other["end"] for other in traces) for one in traces]
    assert max(at_once) <= 3 and {one["threads"] for one in traces} == {"2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert command.main(["--config", str(path), "--seed", "6"]) == 0
    assert trace(load_study(path, seed=[6]).runs()[0])["threads"] == "5"


@pytest.mark.slow
def test_as_many_runs_as_jobs_are_under_way(tmp_path: Path, stand_in: Path) -> None:
    """Every run waits until all three have begun."""
    path = write_study(tmp_path, {"prefix": "hang"}, seed=[1, 2, 3], jobs=3)
    runs = load_study(path).runs()
    opener = threading.Thread(target=lambda: (wait_for(lambda: all((run.folder / "trace").exists() for run in runs)),
                                              (runs[0].folder.parent / "go").touch()))
    opener.start()
    assert command.main(["--config", str(path)]) == 0
    opener.join()


@pytest.mark.slow
def test_runs_are_dealt_out_over_the_devices(tmp_path: Path, stand_in: Path) -> None:
    path = write_study(tmp_path, {"prefix": "hang", "device": ["0", "cuda:2"]}, seed=[1, 2, 3, 4], jobs=4)
    runs = load_study(path).runs()
    opener = threading.Thread(target=lambda: (wait_for(lambda: all((run.folder / "trace").exists() for run in runs)),
                                              (runs[0].folder.parent / "go").touch()))
    opener.start()
    assert command.main(["--config", str(path)]) == 0
    opener.join()
    assert sorted(trace(run)["device"] for run in runs) == [["0"], ["0"], ["2"], ["2"]]


def test_two_studies_on_one_folder(tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path)
    with lock(tmp_path / "runs"):
        assert command.main(["--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "runs") in err and f"process {os.getpid()} " in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number, status, overwrite", [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--overwrite"])])
def test_a_signal_has_the_runs_save_and_the_same_command_goes_on(
        number: signal.Signals, status: int, overwrite: list[str], tmp_path: Path, stand_in: Path, lines: list[str],
        capsys) -> None:
    path = write_study(tmp_path, {"prefix": "hang"}, seed=[1, 2, 3], jobs=2)
    runs = load_study(path).runs()
    signal_when(lambda: all((run.folder / "trace").exists() for run in runs[:2]), number)
    assert command.main(["--config", str(path), *overwrite]) == status
    assert all((run.folder / "saved").exists() and not alive(trace(run)["pid"]) for run in runs[:2])
    without = "without --overwrite " if overwrite else ""
    assert not runs[2].folder.exists() and lines[-1].endswith(f"the same command {without}goes on from here.")
    assert sum(line.startswith("Stopped   ") for line in lines) == 2 and not any("Failed" in line for line in lines)
    capsys.readouterr()
    assert command.main(["--config", str(path), "--dry-run"]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["begun", "begun", "to do"]
    (runs[0].folder.parent / "go").touch()
    assert command.main(["--config", str(path)]) == 0
    assert all(run.record() for run in runs)


@pytest.mark.slow
def test_an_error_of_the_runner_leaves_no_run_behind(tmp_path: Path, stand_in: Path, capsys) -> None:
    """The second run's folder cannot be made; the first is told to save and end."""
    path = write_study(tmp_path, {"prefix": "hang"}, grid={"rank": [2, 3]}, seed=1, jobs=2)
    first, _ = load_study(path).runs()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rank=3").write_text("in the way")
    assert command.main(["--config", str(path)]) == 2
    assert "rank=3" in capsys.readouterr().err
    assert not (first.folder / "trace").exists() or not alive(trace(first)["pid"])


PARENT = """
import sys
from studies.runner import perform
from studies.study import load_study
perform(load_study(sys.argv[2]), [sys.executable, sys.argv[1]])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_runs_of_a_killed_study_save_and_end(tmp_path: Path, stand_in: Path) -> None:
    path = write_study(tmp_path, {"prefix": "hang"}, jobs=2)
    runs = load_study(path).runs()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(stand_in), str(path)], cwd=ROOT)
    wait_for(lambda: all((run.folder / "trace").exists() for run in runs))
    parent.kill()
    parent.wait()
    wait_for(lambda: all((run.folder / "saved").exists() and not alive(trace(run)["pid"]) for run in runs))
    (runs[0].folder.parent / "go").touch()
    assert command.main(["--config", str(path)]) == 0


@pytest.mark.slow
def test_dry_run_lists_the_runs_and_starts_nothing(tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path, grid={"rank": [2, 3]}, jobs=2)
    assert command.main(["--config", str(path), "--dry-run"]) == 0
    title, *table = capsys.readouterr().out.splitlines()
    assert "4 runs" in title and "0 finished" in title and not (tmp_path / "runs").exists()
    assert [line.split() for line in table[:2]] == [["to", "do", "rank=2", "seed", "1", "rank=2"],
                                                    ["to", "do", "rank=3", "seed", "1", "rank=3"]]
    assert command.main(["--config", str(path), "--seed", "1"]) == 0
    capsys.readouterr()
    assert command.main(["--config", str(path), "--dry-run"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["finished", "finished", "to", "to"]


# ---- committed records


@pytest.mark.slow
def test_collected_records_count_as_finished(tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path, results="records")
    assert command.main(["--config", str(path), "--seed", "1"]) == 0
    capsys.readouterr()
    assert study_command(["collect", str(path)]) == 0
    assert "1 records copied" in (out := capsys.readouterr().out) and "of 2 runs 1 have none" in out
    first, second = load_study(path).runs()
    assert first.recorded.read_bytes() == (first.folder / "results.json").read_bytes()

    elsewhere = ["--config", str(path), "--set", f"filepath={tmp_path / 'else'}"]
    assert command.main([*elsewhere, "--device", "0", "--set", "num_workers=3"]) == 0  # these change no result
    first, second = load_study(path, [f"filepath={tmp_path / 'else'}"]).runs()
    assert not first.folder.exists() and first.record() and (second.folder / "trace").exists()
    assert command.main([*elsewhere, "--overwrite"]) == 0 and (first.folder / "trace").exists()


def test_a_record_older_than_a_key_has_its_default(tmp_path: Path) -> None:
    run = recorded(tmp_path, lambda record: record["config"].pop("kd_residual"))
    assert run.record()["seed"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("change, words", [
    (lambda record: record["config"].update(epochs=3), ["another config", "epochs (there 3, now 1)", "results=null"]),
    (lambda record: record.update(finished=False), ["not finished"]),
    (lambda record: record["config"].update(seed=[2]), ["seed (there [2], now [1])"]),
    (lambda record: record["config"].update(unheard=1), ["'unheard'"]),
    (lambda record: record.pop("config"), ["no config"]),
])
def test_a_record_of_something_else_is_refused(
        change: Callable[[dict], None], words: list[str], tmp_path: Path, stand_in: Path, capsys) -> None:
    run = recorded(tmp_path, change)
    for arguments in ([], ["--dry-run"]):
        assert command.main(["--config", str(tmp_path / "study.json"), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(word in err for word in [str(run.recorded), *words]), err
    assert not (tmp_path / "runs").exists()
    assert command.main(["--config", str(tmp_path / "study.json"), "--set", "results=null"]) == 0
    assert study_command(["collect", str(tmp_path / "study.json")]) == 2
    assert str(run.recorded) in capsys.readouterr().err


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    run = recorded(tmp_path, lambda record: None)
    run.recorded.write_text(run.recorded.read_text().replace('"finished": true', '"finished": false'))
    with pytest.raises(UserError, match="damaged"):
        run.record()


def test_collect_says_what_is_missing(tmp_path: Path, capsys) -> None:
    assert study_command(["collect", str(write_study(tmp_path))]) == 2
    assert "'results'" in capsys.readouterr().err
    assert study_command(["collect", str(tmp_path / "base.json")]) == 2
    assert "not a study" in capsys.readouterr().err


# ---- with main.py itself


@pytest.mark.slow
def test_a_real_run_interrupted_in_the_middle_ends_when_started_again(tmp_path: Path, lines: list[str], monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = {"checkpoint_steps": 1, "eval_every": 0, "backbone_type": EMBEDDED}
    path = write_study(tmp_path, base, grid={"growth_threshold": [0.05]}, seed=1, results="records")
    (run,) = load_study(path).runs()
    signal_when(lambda: any(run.folder.glob("checkpoint_*.ckpt")), signal.SIGINT)
    assert command.main(["--config", str(path)]) == 130
    assert run.record() is None and any(run.folder.glob("checkpoint_*.ckpt"))
    assert command.main(["--config", str(path)]) == 0
    assert "Continuing" in (run.folder.parent / "seed_1.log").read_text()
    record = run.record()
    assert len(record["tasks"]) == 2 and record["config"] == run.config.model_dump(mode="json")
    assert f"last accuracy {record['metrics']['last_accuracy']:.2f}; 0 left" in lines[-2]
    assert study_command(["collect", str(path)]) == 0 and read_sealed_json(run.recorded) == record


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


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def recorded(folder: Path, change: Callable[[dict], None]):
    """The only run of a study, with a committed record that `change` has changed."""
    run = load_study(write_study(folder, seed=1, results="records")).runs()[0]
    record = {"finished": True, "config": run.config.model_dump(mode="json"), "seed": 1, "metrics": {"last_accuracy": 1.0}}
    change(record)
    run.recorded.parent.mkdir(parents=True)
    write_sealed_json(run.recorded, record)
    return run
