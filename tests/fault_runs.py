"""Runs of main.py that are watched, killed and starved from outside, for test_faults.py.

`python -m tests.fault_runs` is a launcher: it imports the program once and forks for every run it is asked for, so that a
start costs a second and not the ten of loading torch. A forked run is `main.main` in a process of its own, which signals,
limits and kills meet as they meet `python main.py`. It computes nothing before it forks.
"""

import fcntl
import json
import os
import random
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.helpers import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
POLL_SECONDS = 0.0004  # a save of the embedded backbone's checkpoint takes a few milliseconds
LIMIT_SECONDS = 300


class Run:
    """A process that runs main.py on `folder`; its standard error comes through a named pipe, which no file limit meets."""

    def __init__(self, launcher: "Launcher", config: Path, folder: Path) -> None:
        self.launcher, self.folder, self.started = launcher, folder, time.monotonic()
        self._before = self._names()
        self._pipe = folder.parent / f"{folder.name}.stderr"
        os.mkfifo(self._pipe)
        self._stderr = os.open(self._pipe, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self._stderr, 1031, 1 << 20)  # F_SETPIPE_SZ: nobody reads before the end
        self.pid = launcher.ask(run=["--config", str(config)], stderr=str(self._pipe))

    def ended(self) -> bool:
        """Whether the process has ended; it stays a zombie until `end`."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except FileNotFoundError:
            return True
        return stat.rpartition(")")[2].split()[0] in "ZX"

    def end(self) -> tuple[int, str]:
        """Waits for the process; its status, negative for the signal that killed it, and what it wrote to stderr."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not self.ended():
            if time.monotonic() > deadline:
                self.send(9)
                raise AssertionError(f"a run in {self.folder} did not end")
            time.sleep(0.01)
        status = self.launcher.ask(wait=self.pid)
        text = b""
        with suppress(BlockingIOError):
            while part := os.read(self._stderr, 1 << 20):
                text += part
        os.close(self._stderr)
        self._pipe.unlink()
        return status, text.decode()

    def send(self, number: int) -> None:
        """Sends a signal, to a run that has not been waited for."""
        os.kill(self.pid, number)

    def wait_until(self, seconds: float = LIMIT_SECONDS, parts: int | None = None, checkpoints: int | None = None) -> bool:
        """Waits so many seconds, or for so many new temporary files or checkpoints; false if the run has ended before."""
        deadline, seen, polls = time.monotonic() + seconds, set(), 0
        while time.monotonic() < deadline:
            seen |= self._names() - self._before
            if parts is not None and sum(name.endswith(".part") for name in seen) >= parts:
                return not self.ended()
            if checkpoints is not None and sum(name.endswith(".ckpt") for name in seen) >= checkpoints:
                return not self.ended()
            polls += 1
            if polls % 20 == 0 and self.ended():
                return False
            time.sleep(POLL_SECONDS)
        return not self.ended()

    def wait_for_a_random_moment(self, draw: random.Random) -> bool:
        """A moment anywhere in the run, or, more often, within or just after a save; false if the run has ended before."""
        kind = draw.choice(["time", "save", "save", "save", "checkpoint"])
        if kind == "time":
            return self.wait_until(seconds=draw.uniform(0, 6))
        if kind == "save":
            there = self.wait_until(parts=draw.choice([1, 2, 3, 4, 6, 9, 14]))
            time.sleep(draw.choice([0, 0, 0.0005, 0.002]))
            return there
        there = self.wait_until(checkpoints=draw.randint(1, 4))
        time.sleep(draw.uniform(0, 0.05))
        return there

    def _names(self) -> set[str]:
        try:
            return set(os.listdir(self.folder))
        except FileNotFoundError:
            return set()


class Launcher:
    """The launcher process: `with Launcher() as launcher: launcher.run(config, folder)`."""

    def __enter__(self) -> "Launcher":
        self._process = subprocess.Popen([sys.executable, "-m", "tests.fault_runs"], cwd=ROOT, env=ENVIRONMENT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._pids: set[int] = set()
        return self

    def __exit__(self, *error: object) -> None:
        for pid in self._pids:  # not reaped yet, so the number is still theirs
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._process.communicate()

    def run(self, config: Path, folder: Path) -> Run:
        return Run(self, config, folder)

    def ask(self, **request: Any) -> int:
        """The launcher's answer: the number of a process it has started, or the status of one it has waited for."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = int(self._process.stdout.readline())
        self._pids ^= {request["wait"] if "wait" in request else answer}
        return answer


class Reader:
    """A process that reads every file of a folder in a loop, from `with` to its end, and then says what it found.

    A file that has not changed (inode, size, time) since it was read is not read again.
    """

    def __init__(self, launcher: Launcher, folder: Path, scratch: Path) -> None:
        self.launcher, self.folder, self.scratch = launcher, folder, scratch
        self.problems: list[str] = []
        self.read = 0

    def __enter__(self) -> "Reader":
        self.scratch.mkdir()
        self._pid = self.launcher.ask(watch=str(self.folder), scratch=str(self.scratch))
        return self

    def __exit__(self, *error: object) -> None:
        (self.scratch / "stop").touch()
        assert self.launcher.ask(wait=self._pid) == 0
        report = json.loads((self.scratch / "report.json").read_text())
        self.problems, self.read = report["problems"], report["read"]


def unreadable(path: Path, data: bytes, scratch: Path) -> str | None:
    """What is wrong with `data`, the content of `path`, for somebody who means to use it; None if nothing."""
    import io

    import safetensors.torch
    import torch

    from utils.runs.checkpoint import Checkpoints
    from utils.runs.files import read_sealed_json

    try:
        if path.suffix == ".json":
            json.loads(data)
        elif path.suffix == ".pt":
            torch.load(io.BytesIO(data), weights_only=True)
        elif path.suffix == ".safetensors":
            safetensors.torch.load(data)
        elif path.suffix == ".png":
            assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82"), "cut short"
        elif path.suffix in (".ckpt", ".log"):
            pass
        else:
            raise AssertionError("a file that nobody knows")
        if path.name == "results.json" or path.suffix == ".ckpt":
            copy = scratch / path.name  # the name is part of a checkpoint's checksum
            copy.write_bytes(data)
            try:
                if path.suffix == ".json":
                    read_sealed_json(copy)
                else:
                    state, lines = Checkpoints(scratch).load()
                    assert state is not None and not lines, lines
            finally:
                copy.unlink()
    except Exception as error:
        return f"{path.name}: {type(error).__name__}: {error}"
    return None


def unreadable_files(folder: Path, scratch: Path) -> list[str]:
    """What is wrong with the files that lie in `folder` now."""
    scratch.mkdir(exist_ok=True)
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [problem for path in paths if (problem := unreadable(path, path.read_bytes(), scratch))]


def _watch(folder: Path, scratch: Path) -> int:
    known: dict[str, tuple[int, ...]] = {}
    problems, read = [], 0
    copies = scratch / "copies"
    copies.mkdir()
    while not (scratch / "stop").exists():
        with suppress(FileNotFoundError):  # the folder itself, before it is made
            for name in os.listdir(folder):
                if name.startswith("."):
                    continue
                try:
                    with open(folder / name, "rb") as file:
                        stat = os.fstat(file.fileno())
                        now = stat.st_ino, stat.st_size, stat.st_mtime_ns
                        if known.get(name) == now or name.endswith(".log"):
                            continue
                        data = file.read()
                except FileNotFoundError as error:
                    if not name.endswith(".ckpt"):  # old checkpoints go; nothing else ever does
                        problems.append(str(error))
                    continue
                known[name], read = now, read + 1
                if problem := unreadable(folder / name, data, copies):
                    problems.append(problem)
        time.sleep(0.003)
    (scratch / "report.json").write_text(json.dumps({"problems": problems, "read": read}))
    return 0


def _run(arguments: list[str], stderr: str) -> int:
    import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_WRONLY), 2)
    return main.main(arguments)


def _serve() -> None:
    import matplotlib.figure  # noqa: F401, what takes its time
    import sklearn.datasets  # noqa: F401

    import trainer  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            print(status, file=answers, flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, file=answers, flush=True)
            continue
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if "run" in request:
                status = _run(request["run"], request["stderr"])
            else:
                status = _watch(Path(request["watch"]), Path(request["scratch"]))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)


if __name__ == "__main__":
    _serve()
