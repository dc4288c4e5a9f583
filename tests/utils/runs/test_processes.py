"""utils/runs/processes.py: which process this is, and a plain command that starts, watches and ends the processes of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from main import main, parse
from tests.helpers import ROOT, SMALL
from utils.errors import UserError
from utils.runs import processes as launch
from utils.runs.distributed import add_up, gathered, in_turn, largest, on_main
from utils.runs.runtime import pick_device

# Stands in for main.py: says that it is there, and then does what its first word says.
CHILD = """
import os, signal, sys, time
rank, what, folder = os.environ["RANK"], sys.argv[1], sys.argv[0].rpartition("/")[0]
def stop(number, frame):
    open(f"{folder}/told_{rank}_{number}", "w")
    sys.exit(75)
def has_ended(pid):
    return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
if what != "killed":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
open(f"{folder}/started_{rank}", "w").write(" ".join([os.environ[name] for name in names] + sys.argv[2:]))
if what == "fine":
    sys.exit(0)
if what in ("fails", "killed") and rank == "1":
    sys.exit(3) if what == "fails" else os.kill(os.getpid(), signal.SIGKILL)
if what == "fail in turn":
    while not os.path.lexists(f"{folder}/pid_1"):
        time.sleep(0.001)
    if rank == "1":
        os._exit(3)
    while not has_ended(os.readlink(f"{folder}/pid_1")):
        time.sleep(0.001)
    time.sleep(0.02)
    os._exit(4)
time.sleep(60)
"""

# The plain command with the stand-in. To "fail in turn" it is held, as a busy machine may hold it, until both have ended.
PARENT = """
import os, sys, time
from utils.runs import processes
processes.GRACE_SECONDS = 0.5
if sys.argv[2] == "fail in turn":
    wait = processes._wait
    def wait_late(children, *arguments):
        os.symlink(str(children[1].pid), os.path.dirname(sys.argv[1]) + "/pid_1")
        for child in children:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        return wait(children, *arguments)
    processes._wait = wait_late
sys.exit(processes.start(2, [sys.executable, *sys.argv[1:]]))
"""


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process one of several, as a launcher would."""

    def become(rank: int, processes: int, local_rank: int, local_processes: int) -> None:
        values = dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=local_processes)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return become


@pytest.fixture
def four_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def plain(folder: Path, what: str, *options: str) -> subprocess.Popen:
    child = folder / "child.py"
    child.write_text(CHILD)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen([sys.executable, "-c", PARENT, str(child), what, *options], cwd=ROOT, text=True,
                            stderr=subprocess.PIPE, env=environment)


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, names
        time.sleep(0.02)


def test_the_environment_tells_the_place(as_rank, monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launch.place() == (0, 1, 0, 1) and not launch.launched()
    as_rank(5, 8, 1, 4)
    assert launch.place() == (5, 8, 1, 4) and launch.launched()


def test_a_list_of_devices_asks_for_processes(as_rank, four_gpus) -> None:
    wanted = [(["auto"], 1), (["cpu"], 1), (["2"], 1), (["cpu", "cpu", "cpu"], 3), (["0", "3"], 2), (["0", "4"], 1)]
    assert [(names, launch.processes_to_start(names)) for names, _ in wanted] == wanted
    as_rank(0, 2, 0, 2)
    assert launch.processes_to_start(["0", "1"]) == 1


def test_without_cuda_no_processes_are_started_for_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.processes_to_start(["0", "1"]) == 1
    assert pick_device(["0", "1"])[0] == torch.device("cpu") and len(pick_device(["0", "1"])[1]) == 1


@pytest.mark.parametrize("names, place, device, warned", [
    (["auto"], (0, 1, 0, 1), "cuda:0", 0),
    (["auto"], (5, 8, 1, 4), "cuda:1", 0),
    (["2"], (0, 1, 0, 1), "cuda:2", 0),
    (["2"], (1, 2, 1, 2), "cuda:1", 1),
    (["3", "1"], (1, 2, 1, 2), "cuda:1", 0),
    (["cpu"], (1, 2, 1, 2), "cpu", 0),
    (["cpu", "cpu"], (1, 2, 1, 2), "cpu", 0),
])
def test_each_process_takes_its_device(names, place, device, warned, as_rank, four_gpus) -> None:
    as_rank(*place)
    picked, warnings = pick_device(names)
    assert (str(picked), len(warnings)) == (device, warned)


@pytest.mark.parametrize("names, place, words", [
    (["0", "1", "2"], (0, 2, 0, 2), ["device", "3 devices", "2 processes"]),
    (["auto"], (0, 5, 0, 5), ["device", "'4'", "0 to 3"]),
])
def test_devices_that_do_not_fit_the_processes_are_refused(names, place, words, as_rank, four_gpus) -> None:
    as_rank(*place)
    with pytest.raises(UserError) as error:
        pick_device(names)
    assert all(word in str(error.value) for word in words)


def test_of_several_processes_one_on_each_machine_names_a_mistake(as_rank, tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**SMALL, "rnak": 3}))
    for place, lines in (((0, 4, 0, 2), 1), ((1, 4, 1, 2), 0), ((2, 4, 0, 2), 1)):
        as_rank(*place)
        assert main(["--config", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_one_process_talks_to_nobody() -> None:
    tensor = torch.tensor([1.5, 2.5])
    add_up(tensor)
    assert tensor.tolist() == [1.5, 2.5] and largest(3, 4) == [3, 4] and gathered("x") == ["x"]
    assert on_main(max, 1, 2) == 2 and in_turn(max, 1, 2) == 2


@pytest.mark.slow
def test_every_process_gets_the_command_and_its_place(tmp_path: Path) -> None:
    process = plain(tmp_path, "fine", "--seed", "1", "2")
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    threads = str(max(1, os.cpu_count() // 2))
    started = [(tmp_path / f"started_{rank}").read_text() for rank in (0, 1)]
    assert started == [f"{rank} 2 {rank} 2 127.0.0.1 {threads} --seed 1 2" for rank in (0, 1)]


def test_the_command_line_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was given, with the config that the processes are for in place of all."""
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path in paths:
        Path(path).write_text(json.dumps({**SMALL, "filepath": f"{path}.run"}))
    started = []
    monkeypatch.setattr(launch, "start", lambda *arguments: started.append(arguments) or 7)
    words = ["--seed", "1", "2", "--device", "cpu", "cpu", "--set", "epochs=2", "--set", "batch_size=5", "--overwrite"]
    assert main([*words, "--config", *paths]) == 7
    for path, (processes, (python, file, *arguments)) in zip(paths, started, strict=True):
        assert (processes, python, file) == (2, sys.executable, str(ROOT / "main.py"))
        assert parse(arguments) == parse([*words, "--config", path])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_process_and_its_status_comes_back(number: signal.Signals, tmp_path: Path) -> None:
    process = plain(tmp_path, "waits")
    wait_for(tmp_path, "started_0", "started_1")
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 75
    wait_for(tmp_path, f"told_0_{number}", f"told_1_{number}")


@pytest.mark.slow
def test_a_process_that_fails_brings_the_others_down(tmp_path: Path) -> None:
    process = plain(tmp_path, "fails")
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 3


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(tmp_path: Path) -> None:
    process = plain(tmp_path, "killed")
    message = process.communicate(timeout=120)[1]
    assert message.count("\n") == 1 and "Process 1 " in message and "SIGKILL" in message and process.returncode == 137


@pytest.mark.slow
def test_the_status_is_that_of_the_process_that_failed_first(tmp_path: Path) -> None:
    """Process 1 has ended 20 ms before process 0 does, and this process sees either only when both have."""
    processes = []
    for trial in range(20):
        (tmp_path / str(trial)).mkdir()
        processes.append(plain(tmp_path / str(trial), "fail in turn"))
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in processes] == [("", 3)] * 20
