"""A data set that is held as tensors with the images of every task as the task's domain shows them (utils/data/domains.py)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from utils.data.domains import apply_domain
from utils.data.sets import Dataset, Split
from utils.data.tasks import Members, Tasks
from utils.errors import UserError


def through_lenses(dataset: Dataset, tasks: Tasks, domains: Sequence[str], members: tuple[Members, Members], seed: int
                   ) -> tuple[Dataset, tuple[Members, Members]]:
    """The data set as the stream sees it, and the `members` of its training and test split by their numbers there.

    Where no class comes back, images keep their numbers. Where classes do, every task has copies of its images, one task
    after another; the random numbers of a domain are keyed by the image that was copied, so that an image in one domain is
    what it is in a class-incremental stream of the same seed.
    """
    shown, found = {}, []
    for name, cells in zip(("train", "test"), members, strict=True):
        split = getattr(dataset, name)
        if not isinstance(split.images, Tensor):
            raise UserError(
                f"task_domains: data set '{dataset.name}' is read from image files; domains are for data sets that "
                f"are held as tensors, such as glyphs."
            )
        recurs = len(cells) > tasks.seen[-1]
        images, labels = ([], []) if recurs else ([split.images.clone()], [split.labels])
        for task, domain in enumerate(domains):
            index = np.concatenate([cells[cell] for cell in tasks.cells[task]])
            picks = torch.from_numpy(index)
            seen = apply_domain(domain, split.images[picks], index, seed, name)
            if recurs:
                images.append(seen)
                labels.append(split.labels[index])
            else:
                images[0][picks] = seen
        shown[name] = Split(torch.cat(images), np.concatenate(labels))
        ends = np.cumsum([0, *(len(each) for each in cells)])
        found.append([np.arange(start, stop) for start, stop in zip(ends, ends[1:])] if recurs else cells)
    return replace(dataset, **shown), tuple(found)
