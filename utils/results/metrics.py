"""What is measured in class-incremental learning, from counts of right and wrong predictions by integer task.

Shapes: `n` images, `seen` classes of tasks 0..t in stream order, `T` tasks learned in all.
`R[t][k]` is the accuracy in percent on the test images of task `k` after task `t` was learned, all seen
classes competing. Everything here is a pure function of counts, so sums over batches and processes give the
same numbers as one pass over all images.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.results.calibration import Calibration

Matrix = list[list[float | None]]


@dataclass(frozen=True)
class TaskCounts:
    """Counts of test images after one task, entry `k` for the images whose class belongs to task `k`.

    `images`: test images. `top1`, `top5`: the true class is first, among the first five, of all seen classes.
    `within`: the true class is first when only the classes of its own task compete (the task is told).
    `wrong_task`: errors of `top1` whose predicted class belongs to another task; the others are within it.
    """

    images: list[int]
    top1: list[int]
    top5: list[int]
    within: list[int]
    wrong_task: list[int]

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the lists of TaskCounts differ in length: {lengths}")

    @classmethod
    def zeros(cls, tasks: int) -> "TaskCounts":
        """Nothing counted yet, for `tasks` tasks: the start of a sum over batches."""
        return cls(*([0] * tasks for _ in fields(cls)))

    @classmethod
    def of(cls, tally: Tensor) -> "TaskCounts":
        """From a sum of `tally_predictions`, int64 `[5, T]`; waits for the device."""
        return cls(*tally.tolist())

    def __add__(self, other: "TaskCounts") -> "TaskCounts":
        """Entry-wise sum; both must cover the same number of tasks."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return TaskCounts(*([a + b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs))


@dataclass(frozen=True)
class ClassCounts:
    """Counts of the same test images by class, entry `c` for the class with number `c` of the stream.

    `right`: images of which the true class is first of all seen classes (what `TaskCounts.top1` adds up by task).
    `predicted_task`: row `c`, column `k`: images of class `c` whose predicted class belongs to task `k`.
    """

    right: list[int]
    predicted_task: list[list[int]]

    @classmethod
    def of(cls, tally: Tensor) -> "ClassCounts":
        """From a sum of `tally_classes`, int64 `[seen, 1 + T]`; waits for the device."""
        rows = tally.tolist()
        return cls([row[0] for row in rows], [row[1:] for row in rows])


@dataclass(frozen=True)
class ZeroShot:
    """Counts of the test images of a task that is not learned yet, told apart by the nearest mean of its own classes.

    `images`: how many. `learned`, `frozen`: right ones by the features of the network as it is before the task, and by those
    of the frozen network as it was pretrained.
    """

    images: int
    learned: int
    frozen: int

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> "ZeroShot | None":
        """From a task's record; None where it was not asked for, or no task is to come."""
        return cls(**entry["zero_shot"]) if entry.get("zero_shot") else None


def count_predictions(logits: Tensor, labels: Tensor, task_of_class: Tensor | np.ndarray,
                      tasks: int) -> TaskCounts:
    """Counts one batch: `tally_predictions`, read at once."""
    return TaskCounts.of(tally_predictions(logits, labels, torch.as_tensor(task_of_class, device=logits.device), tasks))


def tally_predictions(logits: Tensor, labels: Tensor, task_of_class: Tensor, tasks: int) -> Tensor:
    """Counts one batch where it is: int64 `[5, tasks]` on the device, rows in the order of `TaskCounts`, to be added up over
    batches and read once.

    `logits`: `[n, seen]`; `labels`: int64 `[n]` in `0..seen-1`; `task_of_class`: int64 `[>= seen]`, the task
    of each class of the stream, or `[n, >= seen]` where that depends on the image: of a domain-incremental stream every class
    is of the image's own task. `tasks`: how many tasks the seen classes belong to. Among equal logits the
    lower class number comes first. A logit that is not a number beats the true class and is never right
    itself, so that a network that has diverged cannot score. With fewer than five seen classes, `top5` takes
    all of them.
    """
    seen = logits.shape[1]
    task_of = task_of_class[..., :seen].expand(len(logits), seen)
    ahead = _ahead(logits, labels)
    true_task = task_of.gather(1, labels[:, None])[:, 0]
    rank = ahead.sum(1)
    top1 = rank == 0
    per_image = torch.stack([
        torch.ones_like(top1),
        top1,
        rank < min(5, seen),
        ~(ahead & (task_of == true_task[:, None])).any(1),
        task_of.gather(1, logits.argmax(1, keepdim=True))[:, 0] != true_task,
    ])
    tally = torch.zeros(len(per_image), tasks, dtype=torch.long, device=logits.device)
    return tally.index_add_(1, true_task, per_image.long())


def tally_classes(logits: Tensor, labels: Tensor, task_of_class: Tensor, tasks: int) -> Tensor:
    """Counts one batch by class where it is: int64 `[seen, 1 + tasks]` on the device, to be added up over batches.

    Column 0 counts the images that are right, column `1 + k` those whose predicted class belongs to task `k`; so a row
    without its column 0 adds up to the images of the class. Arguments and ties as in `tally_predictions`.
    """
    seen = logits.shape[1]
    right = is_first(logits, labels)
    task_of = task_of_class[..., :seen].expand(len(logits), seen)
    predicted = task_of.gather(1, logits.argmax(1, keepdim=True)) == torch.arange(tasks, device=logits.device)  # [n, tasks]
    tally = torch.zeros(seen, 1 + tasks, dtype=torch.long, device=logits.device)
    return tally.index_add_(0, labels, torch.cat([right[:, None], predicted], 1).long())


def accuracy_matrix(counts: Sequence[TaskCounts], field: str = "top1") -> Matrix:
    """`R`, `[T][T]` in percent: row `t` after task `t`, column `k` for task `k`; None where `k > t`.

    `field` is a name of `TaskCounts`: `"within"` gives the matrix with the task told. A task without test
    images has None in its whole column and is left out of every mean. A stream that was learned at once
    has a single row, over all its tasks.
    """
    for task, entry in enumerate(counts):
        if len(entry.images) != task + 1 and len(counts) > 1:
            raise ValueError(f"the counts after task {task} cover {len(entry.images)} tasks, not {task + 1}")
    return [[_percent(part, whole) for part, whole in zip(getattr(entry, field), entry.images, strict=True)]
            + [None] * (len(counts[-1].images) - len(entry.images)) for entry in counts]


def curve(counts: Sequence[TaskCounts], field: str = "top1") -> list[float | None]:
    """For each task learned so far, the percentage of all its test images seen that `field` of `TaskCounts` counts.

    "top1" is the accuracy over all seen classes (iCaRL, Rebuffi et al., 2017), "within" the same with the task told (van de
    Ven et al., 2022). Every image weighs the same, so a task with more images weighs more (PILOT and SD-LoRA report the same).
    """
    return [_percent(sum(getattr(entry, field)), sum(entry.images)) for entry in counts]


def within_task_error_curve(counts: Sequence[TaskCounts]) -> list[float | None]:
    """Percent of all seen test images that are taken for another class of their own task.

    With the curves of "top1" and "wrong_task" it adds up to 100. It is not 100 minus that of "within": an
    image taken for another task's class may or may not be right once the task is told.
    """
    return [_percent(sum(entry.images) - sum(entry.top1) - sum(entry.wrong_task), sum(entry.images))
            for entry in counts]


def average_accuracy(counts: Sequence[TaskCounts]) -> float | None:
    """Mean of the "top1" curve over the tasks (average incremental accuracy, Rebuffi et al., 2017).

    None for a stream that was learned at once: there was no accuracy after its earlier tasks.
    """
    return None if len(counts[-1].images) > len(counts) else _mean(curve(counts))


def mean_task_accuracy(matrix: Matrix) -> float | None:
    """Mean of the last row of `R` (ACC of Lopez-Paz & Ranzato, 2017): every task weighs the same, whatever images it has.

    What is reported of streams of several data sets, whose test sets differ in size.
    """
    return _mean(matrix[-1])


def accuracy_when_learned(matrix: Matrix) -> list[float | None]:
    """`R[k][k]`: accuracy in percent on each task right after it was learned, all classes seen competing.

    One None for a stream that was learned at once.
    """
    return [None if _rows_missing(matrix) else row[task] for task, row in enumerate(matrix)]


def forgetting(matrix: Matrix) -> float | None:
    """Mean over `k < T-1` of `max over t in k..T-2 of R[t][k]`, minus `R[T-1][k]` (Chaudhry et al., 2018).

    In points of accuracy; negative when old tasks end better than they ever were. 0.0 with a single task,
    None for a stream that was learned at once.
    """
    if len(matrix) < 2:
        return None if _rows_missing(matrix) else 0.0
    return _mean([None if last is None else max(row[task] for row in matrix[task:-1]) - last
                  for task, last in enumerate(matrix[-1][:-1])])


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over `k < T-1` of `R[T-1][k] - R[k][k]` (Lopez-Paz & Ranzato, 2017), in points.

    Negative when learning later tasks cost accuracy on earlier ones. 0.0 with a single task, None for a stream that was
    learned at once.
    """
    if len(matrix) < 2:
        return None if _rows_missing(matrix) else 0.0
    return _mean([None if last is None else last - matrix[task][task]
                  for task, last in enumerate(matrix[-1][:-1])])


def forward_transfer(before: Sequence[ZeroShot | None]) -> float | None:
    """Mean over tasks `1..T-1` of the accuracy on a task that is still to be learned, minus a reference, in points.

    Lopez-Paz & Ranzato (2017) have `R[k-1][k]` minus that of a random start. A head has no rows for the classes of task `k`
    before it is learned, so both are here those of the nearest class mean (cosine of features to the means of the training
    images of task `k`, its own classes competing): `R[k-1][k]` with the features of the network after task `k - 1`, the
    reference with those of the frozen network. Positive when what was learned before makes features better for what comes;
    0 for a method that never changes them. `before[k - 1]`: counted after task `k - 1`. None where nothing was.
    """
    return _mean([_percent(entry.learned - entry.frozen, entry.images) for entry in before if entry is not None])


def summary(counts: Sequence[TaskCounts], calibrations: Sequence[Calibration | None] = (),
            before: Sequence[ZeroShot | None] = ()) -> dict[str, Any]:
    """Every metric as plain Python values, ready for JSON: percent, points for forgetting, transfer and calibration error.

    `counts[t]` are the counts after task `t`; there must be at least one. `calibrations[t]`, `before[t]`: likewise, None or
    left out where a run has none; the metrics of them are then None.
    """
    matrix = accuracy_matrix(counts)
    errors = [None if entry is None else entry.error() for entry in calibrations] or [None] * len(counts)
    return {
        "accuracy_matrix": matrix,
        "top1_curve": curve(counts),
        "top5_curve": curve(counts, "top5"),
        "last_accuracy": curve(counts)[-1],
        "average_accuracy": average_accuracy(counts),
        "mean_task_accuracy": mean_task_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(before),
        "calibration_error": errors[-1],
        "calibration_error_curve": errors,
        "accuracy_when_learned": accuracy_when_learned(matrix),
        "within_task_curve": curve(counts, "within"),
        "within_task_error_curve": within_task_error_curve(counts),
        "wrong_task_error_curve": curve(counts, "wrong_task"),
    }


def kept_set(truth: Sequence[bool], kept: Sequence[bool], weights: Sequence[float]) -> dict[str, Any]:
    """How well the kept adapters match the right answer, on a stream where it is known.

    `truth[t]`: whether task `t` needs an adapter of its own; `kept[t]`: whether its adapter is in use at the end;
    `weights[t]`: its gate weight when that was decided. Precision, recall and F1 are of the whole set; AUC is the chance
    that a task which needs an adapter had a larger weight than one which does not, ties half (task 0, which is always kept,
    left out), None if there is only one kind.
    """
    right = sum(a and b for a, b in zip(truth, kept, strict=True))
    later = list(zip(truth, weights, strict=True))[1:]
    needed, others = [w for t, w in later if t], [w for t, w in later if not t]
    wins = sum((a > b) + 0.5 * (a == b) for a in needed for b in others)
    return {
        "truth": list(truth), "kept": list(kept), "precision": right / sum(kept), "recall": right / sum(truth),
        "f1": 2 * right / (sum(kept) + sum(truth)),
        "auc": wins / (len(needed) * len(others)) if needed and others else None,
    }


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor `n - 1`), the latter None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def is_first(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the true class is first of all, bool `[n]`; arguments and ties as in `tally_predictions`."""
    return ~_ahead(logits, labels).any(1)


def _ahead(logits: Tensor, labels: Tensor) -> Tensor:
    """Which classes are ranked before the true one, bool `[n, seen]`."""
    true_logit = logits.gather(1, labels[:, None])
    # Written with negations because every comparison with NaN is false.
    tie_won = (logits == true_logit) & (torch.arange(logits.shape[1], device=logits.device) >= labels[:, None])
    return ~(logits < true_logit) & ~tie_won


def _rows_missing(matrix: Matrix) -> bool:
    """Whether the stream was learned at once, so that there is one row for several tasks."""
    return len(matrix) < len(matrix[0])


def _percent(part: int, whole: int) -> float | None:
    return 100.0 * part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
