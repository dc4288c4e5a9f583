"""utils/results/report.py: the log lines to the letter, and the tables by what can be read off them."""

from typing import Any

import numpy as np
import torch

from utils.results.metrics import TaskCounts, summary
from utils.results.report import curve_lines, final_table, format_array, growth_lines, seeds_table, transfer_line

BETA = [0.15, 0.32, 0.48, 0.05]


def record(tasks: int, gated: bool = True, seed: int = 1993) -> dict[str, Any]:
    """A run of two classes a task: after task t, task k is right on 100 - 2 (t - k) of 100, odd pruned."""
    counts = []
    for t in range(tasks):
        images, right = [100] * (t + 1), [100 - 2 * (t - k) for k in range(t + 1)]
        counts.append(TaskCounts(images, right, images, images, [100 - r for r in right]))
    entries = [{
        "task": t, "classes": 2, "seen_classes": 2 * t + 2, "seconds": 1.25 + t, "evicted": [],
        "beta": 1 / (t + 1) if gated else None, "kept": t % 2 == 0 if gated else None,
        "active_adapters": t // 2 + 1 if gated else 0, "stored_parameters": 1000 * (t + 1),
    } for t in range(tasks)]
    return {"config": {}, "seed": seed, "tasks": entries, "metrics": summary(counts)}


def test_arrays_print_on_one_line_however_long() -> None:
    assert format_array(BETA) == "[0.15 0.32 0.48 0.05]"
    assert format_array(torch.tensor(BETA)) == format_array(np.array(BETA)) == "[0.15 0.32 0.48 0.05]"
    assert format_array([1]) == "[1.00]"
    assert format_array([]) == "[]"
    assert format_array([-0.001]) == "[0.00]"
    assert format_array([0.0] * 500) == "[" + " ".join(["0.00"] * 500) + "]"


def test_growth_lines_of_a_pruned_adapter() -> None:
    assert growth_lines(3, BETA, kept=False, active=3, total=4, criterion="threshold: 0.1000",
                        reasons={3: "beta=0.0500 <= 0.1000"}) == [
        "[Conditional Growth] Task 3 - Beta values: [0.15 0.32 0.48 0.05]",
        "[Conditional Growth] Current task beta: 0.0500, threshold: 0.1000",
        "[Conditional Growth] ✗ Pruning adapter for task 3 (beta=0.0500 <= 0.1000)",
        "[Conditional Growth] Active adapters: 3/4 (75.0%)",
    ]


def test_a_decision_is_told_in_its_own_words() -> None:
    assert growth_lines(2, BETA[:3], criterion="votes: 3", reasons={0: "no vote", 2: "2 of 3 votes"}, kept=True, active=2,
                        total=3, evicted=[0]) == [
        "[Conditional Growth] Task 2 - Beta values: [0.15 0.32 0.48]",
        "[Conditional Growth] Current task beta: 0.4800, votes: 3",
        "[Conditional Growth] ✗ Pruning adapter for task 0 (no vote)",
        "[Conditional Growth] ✓ Keeping adapter for task 2 (2 of 3 votes)",
        "[Conditional Growth] Active adapters: 2/3 (66.7%)",
    ]


def test_curve_lines() -> None:
    metrics = {"top1_curve": [98.7, 95.1234, 93.0251], "average_accuracy": 95.6162, "forgetting": 2.305001}
    assert curve_lines(metrics) == [
        "CNN top1 curve: [98.7, 95.12, 93.03]", "Average Accuracy (CNN): 95.62", "Forgetting (CNN): 2.31"]


def test_transfer_line_tells_what_was_measured() -> None:
    metrics = {"backward_transfer": -2.305001, "forward_transfer": None, "calibration_error": 5.4321}
    assert transfer_line(metrics) == "Backward Transfer (CNN): -2.31, Calibration Error (CNN): 5.43"
    assert transfer_line({**metrics, "mean_task_accuracy": 50.0, "forward_transfer": 1.0}) == (
        "Mean Task Accuracy (CNN): 50.00, Backward Transfer (CNN): -2.31, Forward Transfer: 1.00, "
        "Calibration Error (CNN): 5.43")
    assert transfer_line({"backward_transfer": 0.0}) == "Backward Transfer (CNN): 0.00"  # of an older record


def test_final_table_of_five_tasks_shows_every_task() -> None:
    table = final_table(record(5))
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + 5
    assert lines[0].split("  ")[0] == "task" and "T4" in lines[0]
    assert lines[2 + 3].split() == [
        "3", "8", "94.0", "96.0", "98.0", "100.0", "97.00", "0.2500", "pruned", "2", "4,000", "4.2"]
    # The columns of tasks still to come stay empty: the average of row 0 stands under its heading.
    assert lines[2].index("100.00") + len("100.00") == lines[0].index("average") + len("average")


def test_final_table_of_25_tasks_sums_up_the_old_ones() -> None:
    lines = final_table(record(25)).splitlines()
    assert len(lines) == 2 + 25 and max(map(len, lines)) < 120
    assert "T0" not in lines[0] and "old mean" in lines[0] and "old min" in lines[0]
    # After task 24: 100 on the new task, 52 to 98 on the old ones.
    assert lines[-1].split()[:6] == ["24", "50", "100.0", "75.0", "52.0", "76.00"]
    assert lines[2].split()[2:5] == ["100.0", "-", "-"]


def test_final_table_names_evicted_adapters_and_learners_without_a_gate() -> None:
    run = record(3)
    run["tasks"][2]["evicted"] = [0, 1]
    assert "kept, drops 0, 1" in final_table(run).splitlines()[-1]
    last = final_table(record(3, gated=False)).splitlines()[-1].split()
    assert last[-5:] == ["-", "-", "0", "3,000", "3.2"]


def test_seeds_table_gives_mean_and_sample_deviation() -> None:
    runs = [record(5, seed=seed) for seed in (1993, 1994)]
    runs[1]["metrics"]["last_accuracy"] = runs[0]["metrics"]["last_accuracy"] + 2
    runs[1]["tasks"][-1]["active_adapters"] = 5
    lines = seeds_table(runs).splitlines()
    assert [line.split()[0] for line in lines] == ["seed", "-" * len(lines[0]), "1993", "1994", "mean"]
    # Last accuracy 96 and 98; average of 100, 99, 98, 97, 96; tasks lose 8, 6, 4, 2 points; 3 and 5 adapters.
    assert lines[2].split() == ["1993", "96.00", "98.00", "5.00", "3"]
    assert lines[-1].split("  ")[0].strip() == "mean ± std"
    for text in ("97.00 ± 1.41", "98.00 ± 0.00", "5.00 ± 0.00", "4.00 ± 1.41"):
        assert text in lines[-1]
    assert "±" not in seeds_table(runs[:1])
