"""Which of its images a stream learns from and is tested on: at most so many of every class, and without those held out.

A portion is drawn for every cell (utils/data/tasks.py), keyed by the seed and the natural label of its class, and by its task
where the class comes back; all lists of images are ascending.
"""

from collections.abc import Sequence

import numpy as np
import torch

from utils.data.tasks import Members, Tasks
from utils.errors import UserError
from utils.rng import generator


def at_most(count: int | None, key: str, members: Members, tasks: Tasks, order: Sequence[int], seed: int) -> Members:
    """`count` images of every cell, or all where it has no more; those of a smaller count are among those of a larger one.

    key: that of the config, which keys the draw. order: natural labels of the classes in the order of the stream. None leaves
    out nothing.
    """
    if count is None:
        return members
    return [np.sort(images[_drawn(len(images), key, cell, tasks, order, seed)[:count]])
            for cell, images in enumerate(members)]


def hold_out(fraction: float, members: Members, tasks: Tasks, order: Sequence[int], names: Sequence[str], seed: int
             ) -> tuple[Members, Members]:
    """Splits each cell's images into what is trained on and what is held out. names: those of the classes, as `order`.

    Raises UserError for a cell of a single image, which cannot be split.
    """
    if fraction == 0.0:
        return members, [images[:0] for images in members]
    train, val = [], []
    for cell, images in enumerate(members):
        if len(images) < 2:
            raise UserError(
                f"val_fraction: class '{names[tasks.label_of_cell[cell]]}' has {len(images)} training image, so none can be "
                f"held out; add images, raise 'images_per_class' or choose a growth_rule other than val_loss."
            )
        count = min(max(1, round(fraction * len(images))), len(images) - 1)
        drawn = _drawn(len(images), "val", cell, tasks, order, seed)
        val.append(np.sort(images[drawn[:count]]))
        train.append(np.sort(images[drawn[count:]]))
    return train, val


def _drawn(images: int, purpose: str, cell: int, tasks: Tasks, order: Sequence[int], seed: int) -> np.ndarray:
    """The places of a cell's images in a random order."""
    label, task = tasks.label_of_cell[cell], int(tasks.task_of_cell[cell])
    again = () if task == tasks.task_of_class[label] else (task,)  # a class that comes back
    return torch.randperm(images, generator=generator(seed, purpose, order[label], *again)).numpy()
