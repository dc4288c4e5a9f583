"""The comparison in one table per stream, the best method first: the form in which docs/RESULTS.md has it."""

from collections.abc import Sequence
from typing import NamedTuple

from analysis.measures import MEASURES, difference, values
from analysis.records import Method, Stream
from analysis.tables import MISSING, markdown, p_text
from utils.results.metrics import mean_std

_BY_KEY = {measure.key: measure for measure in MEASURES}
RANKED_BY = _BY_KEY["last_accuracy"]


class Column(NamedTuple):
    """A measure of `MEASURES` by its key, with the heading and digits that it has here. spread: with its deviation."""

    key: str
    heading: str
    digits: int
    spread: bool = True


COLUMNS = (Column("last_accuracy", "last accuracy (%)", 2), Column("average_accuracy", "average (%)", 2),
           Column("mean_task_accuracy", "mean over tasks (%)", 2), Column("forgetting", "forgetting", 1),
           Column("within_task_accuracy", "within task (%)", 1), Column("adapters", "adapters", 1),
           Column("kept_set_f1", "F1", 2), Column("stored_bytes", "stored bytes", 0, spread=False),
           Column("training_seconds", "training (s)", 0, spread=False),
           Column("image_milliseconds", "ms an image", 2, spread=False))


def brief(streams: Sequence[Stream], baselines: Sequence[Method | None]) -> str:
    """A table per stream, under its title, in Markdown.

    baselines: per stream the method whose last accuracy is taken off, None where it has none.
    """
    return "\n\n".join(f"## {stream.title}\n\n{_table(stream, baseline)}"
                       for stream, baseline in zip(streams, baselines, strict=True))


def _table(stream: Stream, baseline: Method | None) -> str:
    """A row per method: seeds, mean ± deviation, and last accuracy minus the baseline's on the same seeds."""
    columns = [column for column in COLUMNS if any(values(method, _BY_KEY[column.key]) for method in stream.methods)]
    header = ["method", "seeds", *(column.heading for column in columns)]
    header += [f"last: minus {baseline.name}"] if baseline else []
    rows = []
    for method in sorted(stream.methods, key=_rank, reverse=True):
        row = [f"`{method.name}`", str(len(method.runs)), *(_figure(method, column) for column in columns)]
        rows.append(row + [_difference(method, baseline)] if baseline else row)
    return markdown(header, rows)


def _rank(method: Method) -> float:
    mean, _ = mean_std(list(values(method, RANKED_BY).values()))
    return mean


def _figure(method: Method, column: Column) -> str:
    known = list(values(method, _BY_KEY[column.key]).values())
    if not known:
        return MISSING
    mean, deviation = mean_std(known)
    text = f"{mean:,.{column.digits}f}"
    shown = column.spread and deviation is not None and round(deviation, column.digits) > 0
    return f"{text} ± {deviation:,.{column.digits}f}" if shown else text


def _difference(method: Method, baseline: Method) -> str:
    """Mean ± deviation and p of the paired t test, and the number of pairs where it is not that of the baseline's seeds."""
    if method is baseline:
        return ""
    result = difference(method, baseline, RANKED_BY, margin=None)
    if result is None:
        return MISSING
    text = f"{result.mean:+.2f}" + ("" if result.sd is None else f" ± {result.sd:.2f}")
    notes = [] if result.t_p is None else [f"p {p_text(result.t_p)}"]
    if result.n != len(baseline.runs):
        notes.append(f"{result.n} seed{'s' * (result.n > 1)}")
    return text + (f" ({', '.join(notes)})" if notes else "")
