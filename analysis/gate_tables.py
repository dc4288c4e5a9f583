"""The answers of analysis/gate_questions.py as Markdown tables, aligned so that they also read well in a terminal."""

from collections.abc import Sequence
from typing import Any

from analysis.gate_questions import Answer

# Up to this many tasks a table has a column per task; the JSON and the picture have them all.
TASKS_SHOWN = 12


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A right-aligned Markdown table; None becomes `-`."""
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def gate_weights_table(answer: Answer) -> str:
    """Adapters down, tasks across; of a long stream evenly spaced tasks, the last one included."""
    weights, moved = answer["in_force"], answer["moved"]
    count = len(weights)
    columns = min(TASKS_SHOWN, count)
    tasks = [round(column * (count - 1) / max(1, columns - 1)) for column in range(columns)]
    rows = [[k, *(("" if k > t else _weight(weights[t][k])) for t in tasks)] for k in range(count)]
    return table(["adapter", *(f"after {t}" for t in tasks)], [*rows, ["moved", *(_weight(moved[t]) for t in tasks)]])


def chosen_table(answer: Answer) -> str:
    """Adapters down, the most often chosen first."""
    order = sorted(answer["adapters"], key=lambda entry: (-entry["chosen"], -entry["mean_weight"], entry["adapter"]))
    return table(["adapter", "chosen", "of tasks", "mean weight", "mean share", "now"],
                 [[entry["adapter"], entry["chosen"], entry["tasks"], f"{entry['mean_weight']:.3f}",
                   f"{entry['mean_share']:.3f}", "stored" if entry["stored"] else "pruned"] for entry in order])


def without_adapter_table(answer: Answer) -> str:
    """The change by adapter and task, all classes competing and with the task told, and the most helpful old adapter."""
    parts = [_check(answer)]
    titles = {"top1": "All classes seen compete", "within": "The task is told (only its own classes compete)"}
    tasks = range(len(answer["images"]) if len(answer["images"]) <= TASKS_SHOWN else 0)
    for field, title in titles.items():
        whole = answer[field]
        rows = [["none", "", f"{whole['all']:.2f} %", *(_percent(whole["tasks"][t]) for t in tasks)]]
        rows += [[entry["adapter"], _weight(entry["weight"]), _change(entry[field]["all"]),
                  *(_change(entry[field]["tasks"][t]) for t in tasks)] for entry in answer["adapters"]]
        parts += [f"{title}:", table(["without", "weight", "all tasks", *(f"T{t}" for t in tasks)], rows)]
    parts += ["For each task, the change without its own adapter and without the old adapter whose loss costs it most:",
              table(["task", "accuracy", "own adapter", "old adapter", "change", "old adapter, task told", "change"],
                    [[t, _percent(answer["top1"]["tasks"][t]), _own(answer, t),
                      *(cell for field in titles for cell in _most_helpful(answer, field, t))]
                     for t in range(len(answer["images"]))])]
    return "\n\n".join(parts)


def similarity_table(answer: Answer) -> str:
    """The correlations, and for each task the old adapter of the most similar task beside the one weighted most."""
    names = {"weight": "gate weight", "relative_weight": "relative gate weight"}
    found = [[name, answer[key]["pairs"], _signed(answer[key]["rho"], 3), _p_value(answer[key]["p"])]
             for key, name in names.items()]
    parts = [table(["task similarity against", "pairs", "Spearman rho", "p"], found)]
    reasons = {answer[key]["undefined"] for key in names} - {None}
    parts += [f"Undefined: {reason}." for reason in sorted(reasons)]
    rows = []
    for task in sorted({pair["task"] for pair in answer["pairs"]}):
        pairs = [pair for pair in answer["pairs"] if pair["task"] == task]
        near, heavy = (max(pairs, key=lambda pair: pair[key]) for key in ("similarity", "weight"))
        rows.append([task, near["adapter"], f"{near['similarity']:.4f}", _weight(near["weight"]),
                     heavy["adapter"], f"{heavy['similarity']:.4f}", _weight(heavy["weight"])])
    header = ["task", "most similar", "cosine", "weight", "most weight", "cosine", "weight"]
    return "\n\n".join([*parts, table(header, rows)] if rows else parts)


def growth_table(answer: Answer) -> str:
    """Tasks down."""
    return table(["after task", "its adapter", "evicted", "adapters", "stored parameters", "stored bytes"],
                 [[entry["task"], "kept" if entry["kept"] else "pruned", ", ".join(map(str, entry["evicted"])),
                   entry["active_adapters"], f"{entry['stored_parameters']:,}", f"{entry['stored_bytes']:,}"]
                  for entry in answer["tasks"]])


def routes_table(answer: Answer) -> str:
    """Tasks down, keys across, in percent."""
    rows = [[task, key, *(f"{100 * share:.1f}" for share in shares)]
            for task, (key, shares) in enumerate(zip(answer["key_of_task"], answer["shares"], strict=True))]
    return table(["task", "its key", *(f"to key {key}" for key in answer["keys"])], rows)


TABLES = {"gate_weights": gate_weights_table, "chosen": chosen_table, "without_adapter": without_adapter_table,
          "similarity": similarity_table, "routes": routes_table, "growth": growth_table}


def _check(answer: Answer) -> str:
    difference = answer["largest_difference"]
    text = "gives exactly the accuracy that the run recorded" if difference == 0 else (
        f"differs from the accuracy that the run recorded by {difference} images in a task at most, being computed otherwise "
        "(device, threads, batch size or precision)")
    return f"The network after task {answer['task']}, rebuilt from its files, {text}."


def _own(answer: Answer, task: int) -> str:
    return next((_change(entry["top1"]["tasks"][task]) for entry in answer["adapters"] if entry["adapter"] == task), "-")


def _most_helpful(answer: Answer, field: str, task: int) -> tuple[str, str]:
    """The older adapter without which the task loses most, and the change; `none` where no loss of one costs anything."""
    old = [(entry[field]["tasks"][task], entry["adapter"]) for entry in answer["adapters"] if entry["adapter"] < task]
    costs = [pair for pair in old if pair[0] is not None and pair[0] < 0]
    if not costs:
        return "none" if old else "-", "-"
    change, adapter = min(costs)
    return str(adapter), _change(change)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _weight(value: float | None) -> str:
    """Three decimals; a weight of exactly zero, as sparsemax gives, is told from a small one."""
    return "-" if value is None else "0" if value == 0 else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _change(value: float | None) -> str:
    return _signed(value, 2)


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:+.{digits}f}"


def _p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"
