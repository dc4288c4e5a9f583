"""MNIST and the sets that have its files: IDX, as torchvision keeps and downloads them, packed or not.

Not by torchvision's reader: it reads unpacked files alone, and stops with a bare assertion on damaged ones.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST

from utils.data.download import DownloadFailed, fetch, reason_of, staging
from utils.errors import UserError

_BYTE = 8  # IDX's number for unsigned bytes, which all of these files hold
_FILES = tuple(f"{split}-{part}" for split in ("train", "t10k") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))


def read_idx(data_path: Path, published: type[MNIST], installed: Path | None = None,
             package: str = "") -> tuple[Tensor, np.ndarray, Tensor, np.ndarray, list[str]]:
    """Train images and labels, test images and labels (uint8 `[n, 3, h, w]`, the channels equal; int64 `[n]`), class names.

    `published` is torchvision's class. The files are looked for in `data_path/<its name>/raw`, then in `data_path`, then in
    `installed`, where the Debian package `package` puts them; else they are downloaded into the first. Raises UserError when
    files are missing and cannot be downloaded, or are damaged.
    """
    kept = data_path / published.__name__ / "raw"
    places = [kept, data_path, *([installed] if installed else [])]
    folder = next((place for place in places if all(_find(place, name) for name in _FILES)), None)
    if folder is None:
        folder = kept
        _download(published, kept, places, package)
    paths = [_find(folder, name) for name in _FILES]
    splits = [_read_split(images, labels, len(published.classes)) for images, labels in (paths[:2], paths[2:])]
    return (*splits[0], *splits[1], list(published.classes))


def _find(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder`, unpacked or packed."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download(published: type[MNIST], folder: Path, places: Sequence[Path], package: str) -> None:
    """Brings those of the published files into `folder` that it lacks."""
    with staging(folder) as staged:
        for name, md5 in published.resources:
            if _find(folder, name.removesuffix(".gz")):
                continue
            try:
                fetch([f"{mirror}{name}" for mirror in published.mirrors], md5, staged).rename(folder / name)
            except DownloadFailed as error:
                looked = ", ".join(f"'{place}'" for place in places)
                install = f"`apt-get install {package}`, or " if package else ""
                raise UserError(
                    f"data_path: none of {looked} has all of {', '.join(_FILES)} and the download failed ({error}); "
                    f"{install}get the four .gz files of {published.mirrors[0]} where there is a network and put them into "
                    f"'{folder}'."
                ) from error


def _read_split(images: Path, labels: Path, classes: int) -> tuple[Tensor, np.ndarray]:
    pixels, numbers = _read(images, 3), _read(labels, 1)
    if len(pixels) != len(numbers):
        raise _damaged(labels, f"it has {len(numbers)} labels for {len(pixels)} images")
    if numbers.size and numbers.max() >= classes:
        raise _damaged(labels, f"label {numbers.max()} is not below {classes}")
    return torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1).contiguous(), numbers.astype(np.int64)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file as an array of that many dimensions.

    Its head: two zeros, the kind of number, the number of dimensions, then their lengths as big-endian 32-bit integers.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # gzip's own error is an OSError
        raise _damaged(path, reason_of(error)) from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, _BYTE, dimensions]):
        raise _damaged(path, f"its head is not that of {dimensions}-dimensional bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) != start + math.prod(shape):
        raise _damaged(path, f"{len(content) - start} bytes follow its head where {' x '.join(map(str, shape))} are announced")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"data_path: '{path}' is no intact IDX file ({why}); remove it and get it again.")
