"""What people read: the growth lines of the log, and the tables at the end of a run and of several seeds.

Everything is made from plain values or from the record of a run (`results.json`), and returned as text
without a final line break. The log lines are those of METHOD.md, section 6: people grep for them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from utils.results.metrics import mean_std

# Beyond this many tasks the accuracy of each no longer fits on a line, and is summed up in three columns.
TASKS_SHOWN = 10

GROWTH = "[Conditional Growth]"


def format_array(values: Iterable[float]) -> str:
    """Numbers on one line, however many, two decimals, single spaces: `[0.15 0.32 0.48 0.05]`."""
    # Adding 0.0 turns -0.0 into 0.0.
    return "[" + " ".join(f"{round(float(value), 2) + 0.0:.2f}" for value in values) + "]"


def growth_lines(task: int, beta_values: Sequence[float], *, kept: bool, active: int, total: int, criterion: str,
                 reasons: Mapping[int, str], evicted: Sequence[int] = ()) -> list[str]:
    """The `[Conditional Growth]` lines of one decision.

    `beta_values`: the gate weights that the decision read, the current task's last. `active` of `total` adapters are in
    use after it; `evicted` are older tasks whose adapters it pruned. criterion, reasons: the growth rule's words, for what it
    holds the newcomer against and, by task, for what decided over an adapter.
    """
    fates = [*((old, False) for old in evicted), (task, kept)]
    return [f"{GROWTH} Task {task} - Beta values: {format_array(beta_values)}",
            f"{GROWTH} Current task beta: {beta_values[-1]:.4f}, {criterion}",
            *(f"{GROWTH} {'✓ Keeping' if stays else '✗ Pruning'} adapter for task {number} ({reasons[number]})"
              for number, stays in fates),
            f"{GROWTH} Active adapters: {active}/{total} ({100 * active / total:.1f}%)"]


def final_table(result: Mapping[str, Any]) -> str:
    """The table at the end of a run, one row per task, from its record.

    Columns: task, seen classes, accuracy in percent on each task so far (`T0`, `T1`, ...; with more than
    `TASKS_SHOWN` tasks: on the new task, and the mean and minimum over the old ones), average over the images
    of all seen classes, gate weight at the decision, kept or pruned (with the older adapters evicted),
    adapters in use, stored parameters, seconds.
    """
    tasks, metrics = result["tasks"], result["metrics"]
    columns = len(metrics["accuracy_matrix"][0])  # more than there are rows if the stream was learned at once
    compact = columns > TASKS_SHOWN
    names = ["new task", "old mean", "old min"] if compact else [f"T{task}" for task in range(columns)]
    header = ["task", "seen", *names, "average", "gate", "adapter", "adapters", "stored params", "seconds"]
    rows = []
    matrix, curve = metrics["accuracy_matrix"], metrics["top1_curve"]
    for entry, accuracies, average in zip(tasks, matrix, curve, strict=True):
        cells = _summed_up(accuracies, entry["task"] + columns - len(tasks)) if compact else accuracies
        rows.append([str(entry["task"]), str(entry["seen_classes"]),
                     *(_number(cell, 1, missing="-" if compact else "") for cell in cells),
                     _number(average, 2), _number(entry["beta"], 4), _fate(entry),
                     _count(entry["active_adapters"]), _count(entry["stored_parameters"]),
                     _number(entry["seconds"], 1)])
    return _table(header, rows)


def curve_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The curve over all seen classes, its mean, and forgetting, from `metrics.summary`."""
    rounded = [None if value is None else round(value, 2) for value in metrics["top1_curve"]]
    return [f"CNN top1 curve: {rounded}",
            f"Average Accuracy (CNN): {_number(metrics['average_accuracy'], 2)}",
            f"Forgetting (CNN): {_number(metrics['forgetting'], 2)}"]


def transfer_line(metrics: Mapping[str, Any]) -> str:
    """Mean over tasks, transfer and calibration at the end of a run, on one line, from `metrics.summary`.

    What was not measured is left out.
    """
    shown = {"Mean Task Accuracy (CNN)": "mean_task_accuracy", "Backward Transfer (CNN)": "backward_transfer",
             "Forward Transfer": "forward_transfer", "Calibration Error (CNN)": "calibration_error"}
    known = {name: metrics.get(key) for name, key in shown.items()}
    return ", ".join(f"{name}: {value:.2f}" for name, value in known.items() if value is not None)


def task_figures(entry: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, float]:
    """What trackers get after a task, by name: from its record and the metrics up to it. What the method has not is left
    out."""
    kept = entry["kept"]
    figures = {
        "task": entry["task"], "accuracy/last": metrics["last_accuracy"], "accuracy/average": metrics["average_accuracy"],
        "accuracy/mean_task": metrics["mean_task_accuracy"],
        "accuracy/forgetting": metrics["forgetting"], "accuracy/backward_transfer": metrics["backward_transfer"],
        "accuracy/forward_transfer": metrics["forward_transfer"], "accuracy/calibration_error": metrics["calibration_error"],
        **{f"accuracy/task_{task}": value for task, value in enumerate(metrics["accuracy_matrix"][-1])},
        "adapters/kept": entry["active_adapters"], "adapters/newest_kept": None if kept is None else int(kept),
        "adapters/evicted": len(entry["evicted"]),
        **{f"beta/adapter_{task}": value for task, value in enumerate(entry["beta_after"] or [])},
        **{f"beta_decided/adapter_{task}": value for task, value in enumerate(entry["beta_values"] or [])},
        **{f"growth/{name}": value for name, value in entry["numbers"].items()},
        "size/trainable_parameters": entry["trainable_parameters"], "size/stored_parameters": entry["stored_parameters"],
        "size/stored_bytes": entry["stored_bytes"], "size/peak_memory_bytes": entry["peak_memory_bytes"],
        "seconds/task": entry["seconds"], "seconds/training": entry["training_seconds"],
        "seconds/evaluation": entry["evaluation_seconds"]}
    return {name: value for name, value in figures.items() if value is not None}


def seeds_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row per run with last and average accuracy, forgetting and adapters kept, then mean ± deviation.

    The standard deviation is that of a sample (divisor `n - 1`), and left out for a single run.
    """
    header = ["seed", "last accuracy", "average accuracy", "forgetting", "adapters kept"]
    columns = [[result["metrics"][name] for result in results]
               for name in ("last_accuracy", "average_accuracy", "forgetting")]
    columns.append([result["tasks"][-1]["active_adapters"] for result in results])
    digits = [2, 2, 2, 0]
    rows = [[str(result["seed"]), *(_number(column[row], digit)
                                    for column, digit in zip(columns, digits, strict=True))]
            for row, result in enumerate(results)]
    name = "mean ± std" if len(results) > 1 else "mean"
    return _table(header, [*rows, [name, *(_mean_text(column) for column in columns)]])


def _summed_up(accuracies: Sequence[float | None], task: int) -> list[float | None]:
    """Accuracy on the new task, mean and minimum over the older ones."""
    old = [value for value in accuracies[:task] if value is not None]
    return [accuracies[task], sum(old) / len(old) if old else None, min(old, default=None)]


def _fate(entry: Mapping[str, Any]) -> str:
    if entry["kept"] is None:
        return "-"
    dropped = ", ".join(str(task) for task in entry["evicted"])
    return ("kept" if entry["kept"] else "pruned") + (f", drops {dropped}" if dropped else "")


def _mean_text(values: Sequence[float | None]) -> str:
    if not values or None in values:
        return "-"
    mean, deviation = mean_std(values)
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _number(value: float | None, digits: int, missing: str = "-") -> str:
    return missing if value is None else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, two spaces apart, with a rule under the header."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
             for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
