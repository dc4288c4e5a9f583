"""Runs a study: what is finished is skipped, what is not is gone on with, where the study's `executor` says.

`studies/local.py` makes runs on this machine, `studies/slurm.py` in jobs of a cluster; `studies/search.py` decides what the
trials of a search are.
"""

import shlex
from collections import deque
from collections.abc import Sequence
from typing import Any

from studies import job, local, slurm
from studies.book import Book, discard, sentences
from studies.search import Search
from studies.study import Study, StudyRun
from studies.trials import known_trials, table
from utils.config import config_warnings
from utils.config.rules import show
from utils.errors import UserError
from utils.runs import folder as run_folder
from utils.runs.lock import lock
from utils.runs.processes import place
from utils.runs.progress import LOGGER, format_seconds


def perform(study: Study, command: Sequence[str], dry_run: bool = False, overwrite: bool = False) -> int:
    """Runs what of the study is not finished, each run by `command --config FILE`; or with `dry_run` prints its runs.

    Returns the exit status: 0, or 1 when a run has failed. Every config is checked before anything is started. `overwrite`
    sets the folders of all runs aside first, and no committed record counts. A signal is passed on to the runs of this
    machine, which save and end; then raises Stopped. Raises UserError in a run of several processes, each of which would
    start all of the study.
    """
    if place().processes > 1:
        raise UserError(f"{study.path}: a study starts its own processes; run it with the plain command, python main.py.")
    failures = (_search if study.file.search else _runs)(study, command, dry_run, overwrite)
    if dry_run:
        return 0
    for failure in failures:
        LOGGER.info(f"Failed: {failure}")
    if failures:
        LOGGER.info(f"{len(failures)} of {len(study.runs())} runs failed; the same command "
                    f"{'without --overwrite ' * overwrite}tries them again.")
    LOGGER.info(f"Compare: python -m analysis.compare {shlex.quote(str(study.path))}")
    return 1 if failures else 0


class _Listed:
    """The `Work` of a study that is no search: its runs, in order."""

    def __init__(self, todo: Sequence[StudyRun]) -> None:
        self.todo, self.left, self.failures = deque(todo), len(todo), []

    def take(self) -> StudyRun | None:
        return self.todo.popleft() if self.todo else None

    def over(self) -> bool:
        return not self.todo

    def hopeless(self, run: StudyRun) -> bool:
        return False

    def ended(self, run: StudyRun, record: dict[str, Any] | None, failure: str) -> str:
        self.left -= 1
        if failure:
            self.failures.append(f"{run.name} seed {run.seed}: {failure}")
        return f"{self.left} left"


def _runs(study: Study, command: Sequence[str], dry_run: bool, overwrite: bool) -> list[str]:
    """Makes the runs of a study that is no search; what failed, a line each."""
    runs = study.runs()
    states = [_state(run, overwrite) for run in runs]
    todo = [run for run, state in zip(runs, states, strict=True) if state != "finished"]
    jobs = min(study.jobs, len(todo))
    title = f"Study {study.name}: {len(runs)} runs in {study.filepath}, {len(runs) - len(todo)} finished"
    if dry_run:
        print("\n".join([f"{title}, {study.jobs} at a time", *_table(runs, states)]), flush=True)
        return []
    for warning in dict.fromkeys(line for run in runs for line in config_warnings(run.config)):
        LOGGER.warning(warning)
    with lock(study.filepath):
        if overwrite:
            for run in runs:
                if aside := run_folder.set_aside(run.folder):
                    LOGGER.info(f"--overwrite: what was in {run.folder} is now in {aside}")
        LOGGER.info(f"{title} already" + (f"; {jobs} at a time" if todo else ""))
        if overwrite and study.results is not None:
            LOGGER.info("--overwrite: committed records do not count; to go on after an interruption use --set results=null.")
        work = _Listed(todo)
        if todo and study.file.executor == "slurm":
            slurm.carry_out(study, work, command)
        elif todo:
            local.carry_out(work, jobs, command)
    return work.failures


def _search(study: Study, command: Sequence[str], dry_run: bool, overwrite: bool) -> list[str]:
    """Takes part in a search, or has jobs do so; what failed, a line each."""
    file = study.file
    title = f"Search {study.name}: {file.trials} trials in {study.filepath}"
    if dry_run:
        print("\n".join([title, *table(study, known_trials(study))]), flush=True)
        return []
    if overwrite:
        discard(study)
        if aside := run_folder.set_aside(study.filepath):
            LOGGER.info(f"--overwrite: what was in {study.filepath} is now in {aside}")
    LOGGER.info(f"{title}; {study.jobs} at a time")
    if file.executor == "slurm":
        Book.begin(study)  # what is wrong with the storage is said here, and not by every job
        failures = _search_in_jobs(study, command)
    else:
        search = Search(study)
        with sentences(study):
            local.carry_out(search, study.jobs, command)
        failures = search.failures
    for line in table(study, known_trials(study)):
        LOGGER.info(line)
    return failures


def _search_in_jobs(study: Study, command: Sequence[str]) -> list[str]:
    """Has as many jobs as `jobs` says take part in a search, each as one process; what failed, a line each."""
    words = [*command, *study.arguments, "--set", "executor=local", "--set", "jobs=1"]
    tasks = [slurm.Task(f"process {number}", words, (study.filepath / f"process_{number}.log").resolve())
             for number in range(study.jobs)]
    failures = []
    for task, status, seconds in slurm.finished(study, tasks, len(tasks)):
        reason = status if isinstance(status, str) else job.failure(status, task.log) if status else ""
        LOGGER.info(f"{'Failed' if reason else 'Finished'}  {task.name} after {format_seconds(seconds)}")
        failures += [f"{task.name}: {reason} (log {task.log})"] if reason else []
    return failures


def _state(run: StudyRun, overwrite: bool) -> str:
    """"finished", "begun" or "to do"; raises UserError if the run's folder or record is of another config, or is yet to be
    made where nothing may be written."""
    if not overwrite and run.record():
        return "finished"
    run_folder.check_place(run.folder)
    return "begun" if not overwrite and (run.folder / "config.json").exists() else "to do"


def _table(runs: Sequence[StudyRun], states: Sequence[str]) -> list[str]:
    """A line for every run: its state, name, seed and changes."""
    rows = [(state, run.name, f"seed {run.seed}") for run, state in zip(runs, states, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    changes = [", ".join(f"{key}={show(value)}" for key, value in run.changes.items()) or "no changes" for run in runs]
    return ["  ".join([*map(str.ljust, row, widths), changed]) for row, changed in zip(rows, changes, strict=True)]
