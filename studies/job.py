"""A run as a process, on this machine or as a job of submitit. Standard library only, so that a job starts at once."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

PREEMPTED = 75  # what a run exits with that was told of its preemption and has saved (utils/runs/signals.py)
GRACE_SECONDS = 600  # the longest that Slurm may leave between SIGTERM and the end of a job
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def start(command: Sequence[str], log: Path, threads: int) -> subprocess.Popen:
    """The process of `command`; `log` and the `.err` beside it take what it prints. Raises OSError."""
    with open(log, "wb") as out, open(log.with_suffix(".err"), "wb") as err:
        # In a session of its own: a Ctrl-C reaches it once, from its parent, and not from the terminal as well.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                                env={"OMP_NUM_THREADS": str(threads), **os.environ}, preexec_fn=partial(_prepare, os.getpid()))


def failure(status: int, log: Path) -> str:
    """Why a process that has ended with this status, not 0, did: the status and the last line of its `.err`."""
    lines = []
    with suppress(OSError):
        text = log.with_suffix(".err").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}, {lines[-1] if lines else 'nothing on stderr'}"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(parent: int) -> None:
    """In the child before it becomes the run. It gets SIGTERM when its parent dies, so that a study that was killed leaves
    nothing running that would hold the folders. Linux alone can do that; elsewhere the lock of the run tells who has the
    folder. Slurm hands submitit's signal to every process of a job; the run is to have one of its own, from `Job`."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(143)


class Job:
    """What submitit runs for one run, or for one process of a search; its result is the command's exit status.

    When the job is to be preempted or its time is up, submitit calls `checkpoint` and has the same job queued again: the run
    saves and ends, and the next call goes on from what it saved. A run that was told of it by Slurm itself, and left with
    `PREEMPTED`, is treated alike. After SIGTERM, which the run answers by saving too, the job waits for Slurm to end it: it
    is either cancelled, or preempted by Slurm, which queues it again by itself if it has not ended by then.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        in_job = callable(signal.getsignal(signal.SIGUSR2))  # submitit listens, but for its debug executor
        ending: list[int] = []
        if in_job:
            signal.signal(signal.SIGTERM, lambda number, frame: ending.append(number))
        self.process = start(self.command, self.log, cores())
        self._wait()
        status = self.process.wait()
        if in_job and status == PREEMPTED:
            signal.raise_signal(signal.SIGUSR2)
        if ending and status:
            time.sleep(GRACE_SECONDS)
        return status

    def checkpoint(self) -> "DelayedSubmission":
        """Has the run save and end; what submitit is to run in the next job."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)
            self._wait()
        return DelayedSubmission(Job(self.command, self.log))

    def _wait(self) -> None:
        """Waits without reaping, so that `checkpoint` can wait inside a signal handler while `__call__` waits already;
        Popen's own wait holds a lock meanwhile."""
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
