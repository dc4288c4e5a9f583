"""The executor `local`: runs as processes of this machine, some at a time, each with its share of cores and a device.

Kept by hand is what no library keeps: a signal reaches the runs, which save and end, and a study that is killed leaves none
behind. submitit's own local executor kills what has not ended within a second, lives on without its study, and starts
everything at once; joblib's processes die of a signal.
"""

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from studies import job
from studies.study import StudyRun
from utils.errors import UserError
from utils.runs.files import write_json
from utils.runs.progress import LOGGER, format_seconds
from utils.runs.signals import Signals, Stopped

POLL_SECONDS = 0.1  # how often processes and signals are looked at


class Work(Protocol):
    """What is to be run, one run at a time."""

    def take(self) -> StudyRun | None:
        """The next run to start; None where there is none now."""

    def over(self) -> bool:
        """Whether nothing is left to be started, now or later, once the runs under way have ended."""

    def hopeless(self, run: StudyRun) -> bool:
        """Whether a run under way is to be stopped; asked again and again."""

    def ended(self, run: StudyRun, record: dict[str, Any] | None, failure: str) -> str:
        """Takes note of a run that has ended, with its finished record or else why there is none ("" where it was stopped by
        the end of the study); what to say of what is left."""


@dataclass
class _Process:
    run: StudyRun
    place: int
    log: Path
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False


def carry_out(work: Work, jobs: int, command: Sequence[str]) -> None:
    """Makes the runs of `work`, `jobs` at a time, each by `command --config FILE`.

    A signal is passed on to the runs, which save and end; then raises Stopped.
    """
    running: list[_Process] = []
    places, threads = list(reversed(range(jobs))), max(1, job.cores() // jobs)
    with Signals() as signals:
        try:
            while running or not work.over():
                while places and (run := work.take()) is not None:
                    running.append(_start(run, places.pop(), command, threads))
                time.sleep(POLL_SECONDS)
                for each in list(running):
                    if each.process.poll() is not None:
                        running.remove(each)
                        places.append(each.place)
                        _report(each, work)
                    elif not each.stopped and work.hopeless(each.run):
                        each.stopped = True
                        each.process.send_signal(signal.SIGTERM)
                if signals.received is not None:
                    raise Stopped(signals.received)
        except BaseException as error:
            number = error.signal if isinstance(error, Stopped) else signal.SIGTERM
            LOGGER.info(f"{number.name}: waiting for {len(running)} runs to save and end")
            for each in running:
                each.stopped = True
                each.process.send_signal(number)
            for each in running:
                each.process.wait()
                _report(each, work)
            raise


def config_file(run: StudyRun, device: list[str]) -> tuple[Path, Path]:
    """Writes the run's config, on these devices, to `<folder>.config.json`; that file and `<folder>.log`. Raises OSError.

    It is the resolved config and not the base with its changes: an edit of the base while a study runs must not split it.
    """
    log = run.folder.with_name(f"{run.folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    config = log.with_suffix(".config.json")
    write_json(config, run.config.model_copy(update={"device": device}).model_dump(mode="json"))
    return config, log


def cannot_start(run: StudyRun, error: OSError) -> UserError:
    """The sentence for a run whose files cannot be written."""
    return UserError(f"{run.folder.parent}: run '{run.name}' cannot be started there ({error.strerror or error}); mend that, "
                     "or choose another 'filepath', then run the same command again.")


def outcome(run: StudyRun, status: int, log: Path) -> tuple[dict[str, Any] | None, str]:
    """The finished record of a run whose process has ended with this status, or None and why there is none."""
    err = log.with_suffix(".err")
    try:
        if err.exists() and not err.stat().st_size:
            err.unlink()
        if status == 0 and (record := run.own_record()):
            return record, ""
    except (UserError, OSError) as error:
        return None, str(error)
    return None, job.failure(status, log)


def _start(run: StudyRun, place: int, command: Sequence[str], threads: int) -> _Process:
    try:
        config, log = config_file(run, [run.config.device[place % len(run.config.device)]])
        process = job.start([*command, "--config", str(config)], log, threads)
    except OSError as error:
        raise cannot_start(run, error) from error
    LOGGER.info(f"Started   {run.name} seed {run.seed}, log {log}")
    return _Process(run, place, log, process)


def _report(each: _Process, work: Work) -> None:
    record, failure = outcome(each.run, each.process.returncode, each.log)
    report(each.run, record, "" if each.stopped else failure, time.monotonic() - each.started, each.log, work)


def report(run: StudyRun, record: dict[str, Any] | None, failure: str, seconds: float, log: Path, work: Work) -> None:
    """Tells `work` how a run has ended, and says it."""
    left = work.ended(run, record, f"{failure} (log {log})" if failure else "")
    name, took = f"{run.name} seed {run.seed}", format_seconds(seconds)
    if record is not None:
        LOGGER.info(f"Finished  {name} in {took}, last accuracy {record['metrics']['last_accuracy']:.2f}; {left}")
    elif failure:
        LOGGER.info(f"Failed    {name} after {took}: {failure}; {left}")
    else:
        LOGGER.info(f"Stopped   {name} after {took}; {left}")
