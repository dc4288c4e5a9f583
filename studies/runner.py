"""Runs a study: each run a process of its own, some at a time, what is finished skipped, what is not gone on with."""

import ctypes
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from studies import records as study_records
from studies.study import Study, StudyRun
from utils.config import Config, config_warnings
from utils.config.rules import show
from utils.data import DATASETS
from utils.errors import UserError, unknown
from utils.runs import folder as run_folder
from utils.runs.files import write_json
from utils.runs.lock import lock
from utils.runs.processes import place
from utils.runs.progress import LOGGER, format_seconds
from utils.runs.signals import Signals, Stopped

MAIN = Path(__file__).resolve().parent.parent / "main.py"
POLL_SECONDS = 0.1
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def describe_study(study: Study, check: Callable[[Config], None]) -> str:
    """What `--dry-run` prints: every run with its state and changes; raises UserError for what `run_study` would refuse."""
    runs = study.runs()
    states = _states(study, check)
    widths = [max(map(len, column)) for column in
              (states, [run.name for run in runs], [f"seed {run.seed}" for run in runs])]
    lines = [f"{_title(study)}, {states.count('finished')} finished, {study.jobs} at a time"]
    for run, state in zip(runs, states, strict=True):
        columns = (state, run.name, f"seed {run.seed}")
        changes = ", ".join(f"{key}={show(value)}" for key, value in run.changes.items()) or "no changes"
        lines.append("  ".join([*(text.ljust(width) for text, width in zip(columns, widths, strict=True)), changes]))
    return "\n".join(lines)


def perform(study: Study, check: Callable[[Config], None], dry_run: bool, overwrite: bool) -> int:
    """Runs the study, or with `dry_run` prints its runs; returns the exit status. Raises UserError in a run of several
    processes, each of which would start all of the study."""
    if place().processes > 1:
        raise UserError(f"{study.path}: a study starts its own processes; run it with the plain command, python main.py.")
    if not dry_run:
        return run_study(study, check, overwrite)
    print(describe_study(study, check), flush=True)
    return 0


def run_study(study: Study, check: Callable[[Config], None], overwrite: bool = False) -> int:
    """Runs what is not finished; returns the exit status: 0, or 1 when a run has failed.

    `check` raises UserError for a config that no method takes; every config of the study is checked before anything is
    started. `overwrite` sets the folders of all runs aside first, and no committed record counts. A signal is passed on to
    the runs, which save and end; then raises Stopped.
    """
    states = _states(study, check, overwrite)
    for warning in dict.fromkeys(line for run in study.runs() for line in config_warnings(run.config)):
        LOGGER.warning(warning)
    with lock(study.filepath):
        if overwrite:
            for run in study.runs():
                if aside := run_folder.set_aside(run.folder):
                    LOGGER.info(f"--overwrite: what was in {run.folder} is now in {aside}")
        todo = [run for run, state in zip(study.runs(), states, strict=True) if overwrite or state != "finished"]
        jobs = min(study.jobs, len(todo))
        LOGGER.info(f"{_title(study)}, {len(states) - len(todo)} finished already" + (f"; {jobs} at a time" if todo else ""))
        if overwrite and study.results is not None:
            LOGGER.info("--overwrite: committed records do not count; to go on after an interruption use --set results=null.")
        failures = _Pool(todo, jobs).work()
    for failure in failures:
        LOGGER.info(f"Failed: {failure}")
    if failures:
        LOGGER.info(f"{len(failures)} of {len(states)} runs failed; the same command "
                    f"{'without --overwrite ' * overwrite}tries them again.")
    LOGGER.info(f"Compare: python -m analysis.compare {shlex.quote(str(study.path))}")
    return 1 if failures else 0


def _title(study: Study) -> str:
    return f"Study {study.name}: {len(study.runs())} runs in {study.filepath}"


def _states(study: Study, check: Callable[[Config], None], overwrite: bool = False) -> list[str]:
    """For every run "finished", "begun" or "to do"; raises UserError for the first that cannot be made."""
    for config in (run.config for run in study.runs()):
        if config.dataset not in DATASETS:
            raise unknown("dataset", config.dataset, DATASETS)
        check(config)
    if overwrite:
        return ["to do"] * len(study.runs())
    return ["finished" if run.record() else "begun" if (run.folder / "config.json").exists() else "to do"
            for run in study.runs()]


class _Child:
    """The process of a run. What it prints goes to `<folder>.log` and `<folder>.err`, its config is `<folder>.config.json`."""

    def __init__(self, run: StudyRun, device: str, threads: int) -> None:
        self.run, self.device, self.started = run, device, time.monotonic()
        files = (run.folder.with_name(f"{run.folder.name}.{ending}") for ending in ("log", "err", "config.json"))
        self.log, self.err, config = files
        try:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            # The resolved config, not the base with its changes: an edit of the base while a study runs must not split it.
            write_json(config, run.config.model_copy(update={"device": [device]}).model_dump(mode="json"))
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
            with open(self.log, "wb") as log, open(self.err, "wb") as err:
                # In a session of its own: a Ctrl-C reaches it once, from here, and not from the terminal as well.
                self.process = subprocess.Popen(
                    [sys.executable, str(MAIN), "--config", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=err,
                    env=environment, start_new_session=True, preexec_fn=_end_with_parent(os.getpid()))
        except OSError as error:
            raise UserError(f"{run.folder.parent}: run '{run.name}' cannot be started there ({error.strerror or error}); mend "
                            "that, or choose another 'filepath', then run the same command again.") from error

    def ended(self) -> bool:
        return self.process.poll() is not None

    def record(self) -> dict[str, Any]:
        """The finished record of the run, whose process has ended; raises UserError, one line, if it has not finished."""
        status, lines = self.process.returncode, []
        with suppress(OSError):
            lines = [line for line in self.err.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            if not lines:
                self.err.unlink()
        if status == 0 and (record := study_records.own(self.run)):
            return record
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        raise UserError(f"{how}, {lines[-1].strip() if lines else 'nothing on stderr'}")


class _Pool:
    """`jobs` runs at a time, from the front of the queue."""

    def __init__(self, todo: Iterable[StudyRun], jobs: int) -> None:
        self.queue, self.jobs = deque(todo), jobs
        self.running: list[_Child] = []
        self.failures: list[str] = []
        self.threads = max(1, _cores() // max(1, jobs))
        self.turn = itertools.count()
        self.stopping = False

    def work(self) -> list[str]:
        """Runs the queue; returns what failed, a line each. Raises Stopped after a signal, when every run has ended."""
        with Signals() as signals:
            try:
                while self.queue or self.running:
                    while self.queue and len(self.running) < self.jobs:
                        self._start(self.queue.popleft())
                    time.sleep(POLL_SECONDS)
                    self._reap()
                    if signals.received is not None:
                        raise Stopped(signals.received)
            except BaseException as error:
                self._stop(error.signal if isinstance(error, Stopped) else signal.SIGTERM)
                raise
        return self.failures

    def _start(self, run: StudyRun) -> None:
        child = _Child(run, self._device(run), self.threads)
        self.running.append(child)
        LOGGER.info(f"Started   {run.name} seed {run.seed}, log {child.log}")

    def _device(self, run: StudyRun) -> str:
        """Of the devices that the run may use the one with the fewest runs on it, in turn where several have as few."""
        names, turn = run.config.device, next(self.turn)
        used = [child.device for child in self.running]
        return min((names[(turn + step) % len(names)] for step in range(len(names))), key=used.count)

    def _reap(self) -> None:
        """Takes out the runs that have ended, with a line for each."""
        for child in [child for child in self.running if child.ended()]:
            self.running.remove(child)
            run, seconds = child.run, format_seconds(time.monotonic() - child.started)
            left = f"{len(self.queue) + len(self.running)} left"
            try:
                last = child.record()["metrics"]["last_accuracy"]
                LOGGER.info(f"Finished  {run.name} seed {run.seed} in {seconds}, last accuracy {last:.2f}; {left}")
            except UserError as failure:
                if self.stopping:
                    LOGGER.info(f"Stopped   {run.name} seed {run.seed} after {seconds}; {left}")
                    continue
                self.failures.append(f"{run.name} seed {run.seed}: {failure} (log {child.log})")
                LOGGER.info(f"Failed    {run.name} seed {run.seed} after {seconds}: {failure}; {left}")

    def _stop(self, number: signal.Signals) -> None:
        """Passes the signal on and waits until every run has saved and ended."""
        self.stopping = True
        LOGGER.info(f"{number.name}: waiting for {len(self.running)} runs to save and end")
        for child in self.running:
            with suppress(ProcessLookupError):
                child.process.send_signal(number)
        for child in self.running:
            child.process.wait()
        self._reap()


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent(parent: int) -> Callable[[], None] | None:
    """For the child before it becomes the run: SIGTERM when the study dies, so that a study that was killed leaves nothing
    running that would hold the folders. Linux alone can do that; elsewhere the lock of the run tells who has the folder."""
    if _LIBC is None:
        return None

    def prepare() -> None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(143)

    return prepare
