"""What the page shows of one run, as plain values ready for JSON: its record, and whatever of its files is beside it.

Shapes: `T` tasks recorded, `K` tasks of the stream (more than `T` where all were learned at once), `C` classes seen.
"""

import json
import os
from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from pydantic.fields import FieldInfo

from analysis.measures import MEASURES
from analysis.records import RECORD, Run
from analysis.tables import code, machine
from utils.config import config_of_record
from utils.config.keys import told
from utils.errors import UserError
from utils.results.metrics import TaskCounts, accuracy_matrix
from utils.runs.files import sha256_of

# Files of a run besides those that its record lists with a checksum, as docs/RUNS.md names them.
BESIDE = ("config.json", "split.json", "train.log", "accuracy.png", "gates.png", "growth.png", "gates/gates.md")
SAME, OTHER, MISSING, UNCHECKED = "as recorded", "differs from the record", "not here", "here"
DIGITS = 4  # of accuracies and gate weights: what a picture or a table can show, at a fraction of the bytes


def run_data(run: Run, method: str, stream: int, domains: Sequence[str], page_folder: Path) -> dict[str, Any]:
    """Everything about one run. `method`: its name in the comparison; `stream`: which comparison that is; `page_folder`: where
    the page will lie, for the links."""
    result = run.result
    tasks, metrics = result["tasks"], result["metrics"]
    counts = [TaskCounts(**entry["counts"]) for entry in tasks]
    sizes = _task_sizes(result)
    files, here = _files(run, page_folder)
    return {
        "title": f"{method}, seed {run.draw}", "stream": stream, "domains": list(domains),
        "record": _link(run.path, page_folder), "machine": machine(run), "code": code(run),
        "figures": [[measure.heading, f"{value:,.{measure.digits}f}"]
                    for measure in MEASURES if (value := measure.read(result)) is not None],
        "seen": [entry["seen_classes"] for entry in tasks],
        "matrix": _rounded(metrics["accuracy_matrix"]), "within": _rounded(accuracy_matrix(counts, "within")),
        "top1": _rounded(metrics["top1_curve"]), "told": _rounded(metrics["within_task_curve"]),
        "newest": _rounded(metrics["accuracy_when_learned"]), "forgetting": metrics["forgetting"],
        "counts": [entry["counts"] for entry in tasks],
        "read": _rounded([entry["beta_values"] for entry in tasks]),
        "force": _rounded([entry["beta_after"] for entry in tasks]),
        "stored": [_stored(entry) for entry in tasks],
        "kept": [entry["kept"] for entry in tasks], "evicted": [entry["evicted"] or [] for entry in tasks],
        "adapters": [entry["active_adapters"] for entry in tasks], "bytes": [entry["stored_bytes"] for entry in tasks],
        "parameters": [entry["stored_parameters"] for entry in tasks], "seconds": [entry["seconds"] for entry in tasks],
        "task_of_class": [task for task, size in enumerate(sizes) for _ in range(size)],
        "class_names": _class_names(run), "classes": [entry.get("class_counts") for entry in tasks],
        **_from_gate_files(run, here), "files": files, "config": config_rows(result)}


def config_rows(result: Mapping[str, Any]) -> list[list[Any]]:
    """Of every key of a record's config: key, value, default (in words where it follows from something else), meaning, and
    whether nobody asked for something else than the default, as far as the record tells.

    Where this version does not know the config any more, its keys stand there without default and meaning.
    """
    try:
        config = config_of_record(result["config"], "config")
    except UserError:
        return [[key, _text(value), "", "", False] for key, value in result["config"].items()]
    fields, values = type(config).model_fields, config.model_dump(mode="json")
    return [[key, _text(value), _default(fields[key]), fields[key].description or "",
             value is None or _text(value) == _default(fields[key])] for key, value in values.items()]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none, it must be given"
    return told(field, "unset") or "null" if field.default is None else _text(field.default)


def _text(value: Any) -> str:
    """As a config file writes it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _task_sizes(result: Mapping[str, Any]) -> list[int]:
    """New classes of every task of the stream, also where the method learned them all at once: a task then has those that its
    test images are of, or, in an older record that does not count them by class, its part of an even cut."""
    entries, config = result["tasks"], result["config"]
    images, seen = entries[-1]["counts"]["images"], entries[-1]["seen_classes"]
    if len(images) == len(entries):
        ends = [entry["seen_classes"] for entry in entries]
    elif counts := entries[-1].get("class_counts"):
        of_classes = list(accumulate(map(sum, counts["predicted_task"])))
        ends = [bisect(of_classes, total) for total in accumulate(images)]
    else:
        ends = [min(seen, config["init_cls"] + task * config["increment"]) for task in range(len(images))]
    return [after - before for before, after in pairwise([0, *ends])]


def _stored(entry: Mapping[str, Any]) -> list[int] | None:
    """1 for every adapter that is stored after the task, 0 for a pruned one; None for a method without adapters."""
    mask = entry["pruning_mask"]
    return None if mask is None else list(mask[:entry["task"] + 1])


def _class_names(run: Run) -> list[str]:
    """Names in stream order: those of split.json if it is the run's, else the data set's class numbers."""
    seen = run.result["tasks"][-1]["seen_classes"]
    path = run.path.with_name("split.json")
    if run.path.name == RECORD and path.is_file():
        try:
            split = json.loads(path.read_bytes())
            if split["sha256"] == run.result["split_sha256"]:
                return [str(name) for name in split["class_names"][:seen]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is damaged ({error}); restore it from a copy, or delete it.") from error
    return [str(number) for number in run.result["class_order"][:seen]]


# ---- files


def _files(run: Run, page_folder: Path) -> tuple[list[dict[str, Any]], dict[str, bool]]:
    """The files of the run: name, link and size if it is there, and whether it is what the run wrote; and, by name, whether
    each that the record lists is there as recorded."""
    folder = run.path.parent
    listed = {name: digest for entry in run.result["tasks"] for name, digest in entry["files"].items()}
    rows, here = [_file(run.path, SAME, page_folder)], {}
    whole = run.path.name == RECORD  # a committed record has no files beside it
    for name in BESIDE if whole else ():
        if (folder / name).is_file():
            rows.append(_file(folder / name, UNCHECKED, page_folder))
    for name, digest in sorted(listed.items(), key=lambda item: _by_task(item[0])):
        path = folder / name
        found = whole and path.is_file()
        state = MISSING if not found else SAME if sha256_of(path) == digest else OTHER
        here[name] = state == SAME
        rows.append(_file(path, state, page_folder) if found else {"name": name, "state": MISSING})
    return rows, here


def _file(path: Path, state: str, page_folder: Path) -> dict[str, Any]:
    return {"name": path.name, "state": state, "bytes": path.stat().st_size, "href": _link(path, page_folder)}


def _by_task(name: str) -> tuple[str, int]:
    stem = name.rsplit(".", 1)[0]
    kind, _, task = stem.rpartition("_")
    return (kind, int(task)) if task.isdecimal() else (stem, -1)


def _link(path: Path, page_folder: Path) -> str:
    """The path relative to the page, so that both can be moved together; absolute where there is no way between them."""
    try:
        return quote(Path(os.path.relpath(path.resolve(), page_folder.resolve())).as_posix())
    except ValueError:  # another drive
        return path.resolve().as_uri()


def _from_gate_files(run: Run, here: Mapping[str, bool]) -> dict[str, Any]:
    """What `beta_values_task_<t>.pt` adds to the record, where all of them are there as recorded.

    share: rows as the gate weights, every adapter's share of the sum of |beta * alpha| over blocks and projections. route: for
    routed inference the key of every task so far, after each task. None where there is no such file.
    """
    names = [f"beta_values_task_{entry['task']}.pt" for entry in run.result["tasks"]]
    if not all(here.get(name) for name in names):
        return {"share": None, "route": None}
    gates = [torch.load(run.path.with_name(name)) for name in names]
    products = [(gate["beta_after"].double()[:, None, None] * gate["alphas"].double()).abs().sum((1, 2)) for gate in gates]
    shares = [(part / part.sum() if part.sum() > 0 else part).tolist() for part in products]
    routes = [gate["route"].tolist() for gate in gates] if all("route" in gate for gate in gates) else None
    return {"share": _rounded(shares), "route": routes}


def _rounded(values: Any) -> Any:
    """Nested lists of figures, shortened."""
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return round(values, DIGITS) if isinstance(values, float) else values
