"""Which classes come in which task, in what order and how many: class-incremental streams and domain-incremental ones alike.

A task has a range of classes, by their numbers in the stream. In a class-incremental stream they are new; in a
domain-incremental one they are those of every task, and what is new is the domain of the images. All else follows from the
ranges. A "cell" is one class in one task: what a class-incremental stream has as many of as it has classes.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

Members = list[np.ndarray]  # for each cell the numbers of its images within a split


class Tasks:
    """The classes of each task, one range after another; cells are numbered task by task."""

    def __init__(self, classes: Sequence[range]) -> None:
        self.classes = list(classes)
        ends = list(accumulate((len(each) for each in self.classes), initial=0))
        self.cells = [range(start, stop) for start, stop in zip(ends, ends[1:])]
        self.seen = list(accumulate((each.stop for each in self.classes), max))  # classes of tasks 0 to t together
        self.label_of_cell = np.concatenate([np.arange(each.start, each.stop) for each in self.classes])
        self.task_of_cell = np.repeat(np.arange(len(self.classes)), [len(each) for each in self.classes])

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> "Tasks":
        """Class-incremental: every task brings so many new classes."""
        ends = list(accumulate(sizes, initial=0))
        return cls([range(start, stop) for start, stop in zip(ends, ends[1:])])

    @classmethod
    def of_domains(cls, classes: int, domains: int) -> "Tasks":
        """Domain-incremental: every task has the same classes."""
        return cls([range(classes)] * domains)

    def visits(self, task: int) -> tuple[int, int]:
        """How many tasks have the first class of `task`: before it, and in all."""
        having = [first.start <= self.classes[task].start < first.stop for first in self.classes]
        return sum(having[:task]), sum(having)

    @cached_property
    def task_of_class(self) -> np.ndarray:
        """The task in which each class comes first, int64 `[classes]`."""
        _, first = np.unique(self.label_of_cell, return_index=True)
        return self.task_of_cell[first]

    @cached_property
    def owners(self) -> Tensor:
        """The task of each class as the images of each task meet it, int64 `[T, classes]`: their own for the classes that it
        has, for all others the one in which they came first."""
        owners = torch.from_numpy(self.task_of_class).repeat(len(self.classes), 1)
        for task, classes in enumerate(self.classes):
            owners[task, classes.start : classes.stop] = task
        return owners


def class_order(classes: int, seed: int, shuffle: bool) -> list[int]:
    """Natural labels in the order of the stream, as PILOT draws it: `RandomState(seed).permutation(classes)`."""
    if not shuffle:
        return list(range(classes))
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: {seed} cannot draw a class order; choose one from 0 to {2**32 - 1}.")
    return np.random.RandomState(seed).permutation(classes).tolist()


def task_sizes(classes: int | Sequence[int], init_cls: int, increment: int, nb_tasks: int | None) -> list[int]:
    """Classes per task: `init_cls`, then `increment` each; the last takes what is left.

    Of several data sets `classes` holds the number of each; the last task of every one takes what is left of it.
    Raises UserError if the classes do not suffice, if there are fewer than `nb_tasks` tasks, or if a task has
    a single class (the loss over its own classes would be zero, METHOD.md, section 2).
    """
    counts = [classes] if isinstance(classes, int) else list(classes)
    _check_first(counts[0], init_cls)
    sizes = []
    for count in counts:
        wanted, end = (increment if sizes else init_cls), sum(sizes) + count
        while sum(sizes) < end:
            sizes.append(min(wanted, end - sum(sizes)))
            wanted = increment
    told = f"{' and '.join(map(str, counts))} classes with init_cls {init_cls} and increment {increment}"
    if nb_tasks is not None and nb_tasks > len(sizes):
        raise UserError(f"nb_tasks: {told} make {len(sizes)} tasks, not {nb_tasks}; choose at most {len(sizes)}.")
    sizes = sizes[:nb_tasks]
    if 1 in sizes:
        key = "init_cls" if sizes[0] == 1 else "increment"
        raise UserError(
            f"{key}: {told} leave task {sizes.index(1)} "
            f"a single class, which has nothing to be told from; choose sizes that give every task two or more."
        )
    return sizes


def domain_tasks(classes: int, init_cls: int, domains: Sequence[str] | None, nb_tasks: int | None, dataset: str) -> Tasks:
    """Tasks of the first `init_cls` of `classes` classes, one for each of `domains`; raises UserError."""
    _check_first(classes, init_cls)
    if init_cls == 1:
        raise UserError("init_cls: 1 gives every task a single class, which has nothing to be told from; choose two or more.")
    if not domains:
        raise UserError(f"scenario: data set '{dataset}' has no domains of its own; give 'task_domains', one for every task "
                        "(docs/DATA.md lists those of sets that are held as tensors), or choose a set that has.")
    for number, domain in enumerate(domains):
        if domain in domains[:number]:
            raise UserError(f"task_domains: '{domain}' comes in tasks {list(domains).index(domain)} and {number}, but in "
                            "scenario \"domain\" every task has a domain of its own; name it once.")
    if nb_tasks is not None and nb_tasks > len(domains):
        raise UserError(f"nb_tasks: {len(domains)} domains make {len(domains)} tasks, not {nb_tasks}; choose at most "
                        f"{len(domains)}.")
    return Tasks.of_domains(init_cls, len(domains) if nb_tasks is None else nb_tasks)


def _check_first(classes: int, init_cls: int) -> None:
    if init_cls > classes:
        raise UserError(f"init_cls: {init_cls} is more than the {classes} classes of the data set; choose at most {classes}.")
