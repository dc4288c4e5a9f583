"""Everything that is counted in one evaluation: added up where the logits are, and read once."""

from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from utils.results.calibration import BINS, Calibration, tally_confidence
from utils.results.metrics import ClassCounts, TaskCounts, is_first, tally_classes, tally_predictions


class Counts(NamedTuple):
    """What an evaluation on the test images of all seen classes has counted."""

    tasks: TaskCounts
    classes: ClassCounts
    calibration: Calibration


class Tally:
    """Sums over batches on one device, int64 throughout: several processes add up `sums` and have those of all images."""

    def __init__(self, seen: int, tasks: int, device: torch.device | str = "cpu") -> None:
        """`seen`: how many classes have been seen; `tasks`: in how many tasks."""
        self.tasks = tasks
        sizes = ((len(fields(TaskCounts)), tasks), (seen, 1 + tasks), (3, BINS))
        self.sums = [torch.zeros(size, dtype=torch.long, device=device) for size in sizes]

    def add(self, logits: Tensor, labels: Tensor, task_of_class: Tensor) -> None:
        """One batch: `logits` `[n, seen]`, `labels` int64 `[n]`, `task_of_class` as `tally_predictions` takes it. Waits for
        nothing."""
        by_task, by_class, by_confidence = self.sums
        by_task += tally_predictions(logits, labels, task_of_class, self.tasks)
        by_class += tally_classes(logits, labels, task_of_class, self.tasks)
        by_confidence += tally_confidence(logits, is_first(logits, labels))

    def read(self) -> Counts:
        """The sums so far; waits for the device, once for all."""
        flat = torch.cat([part.flatten() for part in self.sums]).cpu()
        parts = flat.split([part.numel() for part in self.sums])
        by_task, by_class, by_confidence = (part.view_as(own) for part, own in zip(parts, self.sums, strict=True))
        return Counts(TaskCounts.of(by_task), ClassCounts.of(by_class), Calibration.of(by_confidence))
