"""utils/results/plots.py: what is drawn, read back from the figures, and what is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image

from utils.results.metrics import TaskCounts, summary
from utils.results.plots import accuracy_figure, gates_figure, growth_figure, write_pictures


def record(tasks: int, gated: bool = True) -> dict[str, Any]:
    """A run in which every third adapter is pruned at once, and adapter 1 is evicted after task 4."""
    entries, counts = [], []
    for t in range(tasks):
        mask = [int(not (i % 3 == 2 and i <= t or i == 1 and t >= 4)) for i in range(tasks)]
        there = np.array([i == t or i % 3 != 2 and not (i == 1 and t > 4) for i in range(t + 1)])
        beta = there * np.arange(1.0, t + 2)
        beta = (beta / beta.sum()).tolist()
        right = [50 - (t - k) % 50 for k in range(t + 1)]
        counts.append(TaskCounts([50] * (t + 1), right, right, right, [0] * (t + 1)))
        entries.append({
            "task": t, "classes": 4, "seen_classes": 4 * t + 4, "beta_values": beta if gated else None,
            "pruning_mask": mask if gated else None, "active_adapters": sum(mask[:t + 1]) if gated else 0})
    config = {"dataset": "digits", "model_name": "sdlora", "gate": "gumbel_sparsemax"}
    return {"config": config, "seed": 1993, "tasks": entries, "metrics": summary(counts)}


def line(figure: Figure, label: str) -> np.ndarray:
    """The points of the line so labelled, `[n, 2]`."""
    return next(curve.get_xydata() for curve in figure.axes[0].lines if curve.get_label() == label)


def test_pictures_are_written_and_nothing_else(tmp_path: Path) -> None:
    paths = write_pictures(record(5), tmp_path)
    assert paths == [tmp_path / name for name in ("accuracy.png", "gates.png", "growth.png")]
    assert sorted(tmp_path.iterdir()) == paths
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert 600 <= image.width <= 1600 and 400 <= image.height <= 1600
            assert np.asarray(image.convert("L")).std() > 5  # not a blank page


def test_pictures_replace_older_ones(tmp_path: Path) -> None:
    (tmp_path / "gates.png").write_bytes(b"half a file")
    write_pictures(record(2), tmp_path)
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_gate_has_no_gates_picture(tmp_path: Path) -> None:
    assert gates_figure(record(3, gated=False)) is None
    paths = write_pictures(record(3, gated=False), tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "growth.png"]
    assert sorted(tmp_path.iterdir()) == paths


def test_accuracy_shows_the_curves_of_the_metrics() -> None:
    run = record(6)
    figure, metrics = accuracy_figure(run), run["metrics"]
    assert all(line(figure, name)[:, 0].tolist() == [0, 1, 2, 3, 4, 5] for name in ("newest task", "chance"))
    assert line(figure, "all classes seen").tolist() == [[t, a] for t, a in enumerate(metrics["top1_curve"])]
    assert line(figure, "newest task")[:, 1].tolist() == metrics["accuracy_when_learned"]
    assert np.allclose(line(figure, "chance")[:, 1], [25, 100 / 8, 100 / 12, 100 / 16, 5, 100 / 24])


def test_growth_shows_adapters_against_tasks_seen() -> None:
    figure = growth_figure(record(7))
    # Adapters 2 and 5 are pruned at once, adapter 1 after task 4.
    assert line(figure, "kept").tolist() == [[1, 1], [2, 2], [3, 2], [4, 3], [5, 3], [6, 3], [7, 4]]
    assert line(figure, "one per task").tolist() == [[n, n] for n in range(1, 8)]


def test_heatmap_shows_the_gate_weights_and_what_was_pruned() -> None:
    run = record(7)
    axes = gates_figure(run).axes[0]
    weights, gray = (np.ma.filled(image.get_array().astype(float), np.nan) for image in axes.images)
    gone = {(t, i) for t in range(7) for i in (1, 2, 5) if t > {1: 4, 2: 2, 5: 5}[i]}
    for t in range(7):
        for i in range(7):
            expected = run["tasks"][t]["beta_values"][i] if i <= t and (t, i) not in gone else np.nan
            assert np.array_equal(weights[t, i], expected, equal_nan=True), (t, i)
            assert (not np.isnan(gray[t, i])) == ((t, i) in gone)
    crosses = next(points for points in axes.collections if points.get_gid() == "pruned now")
    # Under the numbers.
    assert {(round(y - 0.28, 9), x) for x, y in crosses.get_offsets()} == {(2, 2), (4, 1), (5, 5)}


def test_numbers_stand_in_the_cells_up_to_twelve_tasks() -> None:
    run = record(12)
    run["tasks"][1]["beta_values"] = [0.0, 1.0]
    run["tasks"][3]["beta_values"][0] = 0.001
    axes = gates_figure(run).axes[0]
    texts = {text.get_position()[::-1]: text for text in axes.texts if text.get_transform() == axes.transData}
    last_decision = {1: 4, 2: 2, 5: 5, 8: 8}  # of the adapters that are pruned
    assert set(texts) == {(t, i) for t in range(12) for i in range(t + 1) if t <= last_decision.get(i, 11)}
    assert texts[1, 0].get_text() == "0"  # exactly zero
    assert texts[3, 0].get_text() == "0.00"  # small
    assert texts[0, 0].get_text() == "1.00"
    assert (texts[0, 0].get_color(), texts[1, 0].get_color()) == ("black", "white")
    assert len(gates_figure(record(13)).axes[0].texts) == 1  # the line under the title


def test_a_pruned_cell_differs_from_every_weight() -> None:
    axes = gates_figure(record(7)).axes[0]
    gray = np.array(axes.images[1].cmap(0)[:3])
    scale = axes.images[0].cmap(np.linspace(0, 1, 256))[:, :3]
    assert np.linalg.norm(scale - gray, axis=1).min() > 0.25
    assert np.linalg.norm(np.array(colors.to_rgb("white")) - gray) > 0.25


@pytest.mark.parametrize("tasks", [1, 2, 5, 12, 20, 100])
def test_everything_stays_on_the_page_and_ticks_are_whole_and_apart(tasks: int) -> None:
    run = record(tasks)
    for figure in (accuracy_figure(run), gates_figure(run), growth_figure(run)):
        figure.draw_without_rendering()
        page, axes = figure.bbox, figure.axes[0]
        assert axes.get_title().strip() and axes.get_xlabel() and axes.get_ylabel()
        renderer = figure._get_renderer()
        boxes = [axes.xaxis.label.get_window_extent(renderer), axes.yaxis.label.get_window_extent(renderer),
                 axes.title.get_window_extent(renderer),
                 *(legend.get_window_extent(renderer) for legend in figure.legends)]
        for axis, ends in ((axes.xaxis, ("x0", "x1")), (axes.yaxis, ("y0", "y1"))):
            low, high = sorted(axis.get_view_interval())
            shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            labels = [tick.label1.get_window_extent(renderer) for tick in shown]
            assert shown and all(float(tick.get_loc()).is_integer() for tick in shown)
            spans = sorted((getattr(box, ends[0]), getattr(box, ends[1])) for box in labels)
            assert all(first[1] < second[0] for first, second in zip(spans, spans[1:], strict=False))
            boxes += labels
        for box in boxes:
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
