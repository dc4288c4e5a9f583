"""From image files or tensors to batches on the device.

Shapes: b images of a batch, h x w pixels stored, S x S pixels given out.

A source gives the images of one split in any order asked for, as float32 `[b, 3, S, S]` in 0..1 on the
device: `train` under the augmentation keyed by (seed, task, epoch, image), `evaluate` under the deterministic
test transform. `TensorSource` holds images of one size and augments a batch at a time; `FileSource` decodes
files one by one, in worker processes if there are any, and gives the same bits whether the decoded images are
kept in memory or not.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from utils.augment import Augmentation, augment_batch, augment_image, center_batch, center_image, draw_boxes
from utils.errors import UserError
from utils.signals import leave_to_parent

_SAMPLE = 64  # files whose headers are read to estimate the memory that a split takes
_CHUNK = 64  # images at a time while a test split is read into memory


class View(NamedTuple):
    """What the network is to see of an image: the random view of (seed, task, epoch)."""

    seed: int
    task: int
    epoch: int


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

    num_workers: processes that decode and augment; 0 does it in this one. `members` are the images that will
    ever be asked for, ascending; with `in_memory` they are decoded once, on first use, and kept as they are.
    """

    def __init__(
        self,
        paths: list[Path],
        members: np.ndarray,
        augmentation: Augmentation,
        size: int,
        device: torch.device,
        num_workers: int,
        in_memory: bool,
    ) -> None:
        self.paths, self.members = [str(path) for path in paths], members
        self.augmentation, self.size = augmentation, size
        self.device, self.num_workers, self.in_memory = device, num_workers, in_memory
        self.loaders: dict[str, _Loader] = {}

    def train(self, index: np.ndarray, view: View, batch_size: int) -> Iterator[Tensor]:
        yield from self._load("train", [(int(image), view) for image in index], batch_size)

    def evaluate(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        yield from self._load("evaluate", [(int(image), None) for image in index], batch_size)

    def _load(self, purpose: str, keys: list["_Key"], batch_size: int) -> Iterator[Tensor]:
        if purpose not in self.loaders:
            images = _ViewedImages(self._reader, self.augmentation, self.size)
            self.loaders[purpose] = _Loader(images, self.num_workers, pin=self.device.type == "cuda")
        batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
        for images in self.loaders[purpose].batches(batches):
            yield images.to(self.device, non_blocking=True).to(torch.float32).div_(255.0)

    @cached_property
    def _reader(self) -> "PathReader | MemoryReader":
        reader = PathReader(self.paths)
        return MemoryReader(reader, self.members, max(1, self.num_workers)) if self.in_memory else reader


class EvaluationFileSource(FileSource):
    """Files of a split that is only ever tested: in memory, the finished views are kept, not the decoded images."""

    def evaluate(self, index: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        if not self.in_memory:
            yield from super().evaluate(index, batch_size)
            return
        for part in np.split(index, range(batch_size, len(index), batch_size)):
            places = torch.from_numpy(np.searchsorted(self.members, part))
            yield self._views[places].to(self.device).to(torch.float32).div_(255.0)

    @cached_property
    def _views(self) -> Tensor:
        """The test-time views of all `members`, uint8 `[n, 3, S, S]`."""
        keys: list[_Key] = [(image, None) for image in self.members.tolist()]
        batches = [keys[start : start + _CHUNK] for start in range(0, len(keys), _CHUNK)]
        images = _ViewedImages(PathReader(self.paths), self.augmentation, self.size)
        views = torch.empty(len(keys), 3, self.size, self.size, dtype=torch.uint8)
        for number, part in enumerate(_Loader(images, self.num_workers, pin=False).batches(batches)):
            views[number * _CHUNK : number * _CHUNK + len(part)] = part
        return views


_Key = tuple[int, View | None]  # an image and its random view; None is the test-time view


class PathReader:
    """Decodes an image file whenever it is asked for."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def read(self, image: int) -> Tensor:
        """Image number `image`, uint8 `[3, h, w]`, channels last in memory; UserError if it cannot be decoded."""
        path = self.paths[image]
        try:
            with Image.open(path) as file:
                pixels = np.array(file.convert("RGB"))
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise _undecodable(path, error) from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def shape(self, image: int) -> tuple[int, int]:
        """Height and width, from the file's header."""
        path = self.paths[image]
        try:
            with Image.open(path) as file:
                return file.height, file.width
        except Exception as error:
            raise _undecodable(path, error) from error


def _undecodable(path: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"data_path: the image '{path}' is not there; get the data set again.")
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"data_path: the image '{path}' cannot be decoded ({reason}); replace or remove it.")


class MemoryReader:
    """Decoded images of their own sizes, end to end in one buffer (one object to share with workers, not thousands)."""

    def __init__(self, source: PathReader, members: np.ndarray, threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:  # PIL decodes without holding the interpreter's lock
            self.shapes = list(pool.map(source.shape, members.tolist()))
            ends = np.cumsum([3 * height * width for height, width in self.shapes])
            self.places = {image: place for place, image in enumerate(members.tolist())}
            self.starts = np.concatenate([[0], ends])
            with torch.inference_mode(False):  # the threads, which are outside an evaluation's mode, write to it
                self.buffer = torch.empty(int(self.starts[-1]), dtype=torch.uint8)
            for _ in pool.map(lambda image: self.read(image).copy_(source.read(image)), members.tolist()):
                pass

    def read(self, image: int) -> Tensor:
        """Image number `image` as a view of the buffer, uint8 `[3, h, w]`, channels last in memory."""
        place = self.places[image]
        pixels = self.buffer[self.starts[place] : self.starts[place + 1]]
        return pixels.view(*self.shapes[place], 3).permute(2, 0, 1)


class _ViewedImages(TorchDataset):
    """Maps a key to the view of its image, uint8 `[3, S, S]`.

    An error of the user's comes back as its message: an exception would reach the main process wrapped in the
    worker's traceback.
    """

    def __init__(self, reader: PathReader | MemoryReader, augmentation: Augmentation, size: int) -> None:
        self.reader, self.augmentation, self.size = reader, augmentation, size

    def __getitem__(self, key: _Key) -> Tensor | str:
        image, view = key
        try:
            pixels = self.reader.read(image)
        except UserError as error:
            return str(error)
        if view is None:
            return center_image(pixels, self.size, self.augmentation.test_resize)
        height, width = np.array([pixels.shape[1]]), np.array([pixels.shape[2]])
        boxes = draw_boxes(self.augmentation, height, width, index=np.array([image]), **view._asdict())
        return augment_image(pixels, boxes[0], self.size)


def _collate(items: list[Tensor | str]) -> Tensor | str:
    for item in items:
        if isinstance(item, str):
            return item
    return torch.stack(items)


class _Loader:
    """A torch DataLoader whose batches of keys are given anew for every pass, so that its workers live on."""

    def __init__(self, images: _ViewedImages, num_workers: int, pin: bool) -> None:
        self.images, self.num_workers, self.pin = images, num_workers, pin
        self.keys: list[list[_Key]] = []
        self.kept: DataLoader | None = None
        self.busy = False

    def batches(self, keys: list[list[_Key]]) -> Iterator[Tensor]:
        """uint8 `[b, 3, S, S]` for each list of keys; a second pass while one is open gets workers of its own."""
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

    def _build(self, keys: list[list[_Key]]) -> DataLoader:
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


def _passed(loader: DataLoader) -> Iterator[Tensor]:
    for batch in loader:
        if isinstance(batch, str):
            del loader  # the error's traceback keeps this frame, which must not keep the workers
            raise UserError(batch)
        yield batch


def undecodable(paths: list[Path], members: np.ndarray) -> list[int]:
    """Which of the images `members` cannot be decoded; reads every one of them."""
    reader = PathReader([str(path) for path in paths])

    def fails(image: int) -> bool:
        try:
            reader.read(image)
        except UserError:
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [image for image, bad in zip(members.tolist(), pool.map(fails, members.tolist()), strict=True) if bad]


def decoded_bytes(paths: list[Path], members: np.ndarray) -> int:
    """Estimated bytes of the images `members` once decoded, from the headers of a few of them."""
    if len(members) == 0:
        return 0
    reader = PathReader([str(path) for path in paths])
    sample = members[np.linspace(0, len(members) - 1, min(_SAMPLE, len(members)), dtype=np.int64)]
    shapes = [reader.shape(int(image)) for image in sample]
    return round(len(members) * 3 * float(np.mean([height * width for height, width in shapes])))


def free_memory() -> int:
    """Bytes of main memory that a process may still take: what is available, and within the limit of its cgroup.

    0 where the system does not say.
    """
    bounds = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        bounds.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            bounds.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        fields = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        bounds.append(max(0, limit - used + int(fields["inactive_file"])))  # the page cache gives way
    except (OSError, KeyError, ValueError):  # no cgroup, or the limit "max"
        pass
    return min(bounds, default=0)
