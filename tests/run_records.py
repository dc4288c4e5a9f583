"""Records of runs (`results.json`) for tests: a true one from a tiny run, and variations of it."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.learners import small_config
from trainer import run
from utils.results.metrics import TaskCounts, summary
from utils.runs.files import write_sealed_json

IMAGES = 100  # of every task's test set


def true_record(folder: Path) -> dict[str, Any]:
    """The record of a gated run on two tasks of the digits, trained for the purpose."""
    return run(small_config(folder, nb_tasks=2, eval_every=0))[0]


def varied(base: dict[str, Any], seed: int = 1993, right: Sequence[Sequence[int]] | None = None, *, tasks: int = 3,
           last: int = 60, adapters: Sequence[int] | None = None, parameters: int = 1000, seconds: float = 2.0,
           kept_set: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """`base` as if the run had `tasks` tasks of ten classes and had gone otherwise; every metric follows from the counts.

    right: row `t` holds how many of the 100 test images of each task so far are right after task `t`; without it all are
    80 but `last` of each at the end. adapters: kept after each task. parameters: stored at the end.
    """
    right = right or [[80] * (t + 1) for t in range(tasks - 1)] + [[last] * tasks]
    adapters = adapters or list(range(1, len(right) + 1))
    counts = [TaskCounts([IMAGES] * len(row), list(row), list(row), [min(IMAGES, hit + 10) for hit in row], [0] * len(row))
              for row in right]
    result = copy.deepcopy(base)
    result["tasks"] = [
        {**copy.deepcopy(base["tasks"][-1]), "task": task, "classes": 10, "seen_classes": 10 * task + 10,
         "active_adapters": kept, "stored_parameters": parameters, "stored_bytes": 4 * parameters,
         "seconds": seconds, "peak_memory_bytes": 2**20 * (100 + task), "counts": vars(entry)}
        for task, (kept, entry) in enumerate(zip(adapters, counts, strict=True))]
    result["metrics"] = {**summary(counts), **({"kept_set": kept_set} if kept_set else {})}
    result["seed"] = seed
    result["class_order_sha256"] = hashlib.sha256(str(seed).encode()).hexdigest()
    result["config"] = {**result["config"], "seed": [seed], "nb_tasks": None, "init_cls": 10, "increment": 10, **config}
    return result


def save(folder: Path, record: dict[str, Any], committed: bool = False) -> Path:
    """The record in the layout of a run with several seeds, or of the records kept under `docs/results`."""
    seed = record["seed"]
    path = folder / (f"seed_{seed}.json" if committed else f"seed_{seed}/results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed_json(path, record)
    return path
