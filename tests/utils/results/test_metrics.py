"""utils/results/metrics.py: matrices worked by hand, and counting against a slow loop that shares no code with it."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.results.metrics import (
    ClassCounts,
    TaskCounts,
    ZeroShot,
    accuracy_matrix,
    accuracy_when_learned,
    average_accuracy,
    backward_transfer,
    count_predictions,
    curve,
    forgetting,
    forward_transfer,
    kept_set,
    mean_std,
    mean_task_accuracy,
    summary,
    tally_classes,
    within_task_error_curve,
)
from utils.rng import generator


def right(images: Sequence[int], top1: Sequence[int]) -> TaskCounts:
    """Counts where only `top1` matters."""
    return TaskCounts(list(images), list(top1), list(images), list(images), [0] * len(images))


def slow_counts(logits: list[list[float]], labels: list[int], task_of_class: list[int],
                tasks: int) -> TaskCounts:
    """The definition of `TaskCounts`, image by image, by sorting."""
    counts = TaskCounts.zeros(tasks)
    for row, label in zip(logits, labels, strict=True):
        task = task_of_class[label]
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        own = [c for c in order if task_of_class[c] == task]
        counts.images[task] += 1
        counts.top1[task] += order[0] == label
        counts.top5[task] += label in order[:5]
        counts.within[task] += own[0] == label
        counts.wrong_task[task] += task_of_class[order[0]] != task
    return counts


def slow_class_counts(logits: list[list[float]], labels: list[int], task_of_class: list[int], tasks: int) -> ClassCounts:
    counts = ClassCounts([0] * len(task_of_class), [[0] * tasks for _ in task_of_class])
    for row, label in zip(logits, labels, strict=True):
        first = min(range(len(row)), key=lambda c: (-row[c], c))
        counts.right[label] += first == label
        counts.predicted_task[label][task_of_class[first]] += 1
    return counts


@st.composite
def batches(draw) -> tuple[list[list[float]], list[int], list[int], int]:
    """Task sizes, logits with many ties, and labels."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    task_of_class = [task for task, size in enumerate(sizes) for _ in range(size)]
    seen = len(task_of_class)
    labels = draw(st.lists(st.integers(0, seen - 1), max_size=12))
    row = st.lists(st.integers(-3, 3).map(float), min_size=seen, max_size=seen)
    logits = draw(st.lists(row, min_size=len(labels), max_size=len(labels)))
    return logits, labels, task_of_class, len(sizes)


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_counting_agrees_with_a_slow_loop(batch, dtype) -> None:
    logits, labels, task_of_class, tasks = batch
    tensor = torch.tensor(logits, dtype=dtype).reshape(len(labels), len(task_of_class))
    stream = np.array([*task_of_class, 9])  # classes of tasks still to come may follow
    counted = count_predictions(tensor, torch.tensor(labels, dtype=torch.int64), stream, tasks)
    assert counted == slow_counts(logits, labels, task_of_class, tasks)
    by_class = tally_classes(tensor, torch.tensor(labels, dtype=torch.int64), torch.tensor(task_of_class), tasks)
    assert ClassCounts.of(by_class) == slow_class_counts(logits, labels, task_of_class, tasks)


@settings(deadline=None, max_examples=50)
@given(batches(), st.integers(0, 12))
def test_counts_add_up_over_batches(batch, cut) -> None:
    logits, labels, task_of_class, tasks = batch
    tensor = torch.tensor(logits).reshape(len(labels), len(task_of_class))
    target = torch.tensor(labels, dtype=torch.int64)
    parts = [count_predictions(tensor[piece], target[piece], torch.tensor(task_of_class), tasks)
             for piece in (slice(None, cut), slice(cut, None))]
    assert parts[0] + parts[1] == count_predictions(tensor, target, torch.tensor(task_of_class), tasks)
    assert TaskCounts.zeros(tasks) + parts[0] == parts[0]


def test_counts_of_different_tasks_do_not_add_up() -> None:
    with pytest.raises(ValueError):
        TaskCounts.zeros(2) + TaskCounts.zeros(3)
    with pytest.raises(ValueError, match="differ in length"):
        TaskCounts([1], [1], [1], [1], [1, 0])


def test_counting_worked_by_hand() -> None:
    """Tasks {0, 1} and {2, 3, 4, 5}; six images."""
    logits = torch.tensor([
        [5.0, 1.0, 0.0, 0.0, 0.0, 0.0],   # label 0: right
        [5.0, 1.0, 0.0, 0.0, 0.0, 0.0],   # label 1: taken for 0, of its own task
        [0.0, 4.0, 9.0, 0.0, 0.0, 0.0],   # label 1: taken for 2, of another task; right once the task is told
        [9.0, 8.0, 1.0, 2.0, 3.0, 4.0],   # label 2: last of six, so not among the first five either
        [9.0, 8.0, 5.0, 2.0, 3.0, 4.0],   # label 2: taken for 0; right once the task is told
        [0.0, 0.0, 0.0, 7.0, 7.0, 0.0],   # label 4: a tie with 3, which comes first
    ])
    counts = count_predictions(logits, torch.tensor([0, 1, 1, 2, 2, 4]), torch.tensor([0, 0, 1, 1, 1, 1]), 2)
    assert counts == TaskCounts(images=[3, 3], top1=[1, 0], top5=[3, 2], within=[2, 1], wrong_task=[1, 2])


def test_a_diverged_network_scores_nothing() -> None:
    nothing = torch.full((4, 4), float("nan"))
    counts = count_predictions(nothing, torch.arange(4), torch.tensor([0, 0, 1, 1]), 2)
    assert counts.images == [2, 2]
    assert counts.top1 == counts.top5 == counts.within == [0, 0]
    spoiled = torch.tensor([[1.0, 0.0, float("nan"), 0.0]])
    counts = count_predictions(spoiled, torch.tensor([0]), torch.tensor([0, 0, 1, 1]), 2)
    assert (counts.top1, counts.top5, counts.within, counts.wrong_task) == ([0, 0], [1, 0], [1, 0], [1, 0])


# R = 90 .  .     images per task: 10, 10, 20
#     80 70 .
#     85 60 50
WORKED = [right([10], [9]), right([10, 10], [8, 7]), right([20, 10, 20], [17, 6, 10])]


def test_metrics_worked_by_hand() -> None:
    matrix = accuracy_matrix(WORKED)
    assert matrix == [[90.0, None, None], [80.0, 70.0, None], [85.0, 60.0, 50.0]]
    assert curve(WORKED) == [90.0, 75.0, 66.0]  # 33 of 50
    assert summary(WORKED)["last_accuracy"] == 66.0
    assert average_accuracy(WORKED) == 77.0
    assert accuracy_when_learned(matrix) == [90.0, 70.0, 50.0]
    assert forgetting(matrix) == (5.0 + 10.0) / 2  # best of 90 and 80 before the last task, minus 85; 70 - 60
    assert backward_transfer(matrix) == (-5.0 - 10.0) / 2
    assert mean_task_accuracy(matrix) == (85.0 + 60.0 + 50.0) / 3  # not 66: the last task has fewer images than it weighs


def test_forgetting_takes_the_best_earlier_accuracy_and_not_the_last_one() -> None:
    matrix = [[50.0, None, None], [80.0, 60.0, None], [90.0, 40.0, 70.0]]
    assert forgetting(matrix) == (80.0 - 90.0 + 60.0 - 40.0) / 2
    assert backward_transfer(matrix) == (90.0 - 50.0 + 40.0 - 60.0) / 2


def test_top5_within_task_and_error_split() -> None:
    counts = [TaskCounts([4], [2], [4], [2], [0]), TaskCounts([4, 6], [1, 3], [3, 6], [2, 4], [2, 1])]
    assert curve(counts, "top5") == [100.0, 90.0]
    assert curve(counts, "within") == [50.0, 60.0]
    assert curve(counts, "wrong_task") == [0.0, 30.0]
    assert within_task_error_curve(counts) == [50.0, 30.0]
    assert accuracy_matrix(counts, "within") == [[50.0, None], [50.0, 400 / 6]]
    parts = np.array([curve(counts), curve(counts, "wrong_task"), within_task_error_curve(counts)])
    assert np.allclose(parts.sum(0), 100)


def test_twenty_tasks_of_ten_classes_stay_in_order() -> None:
    """Groups named as text would put classes 100-119 before 20-39; here task k is right on k of 20 images."""
    task_of_class = np.arange(200) // 10
    labels = torch.arange(200).repeat_interleave(2)
    shuffled = labels[torch.randperm(400, generator=generator(0, "order"))]
    tasks = shuffled // 10
    place = torch.stack([(tasks[:i] == tasks[i]).sum() for i in range(400)])  # which image of its task, 0..19
    predicted = torch.where(place < tasks, shuffled, (shuffled + 10) % 200)
    logits = torch.nn.functional.one_hot(predicted, 200).float()
    counts = count_predictions(logits, shuffled, task_of_class, 20)
    assert counts.images == [20] * 20
    assert counts.top1 == list(range(20))
    assert counts.wrong_task == [20 - task for task in range(20)]


def test_forgetting_over_twenty_tasks() -> None:
    """Task k starts at 100 % and loses k points with every later task."""
    counts = [right([1000] * (t + 1), [1000 - 10 * k * (t - k) for k in range(t + 1)]) for t in range(20)]
    assert accuracy_matrix(counts)[19][10] == 100 - 10 * 9
    expected = sum(k * (19 - k) for k in range(19)) / 19
    assert forgetting(accuracy_matrix(counts)) == pytest.approx(expected)
    assert backward_transfer(accuracy_matrix(counts)) == pytest.approx(-expected)


def test_a_single_task_forgets_nothing() -> None:
    metrics = summary([right([8], [6])])
    assert metrics["top1_curve"] == [75.0] and metrics["average_accuracy"] == metrics["last_accuracy"] == 75.0
    assert metrics["forgetting"] == metrics["backward_transfer"] == 0.0


def test_a_task_without_test_images_is_left_out() -> None:
    counts = [right([10], [9]), right([10, 0], [8, 0]), right([10, 0, 10], [7, 0, 5])]
    metrics = summary(counts)
    assert metrics["accuracy_matrix"][2] == [70.0, None, 50.0]
    assert metrics["top1_curve"] == [90.0, 80.0, 60.0]
    assert metrics["forgetting"] == 20.0
    assert metrics["backward_transfer"] == -20.0
    assert metrics["mean_task_accuracy"] == 60.0


def test_the_counts_of_a_task_cover_the_tasks_seen() -> None:
    with pytest.raises(ValueError, match="after task 1 cover 1 tasks"):
        accuracy_matrix([right([1], [1]), right([1], [1])])


def test_forward_transfer_is_the_mean_gain_over_the_frozen_network() -> None:
    # Task 1: 15 of 20 right beside 12; task 2: 4 of 10 beside 5. After the last task none is to come.
    before = [ZeroShot(20, 15, 12), ZeroShot(10, 4, 5), None]
    assert forward_transfer(before) == (15.0 - 10.0) / 2
    assert summary(WORKED, before=before)["forward_transfer"] == 2.5
    assert forward_transfer([None]) is None and summary(WORKED)["forward_transfer"] is None


def test_the_summary_is_strict_json() -> None:
    metrics = summary(WORKED)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["accuracy_matrix"] == accuracy_matrix(WORKED)
    assert metrics["forgetting"] == 7.5 and metrics["top5_curve"] == [100.0] * 3


def test_mean_and_sample_deviation() -> None:
    assert mean_std([1.0, 2.0, 4.0, 5.0]) == (3.0, pytest.approx((10 / 3) ** 0.5))
    assert mean_std([3.0]) == (3.0, None)


def test_the_kept_set_worked_by_hand() -> None:
    truth, kept, weights = [True, True, False, True, False], [True, False, True, True, True], [0.1, 0.3, 0.3, 0.9, 0.2]
    found = kept_set(truth, kept, weights)
    assert (found["precision"], found["recall"], found["f1"]) == (2 / 4, 2 / 3, 4 / 7)
    assert found["auc"] == 3.5 / 4, "0.3 and 0.9 against 0.3 and 0.2, the tie half; task 0 is no question"
    assert kept_set([True, True], [True, True], [1.0, 0.5])["auc"] is None
