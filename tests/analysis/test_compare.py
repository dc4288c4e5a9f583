"""python -m analysis.compare: which runs are compared with which, and what is said of them."""

import csv
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from analysis.compare import compare
from analysis.measures import MEASURES, difference
from analysis.pictures import heatmap_figure
from analysis.records import find_runs
from tests.analysis.conftest import SEEDS, refused, streams
from tests.helpers import save, varied
from utils.errors import UserError


def methods(*paths: Path, **labels: Path) -> list[tuple[str, list[int]]]:
    (stream,) = streams(*paths, **labels)
    return [(method.name, [draw.seed for draw in method.runs]) for method in stream.methods]


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- which runs, and in which groups


def test_a_true_record_is_read_with_all_its_measures(trained):
    (stream,) = streams(trained)
    (method,) = stream.methods
    result = method.runs[(1993, 1993)].result
    read = {measure.key: measure.read(result) for measure in MEASURES}
    assert (method.name, stream.tasks) == ("tiny", 2)
    assert read["last_accuracy"] == result["metrics"]["top1_curve"][-1]
    assert read["within_task_accuracy"] == result["metrics"]["within_task_curve"][-1]
    assert read["adapters"] == result["tasks"][-1]["active_adapters"] and read["stored_bytes"] == 4 * read["stored_parameters"]
    assert read["seconds"] == sum(task["seconds"] for task in result["tasks"]) > 0
    assert read["peak_memory_mib"] * 2**20 == max(task["peak_memory_bytes"] for task in result["tasks"])
    assert read["backward_transfer"] == -result["metrics"]["forgetting"]  # there is a single old task
    assert read["calibration_error"] == result["metrics"]["calibration_error_curve"][-1] > 0
    assert 0 < read["training_seconds"] < read["seconds"]
    last = result["tasks"][-1]
    assert read["image_milliseconds"] * sum(last["counts"]["images"]) == pytest.approx(1000 * last["evaluation_seconds"])
    assert {key for key, value in read.items() if value is None} == {
        "forward_transfer", "mean_task_accuracy", *(f"kept_set_{name}" for name in ("precision", "recall", "f1", "auc"))}


def test_a_record_without_the_younger_figures_is_read_without_them(base, tmp_path):
    old = varied(base)
    for entry in old["tasks"]:
        for name in ("calibration", "zero_shot", "training_seconds", "evaluation_seconds"):
            del entry[name]
    for name in ("forward_transfer", "calibration_error", "calibration_error_curve"):
        del old["metrics"][name]
    del old["config"]["forward_transfer"]
    save(tmp_path / "old", old)
    save(tmp_path / "young", varied(base, 1))
    (stream,) = streams(tmp_path)
    method, = stream.methods  # a key that changes no result makes no other method
    read = {measure.key: measure.read(old) for measure in MEASURES}
    assert read["backward_transfer"] == -20 and read["seconds"] == 6
    assert all(read[key] is None for key in ("calibration_error", "training_seconds", "image_milliseconds"))
    page, written = compare([tmp_path], tmp_path / "out")
    row, = (line for line in page.splitlines() if line.startswith("| old ") or line.startswith("| young "))
    assert "(n = 1)" in row and "forward transfer (points)" not in page


def test_the_mean_over_tasks_is_shown_where_tasks_have_unlike_test_sets(base, tmp_path):
    for name, images in (("even", 20), ("uneven", 21)):
        record = varied(base, 1)
        record["tasks"][-1]["counts"]["images"] = [10, 10, images]
        record["metrics"]["accuracy_matrix"][-1] = [90.0, 50.0, 10.0]
        save(tmp_path / name / "mine", record)
        page, _ = compare([tmp_path / name], tmp_path / f"{name}_out")
        assert ("mean over tasks (%)" in page) == (name == "uneven")
    assert " 50.00 |" in next(line for line in page.splitlines() if line.startswith("| mine "))


def test_methods_are_runs_that_differ_in_the_seed_alone(runs, base, tmp_path):
    assert methods(runs) == [("gated", list(SEEDS)), ("sdlora", list(SEEDS))]
    # The machine, the folder and what is asked for in vain do not make another method.
    save(runs / "elsewhere", varied(base, 7, device=["0"], filepath="x", num_workers=3, prefix="y", forward_transfer=True))
    assert methods(runs)[0] == ("elsewhere", [7, *SEEDS])


def test_layouts_of_folders_and_single_files(base, tmp_path):
    single = tmp_path / "one" / "results.json"
    save(tmp_path / "a", varied(base, 1)).rename(tmp_path / "moved.json")
    single.parent.mkdir()
    (tmp_path / "moved.json").rename(single)
    committed = save(tmp_path / "docs" / "study" / "two", varied(base, 1, rank=2), committed=True)
    copy = tmp_path / "three.json"
    copy.write_bytes(save(tmp_path / "b", varied(base, 1, rank=3)).read_bytes())
    expected = [("one", [1]), ("two", [1]), ("three", [1])]
    assert methods(single, committed, copy) == methods(single.parent, tmp_path / "docs", copy) == expected


def test_numbers_in_names_are_sorted_as_numbers(base, tmp_path):
    for rank in (10, 2, 1):
        save(tmp_path / f"rank={rank}", varied(base, 1, rank=rank))
    assert [name for name, _ in methods(tmp_path)] == ["rank=1", "rank=2", "rank=10"]


def test_a_committed_copy_is_not_a_second_run(runs, base, tmp_path):
    committed = tmp_path / "docs" / "study"
    for index, seed in enumerate(SEEDS):
        save(committed / "sdlora", varied(base, seed, last=60 + index % 2, parameters=3000, gate="none"), committed=True)
    assert methods(runs, committed, runs / "sdlora") == [("gated", list(SEEDS)), ("sdlora", list(SEEDS))]


def test_equal_names_become_longer_and_labels_win(base, tmp_path):
    for study, rank in (("s1", 2), ("s2", 3)):
        save(tmp_path / study / "x", varied(base, 1, rank=rank))
    assert methods(tmp_path) == [("s1/x", [1]), ("s2/x", [1])]
    assert methods(tmp_path, new=tmp_path / "s2") == [("x", [1]), ("new", [1])]
    save(tmp_path / "s1" / "x", varied(base, 2, rank=5))
    assert methods(tmp_path / "s1") == [("x (rank=2)", [1]), ("x (rank=5)", [2])]


def test_the_same_config_run_twice_is_two_methods(base, tmp_path):
    save(tmp_path / "first", varied(base, 1))
    save(tmp_path / "again", varied(base, 1, last=61))
    assert methods(tmp_path) == [("again", [1]), ("first", [1])]
    other = save(tmp_path / "copies" / "first", varied(base, 1, last=59))
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'first'))}.*another run of 'first' with seed 1"):
        streams(other, tmp_path / "first")


@pytest.mark.parametrize("change", [{"dataset": "glyphs"}, {"init_cls": 5}, {"increment": 20}, {"data_path": "./other"},
                                    {"task_domains": ["plain", "dots", "plain"]}, {"shuffle": False}, {"images_per_class": 5},
                                    {"test_images_per_class": 5}])
def test_unlike_streams_are_never_in_one_table(runs, base, change):
    save(runs / "other", varied(base, 1993, **change))
    first, second = sorted(streams(runs), key=lambda stream: len(stream.methods))
    assert [method.name for method in first.methods] == ["other"] and len(second.methods) == 2
    assert first.title != second.title and first.slug != second.slug


def test_more_tasks_or_another_backbone_are_another_stream(base, tmp_path):
    save(tmp_path / "three", varied(base))
    save(tmp_path / "four", varied(base, tasks=4))
    other = varied(base)
    save(tmp_path / "network", {**other, "backbone": {**other["backbone"], "sha256": "0" * 64}})
    assert sorted(method.name for stream in streams(tmp_path) for method in stream.methods) == ["four", "network", "three"]
    assert len(streams(tmp_path)) == 3
    # That a run stops after all of its tasks is no other stream, and no other method.
    save(tmp_path / "three", varied(base, 5, nb_tasks=3))
    methods = [method for stream in streams(tmp_path) for method in stream.methods]
    assert ("three", [5, 1993]) in [(method.name, [draw.seed for draw in method.runs]) for method in methods]


def test_runs_are_paired_by_seed_and_class_order(base, tmp_path):
    for order in (None, 7, 8):
        for name in ("one", "two") if order != 8 else ("one",):
            record = varied(base, 5, order_seed=order, rank=2 if name == "one" else 4)
            save(tmp_path / name / str(order), {**record, "class_order_sha256": str(order)})
    (stream,) = streams(tmp_path)
    one, two = sorted(stream.methods, key=lambda method: -len(method.runs))
    assert [str(draw) for draw in one.runs] == ["5", "5 (order 7)", "5 (order 8)"]
    assert [str(draw) for draw in two.runs] == ["5", "5 (order 7)"]
    assert difference(one, two, MEASURES[0], 0.5).n == 2
    # The seed of the run is a seed of its class order as well.
    save(tmp_path / "same", varied(base, 6, order_seed=6, rank=2))
    save(tmp_path / "null", varied(base, 6, rank=4))
    (stream,) = streams(tmp_path / "same", tmp_path / "null")
    assert [list(method.runs) for method in stream.methods] == [[(6, 6)], [(6, 6)]]


def test_random_backbones_follow_the_seed_within_a_stream(base, tmp_path):
    for seed in (1, 2):
        record = varied(base, seed)
        save(tmp_path / "x", {**record, "backbone": {**record["backbone"], "source": "random", "sha256": f"{seed}" * 64}})
    assert methods(tmp_path) == [("x", [1, 2])]


@pytest.mark.parametrize("change, words", [({"class_order_sha256": "0"}, "class orders"), (None, "numbers of test images")])
def test_one_seed_with_unlike_data_is_refused(runs, base, capsys, change, words):
    record = varied(base, 1993, rank=2)
    if change is None:
        record["tasks"][-1]["counts"]["images"][0] += 1
    path = save(runs / "odd", {**record, **(change or {})})
    assert words in refused(capsys, runs) and str(path) in refused(capsys, path, runs / "gated") + refused(capsys, runs)


def test_unfinished_runs_are_listed_and_left_out(runs, base, tmp_path, capsys):
    save(runs / "gated", {**varied(base, 7, tasks=2), "finished": False})
    begun = runs / "sdlora" / "seed_8"
    begun.mkdir()
    (begun / "train.log").touch()
    save(runs / "sdlora" / "seed_1993.old-1", varied(base, 9))
    page, _ = compare([runs], tmp_path / "out")
    left_out = page.split("## Left out: not finished")[1]
    assert "seed_7/results.json: 2 tasks finished, not all" in left_out and f"{begun}: no task is finished" in left_out
    assert "Seeds: 1993, 1994, 1995, 1996, 1997.\n" in page
    assert "no run is finished yet" in refused(capsys, runs / "gated" / "seed_7", "--output", tmp_path / "no")


def test_a_study_gives_its_runs_in_its_order_finished_here_or_committed(base, tmp_path, monkeypatch):
    finished, committed = varied(base, 1, rank=3), varied(base, 1, rank=2)
    own = save(tmp_path / "runs" / "b,rank=3", finished).parent
    there = save(tmp_path / "docs" / "a,rank=2", committed, committed=True)
    entries = [("b,rank=3", 1, own, None, finished), ("a,rank=2", 1, tmp_path / "runs/none", there, committed),
               ("a,rank=2", 2, tmp_path / "runs/later", None, None)]
    study = SimpleNamespace(runs=lambda: [
        SimpleNamespace(name=name, seed=seed, folder=folder, recorded=place, reports=False,
                        record=lambda record=record: record)
        for name, seed, folder, place, record in entries])
    module = ModuleType("studies.study")
    module.load_study = lambda path: study
    monkeypatch.setitem(sys.modules, "studies.study", module)
    file = tmp_path / "study.json"
    file.write_text('{"base": "../digits.json"} // a study')
    found = find_runs([file])
    assert methods(file) == [("b,rank=3", [1]), ("a,rank=2", [1])]
    assert [run.path for run in found.runs] == [own / "results.json", there]
    assert found.unfinished == [f"{tmp_path / 'runs/later'}: not finished"]


# ---- what is said


def test_the_differences_are_paired_by_seed_and_tested(runs, tmp_path):
    compare([runs], tmp_path / "out", margin=1.0)
    found = {row["measure"]: row for row in lines(tmp_path / "out" / "differences.csv")}
    d = np.array([62, 63, 64, 65, 66]) - np.array([60, 61, 60, 61, 60])
    row = found["last_accuracy"]
    assert (row["baseline"], row["method"], row["n"], row["margin"]) == ("sdlora", "gated", "5", "1.0")
    assert float(row["mean"]) == pytest.approx(d.mean()) and float(row["sd"]) == pytest.approx(d.std(ddof=1))
    assert float(row["t_p"]) == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    assert float(row["no_worse_p"]) == pytest.approx(stats.ttest_1samp(d, -1.0, alternative="greater").pvalue)
    assert float(row["equal_p"]) == pytest.approx(stats.ttest_1samp(d, 1.0, alternative="less").pvalue)
    assert (row["wilcoxon_p"], row["wilcoxon_smallest_p"]) == ("0.0625", "0.0625")
    # Less forgetting is better: the tests say so although the difference is negative.
    assert float(found["forgetting"]["mean"]) == pytest.approx(-d.mean())
    assert float(found["forgetting"]["no_worse_p"]) == pytest.approx(float(row["no_worse_p"]))
    assert (found["adapters"]["mean"], found["adapters"]["t_p"], found["adapters"]["no_worse_p"]) == ("-1.0", "", "")
    assert "kept_set_f1" not in found  # the baseline has none


def test_seeds_that_only_one_side_has_are_not_paired(runs, base, tmp_path):
    save(runs / "gated", varied(base, 7, last=0, adapters=[1, 2, 2]))
    page, _ = compare([runs], tmp_path / "out")
    row = lines(tmp_path / "out" / "differences.csv")[0]
    assert (row["measure"], row["n"]) == ("last_accuracy", "5") and float(row["mean"]) > 0
    assert "Without some of them: sdlora (no 7)." in page


def test_means_and_deviations_over_seeds(runs, tmp_path):
    page, _ = compare([runs], tmp_path / "out")
    summary = {row["method"]: row for row in lines(tmp_path / "out" / "summary.csv")}
    assert float(summary["gated"]["last_accuracy_mean"]) == 64
    assert float(summary["gated"]["last_accuracy_sd"]) == pytest.approx(2.5**0.5)
    assert (summary["gated"]["kept_set_f1_n"], summary["sdlora"]["kept_set_f1_n"]) == ("5", "0")
    assert summary["sdlora"]["kept_set_f1_mean"] == ""
    row = next(line for line in page.splitlines() if line.startswith("| gated"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["5", "64.00 ± 1.58"]
    single = lines(tmp_path / "out" / "comparison.csv")
    assert len(single) == 10 and {row["seed"] for row in single} == set(map(str, SEEDS))
    assert [float(row["last_accuracy"]) for row in single if row["method"] == "gated"] == [62, 63, 64, 65, 66]
    assert f"{single[0]['processor']}, " in page and "(10 runs)" in page


def test_missing_figures_are_dashes_and_left_out_of_pairs(runs, base, tmp_path):
    """The upper bound learns everything at once: one record, whose counts cover every task."""
    for seed in SEEDS:
        record = varied(base, seed, last=90, model_name="joint")
        record["tasks"] = [{**record["tasks"][-1], "task": 0, "active_adapters": 1}]
        record["metrics"] = {**record["metrics"], "average_accuracy": None, "forgetting": None, "backward_transfer": None,
                             "calibration_error": 12.5}
        save(runs / "joint", record)
    page, _ = compare([runs], tmp_path / "out")
    cells = [cell.strip() for cell in next(line for line in page.splitlines() if line.startswith("| joint")).split("|")]
    assert cells[1:9] == ["joint", "5", "90.00 ± 0.00", "-", "-", "-", "12.50 ± 0.00", "100.00 ± 0.00"]
    compared = {row["measure"] for row in lines(tmp_path / "out" / "differences.csv") if row["method"] == "joint"}
    assert {"last_accuracy", "stored_parameters"} <= compared and not {"average_accuracy", "forgetting"} & compared
    assert "no seed with this figure in common" in page
    (stream,) = streams(runs)
    shown = heatmap_figure(stream).axes[0].images[0].get_array()
    assert shown[[method.name for method in stream.methods].index("joint")].tolist() == [90, 90, 90]


def test_one_seed_is_compared_without_interval(runs, tmp_path):
    page, _ = compare([runs / "gated" / "seed_1993", runs / "sdlora" / "seed_1993"], tmp_path / "out")
    assert "one seed: no interval, no test" in page and " ± " not in page.split("## How to read")[0]


def test_the_baseline_is_sdlora_the_first_or_the_one_named(runs, base, tmp_path, capsys):
    assert "against `sdlora`" in compare([runs], tmp_path / "out")[0]
    assert "against `gated`" in compare([runs], tmp_path / "out", baseline="gated")[0]
    assert "against `gated`" in compare([runs], tmp_path / "out", labels={runs / "sdlora": "old"})[0]
    assert "gated, sdlora. Did you mean 'sdlora'?" in refused(capsys, runs, "--baseline", "sdlra", "--output", tmp_path / "o")
    save(runs / "b", varied(base, 1993, dataset="glyphs"))
    assert "The baseline has no finished run on this stream" in compare([runs], tmp_path / "out", baseline="gated")[0]


def test_names_cannot_break_the_table(runs, tmp_path):
    page, _ = compare([runs], tmp_path / "out", labels={runs / "gated": "a|b"})
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert any("a\\|b" in line for line in table)
    widths = {len(line) for line in table[:4]}
    assert len(widths) == 1  # and it reads as plain text
