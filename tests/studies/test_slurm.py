"""The executor `slurm`: what is asked of Slurm, jobs that are preempted and go on, and what a study does without its jobs.

There is no Slurm here: `sbatch` and what belongs to it are scripts on PATH, which run the jobs of an array on this machine.
Two tests go by submitit's local and debug executors. Runs are a stand-in for main.py.
"""

import os
import signal
import stat
import sys
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="the executor slurm needs submitit (pip install submitit)")

import main as command
from studies import slurm
from studies.study import load_study
from studies.trials import known_trials
from tests.helpers import ROOT, once
from tests.studies.conftest import start, starts, write_study
from utils.errors import UserError

# A job's script is run with what Slurm would have in its environment, again after `scontrol requeue`; as many at a time as the
# array says. $CLUSTER_STAND_IN holds what happened.
SBATCH = """
import os, re, subprocess, sys, time
from pathlib import Path
place, text = Path(os.environ["CLUSTER_STAND_IN"]), Path(sys.argv[1]).read_text()
if (place / "refuse").exists():
    sys.exit("sbatch: error: invalid partition specified: nowhere")
number = time.time_ns() // 1000 % 10**9
(place / f"script_{number}").write_text(text)
print(f"Submitted batch job {number}", flush=True)
if os.fork():
    os._exit(0)
os.setsid()
for descriptor in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
array = re.search(r"--array=0-([0-9]+)%([0-9]+)", text)
tasks = [None] if array is None else list(range(int(array[1]) + 1))
running, most = {}, 1 if array is None else int(array[2])
while tasks or running:
    while tasks and len(running) < most:
        task = tasks.pop(0)
        job = f"{number}" if task is None else f"{number}_{task}"
        own = {} if task is None else {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}
        (place / f"state_{job}").write_text("RUNNING")
        running[job] = subprocess.Popen(["bash", sys.argv[1]], env={**os.environ, **own, "SLURM_JOB_ID": job}), task
        with open(place / "log", "a") as file:
            file.write(f"start {len(running)}\\n")
    time.sleep(0.02)
    for job, (process, task) in list(running.items()):
        if process.poll() is not None:
            del running[job]
            if (place / f"requeue_{job}").exists():
                (place / f"requeue_{job}").unlink()
                tasks.insert(0, task)
            else:
                (place / f"state_{job}").write_text("COMPLETED" if process.returncode == 0 else "FAILED")
"""
SRUN = """
import os, sys
from pathlib import Path
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1:] if words[0] == "--unbuffered" else words[2:]
(Path(os.environ["CLUSTER_STAND_IN"]) / f"pid_{os.environ['SLURM_JOB_ID']}").write_text(str(os.getpid()))
os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1")
os.execvp(words[0], words)
"""
SCONTROL = """
import os, sys
from pathlib import Path
assert sys.argv[1] == "requeue"
(Path(os.environ["CLUSTER_STAND_IN"]) / f"requeue_{sys.argv[2]}").touch()
"""
SACCT = """
import os
from pathlib import Path
print("JobID|State|NodeList")
for file in Path(os.environ["CLUSTER_STAND_IN"]).glob("state_*"):
    print(f"{file.name[6:]}|{file.read_text()}|here")
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm; the folder in which it keeps what happened."""
    tools, place = tmp_path / "bin", tmp_path / "slurm_stand_in"
    tools.mkdir()
    place.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL), ("sacct", SACCT)):
        script = tools / name
        script.write_text(f"#!{sys.executable}\n{text}")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER_STAND_IN", str(place))
    return place


@pytest.fixture(autouse=True)
def poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.1)


def write_jobs(folder: Path, changes: dict | None = None, **keys) -> Path:
    """As `write_study`: three runs, as jobs of a cluster."""
    return write_study(folder, changes, **{"seed": [1, 2, 3], "executor": "slurm", **keys})


def scripts(cluster: Path) -> list[str]:
    """The batch scripts that were submitted."""
    return [file.read_text() for file in sorted(cluster.glob("script_*"))]


# ---- what a file may say

BAD = {
    "executor": ({"executor": "pbs"}, ["'executor' is \"pbs\"", '"local" or "slurm"']),
    "no object": ({"slurm": "gpu"}, ["'slurm' is \"gpu\"", '{"partition"']),
    "unknown": ({"slurm": {"gpu": 1}}, ["'gpu' in 'slurm' is not known", "'gpus'"]),
    "gpus": ({"slurm": {"gpus": -1}}, ["'gpus' in 'slurm' is -1", "an integer of at least 0"]),
    "minutes": ({"slurm": {"minutes": 0}}, ["'minutes' in 'slurm' is 0", "at least 1"]),
    "cpus": ({"slurm": {"cpus": 2.5}}, ["'cpus' in 'slurm' is 2.5"]),
    "partition": ({"slurm": {"partition": ""}}, ["'partition' in 'slurm' is \"\""]),
    "notice": ({"slurm": {"minutes": 5}}, ["'notice_seconds' in 'slurm' is 300", "'minutes' of 5"]),
}


@pytest.mark.parametrize("keys, words", BAD.values(), ids=BAD)
def test_bad_keys_are_one_sentence(keys: dict, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_study(write_jobs(tmp_path, **keys))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_without_slurm_or_submitit_the_study_says_so(tmp_path: Path, stand_in: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start(write_jobs(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "needs the command sbatch" in err and "executor=local" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert start(write_jobs(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "pip install submitit" in err and err.count("\n") == 1


@pytest.mark.slow
def test_what_slurm_refuses_is_one_sentence(tmp_path: Path, stand_in: Path, cluster: Path, capsys) -> None:
    (cluster / "refuse").touch()
    assert start(write_jobs(tmp_path, slurm={"partition": "nowhere"})) == 2
    err = capsys.readouterr().err
    assert "invalid partition specified: nowhere" in err and "'slurm'" in err and err.count("\n") == 1


# ---- jobs


@pytest.mark.slow
def test_the_runs_of_a_study_are_one_array(tmp_path: Path, stand_in: Path, cluster: Path, lines: list[str]) -> None:
    path = write_jobs(tmp_path, jobs=2, slurm={"partition": "gpu", "minutes": 90, "gpus": 2, "cpus": 3, "memory_gb": 16,
                                               "notice_seconds": 120, "account": "us", "qos": "low", "constraint": "a100"})
    assert start(path) == 0
    (script,) = scripts(cluster)
    for line in ("array=0-2%2", "partition=gpu", "time=90", "gpus-per-node=2", "cpus-per-task=3", "mem=16GB",
                 "signal=USR2@120", "account=us", "qos=low", "constraint=a100", "requeue", "job-name=study"):
        assert f"#SBATCH --{line}\n" in script, line
    assert (cluster / "log").read_text().count("start ") == 3
    assert all(each.own_record() for each in load_study(path).runs())
    assert sum(line.startswith("Finished ") for line in lines) == 3 and any("; 0 left" in line for line in lines)
    assert not list(tmp_path.glob("runs/base/*.job"))
    assert start(path) == 0 and len(scripts(cluster)) == 1  # everything is finished


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["hang", "warned"])
def test_a_preempted_run_saves_and_goes_on_in_the_next_job(deed: str, tmp_path: Path, stand_in: Path, cluster: Path) -> None:
    """Told by submitit's signal, or by Slurm itself, in which case the run leaves by itself."""
    path = write_jobs(tmp_path, {"prefix": deed}, seed=1)
    (one,) = load_study(path).runs()
    if deed == "hang":
        once(lambda: starts(one.folder), lambda: os.kill(int(next(cluster.glob("pid_*")).read_text()), signal.SIGUSR2))
    assert start(path) == 0
    assert one.own_record()["went_on"] and len(scripts(cluster)) == 1


@pytest.mark.slow
def test_slurm_may_preempt_by_itself(tmp_path: Path, stand_in: Path, cluster: Path) -> None:
    """SIGTERM to every process of the job; once the run has saved Slurm ends the job and queues it again."""
    path = write_jobs(tmp_path, {"prefix": "hang"}, seed=1)
    (one,) = load_study(path).runs()

    def preempt() -> None:
        (file,) = cluster.glob("pid_*")
        for pid in (file.read_text(), starts(one.folder)[-1]["pid"]):
            os.kill(int(pid), signal.SIGTERM)
        once((one.folder / "saved").exists, lambda: (
            (cluster / file.name.replace("pid", "requeue")).touch(), os.kill(int(file.read_text()), signal.SIGKILL)))

    once(lambda: starts(one.folder), preempt)
    assert start(path) == 0
    assert one.own_record()["went_on"] and len(scripts(cluster)) == 1


@pytest.mark.slow
def test_failures_and_lost_jobs_are_told(tmp_path: Path, stand_in: Path, cluster: Path, lines: list[str], monkeypatch) -> None:
    """The second job is killed, as by a machine that goes down: it leaves no status."""
    from submitit import SlurmJob

    monkeypatch.setattr(SlurmJob, "_results_timeout_s", 0)
    monkeypatch.setattr(SlurmJob.watcher, "_delay_s", 0)
    path = write_jobs(tmp_path, variants={"bad": {"prefix": "fail"}, "lost": {"prefix": "hang"}}, seed=1)
    _, lost = load_study(path).runs()
    once(lambda: starts(lost.folder),
         lambda: os.kill(int(next(cluster.glob("pid_*_1")).read_text()), signal.SIGKILL))
    assert start(path) == 1
    failed = sorted(line for line in lines if line.startswith("Failed: "))
    assert failed[0].startswith("Failed: bad seed 1: exit status 1, error: the reason (log ")
    assert failed[1].startswith("Failed: lost seed 1: job ") and "ended as FAILED without an exit status" in failed[1]


@pytest.mark.slow
def test_a_stopped_study_leaves_its_jobs_and_finds_them_again(
        tmp_path: Path, stand_in: Path, cluster: Path, lines: list[str]) -> None:
    path = write_jobs(tmp_path, {"prefix": "hang"}, seed=[1, 2])
    runs = load_study(path).runs()
    once(lambda: all(starts(each.folder) for each in runs), lambda: os.kill(os.getpid(), signal.SIGINT))
    assert start(path) == 130
    assert any("2 jobs go on without this command" in line and "scancel" in line for line in lines)
    lines.clear()
    once(lambda: sum("already" in line for line in lines) >= 3, (tmp_path / "go").touch)
    assert start(path) == 0 and len(scripts(cluster)) == 1
    assert all(each.own_record() for each in runs)


@pytest.mark.slow
def test_processes_of_a_search_are_one_array(tmp_path: Path, stand_in: Path, cluster: Path, lines: list[str]) -> None:
    """Every job is main.py on the study, here one that makes its runs with the stand-in."""
    pytest.importorskip("optuna")
    worker = tmp_path / "worker.py"
    worker.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport main, studies.search\n"
                      f"main.__file__, studies.search.LOOK_SECONDS = {str(stand_in)!r}, 0.1\nsys.exit(main.main())\n")
    command.__file__ = str(worker)
    path = write_jobs(tmp_path, seed=1, search={"rank": [2, 3, 4]}, trials=4, jobs=2, report_seed=2)
    assert start(path, "--set", "epochs=2") == 0
    (script,) = scripts(cluster)
    assert "#SBATCH --array=0-1%2\n" in script and sum(line.startswith("Finished  process") for line in lines) == 2
    study = load_study(path, ["epochs=2"])
    assert [trial.state for trial in known_trials(study)] == ["complete"] * 4
    assert all(each.own_record()["config"]["epochs"] == 2 for each in study.runs() if each.reports)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "debug"])
def test_submitits_own_executors(kind: str, tmp_path: Path, stand_in: Path, monkeypatch) -> None:
    monkeypatch.setattr(slurm, "CLUSTER", kind)
    monkeypatch.chdir(ROOT)
    path = write_jobs(tmp_path, {"prefix": "warned" if kind == "local" else ""}, seed=[1, 2])
    assert start(path) == 0
    assert [each.own_record()["went_on"] for each in load_study(path).runs()] == [kind == "local"] * 2
