"""The trials of a search as the runs that they stand for, and what came of them: the best, and the table."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from studies.book import SMALLER_IS_BETTER, Book, Trial
from studies.study import Study, StudyRun
from utils.config.rules import show
from utils.errors import UserError
from utils.runs.files import write_json

COMMITTED = "search.json"  # the trials of a search, in the study's `results`


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
    """Every run of a search so far, those of the chosen setting first. Failed trials, which may be no config, have none."""
    trials = known_trials(study)
    made = [trial for trial in trials if trial.same_as is None and trial.state != "failed"]
    return [*report_runs(study, trials), *(run for trial in made for run in trial_runs(study, trial))]


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
    write_json(study.results / COMMITTED, [dataclasses.asdict(trial) for trial in known_trials(study)])


def table(study: Study, trials: Sequence[Trial]) -> list[str]:
    """The trials, a line each, then the best and what its setting has on the reporting seeds."""
    keys, measures = list(study.space.items), study.file.measure
    rows = [["trial", *keys, *measures, "state"]]
    for trial in trials:
        values = [_text(trial.values[key]) if key in trial.values else "-" for key in keys]
        figures = [_figure(value) for value in trial.measured or []] or ["-"] * len(measures)
        rows.append([str(trial.number), *values, *figures, f"{trial.state} {trial.note}".strip()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row[:-1], widths)) + f"  {row[-1]}" for row in rows]
    for trial in best(trials, measures):
        shown = ", ".join(f"{key}={_text(value)}" for key, value in trial.values.items())
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in zip(measures, trial.measured, strict=True))
        lines.append(f"{'Best' if len(measures) == 1 else 'On the front'}: trial {trial.number}, {figures} ({shown})")
    return lines + list(_reported(study, trials))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def _figure(value: float) -> str:
    return f"{value:.2f}" if value % 1 else f"{value:.0f}"


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
