"""The comparison in words and numbers: a page in Markdown, readable as it stands, and three CSV files."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from analysis.measures import Measure, difference, measures_of, values
from analysis.records import Found, Method, Run, Stream
from analysis.statistics import Paired
from utils.results.metrics import mean_std

MISSING = "-"
SIGNIFICANT = 0.05

READING = """## How to read this

- Figures are mean ± sample standard deviation over seeds; `-` stands for a figure that a method does not have. Last accuracy
  is on the test images of all classes after the last task, average accuracy the mean of that after every task; the mean over
  tasks, shown where a task has more than twice the test images of another, is after the last task, every task weighing the
  same. Within-task accuracy is after the last task with the task told, so that its own classes alone compete. Adapters,
  stored parameters and bytes are those after the last task, without the frozen backbone; seconds are the sum over the tasks,
  those of training without the evaluations. Milliseconds per test image are those of the evaluation after the last task,
  reading the images included.
- Backward transfer is the mean over old tasks of accuracy at the end minus accuracy when learned. Calibration error is the
  expected one (15 bins, temperature 1, all seen classes) after the last task. Forward transfer, of runs with the key
  `forward_transfer`, is the mean over tasks of the accuracy of nearest class means before the task is learned, with the
  features of the network minus with those of the frozen one.
- Peak memory is what PyTorch allocated on a CUDA device, but on the CPU the most that was resident since the process started,
  whatever it ran before. Seconds and peak memory can be compared on one machine only.
- Differences are method minus baseline on the same seeds, hence the same class orders and test images. The interval, the t
  tests and TOST assume independent, normally distributed differences; few seeds cannot show whether that holds. The Wilcoxon
  signed-rank test assumes symmetric differences; in brackets the smallest p that so many seeds allow.
- "No worse" is a one-sided paired t test of H0 "worse by {margin:g} points or more", "equal" is TOST of H0 "{margin:g} points
  or more apart"; each says yes at p < {significant:g}. "Not shown" is not evidence of the contrary.
- The p values are not corrected for the number of comparisons on this page.
"""


def page(streams: Sequence[Stream], found: Found, baselines: Sequence[Method | None], margin: float,
         pictures: Sequence[Sequence[tuple[str, str]]], command: str) -> str:
    """The whole comparison as Markdown.

    Per stream: its baseline (None where it has none) and its pictures as (caption, file name). `margin`: points.
    """
    parts = ["# Comparison of runs", f"Written by `{command}`."]
    for stream, baseline, shown in zip(streams, baselines, pictures, strict=True):
        parts += [f"## {_cell(stream.title)}", *machines(stream), means_table(stream)]
        parts += _difference_tables(stream, baseline, margin)
        parts += [f"![{caption}]({name})" for caption, name in shown]
    if found.unfinished:
        parts.append("## Left out: not finished\n\n" + "\n".join(f"- {line}" for line in found.unfinished))
    parts.append(READING.format(margin=margin, significant=SIGNIFICANT))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def means_table(stream: Stream) -> str:
    """`means_cells` in Markdown."""
    return markdown(*means_cells(stream))


def means_cells(stream: Stream) -> tuple[list[str], list[list[str]]]:
    """Header and a row per method: seeds, then mean ± standard deviation of every measure."""
    measures = measures_of(stream.methods)
    header = ["method", "seeds", *(measure.heading for measure in measures)]
    return header, [[method.name, str(len(method.runs)), *(_mean_text(method, measure) for measure in measures)]
                    for method in stream.methods]


def difference_table(stream: Stream, baseline: Method, measure: Measure, margin: float) -> str:
    """`difference_cells` in Markdown."""
    return markdown(*difference_cells(stream, baseline, measure, margin))


def difference_cells(stream: Stream, baseline: Method, measure: Measure, margin: float) -> tuple[list[str], list[list[str]]]:
    """Header and a row per method but the baseline: its paired difference in one measure, with the tests."""
    header = ["method", "pairs", "difference", "95 % interval", "t test p", "Wilcoxon p (smallest)"]
    header += [f"no worse by {margin:g}", f"equal within {margin:g}"] if measure.has_margin else []
    rows = []
    for method in stream.methods:
        if method is baseline:
            continue
        result = difference(method, baseline, measure, margin)
        if result is None:
            rows.append([method.name, "0", *[MISSING] * (len(header) - 2), "no seed with this figure in common"])
            continue
        digits = measure.digits
        bounds = MISSING if result.low is None else f"{result.low:+,.{digits}f} to {result.high:+,.{digits}f}"
        row = [method.name, str(result.n), _signed(result, digits), bounds, p_text(result.t_p),
               f"{p_text(result.wilcoxon_p)} ({p_text(result.wilcoxon_smallest_p)})"]
        row += [_verdict(result.no_worse_p), _verdict(result.equal_p)] if measure.has_margin else []
        rows.append([*row, result.note])
    return [*header, "note"], rows


def runs_csv(streams: Sequence[Stream]) -> str:
    """One line per run: every measure, and what it was computed with."""
    measures = measures_of([method for stream in streams for method in stream.methods])
    header = ["stream", "method", "seed", *(measure.key for measure in measures), "device", "processor", "commit", "record"]
    return csv_text(header, ([stream.title, method.name, seed, *(measure.read(run.result) for measure in measures),
                          run.result["hardware"]["device"], run.result["hardware"]["name"],
                          (run.result.get("code") or {}).get("commit"), run.path.as_posix()]
                         for stream in streams for method in stream.methods for seed, run in method.runs.items()))


def summary_csv(streams: Sequence[Stream]) -> str:
    """One line per method: for every measure the number of seeds that have it, mean and sample standard deviation."""
    measures = measures_of([method for stream in streams for method in stream.methods])
    header = ["stream", "method", "seeds", *(f"{measure.key}_{part}" for measure in measures for part in ("n", "mean", "sd"))]
    rows = []
    for stream in streams:
        for method in stream.methods:
            figures = [list(values(method, measure).values()) for measure in measures]
            cells = [cell for known in figures for cell in (len(known), *(mean_std(known) if known else (None, None)))]
            rows.append([stream.title, method.name, len(method.runs), *cells])
    return csv_text(header, rows)


def differences_csv(streams: Sequence[Stream], baselines: Sequence[Method | None], margin: float) -> str:
    """One line per method, measure and stream that has a baseline, as `analysis.statistics.Paired` has it."""
    names = [field.name for field in fields(Paired)]
    rows = []
    for stream, baseline in zip(streams, baselines, strict=True):
        for method in stream.methods:
            for measure in measures_of(stream.methods):
                result = difference(method, baseline, measure, margin) if baseline and method is not baseline else None
                if result is not None:
                    limit = margin if measure.has_margin else None
                    rows.append([stream.title, baseline.name, method.name, measure.key, limit,
                                 *(getattr(result, name) for name in names)])
    return csv_text(["stream", "baseline", "method", "measure", "margin", *names], rows)


def _difference_tables(stream: Stream, baseline: Method | None, margin: float) -> list[str]:
    if baseline is None:
        return ["The baseline has no finished run on this stream, so there are no differences."]
    if len(stream.methods) == 1:
        return ["There is a single method, so there are no differences."]
    parts = []
    for measure in measures_of(stream.methods):
        if measure.in_page and any(values(method, measure) for method in stream.methods if method is not baseline):
            if not values(baseline, measure):
                parts.append(f"### {measure.heading}\n\n`{baseline.name}` has no such figure.")
                continue
            better = "higher is better" if measure.higher_is_better else "lower is better"
            parts.append(f"### {measure.heading}, against `{baseline.name}` ({better})\n\n"
                         f"{difference_table(stream, baseline, measure, margin)}")
    return parts


def machines(stream: Stream) -> list[str]:
    """What the runs were computed on and with, each with the number of runs."""
    runs = [run for method in stream.methods for run in method.runs.values()]
    lines = [f"Machines: {_counted(map(machine, runs))}. Code: {_counted(map(code, runs))}."]
    seeds = {seed for method in stream.methods for seed in method.runs}
    lacking = [f"{method.name} (no {', '.join(map(str, sorted(seeds - method.runs.keys())))})"
               for method in stream.methods if seeds - method.runs.keys()]
    missing = f" Without some of them: {'; '.join(lacking)}." if lacking else ""
    return [*lines, f"Seeds: {', '.join(map(str, sorted(seeds)))}.{missing}"]


def machine(run: Run) -> str:
    """What a run was computed on."""
    hardware: Mapping[str, Any] = run.result["hardware"]
    if hardware["device"] != "cpu":
        return hardware["name"]
    return f"{hardware['name']}, {hardware['threads']} of {hardware['cores']} cores"


def code(run: Run) -> str:
    """The commit that a run was computed with, and the version of PyTorch."""
    version = run.result.get("code") or {}
    commit = (version.get("commit") or "unknown")[:10]
    torch = (run.result.get("versions") or {}).get("torch", "unknown")
    return f"{commit}{' with uncommitted changes' if version.get('dirty') else ''}, torch {torch}"


def _counted(words: Iterable[str]) -> str:
    return "; ".join(f"{word} ({count} run{'s' * (count > 1)})" for word, count in Counter(words).most_common())


def _mean_text(method: Method, measure: Measure) -> str:
    known = list(values(method, measure).values())
    if not known:
        return MISSING
    mean, deviation = mean_std(known)
    text = f"{mean:,.{measure.digits}f}" + ("" if deviation is None else f" ± {deviation:,.{measure.digits}f}")
    return text if len(known) == len(method.runs) else f"{text} (n = {len(known)})"


def _signed(result: Paired, digits: int) -> str:
    text = f"{result.mean:+,.{digits}f}"
    return text if result.sd is None else f"{text} ± {result.sd:,.{digits}f}"


def p_text(value: float | None) -> str:
    """A p value to four digits."""
    if value is None:
        return MISSING
    return "<0.0001" if value < 0.0001 else ">0.9999" if 0.99995 <= value < 1 else f"{value:.4f}"


def _verdict(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{'yes' if value < SIGNIFICANT else 'not shown'} (p {p_text(value)})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to be read as plain text: words to the left, figures to the right."""
    cells = [[_cell(cell) for cell in row] for row in [header, *rows]]
    if not any(row[-1] for row in cells[1:]):  # a column of notes without a note
        cells = [row[:-1] for row in cells]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(cells[0]))]
    words = {0, *(column for column, name in enumerate(header) if name == "note")}
    lines = [[cell.ljust(width) if column in words else cell.rjust(width)
              for column, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in cells]
    rule = ["-" * width if column in words else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Figures in full, an empty cell where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
