"""utils/results/report.py: the log lines to the letter, and the tables by what can be read off them."""

from typing import Any

import numpy as np
import pytest
import torch

from utils.results.metrics import TaskCounts, summary
from utils.results.report import (
    curve_lines,
    decision_lines,
    final_table,
    format_array,
    growth_lines,
    seeds_table,
    told_apart,
)

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
    assert growth_lines(3, BETA, rule="threshold", limit=0.1, kept=False, active=3, total=4) == [
        "[Conditional Growth] Task 3 - Beta values: [0.15 0.32 0.48 0.05]",
        "[Conditional Growth] Current task beta: 0.0500, threshold: 0.1000",
        "[Conditional Growth] ✗ Pruning adapter for task 3 (beta=0.0500 <= 0.1000)",
        "[Conditional Growth] Active adapters: 3/4 (75.0%)",
    ]


def test_a_decision_is_told_in_its_own_words() -> None:
    assert decision_lines(2, BETA[:3], criterion="votes: 3", reason="2 of 3 votes", kept=True, active=2, total=3,
                          evicted={0: "no vote"}) == [
        "[Conditional Growth] Task 2 - Beta values: [0.15 0.32 0.48]",
        "[Conditional Growth] Current task beta: 0.4800, votes: 3",
        "[Conditional Growth] ✗ Pruning adapter for task 0 (no vote)",
        "[Conditional Growth] ✓ Keeping adapter for task 2 (2 of 3 votes)",
        "[Conditional Growth] Active adapters: 2/3 (66.7%)",
    ]
    assert told_apart(0.12345678, 0.12345, scientific=False) == ("0.123457", "0.123450")
    assert told_apart(None, 3e-7, scientific=True) == ("-", "3.00e-07")


def test_growth_lines_of_a_kept_adapter() -> None:
    assert growth_lines(1, [0.45, 0.55], rule="threshold", limit=0.1, kept=True, active=2, total=2) == [
        "[Conditional Growth] Task 1 - Beta values: [0.45 0.55]",
        "[Conditional Growth] Current task beta: 0.5500, threshold: 0.1000",
        "[Conditional Growth] ✓ Keeping adapter for task 1 (beta=0.5500 > 0.1000)",
        "[Conditional Growth] Active adapters: 2/2 (100.0%)",
    ]


@pytest.mark.parametrize(("beta", "kept", "reason"), [
    (0.10000001, True, "beta=0.10000001 > 0.10000000"),
    (0.09999, False, "beta=0.099990 <= 0.100000"),
    (0.1, False, "beta=0.1000 <= 0.1000"),
])
def test_the_printed_comparison_is_true(beta: float, kept: bool, reason: str) -> None:
    line = growth_lines(1, [1 - beta, beta], rule="threshold", limit=0.1, kept=kept, active=1, total=2)[2]
    assert line.endswith(f"({reason})")


def test_task_0_is_kept_without_a_comparison_that_fails() -> None:
    def decision(**numbers: Any) -> str:
        return growth_lines(0, [1.0], kept=True, active=1, total=1, **numbers)[2]

    line = "[Conditional Growth] ✓ Keeping adapter for task 0 "
    assert decision(rule="threshold", limit=1.0) == line + "(task 0 is always kept)"
    assert decision(rule="val_loss", limit=0.05) == line + "(task 0 is always kept)"
    assert decision(rule="threshold", limit=0.1) == line + "(beta=1.0000 > 0.1000)"


def test_growth_lines_of_the_other_rules() -> None:
    def middle(**numbers: Any) -> list[str]:
        lines = growth_lines(3, BETA, active=3, total=4, **numbers)
        assert lines[0] == "[Conditional Growth] Task 3 - Beta values: [0.15 0.32 0.48 0.05]"
        assert lines[-1] == "[Conditional Growth] Active adapters: 3/4 (75.0%)"
        return [line.removeprefix("[Conditional Growth] ") for line in lines[1:-1]]

    assert middle(rule="topk", limit=3, kept=True, evicted=[1]) == [
        "Current task beta: 0.0500, topk: 3",
        "✗ Pruning adapter for task 1 (beta=0.3200, not in the top 3)",
        "✓ Keeping adapter for task 3 (beta=0.0500, in the top 3)"]
    assert middle(rule="val_loss", value=0.03, limit=0.05, kept=False) == [
        "Current task beta: 0.0500, gain: 0.0300, margin: 0.0500",
        "✗ Pruning adapter for task 3 (gain=0.0300 <= 0.0500)"]
    assert middle(rule="kd", value=0.25, limit=9e-4, kept=True) == [
        "Current task beta: 0.0500, residual: 2.50e-01, kd_residual: 9.00e-04",
        "✓ Keeping adapter for task 3 (residual=2.50e-01 > 9.00e-04)"]
    assert middle(rule="none", kept=True) == [
        "Current task beta: 0.0500, rule: none", "✓ Keeping adapter for task 3 (growth_rule=none)"]


def test_curve_lines() -> None:
    metrics = {"top1_curve": [98.7, 95.1234, 93.0251], "average_accuracy": 95.6162, "forgetting": 2.305001}
    assert curve_lines(metrics) == [
        "CNN top1 curve: [98.7, 95.12, 93.03]", "Average Accuracy (CNN): 95.62", "Forgetting (CNN): 2.31"]


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
