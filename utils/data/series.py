"""One data set, or several one after another as one: classes and images numbered through, read each as its set says.

Shapes: b images of a batch, S x S pixels given out.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data.readers import View, undecodable
from utils.data.sets import Dataset, Split
from utils.data.sources import Source, in_batches
from utils.errors import UserError


class Series:
    """Data sets in the order in which a stream takes them.

    classes: the names of all classes; of several sets each stands behind its set's name, `mnist/7`. A natural label counts
    the classes of the sets before its own too, and so does the number of an image within a split.
    """

    def __init__(self, datasets: Dataset | Sequence[Dataset]) -> None:
        self.parts = [datasets] if isinstance(datasets, Dataset) else list(datasets)
        several = len(self.parts) > 1
        self.classes = [f"{part.name}/{name}" if several else name for part in self.parts for name in part.classes]
        self.name = [part.name for part in self.parts] if several else self.parts[0].name
        self.first_class = _starts(len(part.classes) for part in self.parts)
        self.first_image = {split: _starts(len(getattr(part, split).labels) for part in self.parts)
                            for split in ("train", "test")}

    def class_order(self, order: Callable[[int], list[int]]) -> list[int]:
        """Natural labels in the order of the stream: set after set, the classes of each as `order` of their number says."""
        return [first + label for first, part in zip(self.first_class, self.parts) for label in order(len(part.classes))]

    def members(self, split: str, order: Sequence[int]) -> list[np.ndarray]:
        """For each natural label in `order`, the ascending int64 numbers of its images in the split."""
        labels = np.concatenate([getattr(part, split).labels + first for part, first in zip(self.parts, self.first_class)])
        by_label = np.argsort(labels, kind="stable").astype(np.int64)
        bounds = np.searchsorted(labels[by_label], np.arange(max(order) + 2))
        return [by_label[bounds[label] : bounds[label + 1]] for label in order]

    def apart(self, split: str, index: np.ndarray) -> Iterator[tuple[Split, np.ndarray, int]]:
        """For each set its split, those of the images `index` that are of it, by their numbers there, and its first number."""
        owner = _owner(self.first_image[split], index)
        for number, (part, first) in enumerate(zip(self.parts, self.first_image[split])):
            yield getattr(part, split), index[owner == number] - first, first

    def undecodable(self, split: str, index: np.ndarray) -> tuple[list[int], list[str]]:
        """Which of the images `index` are files that cannot be decoded, and their paths; reads every one of them."""
        bad, paths = [], []
        for part, own, first in self.apart(split, index):
            found = [] if isinstance(part.images, Tensor) else undecodable(part.images, own)
            bad += [image + first for image in found]
            paths += [str(part.images[image]) for image in found]
        return bad, paths

    def digest(self, split: str) -> str | list[str]:
        """SHA-256 of a split's labels and images; of several sets one for each."""
        sums = [_split_sum(getattr(part, split)) for part in self.parts]
        return sums if len(sums) > 1 else sums[0]


class SeriesSource:
    """The images of several sources, numbered through from `starts` on.

    Each source reads what is asked of it in one pass and in order, so that files are read ahead as from one source.
    """

    def __init__(self, sources: Sequence[Source], starts: Sequence[int]) -> None:
        self.sources, self.starts = sources, starts

    def train(self, index: np.ndarray, view: View, batch_size: int) -> Iterator[Tensor]:
        return self._merged(index, batch_size, lambda source, own: source.train(own, view, batch_size))

    def evaluate(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        return self._merged(index, batch_size, lambda source, own: source.evaluate(own, batch_size))

    def _merged(self, index: np.ndarray, batch_size: int, read: Callable[[Source, np.ndarray], Iterator[Tensor]]
                ) -> Iterator[Tensor]:
        owner = _owner(self.starts, index)
        passes = {number: _Pass(read(self.sources[number], index[owner == number] - self.starts[number]))
                  for number in np.unique(owner).tolist()}
        for owners in in_batches(owner, batch_size):
            places = {number: np.flatnonzero(owners == number) for number in np.unique(owners).tolist()}
            taken = [passes[number].take(len(own)) for number, own in places.items()]
            if len(taken) == 1:
                yield taken[0]
                continue
            order = np.argsort(np.concatenate(list(places.values())))
            yield torch.cat(taken)[torch.from_numpy(order).to(taken[0].device)]


class _Pass:
    """A pass over a source of which any number of images may be taken at a time."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self.batches, self.held = batches, None

    def take(self, count: int) -> Tensor:
        """The next `count` images."""
        while self.held is None or len(self.held) < count:
            batch = next(self.batches)
            self.held = batch if self.held is None or not len(self.held) else torch.cat([self.held, batch])
        taken, self.held = self.held[:count], self.held[count:]
        return taken


def _starts(lengths: Iterator[int]) -> list[int]:
    """Where each of the parts of these lengths begins."""
    return np.cumsum([0, *lengths])[:-1].tolist()


def _owner(starts: Sequence[int], index: np.ndarray) -> np.ndarray:
    """For each number the part in which it lies."""
    return np.searchsorted(np.asarray(starts), index, side="right") - 1


def _split_sum(split: Split) -> str:
    """SHA-256 of a split's labels and images: the bytes of tensors, the relative paths and sizes of files."""
    total = hashlib.sha256(split.labels.astype("<i8"))
    if isinstance(split.images, Tensor):
        total.update(split.images.contiguous().cpu().numpy())
        return total.hexdigest()
    root = os.path.commonpath([path.parent for path in split.images])
    for path in split.images:
        total.update(f"{path.relative_to(root).as_posix()}\0{_file_size(path)}\0".encode())
    return total.hexdigest()


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"data_path: the image '{path}' is not there; get the data set again.") from error
