"""python -m analysis.frontier: a study's points, what they are held against, the page and the picture."""

import json
from pathlib import Path

import pytest
from PIL import Image
from scipy import stats

from analysis.frontier import draw, main, read_frontiers, table, verdict
from studies.study import load_study
from tests.helpers import SMALL, save, varied
from utils.errors import UserError
from utils.runs.files import read_sealed_json, write_sealed_json

SEEDS = (1993, 1994, 1995)
# variant, its threshold -> adapters at the end and last accuracy of every seed
DONE = {("gated", 0.3): (2, (60, 61, 63)), ("gated", 0.1): (3, (62, 64, 63)), ("other", 0.1): (3, (61, 60, 60)),
        ("other", 0.4): (1, (50, 50, 51)), ("all", None): (3, (63, 66, 66))}


@pytest.fixture
def study(base: dict, tmp_path: Path) -> Path:
    """Two variants with a threshold to turn and one without, three seeds, all finished."""
    (tmp_path / "base.json").write_text(json.dumps({**SMALL, "nb_tasks": None, "init_cls": 10, "increment": 10}))
    path = tmp_path / "study.json"
    path.write_text(json.dumps({
        "base": "base.json", "seed": list(SEEDS), "filepath": str(tmp_path / "runs"), "variants": {
            "gated": {"grid": {"growth_threshold": [0.3, 0.1]}},
            "other": {"gate": "gumbel_softmax", "grid": {"growth_threshold": [0.1, 0.4]}},
            "all": {"gate": "none", "gate_lr": None}}}))
    for run in load_study(path).runs():
        adapters, last = DONE[run.variant, run.changes.get("growth_threshold")]
        record = varied(base, run.seed, last=last[SEEDS.index(run.seed)], adapters=[1, 1, adapters])
        save(run.folder.parent, {**record, "config": run.config.model_dump(mode="json")})
        (run.folder / "config.json").write_text(json.dumps(run.config.model_dump(mode="json")))
    return path


def test_a_curve_per_variant_by_adapters(study: Path) -> None:
    (frontier,), unfinished = read_frontiers(study)
    curves = frontier.curves()
    assert list(curves) == ["gated", "other", "all"] and not unfinished and frontier.slug == ""
    assert [(point.knob, point.mean("adapters")) for point in curves["gated"]] == [
        ("growth_threshold=0.3", 2), ("growth_threshold=0.1", 3)]
    assert [point.knob for point in curves["other"]] == ["growth_threshold=0.4", "growth_threshold=0.1"]
    assert curves["all"][0].knob == "" and curves["all"][0].of("last_accuracy") == [63, 66, 66]


def test_the_reference_is_its_best_row_with_as_many_adapters(study: Path) -> None:
    """Numbers by hand: at 3 adapters `gated` has 62 64 63 (mean 63), at 2 it has 60 61 63, at 1 nothing."""
    (frontier,), _ = read_frontiers(study)
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in table(frontier, "gated").splitlines()}
    p = stats.ttest_1samp([1, 4, 3], 0, alternative="greater").pvalue
    assert f"+2.67 (p {p:.4f})" in rows["other", "growth_threshold=0.1"]
    assert f"-2.00 (p {stats.ttest_1samp([-1, -2, -3], 0, alternative='greater').pvalue:.4f})" in rows["all", "-"]
    assert rows["other", "growth_threshold=0.4"].rstrip("| ").endswith("-")  # nothing of `gated` has one adapter
    assert rows["gated", "growth_threshold=0.3"].rstrip("| ").endswith("-")
    assert "3.0 ± 0.0 | 63.00 ± 1.00" in rows["gated", "growth_threshold=0.1"]
    assert "Last accuracy: `gated` is on or above 1 of 2 rows" in verdict(frontier, "gated")
    assert "below all by 2.00." in verdict(frontier, "gated")


def test_page_and_picture_are_written(study: Path, tmp_path: Path, capsys) -> None:
    assert main([str(study), "--output", str(tmp_path / "out"), "--reference", "other"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "frontier.md").read_text() in printed and "other minus row, last" in printed
    with Image.open(tmp_path / "out" / "frontier.png") as picture:
        assert picture.width > 1000


def test_a_method_without_average_accuracy_is_in_the_other_panel(study: Path, tmp_path: Path) -> None:
    for run in load_study(study).runs():
        if run.variant == "all":
            record = read_sealed_json(run.folder / "results.json")
            record["metrics"]["average_accuracy"] = None
            write_sealed_json(run.folder / "results.json", record)
    page, files = draw(study, tmp_path / "out")
    assert len(files) == 2 and "| all" in page.replace("`", "")


def test_what_is_not_finished_is_said_and_left_out(study: Path, tmp_path: Path) -> None:
    run = load_study(study).runs()[0]
    (run.folder / "results.json").unlink()
    page, _ = draw(study, tmp_path / "out")
    assert f"Left out: 1 runs that are not finished\n\n- {run.name} seed {run.seed}" in page
    (frontier,), _ = read_frontiers(study)
    assert len(frontier.curves()["gated"][0].figures) == 2


@pytest.mark.parametrize("what, words", [
    ("config", "is not a study"), ("empty", "none of its 15 runs is finished"), ("reference", "'other'"),
    ("missing", "no such file"), ("output", "cannot be made")])
def test_bad_input_is_one_sentence(study: Path, tmp_path: Path, capsys, what: str, words: str) -> None:
    arguments = [str({"config": tmp_path / "base.json", "missing": tmp_path / "no.json"}.get(what, study))]
    if what == "empty":
        (tmp_path / "runs").rename(tmp_path / "moved")
    arguments += ["--reference", "othr"] * (what == "reference")
    arguments += ["--output", str(study / "below" if what == "output" else tmp_path / "out")]
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert words in text and text.count("\n") == 1 and "Traceback" not in text


def test_a_run_of_another_config_is_refused(study: Path) -> None:
    run = load_study(study).runs()[0]
    (run.folder / "config.json").write_text(json.dumps({**run.config.model_dump(mode="json"), "rank": 2}))
    with pytest.raises(UserError, match="rank"):
        read_frontiers(study)
