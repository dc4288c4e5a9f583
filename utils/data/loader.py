"""Image files on their way to the device: decoded and cut out in worker processes, augmented where the network is.

Shapes: b images of a batch, h x w pixels of one image's part, which differ from image to image.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from utils.data.augmentation import Augmentation, center_image, cut_out, draw_boxes
from utils.data.reader import MemoryReader, PathReader
from utils.errors import UserError
from utils.runs.signals import leave_to_parent


class View(NamedTuple):
    """What the network is to see of an image: the random view of (seed, task, epoch)."""

    seed: int
    task: int
    epoch: int


Key = tuple[int, View | None]  # an image and its random view; None is the test-time view


class Parts(NamedTuple):
    """The parts of a batch's images that are to be seen, at their own resolutions: one tensor, so one copy to the device."""

    pixels: Tensor  # uint8 [sum of 3 h w], end to end, channels last
    shapes: Tensor  # int64 [b, 2]: h, w
    flips: Tensor  # bool [b]

    def on(self, device: torch.device) -> Iterator[tuple[Tensor, bool]]:
        """Each part on `device` as uint8 `[3, h, w]`, and whether it is to be mirrored; shapes and flips are read here."""
        moved = self.pixels.to(device, non_blocking=True)
        sizes = self.shapes.prod(1).mul(3).tolist()
        for pixels, shape, flip in zip(moved.split(sizes), self.shapes.tolist(), self.flips.tolist(), strict=True):
            yield pixels.view(*shape, 3).permute(2, 0, 1), flip


class Loader:
    """A torch DataLoader whose batches of keys are given anew for every pass, so that its workers live on.

    reader: where decoded images come from. size: S, pixels of the network's input. `pin`: page-locked memory, from which a
    copy to a CUDA device waits for nothing.
    """

    def __init__(self, reader: PathReader | MemoryReader, augmentation: Augmentation, size: int, num_workers: int,
                 pin: bool) -> None:
        self.images, self.num_workers, self.pin = _SeenParts(reader, augmentation, size), num_workers, pin
        self.keys: list[list[Key]] = []
        self.kept: DataLoader | None = None
        self.busy = False

    def batches(self, keys: list[list[Key]]) -> Iterator[Parts]:
        """The parts for each list of keys; a second pass while one is open gets workers of its own."""
        if self.busy:
            yield from _passed(self._build(keys))
            return
        self.busy, self.keys[:] = True, keys
        self.kept = self.kept or self._build(self.keys)
        try:
            yield from _passed(self.kept)
        except UserError:
            self.kept = None  # stops the workers now; left to the garbage collector they can linger for seconds
            raise
        finally:
            self.busy = False

    def _build(self, keys: list[list[Key]]) -> DataLoader:
        return DataLoader(
            self.images,
            batch_sampler=keys,
            collate_fn=_collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin,
            worker_init_fn=leave_to_parent,
            generator=torch.Generator(),  # else torch draws from the global generator on every pass
        )


class _SeenParts(TorchDataset):
    """Maps a key to the part of its image that is to be seen, uint8 `[3, h, w]`, and whether it is to be mirrored. Test-time
    views, which are the same in every pass, are finished here: `[3, S, S]`.

    An error of the user's comes back as its message: an exception would reach the main process wrapped in the
    worker's traceback.
    """

    def __init__(self, reader: PathReader | MemoryReader, augmentation: Augmentation, size: int) -> None:
        self.reader, self.augmentation, self.size = reader, augmentation, size

    def __getitem__(self, key: Key) -> tuple[Tensor, bool] | str:
        image, view = key
        try:
            pixels = self.reader.read(image)
        except UserError as error:
            return str(error)
        if view is None:
            return center_image(pixels, self.size, self.augmentation.test_resize), False
        height, width = np.array([pixels.shape[1]]), np.array([pixels.shape[2]])
        box, = draw_boxes(self.augmentation, height, width, index=np.array([image]), **view._asdict())
        return cut_out(pixels, box, self.size), bool(box[4])


def _collate(items: list[tuple[Tensor, bool] | str]) -> Parts | str:
    for item in items:
        if isinstance(item, str):
            return item
    parts, flips = zip(*items, strict=True)
    pixels = torch.cat([part.permute(1, 2, 0).reshape(-1) for part in parts])
    return Parts(pixels, torch.tensor([part.shape[1:] for part in parts]), torch.tensor(flips))


def _passed(loader: DataLoader) -> Iterator[Parts]:
    for batch in loader:
        if isinstance(batch, str):
            del loader  # the error's traceback keeps this frame, which must not keep the workers
            raise UserError(batch)
        yield batch
