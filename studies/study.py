"""Studies: one JSON file that stands for many runs, every combination of variant, grid values and seed, or the trials of a
search.

`load_study` settles the config of every run before anything is started; `Study.runs()` is what the runner
(`studies/runner.py`) and the comparison of finished runs go through. `python -m studies.study collect STUDY.json` writes
the finished records of the runs into the study's `results` folder, to be committed.
"""

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from studies.file import StudyFile, is_study, read_base, read_study_file
from studies.space import Space, read_space
from utils.config import Config, command_line_changes, config_from_dict
from utils.config.rules import as_list, escaped
from utils.data import DATASETS
from utils.errors import UserError, status_of, unknown
from utils.runs import folder as run_folder
from utils.runs.files import read_sealed_json, write_sealed_json

__all__ = ["Study", "StudyRun", "is_study", "load_study"]

_LONGEST_NAME = 200  # file systems take 255 bytes, and setting a folder aside adds some
# Keys of the study that the command line may change; every other key is one of the runs' config.
_OWN_KEYS = ("seed", "jobs", "filepath", "results", "trials", "measure", "report_seed", "prune", "storage",
             "executor")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: one config, one seed, one folder.

    name: the variant and the grid's values, `sdlora,rank=4`, or the trial, `trial_7`; the same for every seed. variant: "" in
    a study without variants. changes: the config keys that variant and grid set, or the trial has drawn, with their values,
    None where they drop what the base gives. config: the resolved config, with this seed and folder. recorded: where a
    committed record of the run would lie; None in a study without `results`. reports: it is one of the chosen setting of a
    search, on a seed that had no part in choosing it.
    """

    name: str
    variant: str
    changes: Mapping[str, Any]
    seed: int
    folder: Path
    config: Config
    recorded: Path | None
    reports: bool = False

    def record(self) -> dict[str, Any] | None:
        """The finished record (`results.json`) of this run, from its folder or else a committed one; None without either.

        Raises UserError for a record that is damaged or was made with another config.
        """
        return self.own_record() or self.committed_record()

    def own_record(self) -> dict[str, Any] | None:
        """The finished record in the run's folder; raises UserError if that folder belongs to another config."""
        run_folder.check_config(self.folder, self.config)
        return run_folder.finished_result(self.folder)

    def committed_record(self) -> dict[str, Any] | None:
        """The committed record of the run; raises UserError for one that is damaged, unfinished or of another config.

        A config key that the record does not have, being older than the key, counts as its default.
        """
        path = self.recorded
        if path is None or not path.exists():
            return None
        record = read_sealed_json(path)
        if not record.get("finished"):
            raise UserError(f"{path}: is the record of a run that is not finished; delete the file, or put a finished one "
                            "there.")
        try:
            shown = run_folder.differences(record["config"], self.config, str(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: holds no config of a run; delete the file to have this run made again.") from error
        if shown:
            raise UserError(f"{path}: is the record of another config, different in {shown}; delete the file to have this "
                            "run made again, or add --set results=null to leave committed records out.")
        return record


@dataclass(frozen=True)
class Study:
    """A study with every config checked.

    fixed: config keys that the command line sets for every run. options: key -> the option that changed it, in words.
    arguments: those of the command line that make this study of its file again, in another process.
    """

    path: Path
    file: StudyFile
    fixed: Mapping[str, Any]
    options: Mapping[str, str]
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def filepath(self) -> Path:
        """The folder of all runs."""
        return Path(self.file.filepath or f"./runs/studies/{self.name}/")

    @property
    def results(self) -> Path | None:
        """The folder of committed records."""
        return None if self.file.results is None else Path(os.path.normpath(self.path.parent / self.file.results))

    @property
    def jobs(self) -> int:
        """How many runs, or processes of a search, are made at a time."""
        return self.file.jobs or (1 if self.file.search or self.file.executor == "local" else len(self._combined))

    def runs(self) -> list[StudyRun]:
        """Every run. Seed after seed: once the first seed is through there is a result of everything. Of a search, those of
        the trials so far, and once all have ended, those of the chosen setting."""
        if not self.file.search:
            return list(self._combined)
        from studies.trials import search_runs  # which is above this module

        return search_runs(self)

    @cached_property
    def _combined(self) -> tuple[StudyRun, ...]:
        combinations = list(_combinations(self.file))
        _check_names([name for name, _, _ in combinations], escaped(str(self.path)))
        return tuple(self.run_of(name, varied, seed, variant)
                     for seed, (name, variant, varied) in itertools.product(self.file.seed, combinations))

    @cached_property
    def space(self) -> Space:
        """What a search draws from."""
        return read_space(self.file.search, {**self._bases[""], **self.fixed}, f"{escaped(str(self.path))}, search")

    def check(self) -> None:
        """Settles the config of every run, and of what a search could draw; raises UserError for the first that is wrong."""
        if not self.file.search:
            self._combined  # noqa: B018  (made here, and kept)
        else:
            for values in self.space.extremes():
                self.run_of("trial", values, self.file.seed[0])

    @cached_property
    def _bases(self) -> dict[str, dict[str, Any]]:
        """By variant, the values in its base."""
        return {variant: read_base(self._base_of(variant), escaped(str(self.path))) for variant in self.file.variants or [""]}

    def _base_of(self, variant: str) -> Path:
        return Path(os.path.normpath(self.path.parent / self.file.base_of(variant)))

    def run_of(self, name: str, varied: Mapping[str, Any], seed: int, variant: str = "", reports: bool = False) -> StudyRun:
        """The run with this name that changes the keys in `varied`; raises UserError if its config is wrong."""
        source = escaped(str(self.path))
        given = {**self._bases[variant], **varied}
        given = {key: value for key, value in given.items() if value is not None or key not in varied} | self.fixed
        places = {key: f"{source}, {self.file.place_of(key, variant)}" for key in varied}
        folder = self.filepath / name / f"seed_{seed}"
        if self.file.search:
            given = self.space.effective(given)
        config = config_from_dict({**given, "seed": [seed], "filepath": str(folder)},
                                  escaped(str(self._base_of(variant))), options={**places, **self.options})
        for dataset in as_list(config.dataset):
            if dataset not in DATASETS:
                raise unknown("dataset", dataset, DATASETS)
        recorded = None if self.results is None else self.results / name / f"seed_{seed}.json"
        return StudyRun(name, variant, varied, seed, folder, config, recorded, reports)

    def collect(self) -> str:
        """Writes finished records from the folders of the runs to `results`; what it did, in words.

        They are in the form of `committed_form`, each on one line and sealed anew. A committed record of the same config is
        replaced; one of another config is refused, before anything is written.
        """
        if self.results is None:
            raise UserError(f"{self.path}: has no 'results', the folder to collect records in; add it to the study.")
        have = {run.recorded for run in self.runs() if run.committed_record()}
        finished = [run for run in self.runs() if run.own_record()]
        for folder in [self.results, *(run.recorded.parent for run in finished)]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"results: the folder '{folder}' cannot be made ({error.strerror}).") from error
        for run in finished:
            write_sealed_json(run.recorded, run_folder.committed_form(run.own_record()), compact=True)
        if self.file.search:
            from studies.trials import collect_trials

            collect_trials(self)
        missing = len(self.runs()) - len(have | {run.recorded for run in finished})
        return f"{len(finished)} records written to {self.results}; of {len(self.runs())} runs {missing} have none yet."


def load_study(path: str | Path, overrides: Sequence[str] = (), **values: Any) -> Study:
    """The study in the file `path` with the changes of the command line; arguments as for `utils.config.load_config`.

    `--set` changes a key of the study, such as `jobs`, `filepath` or `results`, or a config key, for every run, that the study
    does not vary. Raises UserError, one sentence, for anything wrong in the file, in a base, or in the config of any run.
    """
    path, source = Path(path), escaped(str(path))
    changes = command_line_changes(overrides, **values)
    file = read_study_file(path, {key: change for key, change in changes.items() if key in _OWN_KEYS})
    for key, place in file.varied():
        if key in changes:
            raise UserError(f"{changes[key][1]}: '{key}' is varied by the study ({source}, {place}); change it there.")
    given = [word for key, value in values.items() if value is not None for word in (f"--{key}", *map(str, value))]
    given += [word for text in overrides if text.partition("=")[0].strip() not in ("executor", "jobs")
              for word in ("--set", text)]
    study = Study(path, file, {key: value for key, (value, _) in changes.items() if key not in _OWN_KEYS},
                  {key: option for key, (_, option) in changes.items()},
                  ("--config", str(path.resolve()), *given))
    study.check()
    return study


def _combinations(file: StudyFile) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, variant and changed keys of every run, seeds aside."""
    for variant in file.variants or [""]:
        grid = file.grid_of(variant)
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            parts = [variant] * bool(variant) + [f"{key}={_readable(value)}" for key, value in point.items()]
            yield ",".join(parts) or "base", variant, file.changes_of(variant) | point


def _readable(value: Any) -> str:
    """`value` as part of a folder's name: JSON without quotes, whatever a shell or file system minds as a dash."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-") if not isinstance(value, int | float) else text


def _check_names(names: Sequence[str], source: str) -> None:
    """Refuses names that a file system could not take or, where case is one, not tell apart."""
    seen: dict[str, str] = {}
    for name in names:
        if len(name) > _LONGEST_NAME:
            raise UserError(f"{source}: the run '{name[:60]}...' has a name of {len(name)} letters, too long for a folder; "
                            "write some of the grid as 'variants'.")
        if name.casefold() in seen:
            raise UserError(f"{source}: the runs '{seen[name.casefold()]}' and '{name}' would share a folder; write these "
                            "values as 'variants' with names of their own.")
        seen[name.casefold()] = name


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes finished records of a study; returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies.study", description="Work with the records of a study.")
    parser.add_argument("what", choices=["collect"], help="write finished records of its runs into its 'results' folder")
    parser.add_argument("study", help="the study file")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="as the study was run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as it was run")
    options = parser.parse_args(arguments)

    def work() -> None:
        if not is_study(options.study):
            raise UserError(f"{options.study}: this is a config, not a study (it has no 'base').")
        print(load_study(options.study, options.overrides, seed=options.seed).collect())

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
