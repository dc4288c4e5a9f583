"""One picture for each answer of analysis/gate_questions.py, legible for one task and for fifty.

Each function takes an answer and the record of its run (`results.json`) and returns a figure.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.gate_questions import Answer
from utils.config import title_of
from utils.results.plots import BLUE, DPI, GRAY, ORANGE, PRUNED, TASKS_ANNOTATED

Record = Mapping[str, Any]


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def gate_weights_figure(answer: Answer, result: Record) -> Figure:
    """Weights in force: row = adapter, column = after task; below, how far the older adapters' weights moved."""
    weights = _floats(answer["in_force"]).T  # [adapter, task]
    count = len(weights)
    figure, (upper, lower) = _panels("Gate weights in force after each task", result, (7.2, 7.2), 2, 1,
                                     sharex=True, height_ratios=[4, 1])
    norm = PowerNorm(0.5, 0, max(1.0, np.nanmax(weights)))
    image = upper.imshow(weights, cmap="viridis", norm=norm, interpolation="nearest", aspect="auto")
    gone = np.isnan(weights) & (np.arange(count)[:, None] <= np.arange(count))
    upper.imshow(np.ma.masked_where(~gone, np.zeros(gone.shape)), cmap=ListedColormap([PRUNED]), interpolation="nearest",
                 aspect="auto")
    _numbers(upper, image, weights, lambda weight: "0" if weight == 0 else f"{weight:.2f}", lambda weight: norm(weight) > 0.6)
    upper.set(ylabel="Adapter (of task)", ylim=(count - 0.5, -0.5))
    lower.bar(range(count), _floats(answer["moved"]), color=BLUE)
    lower.set(xlabel="After task", ylabel="Moved", xlim=(-0.5, count - 0.5))
    lower.grid(alpha=0.3)
    _whole(upper.yaxis, lower.xaxis)
    figure.colorbar(image, ax=[upper, lower], label="Gate weight (square-root scale)", shrink=0.8,
                    ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1])
    if gone.any():
        figure.legend(handles=[Patch(color=PRUNED, label="pruned")], loc="outside lower center", frameon=False)
    return figure


def chosen_figure(answer: Answer, result: Record) -> Figure:
    """At how many tasks each adapter is in the support, and its mean weight and share."""
    entries = answer["adapters"]
    adapters = np.array([entry["adapter"] for entry in entries])
    figure, (upper, lower) = _panels("How often each adapter is chosen", result, (7.2, 6.0), 2, 1, sharex=True)
    upper.bar(adapters, [entry["tasks"] for entry in entries], color=PRUNED, label="tasks since its own")
    upper.bar(adapters, [entry["chosen"] for entry in entries], color=BLUE, width=0.55, label="chosen")
    upper.set(ylabel="Tasks")
    lower.bar(adapters - 0.2, [entry["mean_weight"] for entry in entries], 0.4, color=BLUE, label="mean gate weight")
    lower.bar(adapters + 0.2, [entry["mean_share"] for entry in entries], 0.4, color=ORANGE,
              label="mean share of |beta * alpha|")
    lower.set(xlabel="Adapter (of task)", ylabel="Mean over those tasks", xlim=(-0.6, len(entries) - 0.4))
    for axes in (upper, lower):
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        axes.set_ylim(0, 1.25 * max(axes.get_ylim()[1], 1e-9))  # room for the legend
        axes.legend(loc="upper right", ncols=2, frameon=False)
    _whole(upper.yaxis, lower.xaxis)
    return figure


def without_adapter_figure(answer: Answer, result: Record) -> Figure:
    """Change in accuracy without each adapter: row = adapter taken out, column = task whose test images are measured."""
    adapters = [entry["adapter"] for entry in answer["adapters"]]
    tasks = len(answer["images"])
    height = 2.6 + 0.3 * min(len(adapters), 14)
    figure, panels = _panels(f"Accuracy without one adapter, after task {answer['task']}", result, (7.2, 2 * height), 2, 1,
                             sharex=True)
    for axes, field, name in zip(panels, ("top1", "within"), ("All classes seen compete", "The task is told"), strict=True):
        changes = _floats([entry[field]["tasks"] for entry in answer["adapters"]]).reshape(len(adapters), tasks)
        largest = max(1.0, np.nanmax(np.abs(changes), initial=0))
        image = axes.imshow(changes, cmap="RdBu", norm=TwoSlopeNorm(0, -largest, largest), interpolation="nearest",
                            aspect="auto")
        _numbers(axes, image, changes, lambda change: "0" if change == 0 else f"{change:+.1f}",
                 lambda change, largest=largest: abs(change) < 0.6 * largest)
        own = [(row, adapter) for row, adapter in enumerate(adapters) if adapter < tasks]
        axes.scatter([task for _, task in own], [row for row, _ in own], marker="s", s=(min(30.0, 260 / tasks)) ** 2,
                     facecolors="none", edgecolors=GRAY, linewidths=1.0)
        axes.set_title(name, fontsize=10)
        axes.set(ylabel="Adapter taken out")
        shown = _spaced(len(adapters))
        axes.set_yticks(shown, [str(adapters[row]) for row in shown])
        figure.colorbar(image, ax=axes, label="Change (points)")
    panels[-1].set(xlabel="Test images of task (square: the adapter's own)")
    _whole(panels[-1].xaxis)
    return figure


def similarity_figure(answer: Answer, result: Record) -> Figure:
    """Gate weight, as it is and relative to an equal share, against task similarity: a point per task and older adapter."""
    pairs = answer["pairs"]
    figure, panels = _panels("Task similarity and gate weight", result, (9.6, 4.8), 1, 2)
    names = {"weight": "Gate weight", "relative_weight": "Gate weight times adapters in the gate"}
    for axes, (key, name) in zip(panels, names.items(), strict=True):
        points = axes.scatter([pair["similarity"] for pair in pairs], [pair[key] for pair in pairs],
                              c=[pair["task"] for pair in pairs], cmap="viridis", s=22 if len(pairs) > 100 else 34,
                              edgecolors="white", linewidths=0.4)
        found = answer[key]
        axes.set_title("Spearman undefined" if found["rho"] is None else
                       f"Spearman rho {found['rho']:+.2f}, p {found['p']:.2g}, {found['pairs']} pairs", fontsize=10)
        axes.set(xlabel="Cosine of mean features", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.grid(alpha=0.3)
    if pairs:
        bar = figure.colorbar(points, ax=panels, label="Task that decided")
        bar.locator = _locator()
        bar.update_ticks()
    return figure


def growth_figure(answer: Answer, result: Record) -> Figure:
    """Adapters in use, and bytes stored besides the frozen backbone, against tasks seen."""
    entries = answer["tasks"]
    seen = [entry["task"] + 1 for entry in entries]
    marker = "o" if len(seen) <= 40 else ""
    figure, (upper, lower) = _panels("Adapters and stored bytes", result, (7.2, 6.0), 2, 1, sharex=True)
    upper.plot(seen, seen, color=ORANGE, linestyle="--", zorder=3, label="one per task")
    upper.plot(seen, [entry["active_adapters"] for entry in entries], color=BLUE, linewidth=2, marker=marker, label="in use")
    upper.set(ylabel="Adapters", ylim=(0, len(seen) * 1.05 + 0.3))
    upper.legend(loc="upper left", frameon=False)
    values = np.array([entry["stored_bytes"] for entry in entries], dtype=float)
    unit, name = (1e6, "MB") if values.max() >= 1e6 else (1e3, "kB")
    lower.plot(seen, values / unit, color=BLUE, linewidth=2, marker=marker)
    lower.set(xlabel="Tasks seen", ylabel=f"Stored ({name})")
    lower.set_ylim(0, 1.1 * max(values.max() / unit, 1e-9))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    _whole(upper.yaxis, lower.xaxis)
    return figure


def routes_figure(answer: Answer, result: Record) -> Figure:
    """Row = key, column = task: the share of the task's images that goes there; its own key is framed."""
    shares, keys = _floats(answer["shares"]).T, answer["keys"]
    figure, axes = _panels("Where each task's test images go", result, (7.2, 2.4 + 0.45 * len(keys)), 1, 1)
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    _numbers(axes, image, shares, lambda share: f"{100 * share:.0f}", lambda share: share > 0.6)
    for task, key in enumerate(answer["key_of_task"]):
        axes.add_patch(Rectangle((task - 0.5, keys.index(key) - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2))
    axes.set(xlabel="Task", ylabel="Key (of task)", yticks=range(len(keys)), yticklabels=keys)
    _whole(axes.xaxis)
    figure.colorbar(image, ax=axes, label="Share of its test images")
    figure.legend(handles=[Patch(facecolor="none", edgecolor=ORANGE, label="the task's own key")], loc="outside lower center",
                  frameon=False)
    return figure


FIGURES = {"gate_weights": gate_weights_figure, "chosen": chosen_figure, "without_adapter": without_adapter_figure,
           "similarity": similarity_figure, "routes": routes_figure, "growth": growth_figure}


def _panels(title: str, result: Record, size: tuple[float, float], rows: int, columns: int, **options: Any
            ) -> tuple[Figure, Sequence[Axes]]:
    """A figure with title, the name of the run, and `rows * columns` axes; `options` as of Figure.subplots."""
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches
    config = result["config"]
    run = ", ".join([title_of(config["dataset"]), *(config[key] for key in ("model_name", "gate") if config.get(key))])
    figure.suptitle(f"{title}\n{run}, seed {result['seed']}", fontsize=11)
    return figure, figure.subplots(rows, columns, **options)


def _numbers(axes: Axes, image: AxesImage, values: np.ndarray, text: Any, bright: Any) -> None:
    """The values in their cells, as far as there is room for them."""
    if max(values.shape, default=0) > TASKS_ANNOTATED:
        return
    for row, column in np.argwhere(~np.isnan(values)):
        axes.text(column, row, text(values[row, column]), ha="center", va="center", fontsize=9,
                  color="black" if bright(values[row, column]) else "white")


def _locator() -> MaxNLocator:
    return MaxNLocator(nbins=13, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _whole(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(_locator())


def _spaced(count: int) -> list[int]:
    """Positions of at most 14 labels among `count` rows, evenly apart."""
    return list(range(0, count, -(-count // 14) or 1))


def _floats(values: Sequence[Any]) -> np.ndarray:
    """Float64 with NaN for None."""
    return np.array(values, dtype=float)
