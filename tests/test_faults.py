"""Runs that are killed, stopped by signals or starved of disk end with the very bytes of an undisturbed run.

All of this is slow. The short form runs with the other tests. `GCL_LONG_FAULTS=1 pytest tests/test_faults.py` is the long
one: 50 kills, 20 full disks and 12 second signals, from a new seed each time, which is printed (`GCL_FAULT_SEED=<n>`
repeats it). A faulty process is either `python main.py` or, to be quick, a fork of `tests/fault_runs.py` in `main.main`.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from backbone.embedded import EMBEDDED
from tests.fault_runs import ENVIRONMENT, ROOT, Launcher, Reader, unreadable_files
from tests.helpers import LONG

SEED = int(os.environ.get("GCL_FAULT_SEED") or (time.time_ns() % 10**9 if LONG else 5))
KILLS, FULL_DISKS, SECOND_SIGNALS = (50, 20, 12) if LONG else (6, 2, 2)
DISK_BYTES = 8 << 20

# Four tasks, of which the gate prunes some, so that head rows are refit; a checkpoint in every third step.
CONFIG = {"dataset": "digits", "init_cls": 2, "nb_tasks": 4, "backbone_type": EMBEDDED, "init_epoch": 1, "epochs": 1,
          "batch_size": 32, "init_lr": 0.01, "lrate": 0.01, "gate_lr": 0.2, "rank": 4, "growth_threshold": 0.3,
          "refit_epochs": 1, "eval_every": 1, "device": "cpu", "checkpoint_steps": 3}
# The same with evictions of older adapters, a moving average in the optimizer and more than one epoch.
OTHER = {**CONFIG, "init_cls": 3, "nb_tasks": 3, "growth_rule": "topk", "growth_topk": 2, "optimizer": "adamw", "epochs": 2,
         "scheduler": "steplr", "milestones": [1], "checkpoint_steps": 4}
CONFIGS = [CONFIG, OTHER] if LONG else [CONFIG]

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, prlimit and named pipes")]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as started:
        yield started


def write_config(folder: Path, config: dict) -> Path:
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps({**config, "filepath": str(folder)}))
    return path


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, tmp_path_factory) -> list[tuple[dict, dict]]:
    """(config, outcome) of runs that nobody disturbs; every one prunes and refits."""
    outcomes = []
    for config in CONFIGS:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        assert launcher.run(write_config(folder, config), folder).end() == (0, "")
        outcomes.append((config, outcome(folder)))
        tasks = json.loads((folder / "results.json").read_text())["tasks"]
        assert any(0 in task["pruning_mask"] for task in tasks) and tasks[-1]["active_adapters"] > 1
    return outcomes


def outcome(folder: Path) -> dict[str, object]:
    """All that a run computes: bytes of the artifacts, accuracy matrix and the rest of the record but for times."""
    result = json.loads((folder / "results.json").read_text())
    assert result["finished"]
    tasks = [{key: value for key, value in task.items() if "seconds" not in key and key != "peak_memory_bytes"}
             for task in result["tasks"]]
    files = [*folder.glob("*.pt"), *folder.glob("*.safetensors"), folder / "split.json"]
    return {"tasks": tasks, "metrics": result["metrics"], **{path.name: path.read_bytes() for path in files}}


def check(folder: Path, expected: dict[str, object]) -> None:
    """The folder of a run that has ended holds what it should, and no more than that."""
    found = outcome(folder)
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, different
    assert unreadable_files(folder, folder.parent / f"{folder.name}.copies") == []


def one_sentence(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")


# ---- kills

def test_killed_runs_end_as_undisturbed_ones(launcher: Launcher, undisturbed: list, tmp_path: Path) -> None:
    draw, kills, within_saves, runs, read = random.Random(SEED), 0, 0, 0, 0
    while kills < KILLS:
        folder = tmp_path / f"run_{runs}"
        config, expected = undisturbed[runs % len(undisturbed)]
        path, runs = write_config(folder, config), runs + 1
        with Reader(launcher, folder, tmp_path / f"reader_{runs}") as reader:
            while True:
                run = launcher.run(path, folder)
                there = kills < KILLS and run.wait_for_a_random_moment(draw)
                if there:
                    run.send(signal.SIGKILL)
                status, text = run.end()
                if status == 0:
                    break
                assert status == -signal.SIGKILL and text == "", f"seed {SEED}, {folder}: status {status}: {text}"
                kills += 1
                within_saves += any(folder.glob(".*.part")) if folder.exists() else 0
        assert reader.problems == [], f"seed {SEED}"
        check(folder, expected)
        read += reader.read
    print(f"seed {SEED}: {kills} kills, {within_saves} of them within a save, {runs} runs; {read} files read meanwhile")
    assert read > 10 and (within_saves or not LONG)


# ---- full disks

@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Puts a small file system of its own at `folder`, where this user may; says whether it did."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Takes all the room that the disk has but `leave` bytes (in whole pages)."""
    with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 20)) == 1 << 20:
            pass
    size = (disk / "filler").stat().st_size
    os.truncate(disk / "filler", max(0, size - leave))
    return disk / "filler"


def test_runs_on_a_full_disk_stop_and_go_on(launcher: Launcher, undisturbed: list, tmp_path: Path) -> None:
    """With a file system that fills up, and with a limit on the size of files that comes while the process runs."""
    draw, stops, runs, kinds, read = random.Random(SEED), 0, 0, {"full": 0, "limited": 0}, 0
    with ExitStack() as stack:
        disk = tmp_path / "disk"
        may_fill = stack.enter_context(small_disk(disk))
        while stops < FULL_DISKS:
            folder = disk / f"run_{runs}"
            config, expected = undisturbed[runs % len(undisturbed)]
            path = tmp_path / f"{runs}.json"
            path.write_text(json.dumps({**config, "filepath": str(folder)}))
            runs += 1
            with Reader(launcher, folder, tmp_path / f"reader_{runs}") as reader:
                while True:
                    run, filler = launcher.run(path, folder), None
                    if stops < FULL_DISKS and run.wait_for_a_random_moment(draw):
                        if may_fill and stops % 2 == 0:
                            kind, filler = "full", fill(disk, leave=draw.choice([0, 0, 4096, 16384, 65536]))
                        else:
                            kind, limit = "limited", draw.choice([0, 100, 2000, 3000, 20_000, 60_000])
                            with suppress(ProcessLookupError):
                                resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, limit))
                    status, text = run.end()
                    if status == 0:
                        assert text == "", f"seed {SEED}: {text}"
                    else:
                        assert status == 2 and one_sentence(text), f"seed {SEED}: status {status}: {text}"
                        assert str(folder) in text and "Traceback" not in text, text
                        assert not any(folder.glob(".*.part")) if folder.exists() else True
                        stops, kinds[kind] = stops + 1, kinds[kind] + 1
                    if filler is not None:
                        if status == 2 and draw.random() < 0.3:  # started again before there is room
                            status, text = launcher.run(path, folder).end()
                            assert (status, text) == (0, "") or (status == 2 and one_sentence(text)), text
                        filler.unlink()
                    if status == 0:
                        break
            assert reader.problems == [], f"seed {SEED}"
            check(folder, expected)
            read += reader.read
            subprocess.run(["rm", "-rf", str(folder), f"{folder}.copies"], check=True)
    print(f"seed {SEED}: {stops} stops ({kinds}), {runs} runs; {read} files read meanwhile")


# ---- signals

def test_signals_stop_a_run_in_good_order(launcher: Launcher, undisturbed: list, tmp_path: Path) -> None:
    """Each at a moment of its own. tests/test_interruption.py, studies/ and utils/runs/ send them to main.py itself."""
    config, expected = undisturbed[0]
    draw = random.Random(SEED)
    for number, expected_status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)):
        folder = tmp_path / number.name
        path = write_config(folder, config)
        run = launcher.run(path, folder)
        assert run.wait_until(checkpoints=draw.randint(1, 6))
        sent = time.monotonic()
        run.send(number)
        assert run.end() == (expected_status, "")
        seconds = time.monotonic() - sent
        assert seconds < 10
        assert unreadable_files(folder, tmp_path / f"{number.name}.copies") == []
        assert launcher.run(path, folder).end() == (0, "")
        check(folder, expected)
        print(f"{number.name}: after {seconds:.2f} s")


def kill_a_process(folder: Path, config: dict, checkpoint: int) -> int:
    """Kills `python main.py` once it has written so many checkpoints; its status."""
    command = [sys.executable, "main.py", "--config", str(write_config(folder, config))]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    while process.poll() is None and all(int(path.stem[11:]) < checkpoint for path in folder.glob("checkpoint_*.ckpt")):
        time.sleep(0.005)
    process.kill()
    return process.wait()


def test_killed_processes_go_on_as_if_nothing_had_happened(launcher: Launcher, undisturbed: list, tmp_path: Path) -> None:
    """`python main.py` itself, not a fork; in the long form again and again, each time at a later checkpoint."""
    folder = tmp_path / "run"
    config, expected = undisturbed[0]
    for checkpoint in range(2, 14 if LONG else 3):
        assert kill_a_process(folder, config, checkpoint) == -signal.SIGKILL
        assert unreadable_files(folder, tmp_path / "copies") == []
    assert launcher.run(tmp_path / "run.json", folder).end() == (0, "")
    check(folder, expected)


def test_a_second_signal_does_no_harm(launcher: Launcher, undisturbed: list, tmp_path: Path) -> None:
    """Sent 0.3 s after the first, with the process held meanwhile so that it cannot have ended."""
    draw, folder, ends = random.Random(SEED), tmp_path / "run", []
    config, expected = undisturbed[0]
    path = write_config(folder, config)
    for _ in range(SECOND_SIGNALS):
        run = launcher.run(path, folder)
        if run.wait_until(checkpoints=draw.randint(1, 2)):
            run.send(draw.choice([signal.SIGTERM, signal.SIGUSR1]))
            time.sleep(draw.choice([0.001, 0.002, 0.005, 0.01]))
            run.send(signal.SIGSTOP)
            time.sleep(0.3)
            run.send(signal.SIGINT)
            before = time.monotonic()
            run.send(signal.SIGCONT)
            status, text = run.end()
            assert time.monotonic() - before < 10
            assert status in (0, 75, 130, 143, -signal.SIGINT) and text == "", (status, text)
        else:
            status = run.end()[0]
        ends.append(status)
        assert unreadable_files(folder, tmp_path / "copies") == []
    assert launcher.run(path, folder).end() == (0, "")
    check(folder, expected)
    print(f"seed {SEED}: statuses {ends}")


# ---- two processes

def test_the_second_process_on_a_folder_is_refused(launcher: Launcher, undisturbed: list, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config, expected = undisturbed[0]
    path = write_config(folder, config)
    first = launcher.run(path, folder)
    assert first.wait_until(checkpoints=2)
    first.send(signal.SIGSTOP)  # so that it is still there when the second comes
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    command = [sys.executable, "main.py", "--config", str(path)]
    second = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and one_sentence(second.stderr), second.stderr
    assert f"process {first.pid}" in second.stderr and str(folder) in second.stderr
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    first.send(signal.SIGCONT)
    assert first.end() == (0, "")
    check(folder, expected)
