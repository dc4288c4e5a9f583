"""The trials of a search in Optuna's storage, which every process of the search shares, and what a process holds of them.

Optuna numbers attempts; a trial whose process died is attempted again, with the same values in the same folder, so a trial
here is the newest of its attempts and has the number of the first.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from studies.study import Study
from utils.config import Config
from utils.config.rules import escaped
from utils.errors import UserError
from utils.runs import folder as run_folder
from utils.runs.files import write_json

if TYPE_CHECKING:
    import optuna

SMALLER_IS_BETTER = ("forgetting", "stored_bytes", "stored_parameters")
CLAIM = "claim.lock"  # held by the process that works on a trial


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


class Book:
    """The search in Optuna's storage."""

    def __init__(self, study: Study, search: "optuna.Study") -> None:
        self.study, self.search = study, search

    @classmethod
    def open(cls, study: Study) -> "Book | None":
        """The search as it stands; None where it has not begun. Writes nothing. Raises UserError where the storage cannot be
        read, or holds another search of this name."""
        if not _may_be_there(study):
            return None
        optuna = import_optuna()
        with sentences(study, opening=True):
            try:
                book = cls(study, optuna.load_study(study_name=study.name, storage=_storage(_storage_of(study))))
            except KeyError:
                return None
            book._compare()
        return book

    @classmethod
    def begin(cls, study: Study) -> "Book":
        """The search, made where there is none. Raises UserError where the storage holds another one of this name, or one that
        keeps its runs in another folder."""
        optuna = import_optuna()
        with alone(study), sentences(study, opening=True):
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
        """Writes down what the search is, or else compares, also with the folder that it keeps its runs in."""
        file, attrs = self.study.filepath / "search.id", self.search.user_attrs
        self._compare()
        if "token" not in attrs:
            settings, config = self._settings()
            attrs = {"settings": settings, "config": config.model_dump(mode="json"), "token": secrets.token_hex(8)}
            write_json(file, attrs["token"])
            for key, value in attrs.items():
                self.search.set_user_attr(key, value)
        elif not file.exists() or json.loads(file.read_text()) != attrs["token"]:
            raise UserError(f"filepath: '{self.study.filepath}' is not the folder of the search '{self.study.name}' in its "
                            "storage; all processes of a search share one folder. Name that, or start over with --overwrite.")

    def _compare(self) -> None:
        """Raises UserError if the storage says that the search is another one."""
        attrs, (settings, config) = self.search.user_attrs, self._settings()
        if "token" in attrs:
            different = " and ".join(f"'{key}'" for key in settings if settings[key] != attrs["settings"].get(key))
            shown = different or run_folder.differences(attrs["config"], config, "storage")
        else:
            shown = "its trials, which no study has made" if self.search.get_trials(deepcopy=False) else ""
        if shown:
            raise UserError(f"{escaped(str(self.study.path))}: the search '{self.study.name}' has begun with another setting, "
                            f"different in {shown}; rename the file, or start over with --overwrite.")

    def _settings(self) -> tuple[dict[str, Any], Config]:
        """What may not change once a search has begun, and a config that it can draw."""
        study = self.study
        settings = {"search": study.file.search, "measure": study.file.measure, "seed": study.file.seed}
        return settings, study.run_of("trial", next(study.space.extremes()), study.file.seed[0]).config


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
    held = FileLock(study.filepath / "search.lock")
    try:
        study.filepath.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError as error:
        raise UserError(f"filepath: '{study.filepath}' cannot be locked ({error.strerror or error}), which the processes of a "
                        "search must do; choose another folder.") from error
    try:
        yield
    finally:
        held.release()


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
    """Takes the search out of its storage, whatever it is; raises UserError while a process works on it."""
    if not _may_be_there(study):
        return
    optuna = import_optuna()
    with alone(study), sentences(study, opening=True):
        if not all(map(is_free, study.filepath.glob(f"trial_*/{CLAIM}"))):
            raise UserError(f"filepath: '{study.filepath}' is in use by another process of the search; stop it first.")
        with suppress(KeyError):
            optuna.delete_study(study_name=study.name, storage=_storage(_storage_of(study)))


def _storage_of(study: Study) -> str:
    return study.file.storage or str(study.filepath / "search.journal")


def _may_be_there(study: Study) -> bool:
    """Whether the storage is a file that exists, or something that has to be asked."""
    file = _storage_of(study).removeprefix("sqlite:///")
    return "://" in file or Path(file).exists()


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
def sentences(study: Study, opening: bool = False) -> Iterator[None]:
    """What the storage refuses, in one sentence. opening: also what a driver, a journal or a path may raise."""
    try:
        yield
    except Exception as error:
        theirs = type(error).__module__.partition(".")[0] in ("optuna", "sqlalchemy")
        if isinstance(error, UserError) or not (theirs or opening and isinstance(error, (ImportError, OSError, ValueError))):
            raise
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"storage: '{escaped(_storage_of(study))}' cannot be used ({escaped(line)}); mend that, or name "
                        "another 'storage'.") from error
