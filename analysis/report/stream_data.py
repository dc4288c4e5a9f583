"""What the page shows of the comparison of a stream's methods: figures for its pictures, and its tables."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.measures import MEASURES, Measure, difference, measures_of, values
from analysis.pictures import adapter_curve, costs_of, known_growth, non_dominated, task_accuracies
from analysis.records import Method, Run, Stream, settings
from analysis.tables import difference_cells, machines, means_cells
from utils.results.metrics import mean_std

_NUMBER = re.compile(r"[<>]?([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `key`: what the column is sorted by, a number or a text; `href`: where it leads."""

    text: str
    key: float | str
    href: str | None = None

    @property
    def sort(self) -> str:
        """The key as the page's script reads it."""
        return str(self.key).replace("inf", "Infinity") if isinstance(self.key, float) else self.key


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first cell of each row is its heading. `slug` is unique on the page."""

    slug: str
    caption: str
    header: list[str]
    rows: list[list[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether its cells are figures, which stand at the right."""
        return [bool(self.rows) and all(isinstance(row[column].key, float) for row in self.rows)
                for column in range(len(self.header))]


def table(slug: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts; a column of figures is sorted as numbers, by the first number of each cell.

    A last column of notes without a note is left out.
    """
    if rows and not any(row[-1] for row in rows) and header[-1] == "note":
        header, rows = header[:-1], [row[:-1] for row in rows]
    columns = [[_NUMBER.match(row[column]) or row[column] in ("", "-") for row in rows] for column in range(len(header))]
    figures = [column > 0 and all(found) for column, found in enumerate(columns)]
    return Table(slug, caption, list(header), [
        [Cell(text, _key(text) if figure else text.casefold()) for text, figure in zip(row, figures, strict=True)]
        for row in rows])


def _key(text: str) -> float:
    """The first number of a figure; of a missing one the smallest."""
    found = _NUMBER.match(text)
    return float(found[1].replace(",", "")) if found else -math.inf


def means(stream: Stream, slug: str) -> Table:
    """Mean ± deviation of every measure, a row per method."""
    return table(f"{slug}-means", "Mean ± standard deviation over seeds", *means_cells(stream))


def differences(stream: Stream, baseline: Method | None, margin: float, slug: str) -> list[tuple[Measure, Table]]:
    """For every measure that can be compared, the paired differences from the baseline with their tests."""
    if baseline is None or len(stream.methods) == 1:
        return []
    others = [method for method in stream.methods if method is not baseline]
    found = []
    for measure in measures_of(stream.methods):
        if values(baseline, measure) and any(values(method, measure) for method in others):
            better = "higher" if measure.higher_is_better else "lower"
            caption = f"{measure.heading}: method minus {baseline.name} on the same seeds; {better} is better"
            cells = difference_cells(stream, baseline, measure, margin)
            found.append((measure, table(f"{slug}-by-{measure.key}", caption, *cells)))
    return found


def config_differences(stream: Stream, slug: str) -> Table | None:
    """The keys whose values differ between the methods of a stream, a column per method; None where none does."""
    configs = [settings(next(iter(method.runs.values())).result) for method in stream.methods]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [[key, *cells] for key in keys if len(set(cells := [_value(config, key) for config in configs])) > 1]
    if not rows:
        return None
    return table(f"{slug}-config", "Config keys whose values differ; a dash is a key that the method does not have",
                 ["key", *(method.name for method in stream.methods)], rows)


def runs_table(stream: Stream, slug: str, links: Mapping[str, str]) -> Table:
    """A row per run, with its record. `links`: by path of the record."""
    measures = [measure for measure in measures_of(stream.methods) if measure.in_page and not measure.optional]
    rows = []
    for method in stream.methods:
        for draw, run in method.runs.items():
            cells = [Cell(method.name, method.name.casefold()), Cell(str(draw), float(draw.seed))]
            cells += [_figure(measure, run) for measure in measures]
            rows.append([*cells, Cell(run.path.name, run.path.name, links[str(run.path)])])
    return Table(f"{slug}-runs", "Runs", ["method", "seed", *(measure.heading for measure in measures), "record"], rows)


def pictures(stream: Stream, baseline: Method | None, margin: float) -> dict[str, Any]:
    """The figures behind the pictures: `[after task][mean, deviation]` and so on, by method."""
    accuracy, costs = next(measure for measure in MEASURES if measure.key == "last_accuracy"), costs_of(stream)
    truth = known_growth(stream)
    methods = [{
        "name": method.name, "baseline": method is baseline, "seeds": len(method.runs),
        "curve": _over_seeds([_curve(run, stream.tasks) for run in method.runs.values()]),
        "adapters": _over_seeds([adapter_curve(run, stream.tasks) for run in method.runs.values()]),
        "final": {field: _over_seeds([task_accuracies(run, field, stream.tasks) for run in method.runs.values()])
                  for field in ("top1", "within")},
        "accuracy": _mean_sd(method, accuracy), "costs": {cost.key: _mean_sd(method, cost) for cost in costs}}
        for method in stream.methods]
    return {"title": stream.title, "tasks": stream.tasks, "domains": list(stream.domains), "methods": methods,
            "costs": [{"key": cost.key, "title": title[0].lower() + title[1:], "best": _best(methods, cost.key)}
                      for cost, title in costs.items()],
            "truth": None if truth is None else truth.tolist(), "machines": machines(stream),
            "differences": {measure.key: _intervals(stream, baseline, measure, margin) for measure, _ in
                            differences(stream, baseline, margin, "")}}


def _best(methods: Sequence[Mapping[str, Any]], cost: str) -> list[str]:
    """The names of the methods that no other beats in accuracy or `cost` without losing in the other."""
    points = {method["name"]: (method["costs"][cost][0], method["accuracy"][0]) for method in methods
              if method["costs"][cost] and method["accuracy"]}
    return [list(points)[index] for index in non_dominated(list(points.values()))]


def _intervals(stream: Stream, baseline: Method, measure: Measure, margin: float) -> dict[str, Any]:
    """The mean difference of every other method with its interval, and what else the picture of a measure needs."""
    rows = []
    for method in stream.methods:
        found = None if method is baseline else difference(method, baseline, measure, margin)
        if found is not None:
            rows.append({"method": method.name, "mean": found.mean, "low": found.low, "high": found.high, "pairs": found.n})
    return {"heading": measure.heading, "better": 1 if measure.higher_is_better else -1,
            "margin": margin if measure.has_margin else None, "rows": rows}


def _curve(run: Run, tasks: int) -> list[float]:
    """Accuracy over all classes seen, after each of the stream's tasks; NaN where the run says nothing."""
    curve = [math.nan] * tasks
    for entry, value in zip(run.result["tasks"], run.result["metrics"]["top1_curve"], strict=True):
        curve[len(entry["counts"]["images"]) - 1] = math.nan if value is None else value
    return curve


def _over_seeds(rows: Sequence[Sequence[float]]) -> list[list[float | None] | None]:
    """Mean and sample deviation (None for one seed) in each column; None where no run has a figure."""
    out = []
    for column in np.array(rows, dtype=float).T:
        known = column[~np.isnan(column)].tolist()
        out.append(list(mean_std(known)) if known else None)
    return out


def _mean_sd(method: Method, measure: Measure) -> list[float | None] | None:
    known = list(values(method, measure).values())
    return list(mean_std(known)) if known else None


def _figure(measure: Measure, run: Run) -> Cell:
    value = measure.read(run.result)
    return Cell("-", -math.inf) if value is None else Cell(f"{value:,.{measure.digits}f}", float(value))


def _value(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "-"
    value = config[key]
    return value if isinstance(value, str) else json.dumps(value)
