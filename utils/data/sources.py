"""From image files or tensors to batches on the device.

Shapes: b images of a batch, h x w pixels stored, S x S pixels given out.

A source gives the images of one split in any order asked for, as float32 `[b, 3, S, S]` in 0..1 on the
device: `train` under the augmentation keyed by (seed, task, epoch, image), `evaluate` under the deterministic
test transform. `TensorSource` holds images of one size and augments a batch at a time; `FileSource` has files decoded
in worker processes, if there are any; `DecodedSource` holds them decoded on the device. Whichever it is, what is
augmented is resized and mirrored on the device; on the CPU the last two give the same bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from utils.data.augmentation import (
    Augmentation,
    augment_batch,
    center_batch,
    center_image,
    cut_out,
    draw_boxes,
    resize_cut,
)
from utils.data.readers import Cuts, Loader, MemoryReader, PathReader, Request, View

_CHUNK = 64  # images at a time while a test split is read into memory


@dataclass(frozen=True)
class TestView:
    """How an image is seen when it is tested, whatever it comes from; a run's record keeps it.

    size: S. test_resize: as in `Augmentation`. eight_bit: resized in 8-bit pixels, as files are, or in floating point, as
    images held as tensors are. mean, std: per channel, to normalise with; None leaves 0..1.
    """

    __test__ = False  # for pytest, which takes the name for a test's

    size: int
    test_resize: float | None
    eight_bit: bool
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """One decoded image, uint8 `[3, h, w]`, as the network meets it: float32 `[3, S, S]`."""
        if self.eight_bit:
            seen = _floats(center_image(image, self.size, self.test_resize))
        else:
            seen, = center_batch(image[None], self.size, self.test_resize)
        if self.mean is None:
            return seen
        mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (self.mean, self.std))
        return seen.sub_(mean).div_(std)


class Source(Protocol):
    """The images of one split."""

    def train(self, index: np.ndarray, view: View, batch_size: int) -> Iterator[Tensor]:
        """The images `index` (int64 `[n]`), augmented, in this order."""

    def evaluate(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        """The images `index` as they are tested, in this order."""


class TensorSource:
    """Images of one size, uint8 `[n, 3, h, w]`, held on `home` and augmented on `device`."""

    def __init__(
        self, images: Tensor, augmentation: Augmentation, size: int, device: torch.device, home: torch.device
    ) -> None:
        self.images = images.contiguous().to(home)
        self.augmentation, self.size, self.device = augmentation, size, device

    def train(self, index: np.ndarray, view: View, batch_size: int) -> Iterator[Tensor]:
        height, width = self.images.shape[2:]
        heights, widths = np.full(len(index), height), np.full(len(index), width)
        boxes = draw_boxes(self.augmentation, heights, widths, index=index, **view._asdict())
        # Everything an epoch needs crosses to the device once, so that no batch waits for a copy.
        on_device = torch.from_numpy(boxes).to(self.device)
        for images, box in zip(self._pick(index, batch_size), on_device.split(batch_size), strict=True):
            yield augment_batch(images, box, self.size)

    def evaluate(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        for images in self._pick(index, batch_size):
            yield center_batch(images, self.size, self.augmentation.test_resize)

    def _pick(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        for part in torch.from_numpy(index).to(self.images.device).split(batch_size):
            yield self.images[part].to(self.device, non_blocking=True)


class FileSource:
    """Image files, decoded as RGB by PIL.

    `members` are the images that will ever be asked for, ascending. num_workers: processes that decode and cut out what is to
    be seen; 0 does it in this one. `home`: the memory in which decoded images are kept from the first use on, each in its own
    size; None decodes them whenever they are asked for.
    """

    def __init__(self, paths: list[Path], members: np.ndarray, augmentation: Augmentation, size: int, device: torch.device,
                 num_workers: int, home: torch.device | None) -> None:
        self.paths, self.members, self.augmentation, self.size = paths, members, augmentation, size
        self.device, self.num_workers, self.home = device, num_workers, home
        self.loaders: dict[str, Loader] = {}

    def train(self, index: np.ndarray, view: View, batch_size: int) -> Iterator[Tensor]:
        for cuts in self._load("train", index, view, batch_size):
            yield _floats(torch.stack([resize_cut(cut, flip, self.size) for cut, flip in cuts.on(self.device)]))

    def evaluate(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        for views in self._tested(index, batch_size):
            yield _floats(views)

    def _tested(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        """The images as they are tested, uint8 `[b, 3, S, S]`."""
        for cuts in self._load("evaluate", index, None, batch_size):
            yield torch.stack([view for view, _ in cuts.on(self.device)])

    def _load(self, purpose: str, index: np.ndarray, view: View | None, batch_size: int) -> Iterator[Cuts]:
        if purpose not in self.loaders:
            pin = self.device.type == "cuda"
            self.loaders[purpose] = Loader(self._reader, self.augmentation, self.size, self.num_workers, pin)
        requests: list[list[Request]] = [[(image, view) for image in part.tolist()] for part in in_batches(index, batch_size)]
        return self.loaders[purpose].batches(requests)

    @cached_property
    def _reader(self) -> PathReader | MemoryReader:
        reader = PathReader(self.paths)
        return reader if self.home is None else MemoryReader(reader, self.members, max(1, self.num_workers), self.home)


class DecodedSource(FileSource):
    """Image files whose decoded images are kept on the device itself: what is to be seen is cut out there."""

    def train(self, index: np.ndarray, view: View, batch_size: int) -> Iterator[Tensor]:
        sizes = np.array([self._reader.shape(image) for image in index.tolist()]).reshape(-1, 2)
        boxes = draw_boxes(self.augmentation, sizes[:, 0], sizes[:, 1], index=index, **view._asdict())
        for rows in in_batches(np.arange(len(index)), batch_size):
            cuts = [cut_out(self._reader.read(image), box, self.size) for image, box in zip(index[rows].tolist(), boxes[rows])]
            yield _floats(torch.stack([resize_cut(cut, flip, self.size) for cut, flip in zip(cuts, boxes[rows, 4])]))

    def _tested(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        for part in in_batches(index, batch_size):
            images = (self._reader.read(image) for image in part.tolist())
            yield torch.stack([center_image(image, self.size, self.augmentation.test_resize) for image in images])


class EvaluationFileSource(FileSource):
    """Files of a split that is only ever tested: what is kept on `home` are the finished views, not the decoded images."""

    def evaluate(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        if self.home is None:
            yield from super().evaluate(index, batch_size)
            return
        for part in in_batches(index, batch_size):
            places = torch.from_numpy(np.searchsorted(self.members, part)).to(self.home)
            yield _floats(self._views[places].to(self.device, non_blocking=True))

    @cached_property
    def _views(self) -> Tensor:
        """The test-time views of all `members`, uint8 `[n, 3, S, S]`."""
        views = torch.empty(len(self.members), 3, self.size, self.size, dtype=torch.uint8, device=self.home)
        for number, part in enumerate(self._tested(self.members, _CHUNK)):
            views[number * _CHUNK : number * _CHUNK + len(part)] = part
        return views

    @cached_property
    def _reader(self) -> PathReader:
        return PathReader(self.paths)


def in_batches(index: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """`index` in batches; the last may be smaller."""
    return [index[start : start + batch_size] for start in range(0, len(index), batch_size)]


def _floats(images: Tensor) -> Tensor:
    """uint8 -> float32 in 0..1."""
    return images.to(torch.float32).div_(255.0)
