"""Runs a study: each run a process of its own, some at a time, what is finished skipped, what is not gone on with.

An executor's threads start the processes and wait for them. Kept by hand is what no library keeps: a signal reaches the runs,
which save and end, and a study that is killed leaves none behind.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from studies.study import Study, StudyRun
from utils.config import config_warnings
from utils.config.rules import show
from utils.data import DATASETS
from utils.errors import UserError, unknown
from utils.runs import folder as run_folder
from utils.runs.files import write_json
from utils.runs.lock import lock
from utils.runs.processes import place
from utils.runs.progress import LOGGER, format_seconds
from utils.runs.signals import Signals, Stopped

POLL_SECONDS = 0.1  # how often a signal is looked for
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def perform(study: Study, command: Sequence[str], dry_run: bool = False, overwrite: bool = False) -> int:
    """Runs what of the study is not finished, each run by `command --config FILE`; or with `dry_run` prints its runs.

    Returns the exit status: 0, or 1 when a run has failed. Every config is checked before anything is started. `overwrite`
    sets the folders of all runs aside first, and no committed record counts. A signal is passed on to the runs, which save
    and end; then raises Stopped. Raises UserError in a run of several processes, each of which would start all of the study.
    """
    if place().processes > 1:
        raise UserError(f"{study.path}: a study starts its own processes; run it with the plain command, python main.py.")
    runs = study.runs()
    states = [_state(run, overwrite and not dry_run) for run in runs]
    title = f"Study {study.name}: {len(runs)} runs in {study.filepath}"
    if dry_run:
        print("\n".join([f"{title}, {states.count('finished')} finished, {study.jobs} at a time", *_table(runs, states)]),
              flush=True)
        return 0
    for warning in dict.fromkeys(line for run in runs for line in config_warnings(run.config)):
        LOGGER.warning(warning)
    with lock(study.filepath):
        if overwrite:
            for run in runs:
                if aside := run_folder.set_aside(run.folder):
                    LOGGER.info(f"--overwrite: what was in {run.folder} is now in {aside}")
        todo = [run for run, state in zip(runs, states, strict=True) if state != "finished"]
        jobs = min(study.jobs, len(todo))
        LOGGER.info(f"{title}, {len(runs) - len(todo)} finished already" + (f"; {jobs} at a time" if todo else ""))
        if overwrite and study.results is not None:
            LOGGER.info("--overwrite: committed records do not count; to go on after an interruption use --set results=null.")
        failures = _Work(todo, jobs, command).finish() if todo else []
    for failure in failures:
        LOGGER.info(f"Failed: {failure}")
    if failures:
        LOGGER.info(f"{len(failures)} of {len(runs)} runs failed; the same command "
                    f"{'without --overwrite ' * overwrite}tries them again.")
    LOGGER.info(f"Compare: python -m analysis.compare {shlex.quote(str(study.path))}")
    return 1 if failures else 0


def _state(run: StudyRun, overwrite: bool) -> str:
    """"finished", "begun" or "to do"; raises UserError if the run cannot be made."""
    names = run.config.dataset
    for name in [names] if isinstance(names, str) else names:
        if name not in DATASETS:
            raise unknown("dataset", name, DATASETS)
    if not overwrite and run.record():
        return "finished"
    return "begun" if not overwrite and (run.folder / "config.json").exists() else "to do"


def _table(runs: Sequence[StudyRun], states: Sequence[str]) -> list[str]:
    """A line for every run: its state, name, seed and changes."""
    rows = [(state, run.name, f"seed {run.seed}") for run, state in zip(runs, states, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    changes = [", ".join(f"{key}={show(value)}" for key, value in run.changes.items()) or "no changes" for run in runs]
    return ["  ".join([*map(str.ljust, row, widths), changed]) for row, changed in zip(rows, changes, strict=True)]


class _Work:
    """The runs that are to be made, `jobs` at a time, in order."""

    def __init__(self, todo: Sequence[StudyRun], jobs: int, command: Sequence[str]) -> None:
        self.todo, self.jobs, self.command = todo, jobs, command
        self.threads = max(1, _cores() // jobs)
        self.guard = threading.Lock()  # of what follows
        self.places = list(reversed(range(jobs)))  # that no run has; with each goes a device
        self.running: list[subprocess.Popen] = []
        self.left, self.stopping = len(todo), False
        self.failures: list[str] = []

    def finish(self) -> list[str]:
        """Makes the runs; returns what failed, a line each. Raises Stopped after a signal, when every run has ended."""
        with Signals() as signals, ThreadPoolExecutor(self.jobs) as executor:
            waiting = {executor.submit(self._make, run) for run in self.todo}
            try:
                while waiting:
                    done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                    for each in done:
                        each.result()
                    if signals.received is not None:
                        raise Stopped(signals.received)
            except BaseException as error:
                self._stop(error.signal if isinstance(error, Stopped) else signal.SIGTERM)
                raise
        return self.failures

    def _make(self, run: StudyRun) -> None:
        """Starts the run, waits for its end and says how that was; does nothing once the study stops."""
        started, log = time.monotonic(), run.folder.with_name(f"{run.folder.name}.log")
        with self.guard:
            if self.stopping:
                return
            at = self.places.pop()
            process = self._start(run, run.config.device[at % len(run.config.device)], log)
            self.running.append(process)
            LOGGER.info(f"Started   {run.name} seed {run.seed}, log {log}")
        process.wait()
        seconds = format_seconds(time.monotonic() - started)
        with self.guard:
            self.running.remove(process)
            self.places.append(at)
            self.left -= 1
            try:
                last = _record(run, process.returncode, log.with_suffix(".err"))["metrics"]["last_accuracy"]
                LOGGER.info(f"Finished  {run.name} seed {run.seed} in {seconds}, last accuracy {last:.2f}; {self.left} left")
            except UserError as failure:
                if self.stopping:
                    LOGGER.info(f"Stopped   {run.name} seed {run.seed} after {seconds}; {self.left} left")
                    return
                self.failures.append(f"{run.name} seed {run.seed}: {failure} (log {log})")
                LOGGER.info(f"Failed    {run.name} seed {run.seed} after {seconds}: {failure}; {self.left} left")

    def _start(self, run: StudyRun, device: str, log: Path) -> subprocess.Popen:
        """The run's process; `<folder>.log` and `<folder>.err` take what it prints, `<folder>.config.json` is its config."""
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            # The resolved config, not the base with its changes: an edit of the base while a study runs must not split it.
            config = log.with_suffix(".config.json")
            write_json(config, run.config.model_copy(update={"device": [device]}).model_dump(mode="json"))
            with open(log, "wb") as out, open(log.with_suffix(".err"), "wb") as err:
                # In a session of its own: a Ctrl-C reaches it once, from here, and not from the terminal as well.
                return subprocess.Popen(
                    [*self.command, "--config", str(config)], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                    env={"OMP_NUM_THREADS": str(self.threads), **os.environ}, start_new_session=True,
                    preexec_fn=partial(_end_with_parent, os.getpid()))
        except OSError as error:
            raise UserError(f"{log.parent}: run '{run.name}' cannot be started there ({error.strerror or error}); mend that, "
                            "or choose another 'filepath', then run the same command again.") from error

    def _stop(self, number: signal.Signals) -> None:
        """Starts nothing more and passes the signal on; the runs save and end, which the executor waits for."""
        with self.guard:
            self.stopping = True
            LOGGER.info(f"{number.name}: waiting for {len(self.running)} runs to save and end")
            for process in self.running:
                process.send_signal(number)


def _record(run: StudyRun, status: int, err: Path) -> dict[str, Any]:
    """The finished record of the run, whose process has ended; raises UserError, one line, if it has not finished."""
    lines = []
    with suppress(OSError):
        lines = [line for line in err.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if not lines:
            err.unlink()
    if status == 0 and (record := run.own_record()):
        return record
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    raise UserError(f"{how}, {lines[-1].strip() if lines else 'nothing on stderr'}")


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent(parent: int) -> None:
    """In the child before it becomes the run: SIGTERM when the study dies, so that a study that was killed leaves nothing
    running that would hold the folders. Linux alone can do that; elsewhere the lock of the run tells who has the folder."""
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(143)
