"""utils/data/tasks.py: what follows from the classes of each task."""

import pytest

from utils.data.tasks import Tasks, domain_tasks
from utils.errors import UserError


def test_new_classes_in_every_task() -> None:
    tasks = Tasks.of_sizes([2, 3, 1])
    assert tasks.classes == tasks.cells == [range(2), range(2, 5), range(5, 6)] and tasks.seen == [2, 5, 6]
    assert tasks.label_of_cell.tolist() == list(range(6)) and tasks.task_of_class.tolist() == [0, 0, 1, 1, 1, 2]
    assert (tasks.owners == tasks.owners[0]).all() and tasks.owners[0].tolist() == tasks.task_of_class.tolist()
    assert [tasks.visits(task) for task in range(3)] == [(0, 1)] * 3


def test_the_same_classes_in_every_task() -> None:
    tasks = Tasks.of_domains(3, 4)
    assert tasks.classes == [range(3)] * 4 and tasks.cells == [range(0, 3), range(3, 6), range(6, 9), range(9, 12)]
    assert tasks.seen == [3] * 4 and tasks.label_of_cell.tolist() == [0, 1, 2] * 4
    assert tasks.owners.tolist() == [[task] * 3 for task in range(4)], "whatever an image is taken for is of its own task"
    assert [tasks.visits(task) for task in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize("changes, message", [
    ({"init_cls": 7}, "init_cls: 7 is more than the 6 classes"),
    ({"init_cls": 1}, "init_cls: 1 gives every task a single class"),
    ({"domains": None}, "scenario: data set 'things' has no domains of its own; give 'task_domains'"),
    ({"domains": ["a", "b", "a"]}, "task_domains: 'a' comes in tasks 0 and 2, .* name it once"),
    ({"nb_tasks": 3}, "nb_tasks: 2 domains make 2 tasks, not 3"),
])
def test_streams_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    usual = {"classes": 6, "init_cls": 3, "domains": ["a", "b"], "nb_tasks": None, "dataset": "things"}
    with pytest.raises(UserError, match=message) as caught:
        domain_tasks(**{**usual, **changes})
    assert "\n" not in str(caught.value)
