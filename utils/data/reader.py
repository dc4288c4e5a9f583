"""Image files as pixels: read when asked for, or decoded once and held in memory; and how much memory that takes.

Shapes: h x w pixels of one image, which differ from image to image.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UserError

_SAMPLE = 64  # files whose headers are read to estimate the memory that a split takes


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
    """Decoded images of their own sizes, end to end in one buffer on `home`: one object to share with workers, not many."""

    def __init__(self, source: PathReader, members: np.ndarray, threads: int, home: str | torch.device = "cpu") -> None:
        with ThreadPoolExecutor(threads) as pool:  # PIL decodes without holding the interpreter's lock
            self.shapes = list(pool.map(source.shape, members.tolist()))
            ends = np.cumsum([3 * height * width for height, width in self.shapes])
            self.places = {image: place for place, image in enumerate(members.tolist())}
            self.starts = np.concatenate([[0], ends])
            with torch.inference_mode(False):  # the threads, which are outside an evaluation's mode, write to it
                self.buffer = torch.empty(int(self.starts[-1]), dtype=torch.uint8, device=home)
            for _ in pool.map(lambda image: self.read(image).copy_(source.read(image)), members.tolist()):
                pass

    def read(self, image: int) -> Tensor:
        """Image number `image` as a view of the buffer, uint8 `[3, h, w]`, channels last in memory."""
        place = self.places[image]
        pixels = self.buffer[self.starts[place] : self.starts[place + 1]]
        return pixels.view(*self.shapes[place], 3).permute(2, 0, 1)

    def shape(self, image: int) -> tuple[int, int]:
        """Height and width."""
        return self.shapes[self.places[image]]


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
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        fields = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        bounds.append(max(0, limit - used + int(fields["inactive_file"])))  # the page cache gives way
    except (OSError, KeyError, ValueError):  # no cgroup, or the limit "max"
        pass
    return min(bounds, default=0)
