"""The trials of a search: in Optuna's storage, shared by every process of the search, and as the runs that they stand for.

Optuna numbers attempts; a trial whose process died is attempted again, with the same values in the same folder, so a trial
here is the newest of its attempts and has the number of the first.
"""

import dataclasses
import json
import secrets
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from studies.study import Study, StudyRun
from utils.config.rules import escaped, show
from utils.errors import UserError
from utils.runs import folder as run_folder
from utils.runs.files import write_json

if TYPE_CHECKING:
    import optuna

SMALLER_IS_BETTER = ("forgetting", "stored_bytes", "stored_parameters")
CLAIM = "claim.lock"  # held by the process that works on a trial
COMMITTED = "search.json"  # the trials of a search, in the study's `results`


@dataclass(frozen=True)
class Trial:
    """state: "waiting", "running", "complete", "pruned" or "failed". values: the drawn keys. measured: by the study's
    `measure`, means over its seeds; None unless complete. note: the tasks after which it was pruned, why it failed, or the
    trial of the same values whose runs it took over."""

    number: int
    state: str
    values: Mapping[str, Any]
    measured: Sequence[float] | None = None
    note: str = ""
    same_as: int | None = None

    @property
    def over(self) -> bool:
        return self.state not in ("waiting", "running")


def measured(record: Mapping[str, Any], name: str) -> float | None:
    """The measure of this name at the end of a run; None where it has none."""
    return record["metrics"].get(name) if name in record["metrics"] else record["tasks"][-1].get(name)


def best(trials: Sequence[Trial], measures: Sequence[str]) -> list[Trial]:
    """Of the complete trials the one that none beats, the first of equals; with two measures all that none beats in both."""
    signs = [-1 if name in SMALLER_IS_BETTER else 1 for name in measures]
    scores = {trial.number: [sign * value for sign, value in zip(signs, trial.measured, strict=True)]
              for trial in trials if trial.state == "complete" and trial.same_as is None}

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))

    front = [number for number, score in scores.items() if not any(beats(other, score) for other in scores.values())]
    return [trial for trial in trials if trial.number in (front if len(measures) > 1 else front[:1])]


def trial_runs(study: Study, trial: Trial) -> list[StudyRun]:
    """The runs of a trial, one on each of the selecting seeds."""
    return [study.run_of(f"trial_{trial.number}", trial.values, seed) for seed in study.file.seed]


def report_runs(study: Study, trials: Sequence[Trial]) -> list[StudyRun]:
    """The runs of what the search has chosen, on the reporting seeds; none before every trial is over."""
    if len(trials) < study.file.trials or not all(trial.over for trial in trials):
        return []
    return [study.run_of(f"chosen_{trial.number}", trial.values, seed, reports=True)
            for seed in study.file.report_seed or [] for trial in best(trials, study.file.measure)]


def search_runs(study: Study) -> list[StudyRun]:
    """Every run of a search so far, those of the chosen setting first."""
    trials = known_trials(study)
    return [*report_runs(study, trials),
            *(run for trial in trials if trial.same_as is None for run in trial_runs(study, trial))]


def known_trials(study: Study) -> list[Trial]:
    """The trials in the search's storage, or else the committed ones; none where it has not begun."""
    if book := Book.open(study):
        return book.trials()
    path = None if study.results is None else study.results / COMMITTED
    if path is None or not path.exists():
        return []
    try:
        return [Trial(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: does not hold the trials of a search ({error}); restore it, or delete it.") from error


def collect_trials(study: Study) -> None:
    """Writes the trials into the study's `results`."""
    study.results.mkdir(parents=True, exist_ok=True)
    write_json(study.results / COMMITTED, [dataclasses.asdict(trial) for trial in known_trials(study)])


def table(study: Study, trials: Sequence[Trial]) -> list[str]:
    """The trials, a line each, then the best and what its setting has on the reporting seeds."""
    keys, measures = list(study.space.items), study.file.measure
    rows = [["trial", *keys, *measures, "state"]]
    for trial in trials:
        values = [_text(trial.values[key]) if key in trial.values else "-" for key in keys]
        figures = [f"{value:.2f}" if value % 1 else f"{value:.0f}" for value in trial.measured or []] or ["-"] * len(measures)
        rows.append([str(trial.number), *values, *figures, f"{trial.state} {trial.note}".strip()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row[:-1], widths)) + f"  {row[-1]}" for row in rows]
    for trial in best(trials, measures):
        shown = ", ".join(f"{key}={_text(value)}" for key, value in trial.values.items())
        figures = ", ".join(f"{name} {value:.2f}" for name, value in zip(measures, trial.measured, strict=True))
        lines.append(f"{'Best' if len(measures) == 1 else 'On the front'}: trial {trial.number}, {figures} ({shown})")
    return lines + list(_reported(study, trials))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def _reported(study: Study, trials: Sequence[Trial]) -> Iterator[str]:
    """What the chosen settings have on the reporting seeds."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in report_runs(study, trials):
        if record := run.record():
            by_name.setdefault(run.name, []).append(record)
    for name, records in by_name.items():
        parts = []
        for measure in study.file.measure:
            values = [value for record in records if (value := measured(record, measure)) is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            parts.append(f"{measure} {statistics.mean(values):.2f}{spread}" if values else f"no {measure}")
        yield f"Reported: {name} on {len(records)} seed{'s' * (len(records) != 1)}, {', '.join(parts)}"


class Book:
    """The search in Optuna's storage."""

    def __init__(self, study: Study, search: "optuna.Study") -> None:
        self.study, self.search = study, search

    @classmethod
    def open(cls, study: Study) -> "Book | None":
        """The search as it stands; None where it has not begun. Writes nothing. Raises UserError."""
        place = _storage_of(study)
        file = Path(place.removeprefix("sqlite:///")) if place.startswith("sqlite:///") else place
        if (isinstance(file, Path) or "://" not in place) and not Path(file).exists():
            return None
        optuna = import_optuna()
        try:
            with _sentences(study):
                return cls(study, optuna.load_study(study_name=study.name, storage=_storage(place)))
        except KeyError:
            return None

    @classmethod
    def begin(cls, study: Study) -> "Book":
        """The search, made where there is none. Raises UserError where the storage holds another one of this name, or one that
        keeps its runs in another folder."""
        optuna = import_optuna()
        study.filepath.mkdir(parents=True, exist_ok=True)
        with alone(study), _sentences(study):
            number = len(study.file.measure)
            search = optuna.create_study(
                study_name=study.name, storage=_storage(_storage_of(study)), load_if_exists=True,
                directions=["minimize" if name in SMALLER_IS_BETTER else "maximize" for name in study.file.measure],
                pruner=optuna.pruners.MedianPruner() if number == 1 and study.file.prune is not False else
                optuna.pruners.NopPruner())
            book = cls(study, search)
            book._settle()
            # Every process draws its own; a search of one process is the same every time.
            processes = search.user_attrs.get("processes", 0)
            search.set_user_attr("processes", processes + 1)
            search.sampler = optuna.samplers.TPESampler(seed=study.file.seed[0] + processes, constant_liar=True)
        return book

    def attempts(self) -> dict[int, "optuna.trial.FrozenTrial"]:
        """The newest attempt at every trial, by the number of the first. One that died before it had any values is none."""
        newest: dict[int, optuna.trial.FrozenTrial] = {}
        for attempt in self.search.get_trials(deepcopy=False):
            if attempt.params or attempt.state.name != "FAIL":
                newest[attempt.user_attrs.get("first", attempt.number)] = attempt
        return newest

    def trials(self) -> list[Trial]:
        """Every trial so far, by number."""
        return [self._trial(number, attempt) for number, attempt in sorted(self.attempts().items())]

    def _trial(self, number: int, attempt: "optuna.trial.FrozenTrial") -> Trial:
        given = attempt.params or attempt.system_attrs.get("fixed_params", {})
        values = {key: self.study.space.value(key, given[key]) for key in self.study.space.items if key in given}
        name, notes = attempt.state.name, attempt.user_attrs
        if name == "COMPLETE":
            same = notes.get("same_as")
            return Trial(number, "complete", values, attempt.values, "" if same is None else f"as trial {same}", same)
        if name == "PRUNED":
            tasks = len(attempt.intermediate_values)
            return Trial(number, "pruned", values, note=f"after {tasks} task{'s' * (tasks != 1)}")
        if name == "FAIL" and "failure" in notes:
            return Trial(number, "failed", values, note=f"({notes['failure']})")
        return Trial(number, "running" if name == "RUNNING" else "waiting", values)

    def _settle(self) -> None:
        """Writes down what the search is, or compares with what is written."""
        study = self.study
        base = study.run_of("base", next(study.space.extremes()), study.file.seed[0]).config.model_dump(mode="json")
        now = {"search": study.file.search, "measure": study.file.measure, "seed": study.file.seed}
        token, attrs = study.filepath / "search.id", self.search.user_attrs
        if "folder" not in attrs:
            write_json(token, secrets.token_hex(8))
            for key, value in {"settings": now, "base": base, "folder": json.loads(token.read_text())}.items():
                self.search.set_user_attr(key, value)
            return
        if not token.exists() or json.loads(token.read_text()) != attrs["folder"]:
            raise UserError(f"filepath: '{study.filepath}' is not the folder of the search '{study.name}' in its storage; all "
                            "processes of a search share one folder. Name that one, or start over with --overwrite.")
        different = [key for key in now if now[key] != attrs["settings"].get(key)]
        config = study.run_of("base", next(study.space.extremes()), study.file.seed[0]).config
        shown = " and ".join(f"'{key}'" for key in different) or run_folder.differences(attrs["base"], config, "storage")
        if shown:
            raise UserError(f"{escaped(str(study.path))}: the search '{study.name}' has begun with another setting, different "
                            f"in {shown}; rename the file, or start over with --overwrite.")


def import_optuna() -> ModuleType:
    """Optuna, quiet; raises UserError where it is not installed."""
    try:
        import optuna
        import optuna.storages.journal  # of version 4 and later
    except ImportError as error:
        raise UserError("search: needs the package optuna, version 4 or later; install it with: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextmanager
def alone(study: Study) -> Iterator[None]:
    """Of all processes of a search one at a time is in here."""
    try:
        with FileLock(study.filepath / "search.lock"):
            yield
    except OSError as error:
        raise UserError(f"filepath: '{study.filepath}' cannot be locked ({error.strerror or error}), which the processes of a "
                        "search must do; choose another folder.") from error


def claim(path: Path) -> FileLock | None:
    """A lock on `path` that the kernel takes back when this process dies; None where another process has it."""
    held = FileLock(path)
    try:
        held.acquire(blocking=False)
        return held
    except Timeout:
        return None


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock `path`."""
    if not path.exists():
        return True
    held = claim(path)
    if held is not None:
        held.release()
    return held is not None


def discard(study: Study) -> None:
    """Takes the search out of its storage; raises UserError while a process works on it."""
    book = Book.open(study)
    if book is None:
        return
    for trial in book.trials():
        if not is_free(study.filepath / f"trial_{trial.number}" / CLAIM):
            raise UserError(f"filepath: '{study.filepath}' is in use by another process of the search; stop it first.")
    with _sentences(study):
        import_optuna().delete_study(study_name=study.name, storage=_storage(_storage_of(study)))


def _storage_of(study: Study) -> str:
    return study.file.storage or str(study.filepath / "search.journal")


def _storage(place: str) -> Any:
    """Optuna's storage for a URL of a database or the path of a journal file."""
    if "://" in place:
        return place
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(place).resolve()  # the lock beside it is a link, which would be relative to its own folder
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


@contextmanager
def _sentences(study: Study) -> Iterator[None]:
    """What a storage refuses, in one sentence."""
    try:
        yield
    except (UserError, KeyError):
        raise
    except Exception as error:  # whatever the database's driver raises
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"storage: '{escaped(_storage_of(study))}' cannot be used ({escaped(line)}); mend that, or name "
                        "another 'storage'.") from error
