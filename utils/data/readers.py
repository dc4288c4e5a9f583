"""Image files as pixels: read when asked for or decoded once and held in memory, and cut out in worker processes; and how
much memory that takes.

Shapes: b images of a batch, h x w pixels of one image or of what is cut out of it, which differ from image to image.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.augmentation import Augmentation, center_image, cut_out, draw_boxes
from utils.errors import UserError
from utils.runs.signals import leave_to_parent

_SAMPLE = 64  # files whose headers are read to estimate the memory that a split takes


class PathReader:
    """Decodes an image file whenever it is asked for; UserError if it is missing or damaged. named: what named the files."""

    def __init__(self, paths: list[Path], named: str = "data_path") -> None:
        self.paths, self.named = paths, named

    def read(self, image: int) -> Tensor:
        """Image number `image`, uint8 `[3, h, w]`, channels last in memory."""
        with self._opened(image) as file:
            pixels = np.array(file.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def shape(self, image: int) -> tuple[int, int]:
        """Height and width, from the file's header."""
        with self._opened(image) as file:
            return file.height, file.width

    @contextmanager
    def _opened(self, image: int) -> Iterator[Image.Image]:
        path = self.paths[image]
        try:
            with Image.open(path) as file:
                yield file
        except FileNotFoundError as error:
            raise UserError(f"{self.named}: the image '{path}' is not there; get the data set again.") from error
        except Exception as error:  # decoders raise nearly anything on damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.named}: the image '{path}' cannot be decoded ({reason}); replace or remove it.") from error


class MemoryReader:
    """Decoded images of their own sizes, end to end in one buffer on `home`: one object to share with workers, not many."""

    def __init__(self, reader: PathReader, members: np.ndarray, threads: int, home: torch.device) -> None:
        with ThreadPoolExecutor(threads) as pool:  # PIL decodes without holding the interpreter's lock
            self.shapes = list(pool.map(reader.shape, members.tolist()))
            ends = np.cumsum([3 * height * width for height, width in self.shapes])
            self.places = {image: place for place, image in enumerate(members.tolist())}
            self.starts = np.concatenate([[0], ends])
            with torch.inference_mode(False):  # the threads, which are outside an evaluation's mode, write to it
                self.buffer = torch.empty(int(self.starts[-1]), dtype=torch.uint8, device=home)
            for _ in pool.map(lambda image: self.read(image).copy_(reader.read(image)), members.tolist()):
                pass

    def read(self, image: int) -> Tensor:
        """Image number `image` as a view of the buffer, uint8 `[3, h, w]`, channels last in memory."""
        place = self.places[image]
        pixels = self.buffer[self.starts[place] : self.starts[place + 1]]
        return pixels.view(*self.shapes[place], 3).permute(2, 0, 1)

    def shape(self, image: int) -> tuple[int, int]:
        """Height and width."""
        return self.shapes[self.places[image]]


class View(NamedTuple):
    """What the network is to see of an image: the random view of (seed, task, epoch)."""

    seed: int
    task: int
    epoch: int


Request = tuple[int, View | None]  # an image and its random view; None is the test-time view


class Cuts(NamedTuple):
    """What is to be seen of a batch's images, at their own resolutions: one tensor, so one copy to the device."""

    pixels: Tensor  # uint8 [sum of 3 h w], end to end, channels last
    shapes: Tensor  # int64 [b, 2]: h, w
    flips: Tensor  # bool [b]

    def on(self, device: torch.device) -> Iterator[tuple[Tensor, bool]]:
        """Each cut on `device` as uint8 `[3, h, w]`, and whether it is to be mirrored; shapes and flips are read here."""
        moved = self.pixels.to(device, non_blocking=True)
        sizes = self.shapes.prod(1).mul(3).tolist()
        for pixels, shape, flip in zip(moved.split(sizes), self.shapes.tolist(), self.flips.tolist(), strict=True):
            yield pixels.view(*shape, 3).permute(2, 0, 1), flip


class Loader:
    """A torch DataLoader whose batches of requests are given anew for every pass, so that its workers live on.

    reader: where decoded images come from. size: S, pixels of the network's input. `pin`: page-locked memory, from which a
    copy to a CUDA device waits for nothing.
    """

    def __init__(self, reader: PathReader | MemoryReader, augmentation: Augmentation, size: int, num_workers: int,
                 pin: bool) -> None:
        self.images, self.num_workers, self.pin = _Cutter(reader, augmentation, size), num_workers, pin
        self.requests: list[list[Request]] = []
        self.kept: DataLoader | None = None
        self.busy = False

    def batches(self, requests: list[list[Request]]) -> Iterator[Cuts]:
        """The cuts for each list of requests; a second pass while one is open gets workers of its own."""
        if self.busy:
            yield from _passed(self._build(requests))
            return
        self.busy, self.requests[:] = True, requests
        self.kept = self.kept or self._build(self.requests)
        try:
            yield from _passed(self.kept)
        except UserError:
            self.kept = None  # stops the workers now; left to the garbage collector they can linger for seconds
            raise
        finally:
            self.busy = False

    def _build(self, requests: list[list[Request]]) -> DataLoader:
        return DataLoader(
            self.images,
            batch_sampler=requests,
            collate_fn=_collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin,
            worker_init_fn=leave_to_parent,
            generator=torch.Generator(),  # else torch draws from the global generator on every pass
        )


class _Cutter:
    """Answers a request with what is to be seen of its image, uint8 `[3, h, w]`, and whether it is to be mirrored. Test-time
    views, which are the same in every pass, are finished here: `[3, S, S]`.

    An error of the user's comes back as its message: an exception would reach the main process wrapped in the worker's
    traceback.
    """

    def __init__(self, reader: PathReader | MemoryReader, augmentation: Augmentation, size: int) -> None:
        self.reader, self.augmentation, self.size = reader, augmentation, size

    def __getitem__(self, request: Request) -> tuple[Tensor, bool] | str:
        image, view = request
        try:
            pixels = self.reader.read(image)
        except UserError as error:
            return str(error)
        if view is None:
            return center_image(pixels, self.size, self.augmentation.test_resize), False
        height, width = np.array([pixels.shape[1]]), np.array([pixels.shape[2]])
        box, = draw_boxes(self.augmentation, height, width, index=np.array([image]), **view._asdict())
        return cut_out(pixels, box, self.size), bool(box[4])


def _collate(items: list[tuple[Tensor, bool] | str]) -> Cuts | str:
    for item in items:
        if isinstance(item, str):
            return item
    cuts, flips = zip(*items, strict=True)
    pixels = torch.cat([cut.permute(1, 2, 0).reshape(-1) for cut in cuts])
    return Cuts(pixels, torch.tensor([cut.shape[1:] for cut in cuts]), torch.tensor(flips))


def _passed(loader: DataLoader) -> Iterator[Cuts]:
    batches = iter(loader)
    if loader.num_workers:  # once more after torch's own, which would wait five seconds for each
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
    for batch in batches:
        if isinstance(batch, str):
            del loader, batches  # the error's traceback keeps this frame, which must not keep the workers
            raise UserError(batch)
        yield batch


def _end_workers() -> None:
    """Kills the workers when the interpreter exits: deaf to SIGTERM (`leave_to_parent`), they would never let it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as an error
    for worker in multiprocessing.active_children():
        worker.kill()


def undecodable(paths: list[Path], members: np.ndarray) -> list[int]:
    """Which of the images `members` cannot be decoded; reads every one of them."""
    reader = PathReader(paths)

    def fails(image: int) -> bool:
        try:
            reader.read(image)
        except UserError:
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return members[list(pool.map(fails, members.tolist()))].tolist()


def decoded_bytes(paths: list[Path], members: np.ndarray) -> int:
    """Estimated bytes of the images `members` once decoded, from the headers of a few of them."""
    if len(members) == 0:
        return 0
    reader = PathReader(paths)
    sample = members[np.linspace(0, len(members) - 1, min(_SAMPLE, len(members)), dtype=np.int64)]
    shapes = [reader.shape(int(image)) for image in sample]
    return round(len(members) * 3 * float(np.mean([height * width for height, width in shapes])))


def free_memory(device: torch.device = torch.device("cpu")) -> int:  # noqa: B008  (immutable)
    """Bytes that a process may still take: of a CUDA device's memory, or of main memory within the limit of its cgroup.

    0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    bounds = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        bounds.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            bounds.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    cgroup = Path("/sys/fs/cgroup")
    with suppress(OSError, KeyError, ValueError):  # no cgroup, or the limit "max"
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        fields = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        bounds.append(max(0, limit - used + int(fields["inactive_file"])))  # the page cache gives way
    return min(bounds, default=0)
