"""The pictures of a comparison: accuracy against what it costs, growth of the adapters, accuracy per task.

As in `utils/results/plots.py`, figures are objects, without pyplot, and colours can be told apart without colour vision;
methods differ in marker and line style too. Everything is mean ± sample standard deviation over seeds.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.measures import MEASURES, Measure, values
from analysis.records import Run, Stream
from utils.config import title_of
from utils.results.metrics import mean_std
from utils.results.plots import DPI, GRAY, logarithmic
from utils.runs.files import write_bytes

# Okabe & Ito (2008); seven colours by nine markers give 63 methods a look of their own.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")

# What accuracy is drawn against: measures, and the names of their axes.
COSTS = {"stored_bytes": "Stored bytes, backbone left out", "training_seconds": "Seconds of training",
         "image_milliseconds": "Milliseconds per test image"}

NAME_WIDTH = 44  # letters on a line of a legend
ROW_WIDTH = 30  # letters on a line beside a heatmap
CELLS_ANNOTATED = 15  # tasks up to which the accuracies are written into the cells
DOMAINS_SHOWN = 40


def write_pictures(stream: Stream, folder: Path) -> list[tuple[str, str]]:
    """Writes `pareto.png`, `growth.png` and `accuracy_per_task.png` (with the stream's slug where it has one) into `folder`.

    Returns caption and file name of those written; a stream without adapters has no growth to show.
    """
    written = []
    for name, caption, figure in (
            ("pareto", "last accuracy against stored bytes, training and evaluation time", pareto_figure(stream)),
            ("growth", "adapters against tasks", growth_figure(stream)),
            ("accuracy_per_task", "accuracy per task after the last one", heatmap_figure(stream))):
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI)
            file = f"{name}_{stream.slug}.png" if stream.slug else f"{name}.png"
            write_bytes(folder / file, buffer.getvalue())
            written.append((caption, file))
    return written


def costs_of(stream: Stream) -> dict[Measure, str]:
    """Those of `COSTS` that any method has, with the names of their axes."""
    return {measure: COSTS[measure.key] for measure in MEASURES
            if measure.key in COSTS and any(values(method, measure) for method in stream.methods)}


def pareto_figure(stream: Stream) -> Figure:
    """Last accuracy against what it costs (`costs_of`): a point per method with its deviations, and the step through those
    points that no other beats in both."""
    accuracy, costs = next(measure for measure in MEASURES if measure.key == "last_accuracy"), costs_of(stream)
    names = [method.name for method in stream.methods]
    figure, panels = _canvas("Last accuracy against what it costs", stream, names, panels=len(costs))
    for axes, (cost, label) in zip(panels, costs.items(), strict=True):
        _pareto_panel(axes, stream, accuracy, cost, label)
    panels[0].set_ylabel("Accuracy on all classes after the last task (%)")
    _legend(figure)
    return figure


def _pareto_panel(axes: Axes, stream: Stream, accuracy: Measure, cost: Measure, label: str) -> None:
    points = []
    for index, method in enumerate(stream.methods):
        costs, scores = list(values(method, cost).values()), list(values(method, accuracy).values())
        if not costs or not scores:
            continue
        (x, x_sd), (y, y_sd) = mean_std(costs), mean_std(scores)
        points.append((x, y))
        axes.errorbar([x], [y], xerr=[x_sd or 0.0], yerr=[y_sd or 0.0], fmt="none", ecolor=_color(index), elinewidth=1,
                      capsize=2.5)
        axes.plot([x], [y], color=_color(index), marker=_marker(index), markersize=7, linestyle="",
                  label=_wrapped(method.name))
    front = sorted(points[index] for index in non_dominated(points))
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color=GRAY, linewidth=1, zorder=0,
                  label="best for its cost (means)")
    spent = [x for x, _ in points]
    if spent and min(spent) > 0 and max(spent) > 8 * min(spent):
        logarithmic(axes)
    axes.set_xlabel(f"{label}{' (logarithmic)' if axes.get_xscale() == 'log' else ''}")
    axes.grid(alpha=0.3)


def non_dominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, accuracy) points that no other beats in one of the two without losing in the other."""
    return [index for index, (x, y) in enumerate(points)
            if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)]


def growth_figure(stream: Stream) -> Figure | None:
    """Adapters kept against tasks seen: a line per method that has adapters, in a band of one deviation.

    Where the records tell the right answer, that is drawn too. None when no method has an adapter.
    """
    curves_of = [np.array([adapter_curve(run, stream.tasks) for run in method.runs.values()]) for method in stream.methods]
    shown = [(index, method, curves) for index, (method, curves) in enumerate(zip(stream.methods, curves_of, strict=True))
             if np.nansum(curves) > 0]
    if not shown:
        return None
    truth = known_growth(stream)
    figure, (axes,) = _canvas("Adapters kept", stream, [method.name for _, method, _ in shown], extra=2)
    seen = np.arange(1, stream.tasks + 1)
    for place, (index, method, curves) in enumerate(shown):
        mean = curves.mean(axis=0)
        if len(curves) > 1:
            deviation = curves.std(axis=0, ddof=1)
            axes.fill_between(seen, mean - deviation, mean + deviation, color=_color(index), alpha=0.12, linewidth=0)
        # Later lines are thinner, so that one that lies on another leaves it visible.
        line = 3.2 - 2 * place / max(1, len(shown) - 1)
        axes.plot(seen, mean, color=_color(index), linestyle=DASHES[index % len(DASHES)], linewidth=line,
                  marker=_marker(index), markersize=3.5 + line if stream.tasks <= 40 else 0, label=_wrapped(method.name))
    axes.plot(seen, seen, color=GRAY, linestyle=":", linewidth=1, zorder=0, label="one per task")
    if truth is not None:
        axes.plot(seen, truth, color="black", linewidth=1, zorder=0, label="right answer (one per new domain)")
    axes.set(xlabel="Tasks seen", ylabel="Adapters kept", ylim=(0, None))
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.yaxis.set_major_locator(_whole_numbers())
    axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def heatmap_figure(stream: Stream) -> Figure:
    """Mean accuracy on every task after the last one: all classes competing above, the task told below."""
    methods, tasks = stream.methods, stream.tasks
    domains = stream.domains if tasks <= DOMAINS_SHOWN else ()
    names = [_wrapped(method.name, ROW_WIDTH) for method in methods]
    lines = sum(1 + name.count("\n") for name in names)
    width = min(16.0, max(7.5, 3.4 + 0.5 * tasks))
    height = 2 * (1.0 + 0.16 * lines + 0.14 * len(methods)) + (1.4 if domains else 0.8)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    figure.suptitle("Accuracy on each task after the last one\n", fontsize=13)
    kinds = {"top1": "all classes competing", "within": "task told: its own classes competing"}
    for axes, (field, title) in zip(panels, kinds.items(), strict=True):
        matrix = np.array([_mean_row([task_accuracies(run, field, tasks) for run in method.runs.values()])
                           for method in methods])
        image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yticks(range(len(methods)), names, fontsize=8)
        if tasks <= CELLS_ANNOTATED:
            for row, column in np.argwhere(~np.isnan(matrix)):
                axes.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", fontsize=8,
                          color="black" if matrix[row, column] > 60 else "white")
    if domains:
        panels[1].set_xticks(range(tasks), [f"{task} {domain}" for task, domain in enumerate(domains)], rotation=90,
                             fontsize=8)
    else:
        panels[1].xaxis.set_major_locator(_whole_numbers())
    panels[1].set_xlabel("Task" if not domains else "Task and its image domain")
    figure.colorbar(image, ax=panels, label="Test accuracy (%), mean over seeds", shrink=0.8)
    return figure


def adapter_curve(run: Run, tasks: int) -> list[float]:
    """Adapters kept after each of the stream's tasks; NaN for tasks after which the run says nothing."""
    curve = [float("nan")] * tasks
    for entry in run.result["tasks"]:
        curve[len(entry["counts"]["images"]) - 1] = float(entry["active_adapters"] or 0)
    return curve


def task_accuracies(run: Run, field: str, tasks: int) -> list[float]:
    """Accuracy in percent on each task at the end, by a field of `metrics.TaskCounts`; NaN where there is none."""
    counts = run.result["tasks"][-1]["counts"]
    if len(counts["images"]) != tasks:
        return [float("nan")] * tasks
    return [100 * hit / images if images else float("nan")
            for hit, images in zip(counts[field], counts["images"], strict=True)]


def known_growth(stream: Stream) -> np.ndarray | None:
    """Adapters needed after each task, where every record that knows the right answer gives the same one; else None."""
    truths = {tuple(known["truth"]) for method in stream.methods for run in method.runs.values()
              if (known := run.result["metrics"].get("kept_set"))}
    if len(truths) != 1 or len(truth := truths.pop()) != stream.tasks:
        return None
    return np.cumsum(truth)


def _mean_row(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean of the rows that hold a figure; NaN where there is none."""
    whole = [row for row in rows if not np.isnan(row).all()]
    return np.mean(whole, axis=0) if whole else np.array(rows[0])


def _canvas(title: str, stream: Stream, names: Sequence[str], extra: int = 1, panels: int = 1
            ) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` with one vertical axis, and room below for a legend of these names and `extra` more entries."""
    columns = _columns(names)
    lines = sum(1 + _wrapped(name).count("\n") for name in names) + extra
    figure = Figure(figsize=(8.0 if panels == 1 else 4.6 * panels, 4.6 + 0.22 * -(-lines // columns)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    first = next(iter(stream.methods[0].runs.values()))
    fewest, most = (pick(len(method.runs) for method in stream.methods) for pick in (min, max))
    sample = f"mean ± deviation over {most if fewest == most else f'{fewest} to {most}'} seeds"
    if len({seed for method in stream.methods for seed in method.runs}) == 1:
        sample = f"seed {first.draw}"
    figure.suptitle(title, fontsize=13)
    axes[len(axes) // 2].set_title(f"{title_of(first.result['config']['dataset'])}, {stream.tasks} tasks, {sample}",
                                   fontsize=9, color=GRAY)
    return figure, axes


def _columns(names: Sequence[str]) -> int:
    longest = max((min(NAME_WIDTH, len(name)) for name in names), default=1)
    return max(1, min(3, 110 // (longest + 8)))


def _legend(figure: Figure) -> None:
    entries = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = _columns([line for label in entries for line in label.split("\n")])
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _wrapped(name: str, width: int = NAME_WIDTH) -> str:
    """The name in lines of at most `width` letters, broken after a separator where there is one."""
    lines = [""]
    for word in re.findall(r"[^\s_,;/+-]*[\s_,;/+-]*", name):
        for piece in [word[start:start + width] for start in range(0, len(word), width)]:
            if len(lines[-1]) + len(piece.rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(nbins=13, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
