"""Studies: one JSON file that stands for many runs, every combination of variant, grid values and seed.

`load_study` settles the config of every run before anything is started; `Study.runs()` is what the runner
(`studies/runner.py`) and the comparison of finished runs go through. `python -m studies.study collect STUDY.json` copies
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
from pathlib import Path
from typing import Any

from studies.file import StudyFile, is_study, read_base, read_study_file
from utils.config import Config, command_line_changes, config_from_dict
from utils.config.rules import escaped
from utils.errors import UserError

__all__ = ["Study", "StudyRun", "is_study", "load_study"]

_LONGEST_NAME = 200  # file systems take 255 bytes, and setting a folder aside adds some
# Keys of the study that the command line may change; every other key is one of the runs' config.
_OWN_KEYS = ("seed", "jobs", "filepath", "results")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: one config, one seed, one folder.

    name: the variant and the grid's values, `sdlora,rank=4`; the same for every seed. variant: "" in a study without
    variants. changes: the config keys that variant and grid set, with their values. config: the resolved config, with this
    seed and folder. recorded: where a committed record of the run would lie; None in a study without `results`.
    """

    name: str
    variant: str
    changes: Mapping[str, Any]
    seed: int
    folder: Path
    config: Config
    recorded: Path | None

    def record(self) -> dict[str, Any] | None:
        """The finished record (`results.json`) of this run, from its folder or else a committed one; None without either.

        Raises UserError for a record that is damaged or was made with another config.
        """
        from studies import records as study_records  # loads torch: mistakes in a study are told without

        return study_records.own(self) or study_records.committed(self)


@dataclass(frozen=True)
class Study:
    """A study with every config resolved. filepath: folder of all runs. results: folder of committed records, or None."""

    path: Path
    filepath: Path
    results: Path | None
    jobs: int
    all_runs: tuple[StudyRun, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    def runs(self) -> list[StudyRun]:
        """Every run. Seed after seed: once the first seed is through there is a result of everything."""
        return list(self.all_runs)


def load_study(path: str | Path, overrides: Sequence[str] = (), **values: Any) -> Study:
    """The study in the file `path` with the changes of the command line; arguments as for `utils.config.load_config`.

    `--set` changes `jobs`, `filepath` or `results` of the study, or a config key, for every run, that the study does not
    vary. Raises UserError, one sentence, for anything wrong in the file, in a base, or in the config of any run.
    """
    path, source = Path(path), escaped(str(path))
    changes = command_line_changes(overrides, **values)
    own = {key: change for key, change in changes.items() if key in _OWN_KEYS}
    file = read_study_file(path, own)
    for key, place in file.varied():
        if key in changes:
            raise UserError(f"{changes[key][1]}: '{key}' is varied by the study ({source}, {place}); change it there.")
    root = Path(file.filepath or f"./runs/studies/{path.stem}/")
    results = None if file.results is None else Path(os.path.normpath(path.parent / file.results))
    combinations = list(_combinations(file))
    _check_names([name for name, _, _ in combinations], source)
    fixed = {key: value for key, (value, _) in changes.items() if key not in own}
    options = {key: option for key, (_, option) in changes.items()}
    runs = []
    for seed, (name, variant, varied) in itertools.product(file.seed, combinations):
        base, folder = Path(os.path.normpath(path.parent / file.base_of(variant))), root / name / f"seed_{seed}"
        places = {key: f"{source}, grid" if key in file.grid else f"{source}, variant '{variant}'" for key in varied}
        config = config_from_dict({**read_base(base, source), **varied, **fixed, "seed": [seed], "filepath": str(folder)},
                                  escaped(str(base)), options={**places, **options})
        recorded = None if results is None else results / name / f"seed_{seed}.json"
        runs.append(StudyRun(name, variant, varied, seed, folder, config, recorded))
    return Study(path, root, results, file.jobs, tuple(runs))


def _combinations(file: StudyFile) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, variant and changed keys of every run, seeds aside."""
    for variant in file.variants or [""]:
        for values in itertools.product(*file.grid.values()):
            point = dict(zip(file.grid, values, strict=True))
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
    """Copies finished records of a study; returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies.study", description="Work with the records of a study.")
    parser.add_argument("what", choices=["collect"], help="copy finished records of its runs into its 'results' folder")
    parser.add_argument("study", help="the study file")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="as the study was run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as it was run")
    options = parser.parse_args(arguments)
    try:
        if not is_study(options.study):
            raise UserError(f"{options.study}: this is a config, not a study (it has no 'base').")
        study = load_study(options.study, options.overrides, seed=options.seed)
        from studies.records import collect  # loads torch

        print(collect(study))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
