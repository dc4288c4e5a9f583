"""A search: trials that Optuna proposes (TPE), each a run on every selecting seed, then runs of the best on other seeds.

Any number of processes on any number of machines take part by starting the same command; they share a storage and the folder
of the runs. What a process works on it holds a lock of, which the kernel takes back when the process dies: the others then see
that its trial is nobody's, and make it up.
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from studies.book import CLAIM, SMALLER_IS_BETTER, Book, Trial, alone, claim, import_optuna, is_free
from studies.study import Study, StudyRun
from studies.trials import measured, report_runs, trial_runs
from utils.config.rules import show
from utils.errors import UserError
from utils.runs.files import read_sealed_json
from utils.runs.lock import LOCK_FILE
from utils.runs.progress import LOGGER

if TYPE_CHECKING:
    import optuna

LOOK_SECONDS = 1.0  # how often the storage is looked at for work while there is none


@dataclass
class _Current:
    """A trial that this process works on."""

    number: int
    attempt: "optuna.Trial"
    held: FileLock
    runs: deque[StudyRun]
    records: list[dict[str, Any]] = field(default_factory=list)
    reported: int = 0  # tasks of the run under way whose accuracy the pruner knows
    step: int = 0  # tasks of all its runs, and the sum of their accuracies
    summed: float = 0.0
    changed: float = 0.0  # when its record was last written
    hopeless: bool = False


class Search:
    """The part of a search that this process does: the `Work` of an executor."""

    def __init__(self, study: Study) -> None:
        self.study, self.book, self.failures = study, Book.begin(study), []
        self.current: dict[str, _Current] = {}  # by the name of its runs
        self.ready: deque[StudyRun] = deque()
        self.reports: dict[Path, FileLock] = {}  # folders of runs of the chosen setting that this process makes
        self.tried: set[Path] = set()
        self.looked = float("-inf")
        self.complete = self.waits = False
        with alone(study):
            self._make_up(failed=True)

    # ---- what an executor asks

    def take(self) -> StudyRun | None:
        if not self.ready and not self.complete and time.monotonic() - self.looked >= LOOK_SECONDS:
            self._look()
        return self.ready.popleft() if self.ready else None

    def over(self) -> bool:
        return self.complete and not self.ready

    def hopeless(self, run: StudyRun) -> bool:
        """Reports the accuracies after the tasks since the last call; whether the median of the trials so far is ahead.

        What is reported is their sum: the rule looks at the best value that a trial has had, and accuracy falls from task to
        task, so that the best would be the first for ever.
        """
        current = self.current.get(run.name)
        if current is None or len(self.study.file.measure) > 1:
            return False
        path = run.folder / "results.json"
        with suppress(OSError, UserError):  # not there yet; what is wrong with it the run will say
            if (changed := path.stat().st_mtime) == current.changed:
                return False
            current.changed = changed
            self._report(current, read_sealed_json(path))
        return current.hopeless

    def _report(self, current: _Current, record: dict[str, Any]) -> None:
        """Tells the pruner the accuracies of a run that it does not know yet. It looks for the least where the measure is one
        of which less is better."""
        sign = -1 if self.study.file.measure[0] in SMALLER_IS_BETTER else 1
        for accuracy in record["metrics"]["top1_curve"][current.reported:]:
            current.summed += accuracy or 0.0  # None without test images
            current.attempt.report(sign * current.summed, current.step)
            current.reported, current.step = current.reported + 1, current.step + 1
            current.hopeless |= current.step < self._steps() and current.attempt.should_prune()

    def ended(self, run: StudyRun, record: dict[str, Any] | None, failure: str) -> str:
        if failure:
            self.failures.append(f"{run.name} seed {run.seed}: {failure}")
        if run.folder in self.reports:
            self.reports.pop(run.folder).release()
        else:
            self._ended_of_trial(self.current[run.name], record, failure)
        self.looked = float("-inf")
        left = self.study.file.trials - sum(trial.over for trial in self.book.trials())
        return f"{left} trial{'s' * (left != 1)} left"

    # ---- what is to be done next

    def _look(self) -> None:
        """Makes up for dead processes, and takes a trial or else a run of the chosen setting, where there is one to take."""
        self.looked = time.monotonic()
        with alone(self.study):
            self._make_up()
            attempts = self.book.attempts().values()
            if len(attempts) < self.study.file.trials or any(attempt.state.name == "WAITING" for attempt in attempts):
                self._begin()
                self.looked = float("-inf")
                return
        trials = self.book.trials()
        if all(trial.over for trial in trials):
            self._take_report(report_runs(self.study, trials))
        elif not self.current and not self.waits:
            LOGGER.info("Waiting for the trials of other processes")
            self.waits = True

    def _make_up(self, failed: bool = False) -> None:
        """Queues again every trial that died with its process, and with `failed` those whose runs have failed."""
        search = self.book.search
        for number, attempt in self.book.attempts().items():
            name = attempt.state.name
            if name == "RUNNING" and f"trial_{number}" not in self.current and self._is_nobodys(number):
                search.tell(attempt.number, state=_state("FAIL"))
            elif name != "FAIL" or ("failure" in attempt.user_attrs and not failed):
                continue
            if attempt.params:
                why = "runs failed" if "failure" in attempt.user_attrs else "process ended"
                LOGGER.info(f"Trial {number} is queued again: its {why}")
                search.enqueue_trial(attempt.params, user_attrs={"first": number})

    def _is_nobodys(self, number: int) -> bool:
        """Whether no process holds the trial, nor a run of it its folder: one outlives its process until it has saved."""
        folder = self.study.filepath / f"trial_{number}"
        return all(map(is_free, [folder / CLAIM, *(folder / f"seed_{seed}" / LOCK_FILE for seed in self.study.file.seed)]))

    def _begin(self) -> None:
        """Asks Optuna for a trial; one whose values a complete trial had has its result at once."""
        attempt = self.book.search.ask()
        trial = Trial(attempt.user_attrs.get("first", attempt.number), "running", self.study.space.draw(attempt))
        shown = ", ".join(f"{key}={show(value)}" for key, value in trial.values.items())
        LOGGER.info(f"Trial {trial.number}: {shown}")
        twin = next((other for other in self.book.trials() if other.state == "complete" and other.values == trial.values
                     and other.same_as is None), None)
        if twin is not None:
            attempt.set_user_attr("same_as", twin.number)
            self.book.search.tell(attempt, list(twin.measured))
            return
        try:
            runs = deque(trial_runs(self.study, trial))
        except UserError as error:  # of a value between the ends of a range, which were checked
            self._fail(attempt, str(error))
            self.failures.append(f"trial {trial.number}: {error}")
            return
        folder = self.study.filepath / f"trial_{trial.number}"
        folder.mkdir(exist_ok=True)
        self.current[folder.name] = _Current(trial.number, attempt, claim(folder / CLAIM), runs)
        self.ready.append(runs.popleft())

    def _take_report(self, runs: Sequence[StudyRun]) -> None:
        """A run of the chosen setting that nobody makes; when all are made, the search is."""
        open_ = [run for run in runs if run.folder not in self.tried and not run.record()]
        self.complete = not open_ and not self.reports
        for run in open_:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            if (held := claim(run.folder.with_name(f"{run.folder.name}.{CLAIM}"))) is None:
                continue
            if not is_free(run.folder / LOCK_FILE):  # by the run of a process that died, until it has saved
                held.release()
                continue
            self.reports[run.folder] = held
            self.tried.add(run.folder)
            self.ready.append(run)
            self.looked = float("-inf")
            return

    # ---- what has come out

    def _ended_of_trial(self, current: _Current, record: dict[str, Any] | None, failure: str) -> None:
        search, measures = self.book.search, self.study.file.measure
        if record is not None:
            current.records.append(record)
            if len(measures) == 1:
                self._report(current, record)  # what came after the last look
        if current.hopeless and (record is None or current.runs):
            search.tell(current.attempt, state=_state("PRUNED"))
        elif record is None and failure:
            self._fail(current.attempt, failure)
        elif record is None:
            search.tell(current.attempt, state=_state("FAIL"))  # stopped: whoever looks next queues it again
        elif current.runs:
            current.reported, current.changed = 0, 0.0
            self.ready.append(current.runs.popleft())
            return
        else:
            values = [[measured(each, name) for each in current.records] for name in measures]
            missing = [name for name, figures in zip(measures, values, strict=True) if None in figures]
            if missing:
                self._fail(current.attempt, f"its runs have no {missing[0]}")
                self.failures.append(f"trial {current.number}: its runs have no {missing[0]}; name another 'measure'")
            else:
                search.tell(current.attempt, [statistics.mean(figures) for figures in values])
        del self.current[f"trial_{current.number}"]
        current.held.release()

    def _steps(self) -> int:
        """How many accuracies a complete trial has reported; one that has as many is no longer worth stopping."""
        return max((len(attempt.intermediate_values) for attempt in self.book.attempts().values()
                    if attempt.state.name == "COMPLETE"), default=0)

    def _fail(self, attempt: "optuna.Trial", reason: str) -> None:
        attempt.set_user_attr("failure", reason)
        self.book.search.tell(attempt, state=_state("FAIL"))


def _state(name: str) -> "optuna.trial.TrialState":
    return import_optuna().trial.TrialState[name]
