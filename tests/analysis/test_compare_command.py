"""python -m analysis.compare: its pictures, and the command with what it refuses."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from analysis.compare import compare, main
from analysis.measures import measures_of
from analysis.pictures import growth_figure, heatmap_figure, non_dominated, pareto_figure
from tests.analysis.conftest import KEPT_SET, refused, streams
from tests.helpers import ROOT, save, varied

# ---- pictures


def test_non_dominated_points():
    assert non_dominated([(1, 50), (2, 40), (2, 60), (3, 60), (0.5, 10), (2, 60)]) == [0, 2, 4, 5]
    assert non_dominated([]) == []


def test_pareto_shows_means_deviations_and_the_front(runs, base):
    save(runs / "fast", varied(base, last=50, parameters=9000, seconds=1.0, rank=1))
    by_bytes, by_training, by_image = pareto_figure(streams(runs)[0]).axes
    score = pytest.approx(60.4)
    assert points_of(by_bytes) == {"fast": [[36000, 50]], "gated": [[4000, 64]], "sdlora": [[12000, score]]}  # one beats all
    # Three tasks: 0.75 of their seconds is training, 0.25 the evaluation, the last one of 300 images.
    best = [[2.25, 50], [4.5, 64]]
    assert points_of(by_training) == {"fast": [best[0]], "gated": [best[1]], "sdlora": [[4.5, score]],
                                      "best for its cost (means)": best}
    assert points_of(by_image)["fast"] == [[pytest.approx(1000 / 1200), 50]]
    bar = by_bytes.containers[1].lines[2][1].get_segments()[0]
    assert bar[:, 1] == pytest.approx([64 - 2.5**0.5, 64 + 2.5**0.5])


def test_pareto_leaves_out_what_no_record_has(base, tmp_path):
    old = varied(base)
    for entry in old["tasks"]:
        del entry["training_seconds"], entry["evaluation_seconds"]
    save(tmp_path / "old", old)
    (axes,) = pareto_figure(streams(tmp_path)[0]).axes
    assert points_of(axes) == {"old": [[4000, 60]]} and axes.get_xlabel() == "Stored bytes, backbone left out"


def points_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if not line.get_label().startswith("_")}


def test_growth_shows_the_mean_with_its_band_and_the_right_answer(runs, base):
    save(runs / "gated", varied(base, 7, adapters=[1, 2, 3], kept_set=KEPT_SET))
    save(runs / "head", varied(base, 7, adapters=[0, 0, 0], rank=1))
    axes = growth_figure(streams(runs)[0]).axes[0]
    shown = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert shown.pop("gated") == pytest.approx([1, 2, 13 / 6])
    assert shown == {"sdlora": [1, 2, 3], "one per task": [1, 2, 3], "right answer (one per new domain)": [1, 1, 1]}
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.max() == pytest.approx(13 / 6 + np.std([2, 2, 2, 2, 2, 3], ddof=1))


def test_no_growth_picture_without_adapters(base, tmp_path):
    save(tmp_path / "head", varied(base, adapters=[0, 0, 0]))
    _, written = compare([tmp_path], tmp_path / "out")
    assert not any(path.name == "growth.png" for path in written) and (tmp_path / "out" / "pareto.png").exists()


def test_heatmap_shows_each_task_at_the_end(base, tmp_path):
    for seed, shift in ((1, 0), (2, 10)):
        save(tmp_path / "x", varied(base, seed, right=[[90], [80, 70], [60 + shift, 50, 40]]))
    above, below = heatmap_figure(streams(tmp_path)[0]).axes[:2]
    assert above.images[0].get_array().tolist() == [[65, 50, 40]] and below.images[0].get_array().tolist() == [[75, 60, 50]]
    assert [text.get_text() for text in above.texts] == ["65", "50", "40"]


def test_ten_methods_with_long_names_stay_on_the_page(base, tmp_path):
    domains = [f"rotated+grating+{task}" for task in range(12)]
    for index in range(10):
        save(tmp_path / f"a_method_with_quite_a_long_name_{'x' * 30},rank={index + 1},growth_threshold=0.05",
             varied(base, tasks=12, rank=index + 1, parameters=1000 * (index + 1), last=50 + index, task_domains=domains))
    (stream,) = streams(tmp_path)
    for figure in (pareto_figure(stream), growth_figure(stream), heatmap_figure(stream)):
        figure.draw_without_rendering()
        renderer, page = figure._get_renderer(), figure.bbox
        boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
        for axes in figure.axes:
            assert axes.get_window_extent(renderer).height > 150 and axes.get_window_extent(renderer).width > 10
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                boxes += [tick.label1.get_window_extent(renderer) for tick in axis.get_major_ticks()
                          if low <= tick.get_loc() <= high and tick.label1.get_visible()]
        assert all(page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1 and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1
                   for box in boxes)


# ---- the command


def test_the_command_prints_the_page_and_says_what_it_wrote(runs, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main([str(runs), "--output", str(out)]) == 0
    text = capsys.readouterr().out
    names = {"comparison.md", "comparison.csv", "summary.csv", "differences.csv", "pareto.png", "growth.png",
             "accuracy_per_task.png"}
    assert {path.name for path in out.iterdir()} == names and all(str(out / name) in text for name in names)
    page = (out / "comparison.md").read_text(encoding="utf-8")
    assert page in text and f"python -m analysis.compare {runs} --output {out}" in page
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", page)) == {name for name in names if name.endswith(".png")}
    for name in names:
        if name.endswith(".png"):
            with Image.open(out / name) as image:
                assert 600 <= image.width <= 2000 and np.asarray(image.convert("L")).std() > 5


def test_brief_is_one_table_with_the_best_first_and_writes_nothing(runs, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(runs / "single", varied(base, 1993, last=70, adapters=[1, 2, 3], parameters=1))
    before = set(tmp_path.rglob("*"))
    assert main([str(runs), "--brief"]) == 0
    title, empty, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("## digits, 3 tasks") and empty == "" and set(tmp_path.rglob("*")) == before
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["method"], row["seeds"]) for row in shown] == [("`single`", "1"), ("`gated`", "5"), ("`sdlora`", "5")]
    assert [row["last accuracy (%)"] for row in shown] == ["70.00", "64.00 ± 1.58", "60.40 ± 0.55"]
    assert [row["F1"] for row in shown] == ["-", "0.67", "-"]
    p = f"{stats.ttest_1samp([2, 2, 4, 4, 6], 0).pvalue:.4f}"
    assert [row["last: minus sdlora"] for row in shown] == ["+10.00 (1 seed)", f"+3.60 ± 1.67 (p {p})", ""]
    for option, value in (("--output", "out"), ("--margin", "1")):  # that would change nothing
        with pytest.raises(SystemExit, match="2"):
            main([str(runs), "--brief", option, value])
        assert "not allowed with argument" in capsys.readouterr().err


def test_two_streams_have_pictures_of_their_own(runs, base, tmp_path):
    save(runs / "glyphs", varied(base, dataset="glyphs"))
    page, written = compare([runs], tmp_path / "out")
    assert {"pareto_digits.png", "pareto_glyphs.png"} <= {path.name for path in written}
    assert page.count("\n## digits, 3 tasks") == page.count("\n## glyphs, 3 tasks") == 1


def test_bad_input_is_one_sentence_and_writes_nothing(runs, tmp_path, capsys):
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign, text = tmp_path / "foreign.json", tmp_path / "notes.json"
    foreign.write_text('{"dataset": "digits"}')
    text.write_text("notes")
    cases = {"there is no such file": [tmp_path / "nowhere"], "no run is there": [empty], "neither the record": [foreign],
             "malformed JSON": [text], "--margin: 0": [runs, "--margin", "0"], "PATH=NAME": [runs, "--label", "gated"],
             "no finished run to be called": [runs, "--label", f"{empty}=x"],
             "no method is called": [runs, "--baseline", "no"]}
    for words, arguments in cases.items():
        assert words in refused(capsys, *arguments, "--output", out), words
        assert not out.exists()
    (tmp_path / "file").touch()
    assert "cannot be made" in refused(capsys, runs, "--output", tmp_path / "file" / "out")


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: text.replace("_accuracy\": 62", "_accuracy\": 99"),
                                    lambda text: "[]"])
def test_a_damaged_record_is_named(runs, tmp_path, capsys, damage):
    path = runs / "gated" / "seed_1993" / "results.json"
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    sentence = refused(capsys, runs, "--output", tmp_path / "out")
    assert str(path) in sentence and "is damaged" in sentence and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_help_comes_without_torch():
    check = ("import sys, analysis.compare as c\ntry: c.parse(['--help'])\nexcept SystemExit: pass\n"
             "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    options = ("--baseline", "--margin", "--output", "--brief", "--label")
    assert done.returncode == 0 and all(option in done.stdout for option in options)


def test_optional_columns_come_with_their_figures(runs, base):
    (stream,) = streams(runs)
    assert [measure.key for measure in measures_of(stream.methods[1:])][-1] == "peak_memory_mib"
    assert [measure.key for measure in measures_of(stream.methods)][-1] == "kept_set_auc"
