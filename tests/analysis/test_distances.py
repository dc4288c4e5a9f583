"""python -m analysis.distances: which decisions and distances it reads, its tables, picture and refusals."""

import csv
from pathlib import Path

import pytest
from matplotlib.colors import same_color
from PIL import Image

from analysis.distance_picture import figure
from analysis.distances import Arrival, arrivals, main, pair_table, task_table, verdict
from backbone.keys import shift_numbers
from tests.analysis.conftest import streams
from tests.helpers import refusal, save, varied
from utils.results.plots import BLUE, ORANGE

DOMAINS = ["negative", "plain", "negative", "edges"]
# of every seed the distances of each task to the keys, and what was kept
SEEN = {1: ([{}, {0: 8.0}, {0: 1.0, 1: 9.0}, {0: 2.5, 1: 4.0}], [True, True, False, False]),
        2: ([{}, {0: 10.0}, {0: 1.2, 1: 7.0}, {0: 6.0, 1: 3.5}], [True, True, False, True])}


def record(base: dict, seed: int, domains: list[str] | None = DOMAINS, price: float | None = 3.0, **changes) -> dict:
    """A run of `SEEN`. Without a price it has none in its record."""
    made = varied(base, seed, tasks=4, task_domains=domains, **changes)
    for entry, shifts, kept in zip(made["tasks"], *SEEN[seed], strict=True):
        entry["kept"] = kept
        entry["numbers"] = {"threshold": 0.5, **({} if price is None else {"price": price}), **shift_numbers(shifts)}
    return made


@pytest.fixture
def folder(base: dict, tmp_path: Path) -> Path:
    """Two seeds with distances, and a method that measures none."""
    for seed in SEEN:
        save(tmp_path / "runs" / "routed", record(base, seed))
        save(tmp_path / "runs" / "plain", varied(base, seed, tasks=4, task_domains=DOMAINS, rank=1))
    return tmp_path / "runs"


def found(folder: Path) -> list[Arrival]:
    (stream,) = streams(folder)
    held = {method.name: arrivals(method, stream.domains) for method in stream.methods}
    assert not held.pop("plain", None)
    return held["routed"]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_a_row_per_task_over_seeds(folder: Path) -> None:
    """Numbers by hand: the standard deviation of 8 and 10 is the root of 2."""
    assert cells(task_table(found(folder))) == [
        ["0", "negative", "first", "-", "-", "2 of 2"], ["1", "plain", "first", "0 negative", "9.00 ± 1.41", "2 of 2"],
        ["2", "negative", "", "0 negative", "1.10 ± 0.14", "0 of 2"],
        ["3", "edges", "first", "0 negative (1 of 2), 1 plain (1 of 2)", "3.00 ± 0.71", "1 of 2"]]


def test_a_row_per_pair_of_domains_with_those_kept_where_it_was_nearest(folder: Path) -> None:
    assert cells(pair_table(found(folder))) == [
        ["negative", "negative", "2", "1.10 ± 0.14", "0 of 2"], ["negative", "plain", "2", "8.00 ± 1.41", "-"],
        ["plain", "negative", "2", "9.00 ± 1.41", "2 of 2"], ["edges", "negative", "2", "4.25 ± 2.47", "0 of 1"],
        ["edges", "plain", "2", "3.75 ± 0.35", "1 of 1"]]


def test_the_verdict_names_what_the_price_alone_would_have_decided_otherwise(folder: Path, base: dict) -> None:
    text = verdict(found(folder))
    assert "6 of 6 decisions.\n" in text
    assert "2.50 to 10.0 for the first task of a domain, 1.00 to 1.20 for later ones; a price between 1.20 and 2.50" in text
    for seed in SEEN:
        save(folder / "routed", record(base, seed, price=2.0))
    assert "5 of 6 decisions; not so task 3 of seed 1 at 2.50 refused." in verdict(found(folder))
    overlapping = [*found(folder), Arrival(found(folder)[0].draw, 2, "negative", False, {0: 2.6}, 2.0, True)]
    assert "no price tells them apart" in verdict(overlapping)


def test_without_domains_or_price_nothing_is_said_of_them(base: dict, tmp_path: Path) -> None:
    save(tmp_path / "routed", record(base, 1, domains=None, price=None))
    seen = found(tmp_path)
    assert cells(task_table(seen))[3] == ["3", "0", "2.50", "0 of 1"] and verdict(seen) == ""
    (axes,) = figure("stream", {"routed": seen}).axes
    assert axes.get_ylabel() == "Task" and len(lines(axes, "--")) == 0


def lines(axes, style: str) -> list:
    return [line for line in axes.lines if line.get_linestyle() == style]


def test_kept_and_refused_differ_in_shape_and_color_and_the_price_is_a_line(folder: Path) -> None:
    made = figure("stream", {"routed": found(folder), "again": found(folder)})
    assert len(made.axes) == 2 and made.axes[0].get_xscale() == "log"
    for axes in made.axes:
        points = [(line.get_xdata()[0], line.get_marker(), line.get_color(), line.get_markerfacecolor() != "white")
                  for line in lines(axes, "None")]
        kept = [(8.0, "^", BLUE, True), (10.0, "^", BLUE, True), (3.5, "^", BLUE, True)]
        refused = [(1.0, "o", ORANGE, False), (1.2, "o", ORANGE, False), (2.5, "o", ORANGE, True)]
        assert sorted(points) == sorted(kept + refused) and not same_color(BLUE, ORANGE)
        (price,) = lines(axes, "--")
        assert list(price.get_xdata()) == [3.0, 3.0]
    heights = {line.get_xdata()[0]: line.get_ydata()[0] for line in lines(made.axes[0], "None")}
    assert heights[8.0] == heights[10.0] < heights[1.0] < heights[2.5], "a lane per task, by domain as they come"


def test_files_are_written_and_what_lacks_distances_is_named(folder: Path, base: dict, tmp_path: Path, capsys) -> None:
    save(folder / "routed", {**record(base, 1), "seed": 3, "finished": False})
    out = tmp_path / "out"
    assert main([str(folder), "--output", str(out), "--label", f"{folder / 'routed'}=gate"]) == 0
    page = (out / "distances.md").read_text()
    assert page in capsys.readouterr().out and "### gate, seeds 1, 2" in page and "plain (2 runs)" in page
    assert "Left out: not finished" in page and "![distance" in page
    rows = list(csv.DictReader((out / "distances.csv").open()))
    assert len(rows) == 10 and sum(row["nearest"] == "True" for row in rows) == 6
    assert [row["distance"] for row in rows if row["seed"] == "2" and row["task"] == "3"] == ["6.0", "3.5"]
    with Image.open(out / "distances.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize("what, words", [
    ("older", "no finished run has recorded how far images have moved (2 finished)"), ("missing", "no such file"),
    ("output", "cannot be made"), ("label", "is not PATH=NAME")])
def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path, capsys, what: str, words: str) -> None:
    path = {"older": folder / "plain", "missing": tmp_path / "no"}.get(what, folder)
    (tmp_path / "file").touch()
    options = ["--label", "x"] if what == "label" else []
    assert words in refusal(main, capsys, path, *options, "--output", tmp_path / ("file/out" if what == "output" else "out"))
    assert not (tmp_path / "out").exists()
