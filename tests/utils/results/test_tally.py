"""utils/results/tally.py: the sums are those of the parts, over batches and over processes."""

import torch

from utils.results.calibration import Calibration, tally_confidence
from utils.results.metrics import ClassCounts, TaskCounts, tally_classes, tally_predictions
from utils.results.tally import Counts, Tally
from utils.rng import generator

TASK_OF_CLASS = torch.tensor([0, 0, 1, 1, 1, 2])  # the last class is still to come
SEEN, TASKS = 5, 2


def test_batches_and_processes_add_up_to_what_one_pass_counts() -> None:
    logits = torch.randn(90, SEEN, generator=generator(0, "x"))
    labels = torch.randint(SEEN, (90,), generator=generator(0, "y"))
    processes = [Tally(SEEN, TASKS) for _ in range(2)]
    for number, (x, y) in enumerate(zip(logits.split(7), labels.split(7), strict=True)):
        processes[number % 2].add(x, y, TASK_OF_CLASS)
    whole = Tally(SEEN, TASKS)
    for mine, parts in zip(whole.sums, zip(*(tally.sums for tally in processes), strict=True), strict=True):
        mine += sum(parts)
    first = torch.tensor([max(range(SEEN), key=row.__getitem__) for row in logits.tolist()])
    assert whole.read() == Counts(
        TaskCounts.of(tally_predictions(logits, labels, TASK_OF_CLASS, TASKS)),
        ClassCounts.of(tally_classes(logits, labels, TASK_OF_CLASS, TASKS)),
        Calibration.of(tally_confidence(logits, first == labels)))
