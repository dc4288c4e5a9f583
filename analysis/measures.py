"""What is compared between runs: each measure read from the record of a run (`results.json`), with its unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.records import Draw, Method
from analysis.statistics import Paired, paired
from utils.results.metrics import mean_task_accuracy

MIB = 2**20


@dataclass(frozen=True)
class Measure:
    """A column of the tables. `read` takes a record and gives None where the run has no such figure.

    `has_margin`: it is in points of accuracy, so that "no worse" and "equal" mean something. `in_page`: its differences
    stand on the page too, not in `differences.csv` alone.
    """

    key: str
    heading: str
    digits: int
    read: Callable[[Mapping[str, Any]], float | None]
    higher_is_better: bool = True
    has_margin: bool = False
    in_page: bool = True
    optional: bool = False  # left out of the tables where no run has it


def _metric(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: result["metrics"].get(name)


def _at_the_end(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: result["tasks"][-1].get(key)


def _kept_set(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: (result["metrics"].get("kept_set") or {}).get(name)


def _within_task(result: Mapping[str, Any]) -> float | None:
    curve = result["metrics"].get("within_task_curve")
    return curve[-1] if curve else None


def _mean_task_accuracy(result: Mapping[str, Any]) -> float | None:
    """None where no task has more than twice the test images of another: it would be last accuracy once more."""
    images = result["tasks"][-1]["counts"]["images"]
    return mean_task_accuracy(result["metrics"]["accuracy_matrix"]) if max(images) > 2 * min(images) else None


def _seconds(result: Mapping[str, Any]) -> float:
    return sum(entry["seconds"] for entry in result["tasks"])


def _training_seconds(result: Mapping[str, Any]) -> float | None:
    """Without the evaluations; None for a record that is older than this figure."""
    parts = [entry.get("training_seconds") for entry in result["tasks"]]
    return None if None in parts else sum(parts)


def _image_milliseconds(result: Mapping[str, Any]) -> float | None:
    """Of the evaluation after the last task."""
    last = result["tasks"][-1]
    seconds, images = last.get("evaluation_seconds"), sum(last["counts"]["images"])
    return None if seconds is None or not images else 1000 * seconds / images


def _peak_memory(result: Mapping[str, Any]) -> float:
    return max(entry["peak_memory_bytes"] for entry in result["tasks"]) / MIB


MEASURES = (
    Measure("last_accuracy", "last accuracy (%)", 2, _metric("last_accuracy"), has_margin=True),
    Measure("average_accuracy", "average accuracy (%)", 2, _metric("average_accuracy"), has_margin=True),
    Measure("mean_task_accuracy", "mean over tasks (%)", 2, _mean_task_accuracy, has_margin=True, optional=True),
    Measure("forgetting", "forgetting (points)", 2, _metric("forgetting"), higher_is_better=False, has_margin=True),
    Measure("backward_transfer", "backward transfer (points)", 2, _metric("backward_transfer"), has_margin=True,
            in_page=False),
    Measure("forward_transfer", "forward transfer (points)", 2, _metric("forward_transfer"), has_margin=True, optional=True),
    Measure("calibration_error", "calibration error (points)", 2, _metric("calibration_error"), higher_is_better=False),
    Measure("within_task_accuracy", "within-task accuracy (%)", 2, _within_task, has_margin=True),
    Measure("adapters", "adapters kept", 1, _at_the_end("active_adapters"), higher_is_better=False),
    Measure("stored_parameters", "stored parameters", 0, _at_the_end("stored_parameters"), higher_is_better=False),
    Measure("stored_bytes", "stored bytes", 0, _at_the_end("stored_bytes"), higher_is_better=False, in_page=False),
    Measure("seconds", "seconds", 1, _seconds, higher_is_better=False, in_page=False),
    Measure("training_seconds", "seconds of training", 1, _training_seconds, higher_is_better=False),
    Measure("image_milliseconds", "ms per test image", 3, _image_milliseconds, higher_is_better=False),
    Measure("peak_memory_mib", "peak memory (MiB)", 0, _peak_memory, higher_is_better=False, in_page=False),
    *(Measure(f"kept_set_{name}", f"kept set: {heading}", 3, _kept_set(name), optional=True, in_page=name == "f1")
      for name, heading in (("precision", "precision"), ("recall", "recall"), ("f1", "F1"), ("auc", "AUC of the gate"))),
)


def measures_of(methods: Sequence[Method]) -> list[Measure]:
    """The measures to show: all but the optional ones that no run has."""
    return [measure for measure in MEASURES if not measure.optional or any(values(method, measure) for method in methods)]


def values(method: Method, measure: Measure) -> dict[Draw, float]:
    """The figure of every seed that has it."""
    read = {seed: measure.read(run.result) for seed, run in method.runs.items()}
    return {seed: float(value) for seed, value in read.items() if value is not None}


def difference(method: Method, baseline: Method, measure: Measure, margin: float | None) -> Paired | None:
    """`method` minus `baseline` over the seeds for which both have the figure; None where there is no such seed.

    margin: points up to which a method is "no worse" or "equal"; None tests neither.
    """
    mine, theirs = values(method, measure), values(baseline, measure)
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    return paired([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds],
                  margin if measure.has_margin else None, measure.higher_is_better)
