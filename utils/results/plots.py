"""The three pictures of a finished run, made from its record (`results.json`) alone.

Figures are built as objects, without pyplot: no global state, no display, safe inside a training process.
Tasks count from 0, as in the log and the files. Colours are those of Okabe & Ito (2008) and viridis, both
readable without colour vision.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from utils.config import title_of
from utils.runs.files import write_bytes

BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#6B6B6B"
PRUNED = "#D3D3D3"
DPI = 120

# Up to this many tasks the weights are written into the cells of the heatmap.
TASKS_ANNOTATED = 12


def write_pictures(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes `accuracy.png`, `gates.png` and `growth.png` into `folder`; returns the paths of those written.

    A run whose learner has no gate gets no `gates.png`.
    """
    figures = {"accuracy.png": accuracy_figure(result), "gates.png": gates_figure(result),
               "growth.png": growth_figure(result)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI)
            write_bytes(folder / name, buffer.getvalue())
            written.append(folder / name)
    return written


def accuracy_figure(result: Mapping[str, Any]) -> Figure:
    """Accuracy over all seen classes after each task, on the newest task alone, and chance among the seen."""
    metrics, tasks = result["metrics"], result["tasks"]
    steps = [entry["task"] for entry in tasks]
    figure, axes = _canvas("Accuracy after each task", result)
    marker = "o" if len(steps) <= 40 else ""
    newest = metrics["accuracy_when_learned"]
    if any(value is not None for value in newest):  # a stream that was learned at once has no newest task
        axes.plot(steps, _floats(newest), color=ORANGE, linestyle="--", marker="s" if marker else "", markersize=5,
                  label="newest task")
    axes.plot(steps, _floats(metrics["top1_curve"]), color=BLUE, linewidth=2, marker=marker,
              label="all classes seen")
    axes.plot(steps, [100 / entry["seen_classes"] for entry in tasks], color=GRAY, linestyle=":",
              marker="." if len(steps) == 1 else "", label="chance")
    axes.set(xlabel="After task", ylabel="Test accuracy (%)", ylim=(0, 103))
    _integer_axis(axes, steps)
    _legend(figure)
    return figure


def gates_figure(result: Mapping[str, Any]) -> Figure | None:
    """Heatmap of the gate weights that each growth decision read: row = after task, column = adapter.

    A cross marks the adapters that this very decision pruned (the weight is still shown), gray cells those
    pruned earlier. The scale is that of the square root, so that the small weights of a long stream can be
    told apart. None for a run without gate weights.
    """
    tasks = result["tasks"]
    if not any(entry["beta_values"] for entry in tasks):
        return None
    weights, before, now = gate_matrices(result)
    count = len(tasks)
    figure, axes = _canvas("Gate weights read by each growth decision", result, size=(7.2, 6.6))
    image = axes.imshow(weights, cmap="viridis", norm=PowerNorm(0.5, 0, max(1.0, np.nanmax(weights))),
                        interpolation="nearest")
    axes.imshow(np.ma.masked_where(~before, np.zeros(before.shape)), cmap=ListedColormap([PRUNED]),
                interpolation="nearest")
    rows, columns = np.nonzero(now)
    annotated = count <= TASKS_ANNOTATED
    # Below the number where there is one; elsewhere as large as a cell allows (the axes are 310 points wide).
    shift, size = (0.28, 7.0) if annotated else (0.0, min(7.0, 0.7 * 310 / count))
    colors = [_readable_on(image, weight) for weight in weights[rows, columns]]
    axes.scatter(columns, rows + shift, marker="x", s=size**2, color=colors, linewidths=min(1.5, size / 3),
                 gid="pruned now")
    if annotated:
        for row, column in np.argwhere(~np.isnan(weights)):
            axes.text(column, row, _weight_text(weights[row, column]), ha="center", va="center", fontsize=9,
                      color=_readable_on(image, weights[row, column]))
    axes.set(xlabel="Adapter (of task)", ylabel="After task")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_whole_numbers())
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    figure.colorbar(image, ax=axes, label="Gate weight (square-root scale)", shrink=0.85,
                    ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1])
    handles = []
    if before.any():
        handles.append(Patch(color=PRUNED, label="pruned earlier"))
    if now.any():
        handles.append(axes.scatter([], [], marker="x", s=49, color="black", label="pruned by this decision"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def growth_figure(result: Mapping[str, Any]) -> Figure:
    """Adapters kept against tasks seen, beside the line of one adapter per task."""
    kept = [entry["active_adapters"] or 0 for entry in result["tasks"]]
    seen = list(range(1, len(kept) + 1))
    figure, axes = _canvas("Adapters kept", result)
    # Drawn above, so that it still shows where the two agree.
    axes.plot(seen, seen, color=ORANGE, linestyle="--", zorder=3, label="one per task")
    axes.plot(seen, kept, color=BLUE, linewidth=2, marker="o" if len(seen) <= 40 else "", label="kept")
    axes.set(xlabel="Tasks seen", ylabel="Adapters", ylim=(0, len(seen) * 1.05 + 0.3))
    _integer_axis(axes, seen)
    axes.yaxis.set_major_locator(_whole_numbers())
    _legend(figure)
    return figure


def gate_matrices(result: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the heatmap shows, each `[T, T]` with rows = after task and columns = adapter.

    The weights that each decision read (float64, NaN where there is no adapter yet or no longer), which
    adapters were pruned by an earlier decision, and which by this one (both bool).
    """
    tasks = result["tasks"]
    weights = np.full((len(tasks), len(tasks)), np.nan)
    pruned = np.zeros((len(tasks) + 1, len(tasks)), dtype=bool)  # row t: before the decision on task t
    for row, entry in enumerate(tasks):
        values = entry["beta_values"] or []
        weights[row, : len(values)] = values
        if entry["pruning_mask"]:
            pruned[row + 1, : row + 1] = np.asarray(entry["pruning_mask"][: row + 1]) == 0
    before = pruned[:-1]
    weights[before] = np.nan
    return weights, before, pruned[1:] & ~before


def _canvas(title: str, result: Mapping[str, Any],
            size: tuple[float, float] = (7.2, 4.6)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches
    axes = figure.add_subplot()
    config = result["config"]
    run = [title_of(config["dataset"]), *(config[key] for key in ("model_name", "gate") if config.get(key))]
    axes.set_title(f"{title}\n", fontsize=13)
    axes.text(0.5, 1.02, ", ".join([*run, f"seed {result['seed']}"]), transform=axes.transAxes, ha="center",
              fontsize=9, color=GRAY)
    return figure, axes


def _integer_axis(axes: Axes, steps: list[int]) -> None:
    axes.xaxis.set_major_locator(_whole_numbers())
    margin = 0.03 * max(len(steps) - 1, 10)
    axes.set_xlim(steps[0] - margin, steps[-1] + margin)
    axes.grid(alpha=0.3)


def logarithmic(axes: Axes) -> None:
    """Makes the x axis logarithmic: plain numbers, as many as have room; large ones, or many decades, as powers of ten."""
    axes.set_xscale("log", nonpositive="clip")
    low, high = axes.get_xlim()
    if high / low < 3000 and high < 1e5:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1, 3), numticks=20))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(nbins=13, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _readable_on(image: AxesImage, weight: float) -> str:
    """The colour of text on a cell of this weight."""
    return "black" if image.norm(weight) > 0.6 else "white"


def _weight_text(weight: float) -> str:
    """Two decimals; a weight of exactly zero, as sparsemax gives, is told from a small one."""
    return "0" if weight == 0 else f"{weight:.2f}"


def _floats(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
