"""The picture of `analysis.distances`: a point per decision, at the distance of the task's images to the nearest key."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.results.plots import BLUE, GRAY, ORANGE, logarithmic

if TYPE_CHECKING:
    from analysis.distances import Arrival

COLUMNS = 3  # panels beside each other
LANE = 0.2  # inches of height for a task
TALLEST = 12.0  # inches for all lanes of a panel
GAP = 0.6  # lanes between two domains
LOOKS = {True: ("^", BLUE, "kept"), False: ("o", ORANGE, "refused")}


def figure(title: str, by_method: "Mapping[str, Sequence[Arrival]]") -> Figure:
    """A panel per method with a row per domain and in it a lane per task, a row per task where the stream has no domains.

    Kept is a triangle, refused a circle; hollow where an earlier task had the domain. Lines: the price, and no movement.
    """
    first = next(iter(by_method.values()))
    lanes = _lanes({arrival.task: arrival.domain for found in by_method.values() for arrival in found if arrival.distances})
    columns = min(COLUMNS, len(by_method))
    rows = -(-len(by_method) // columns)
    tall = min(TALLEST, LANE * (max(lanes.values()) + 2))
    made = Figure(figsize=(7.6 if columns == 1 else 1.2 + 4.4 * columns, 1.9 + rows * (tall + 0.5)), layout="constrained")
    made.suptitle(f"Adapters kept, against how far the images have moved\n{title}", fontsize=11, wrap=True)
    panels = made.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    domains = {arrival.task: arrival.domain for arrival in first}
    for place, (axes, (name, found)) in enumerate(zip(panels, by_method.items(), strict=False)):
        _points(axes, found, lanes)
        _rows(axes, domains, lanes, tall, labelled=place % columns == 0)
        _distances(axes, labelled=place + columns >= len(by_method))
        axes.set_title(name, fontsize=10)
    for axes in made.axes[len(by_method):]:
        axes.remove()
    made.legend(handles=_legend(by_method), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return made


def _lanes(domains: Mapping[int, str]) -> dict[int, float]:
    """The height of every task's lane, from the top: tasks of a domain beside each other, domains in the order in which they
    come, a gap between them."""
    order = list(dict.fromkeys(domains[task] for task in sorted(domains)))
    tasks = sorted(domains, key=lambda task: (order.index(domains[task]), task))
    return {task: index + GAP * order.index(domains[task]) for index, task in enumerate(tasks)}


def _points(axes: Axes, found: "Sequence[Arrival]", lanes: Mapping[int, float]) -> None:
    for arrival in found:
        if arrival.distances:
            marker, color, _ = LOOKS[arrival.kept]
            axes.plot([arrival.distance], [lanes[arrival.task]], marker=marker, markersize=7, linestyle="", color=color,
                      markerfacecolor="white" if arrival.domain and not arrival.first else color, markeredgewidth=1.3,
                      alpha=0.85)
    axes.axvline(1, color=GRAY, linewidth=0.8, linestyle=":", zorder=0)
    price = next((arrival.price for arrival in found if arrival.price is not None), None)
    if price is not None:
        axes.axvline(price, color="black", linewidth=1.2, linestyle="--", zorder=0)


def _rows(axes: Axes, domains: Mapping[int, str], lanes: Mapping[int, float], tall: float, labelled: bool) -> None:
    """Tasks from the top, a line between domains, and the names of both where the panel is `labelled`."""
    spacing = tall / (max(lanes.values()) + 2)
    every = 1 if spacing > 0.13 else 5  # lanes to a label
    shown = {lane: task for place, (task, lane) in enumerate(lanes.items()) if place % every == 0}
    axes.set_yticks(list(shown), [str(task) for task in shown.values()], fontsize=8)
    axes.tick_params(axis="y", length=2)
    axes.set_ylim(max(lanes.values()) + 0.8, -0.8)
    of_domain: dict[str, list[float]] = {}
    for task, lane in lanes.items():
        of_domain.setdefault(domains[task], []).append(lane)
    for each in list(of_domain.values())[1:]:
        axes.axhline(each[0] - (1 + GAP) / 2, color="#D3D3D3", linewidth=0.8, zorder=0)
    if labelled and any(of_domain):
        names = axes.secondary_yaxis("left")
        names.spines["left"].set_visible(False)
        names.set_yticks([sum(each) / len(each) for each in of_domain.values()], of_domain, fontsize=9)
        names.tick_params(length=0, pad=22)
        names.set_ylabel("Domain and task")
    elif labelled:
        axes.set_ylabel("Task")


def _distances(axes: Axes, labelled: bool) -> None:
    """The axis of distances: logarithmic, with plain numbers, and its name where the panel is `labelled`."""
    logarithmic(axes)
    axes.tick_params(axis="x", labelbottom=labelled, labelsize=9)
    axes.grid(axis="x", alpha=0.25)
    if labelled:
        axes.set_xlabel("Distance to the nearest key\n(F ratio, about 1 for none; logarithmic)", fontsize=9)


def _legend(by_method: "Mapping[str, Sequence[Arrival]]") -> list[Line2D]:
    found = [arrival for each in by_method.values() for arrival in each]
    looks = sorted({(arrival.kept, arrival.first or not arrival.domain) for arrival in found if arrival.distances},
                   reverse=True)
    named = any(arrival.domain for arrival in found)
    entries = []
    for kept, first in looks:
        marker, color, word = LOOKS[kept]
        of = (", first task of its domain" if first else ", domain seen before") if named else ""
        entries.append(Line2D([], [], linestyle="", marker=marker, markersize=7, color=color, markeredgewidth=1.3,
                              markerfacecolor=color if first else "white", label=word + of))
    if prices := sorted({arrival.price for arrival in found if arrival.price is not None}):
        entries.append(Line2D([], [], color="black", linewidth=1.2, linestyle="--",
                              label=f"gate_price {', '.join(f'{price:g}' for price in prices)}"))
    return [*entries, Line2D([], [], color=GRAY, linewidth=0.8, linestyle=":", label="no movement")]
