"""The runner of studies, with processes on this machine: it skips, goes on, and survives its runs.

Most runs here are a stand-in for main.py (tests/studies/conftest.py); the last test runs main.py.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.records import find_runs
from backbone.embedded import EMBEDDED
from studies import job
from studies.study import StudyRun, load_study
from studies.study import main as study_command
from tests.helpers import ROOT, once, wait_for
from tests.studies.conftest import start, starts, write_study
from utils.config import load_config
from utils.runs.files import read_sealed_json
from utils.runs.lock import lock


def last(run: StudyRun) -> dict:
    """What the stand-in has noted at its last start of the run."""
    return starts(run.folder)[-1]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_runs_are_made_skipped_and_made_again(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    path = write_study(tmp_path, grid={"rank": [2, 3]})
    assert start(path) == 0
    runs = load_study(path).runs()
    records, begun = [run.record() for run in runs], [last(run)["at"] for run in runs]
    assert [(record["config"]["rank"], record["seed"]) for record in records] == [(2, 1), (3, 1), (2, 2), (3, 2)]
    assert begun == sorted(begun) and sum(line.startswith("Finished ") for line in lines) == 4
    assert "Finished  rank=3 seed 2" in lines[-2] and "last accuracy 61.00; 0 left" in lines[-2]
    assert lines[-1] == f"Compare: python -m analysis.compare {path}"
    assert (runs[0].folder.parent / "seed_1.log").read_text() == "on stdout\n"
    assert not (runs[0].folder.parent / "seed_1.err").exists()
    assert load_config(runs[0].folder.parent / "seed_1.config.json") == runs[0].config  # runs by itself, too

    (runs[2].folder / "results.json").unlink()
    lines.clear()
    assert start(path) == 0
    assert [last(run)["at"] == at for run, at in zip(runs, begun, strict=True)] == [True, True, False, True]
    assert "3 finished already" in lines[0]
    lines.clear()
    assert start(path) == 0 and not any("Started" in line for line in lines)

    assert start(path, "--overwrite") == 0
    assert all(last(run)["at"] != at and run.folder.with_name(f"{run.folder.name}.old-1").is_dir()
               for run, at in zip(runs, begun, strict=True))


@pytest.mark.slow
def test_failures_do_not_stop_the_others(tmp_path: Path, stand_in: Path, lines: list[str]) -> None:
    path = write_study(tmp_path, seed=1, jobs=2,
                       variants={name: {"prefix": name} for name in ("fail", "die", "good")})
    assert start(path) == 1
    fail, die, good = load_study(path).runs()
    assert good.record() and not fail.record() and not die.record()
    summary = [line for line in lines if line.startswith("Failed: ")]
    assert [line.split(" (log")[0] for line in sorted(summary)] == [
        "Failed: die seed 1: killed by SIGKILL, nothing on stderr", "Failed: fail seed 1: exit status 1, error: the reason"]
    assert (fail.folder.parent / "seed_1.err").read_text() == "first line\nerror: the reason\n"


@pytest.mark.slow
def test_a_run_of_another_config_in_the_way_is_refused(tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path)
    assert start(path) == 0
    for arguments in (["--set", "epochs=3"], ["--set", "epochs=3", "--dry-run"]):
        assert start(path, *arguments) == 2
        err = capsys.readouterr().err
        assert "another config" in err and "epochs (there 1, now 3)" in err and err.count("\n") == 1


@pytest.mark.slow
def test_as_many_at_a_time_as_jobs_say_with_their_share_of_threads(tmp_path: Path, stand_in: Path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(job, "cores", lambda: 7)
    path = write_study(tmp_path, {"prefix": "slow"}, seed=[1, 2, 3, 4, 5], jobs=3)
    assert start(path) == 0
    runs = load_study(path).runs()
    spans = [(last(run)["at"], run.record()["ended"]) for run in runs]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) <= 3
    assert {last(run)["threads"] for run in runs} == {"2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert start(path, "--seed", "6") == 0
    assert last(load_study(path, seed=[6]).runs()[0])["threads"] == "5"


@pytest.mark.slow
def test_as_many_runs_as_jobs_are_under_way(tmp_path: Path, stand_in: Path) -> None:
    """Every run waits until all three have begun."""
    path = write_study(tmp_path, {"prefix": "hang"}, seed=[1, 2, 3], jobs=3)
    runs = load_study(path).runs()
    once(lambda: all(starts(run.folder) for run in runs), (tmp_path / "go").touch)
    assert start(path) == 0


@pytest.mark.slow
def test_runs_are_dealt_out_over_the_devices(tmp_path: Path, stand_in: Path) -> None:
    path = write_study(tmp_path, {"prefix": "hang", "device": ["0", "cuda:2"]}, seed=[1, 2, 3, 4], jobs=4)
    runs = load_study(path).runs()
    once(lambda: all(starts(run.folder) for run in runs), (tmp_path / "go").touch)
    assert start(path) == 0
    assert sorted(last(run)["device"] for run in runs) == [["0"], ["0"], ["2"], ["2"]]


def test_two_studies_on_one_folder(tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path)
    with lock(tmp_path / "runs"):
        assert start(path) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "runs") in err and f"process {os.getpid()} " in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number, status, overwrite", [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--overwrite"])])
def test_a_signal_has_the_runs_save_and_the_same_command_goes_on(
        number: signal.Signals, status: int, overwrite: list[str], tmp_path: Path, stand_in: Path, lines: list[str],
        capsys) -> None:
    path = write_study(tmp_path, {"prefix": "hang"}, seed=[1, 2, 3], jobs=2)
    runs = load_study(path).runs()
    once(lambda: all(starts(run.folder) for run in runs[:2]), lambda: os.kill(os.getpid(), number))
    assert start(path, *overwrite) == status
    assert all((run.folder / "saved").exists() and not alive(last(run)["pid"]) for run in runs[:2])
    without = "without --overwrite " if overwrite else ""
    assert not runs[2].folder.exists() and lines[-1].endswith(f"the same command {without}goes on from here.")
    assert sum(line.startswith("Stopped   ") for line in lines) == 2 and not any("Failed" in line for line in lines)
    capsys.readouterr()
    assert start(path, "--dry-run") == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["begun", "begun", "to do"]
    (tmp_path / "go").touch()
    assert start(path) == 0
    assert all(run.record() for run in runs)


@pytest.mark.slow
def test_an_error_of_the_runner_leaves_no_run_behind(tmp_path: Path, stand_in: Path, capsys) -> None:
    """The second run's folder cannot be made; the first is told to save and end."""
    path = write_study(tmp_path, {"prefix": "hang"}, grid={"rank": [2, 3]}, seed=1, jobs=2)
    first, _ = load_study(path).runs()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rank=3").write_text("in the way")
    assert start(path) == 2
    assert "rank=3" in capsys.readouterr().err
    assert not starts(first.folder) or not alive(last(first)["pid"])


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
    wait_for(lambda: all(starts(run.folder) for run in runs))
    parent.kill()
    parent.wait()
    wait_for(lambda: all((run.folder / "saved").exists() and not alive(last(run)["pid"]) for run in runs))
    (tmp_path / "go").touch()
    assert start(path) == 0


@pytest.mark.slow
def test_dry_run_lists_the_runs_and_starts_nothing(tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path, grid={"rank": [2, 3]}, jobs=2)
    assert start(path, "--dry-run") == 0
    title, *table = capsys.readouterr().out.splitlines()
    assert "4 runs" in title and "0 finished" in title and not (tmp_path / "runs").exists()
    assert [line.split() for line in table[:2]] == [["to", "do", "rank=2", "seed", "1", "rank=2"],
                                                    ["to", "do", "rank=3", "seed", "1", "rank=3"]]
    assert start(path, "--seed", "1") == 0
    capsys.readouterr()
    assert start(path, "--dry-run") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["finished", "finished", "to", "to"]


@pytest.mark.slow
def test_a_real_run_interrupted_in_the_middle_ends_when_started_again(tmp_path: Path, lines: list[str]) -> None:
    base = {"checkpoint_steps": 1, "eval_every": 0, "backbone_type": EMBEDDED}
    path = write_study(tmp_path, base, grid={"growth_threshold": [0.05]}, seed=1, results="records")
    (run,) = load_study(path).runs()
    once(lambda: any(run.folder.glob("checkpoint_*.ckpt")), lambda: os.kill(os.getpid(), signal.SIGINT))
    assert start(path) == 130
    assert run.record() is None and any(run.folder.glob("checkpoint_*.ckpt"))
    assert start(path) == 0
    assert "Continuing" in (run.folder.parent / "seed_1.log").read_text()
    record = run.record()
    assert len(record["tasks"]) == 2 and record["config"] == run.config.model_dump(mode="json")
    assert f"last accuracy {record['metrics']['last_accuracy']:.2f}; 0 left" in lines[-2]
    assert study_command(["collect", str(path)]) == 0
    assert [task.pop("probe") != [] for task in record["tasks"]] == [True] * 2 and read_sealed_json(run.recorded) == record
    assert [found.path for found in find_runs([run.folder, run.recorded]).runs] == [run.folder / "results.json"]
