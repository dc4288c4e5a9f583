"""Command line: accuracy against the number of adapters, a curve for every variant of a study over its own grid.

    python -m analysis.frontier exps/studies/frontier_domains.json
"""

import argparse
import io
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.command import make_output
from utils.errors import UserError, nearest, status_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.records import Draw
    from analysis.statistics import Paired

OUTPUT = Path("runs/frontier")
SHOWN = {"last_accuracy": "Last accuracy (%)", "average_accuracy": "Average accuracy (%)"}
COLUMNS = {"adapters": ("adapters", 1), "last_accuracy": ("last (%)", 2), "average_accuracy": ("average (%)", 2),
           "forgetting": ("forgetting", 2), "kept_set_f1": ("F1", 2)}

READING = """## How to read this

- A row is one value of a mechanism's own knob: mean ± sample standard deviation over seeds. A mechanism may keep a different
  number of adapters on every seed.
- "{reference} minus row" is paired by seed: `{reference}` at its best mean accuracy among its rows with at most as many
  adapters on average, minus the row, with the p of a one-sided paired t test that it is above 0. Its row is chosen by the same
  seeds that are compared. `-`: it has no row with so few adapters. The p values are not corrected for their number.
"""


@dataclass(frozen=True)
class Point:
    """The runs of one variant at one combination of its grid's values. knob: these values in words, "" without a grid.

    figures: for every draw the figures that its run has, by the keys of `COLUMNS`; a method without adapters has 0.
    """

    variant: str
    knob: str
    figures: "dict[Draw, dict[str, float]]" = field(default_factory=dict)

    def of(self, key: str) -> list[float]:
        """The figure of every seed that has it."""
        return [figures[key] for figures in self.figures.values() if key in figures]

    def mean(self, key: str) -> float:
        """Mean over the seeds; NaN where no run has the figure."""
        known = self.of(key)
        return math.fsum(known) / len(known) if known else math.nan

    def deviation(self, key: str) -> float:
        """Sample standard deviation over the seeds; 0 for a single one."""
        known = self.of(key)
        return statistics.stdev(known) if len(known) > 1 else 0.0


@dataclass(frozen=True)
class Frontier:
    """The points of one stream, in the study's order. slug: a word for its files, "" for a single stream."""

    title: str
    slug: str
    points: list[Point]

    def curves(self) -> dict[str, list[Point]]:
        """The points of every variant, ascending in adapters."""
        return {variant: sorted((point for point in self.points if point.variant == variant),
                                key=lambda point: point.mean("adapters"))
                for variant in dict.fromkeys(point.variant for point in self.points)}

    def at_most(self, variant: str, adapters: float, key: str) -> Point | None:
        """The variant's best point in the figure `key` among those with at most so many adapters."""
        affordable = [point for point in self.points
                      if point.variant == variant and point.mean("adapters") <= adapters + 1e-9]  # means round
        return max(affordable, key=lambda point: point.mean(key), default=None)


def read_frontiers(path: Path) -> tuple[list[Frontier], list[str]]:
    """The frontiers of the finished runs of the study in the file `path`, one per stream, and the runs that are not finished.

    Raises UserError for what is no study, for damaged or foreign records, and where no run is finished.
    """
    from analysis.measures import MEASURES
    from analysis.records import Run, group_runs
    from studies.study import is_study, load_study

    if not path.exists():
        raise UserError(f"{path}: there is no such file; name a study.")
    if not is_study(path):
        raise UserError(f"{path}: is not a study, the file that varies a config (docs/STUDIES.md); name one.")
    measures = [measure for measure in MEASURES if measure.key in COLUMNS]
    made = [(run, run.record()) for run in load_study(path).runs()]
    found = {id(record := Run(run.folder, (run.name,), result)): (run, record) for run, result in made if result}
    if not found:
        raise UserError(f"{path}: none of its {len(made)} runs is finished; start them with python main.py --config "
                        f"{shlex.quote(str(path))}.")
    frontiers = []
    for stream in group_runs(record for _, record in found.values()):
        members = {id(run) for method in stream.methods for run in method.runs.values()}
        points: dict[str, Point] = {}
        for run, record in (pair for key, pair in found.items() if key in members):
            knob = run.name.removeprefix(run.variant).lstrip(",") if run.variant else run.name
            point = points.setdefault(run.name, Point(run.variant or path.stem, knob))
            read = {measure.key: measure.read(record.result) for measure in measures}
            known = {key: float(value) for key, value in read.items() if value is not None}
            point.figures[record.draw] = {"adapters": 0.0, **known}
        frontiers.append(Frontier(stream.title, stream.slug, list(points.values())))
    return frontiers, [f"{run.name} seed {run.seed}" for run, result in made if not result]


def table(frontier: Frontier, reference: str) -> str:
    """A row per point, with its paired difference from the reference at as many adapters."""
    from analysis.tables import MISSING, markdown, p_text
    from utils.results.metrics import mean_std

    header = ["mechanism", "knob", "seeds", *(heading for heading, _ in COLUMNS.values()),
              *(f"{reference} minus row, {name.split()[0].lower()}" for name in SHOWN.values())]
    rows = []
    for point in (point for curve in frontier.curves().values() for point in curve):
        row = [point.variant, point.knob or MISSING, str(len(point.figures))]
        for key, (_, digits) in COLUMNS.items():
            known = point.of(key)
            mean, deviation = mean_std(known) if known else (None, None)
            row.append(MISSING if mean is None else f"{mean:.{digits}f}" + (
                "" if deviation is None else f" ± {deviation:.{digits}f}"))
        for key in SHOWN:
            result = None if point.variant == reference else _above(frontier, point, reference, key)
            row.append(MISSING if result is None else f"{result.mean:+.2f} (p {p_text(result.no_worse_p)})")
        rows.append(row)
    return markdown(header, rows)


def verdict(frontier: Frontier, reference: str) -> str:
    """Whether the reference is on or above every other mechanism at every number of adapters that it can be held against."""
    lines = []
    for key, name in SHOWN.items():
        gaps = [(result.mean, point) for point in frontier.points if point.variant != reference
                and (result := _above(frontier, point, reference, key)) is not None]
        below = [f"{point.variant} {point.knob}".strip() + f" by {-gap:.2f}" for gap, point in gaps if gap < 0]
        lines.append(f"{name.removesuffix(' (%)')}: `{reference}` is on or above {len(gaps) - len(below)} of {len(gaps)} rows "
                     f"of other mechanisms that have at least as many adapters{'; below ' * bool(below)}{', '.join(below)}.")
    return "\n\n".join(lines)


def figure(frontier: Frontier) -> "Figure":
    """Last and average accuracy against adapters, a line per variant through its points with their deviations."""
    from matplotlib.figure import Figure

    from analysis.pictures import COLORS, DASHES, MARKERS

    curves = frontier.curves()
    made = Figure(figsize=(11.0, 5.0 + 0.2 * -(-len(curves) // 4)), layout="constrained")
    made.suptitle(f"Accuracy against adapters\n{frontier.title}", fontsize=11, wrap=True)
    panels = made.subplots(1, 2)
    for axes, (key, name) in zip(panels, SHOWN.items(), strict=True):
        for index, (variant, points) in enumerate(curves.items()):
            known = [point for point in points if point.of(key)]  # joint training has no average accuracy
            x, x_sd, y, y_sd = ([of(point, each) for point in known] for each in ("adapters", key)
                                for of in (Point.mean, Point.deviation))
            color = COLORS[index % len(COLORS)]
            axes.errorbar(x, y, xerr=x_sd, yerr=y_sd, color=color, marker=MARKERS[index % len(MARKERS)], markersize=6,
                          linestyle=DASHES[index // 2 % len(DASHES)], linewidth=1.2, elinewidth=0.7, capsize=2, label=variant)
        axes.set(xlabel="Adapters kept", ylabel=name)
        axes.grid(alpha=0.3)
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return made


def draw(path: Path, output: Path = OUTPUT, reference: str | None = None,
         command: str = "analysis.frontier.draw") -> tuple[str, list[Path]]:
    """Writes tables and pictures of the study's frontiers into `output`; returns the page and the files written.

    reference: the variant that the others are held against (default: the study's first). Raises UserError.
    """
    from utils.results.plots import DPI
    from utils.runs.files import write_bytes

    frontiers, unfinished = read_frontiers(path)
    variants = dict.fromkeys(point.variant for frontier in frontiers for point in frontier.points)
    if reference is not None and reference not in variants:
        raise UserError(f"--reference: no variant with a finished run is called '{reference}'; choose one of "
                        f"{', '.join(variants)}.{nearest(reference, variants)}")
    reference = reference or next(iter(variants))
    make_output(output)
    parts, written = [f"# Frontier of {path.stem}", f"Written by `{command}`."], []
    for frontier in frontiers:
        name, buffer = f"frontier_{frontier.slug}.png" if frontier.slug else "frontier.png", io.BytesIO()
        figure(frontier).savefig(buffer, format="png", dpi=DPI)
        write_bytes(output / name, buffer.getvalue())
        parts += [f"## {frontier.title}", table(frontier, reference), verdict(frontier, reference),
                  f"![accuracy against adapters]({name})"]
        written.append(output / name)
    if unfinished:
        parts.append(f"## Left out: {len(unfinished)} runs that are not finished\n\n"
                     + "\n".join(f"- {line}" for line in unfinished))
    page = "\n\n".join([*parts, READING.format(reference=reference)])
    write_bytes(output / "frontier.md", page.encode())
    return page, [output / "frontier.md", *written]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.frontier",
        description="Draw accuracy against adapters kept: a curve for every variant of a study over its own grid.")
    parser.add_argument("study", type=Path, metavar="STUDY", help="the study file")
    parser.add_argument("--reference", metavar="NAME",
                        help="the variant that others are held against at the same number of adapters (default: the first)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER",
                        help=f"where frontier.md and the pictures go (default: {OUTPUT})")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and says where they were written; returns the exit status: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    def work() -> None:
        page, written = draw(options.study, options.output, options.reference,
                             shlex.join(["python", "-m", "analysis.frontier", *arguments]))
        print(page)
        print("Written: " + ", ".join(str(path) for path in written), flush=True)

    return status_of(work)


def _above(frontier: Frontier, point: Point, reference: str, key: str) -> "Paired | None":
    """The reference at as many adapters minus the point, paired by seed; None where one of them has no such figure."""
    from analysis.statistics import paired

    best = frontier.at_most(reference, point.mean("adapters"), key)
    draws = sorted(best.figures.keys() & point.figures.keys()) if best else []
    pairs = [(best.figures[draw][key], point.figures[draw][key]) for draw in draws
             if key in best.figures[draw] and key in point.figures[draw]]
    return paired(*zip(*pairs, strict=True), margin=0.0) if pairs else None


if __name__ == "__main__":
    sys.exit(main())
