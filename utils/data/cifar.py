"""CIFAR-10 and CIFAR-100 in the files that torchvision keeps, and by its names and its download.

Not by its reader: that one unpickles without limits, which is safe with files of the published MD5 alone, and refuses all
others. Here any set in these files is read, with an unpickler that makes arrays and plain values and nothing else.
"""

import pickle
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from utils.data.download import DownloadFailed, fetch, reason_of, staging
from utils.errors import UserError

_BYTES = 3 * 32 * 32  # one image: the red, the green, then the blue plane


def read_cifar(data_path: Path, published: type[CIFAR10]) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray, list[str]]:
    """Train images and labels, test images and labels (uint8 `[n, 3, 32, 32]`, int64 `[n]`) and class names.

    `published` is torchvision's class. Raises UserError when files are missing and cannot be downloaded, or are damaged.
    """
    folder = _find_folder(data_path, published)
    path, key = folder / published.meta["filename"], published.meta["key"]
    classes = _unpickle(path).get(key)
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise _damaged(path, f"no list of names under '{key}'")
    splits = []
    for files in (published.train_list, published.test_list):
        images, labels = zip(*(_read_images(folder / name, len(classes)) for name, _ in files), strict=True)
        splits += [torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32), np.concatenate(labels)]
    return (*splits, classes)


def _find_folder(data_path: Path, published: type[CIFAR10]) -> Path:
    """The folder of the extracted files: as it is, or from the archive beside it, or downloaded.

    It appears whole or not at all: an interruption leaves no half data set.
    """
    if data_path.name == published.base_folder and data_path.is_dir():
        return data_path
    folder, archive = data_path / published.base_folder, data_path / published.filename
    if folder.is_dir():
        return folder
    with staging(data_path) as place:
        _extract(archive if archive.is_file() else _download(published, place, folder), place)
        if not (staged := place / folder.name).is_dir():
            raise UserError(f"data_path: '{archive}' holds no folder '{folder.name}'; get the archive again.")
        with suppress(OSError):  # another process may have been faster
            staged.rename(folder)
    return folder


def _download(published: type[CIFAR10], place: Path, folder: Path) -> Path:
    """The published archive, brought to `place`."""
    try:
        return fetch([published.url], published.tgz_md5, place)
    except DownloadFailed as error:
        raise UserError(
            f"data_path: neither '{folder}' nor '{folder.parent / published.filename}' is there and the download failed "
            f"({error}); get {published.url} where there is a network and put it into '{folder.parent}'."
        ) from error


def _extract(archive: Path, target: Path) -> None:
    """Writes the members of `archive` under `target`; one that would land elsewhere, or is a link, is refused by name."""
    try:
        with tarfile.open(archive) as members:
            members.extraction_filter = getattr(tarfile, "data_filter", None)  # Pythons before 3.10.12 have none
            for member in members:
                inside = (target / member.name).resolve().is_relative_to(target.resolve())
                if not inside or not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"data_path: the member '{member.name}' of '{archive}' is no plain file inside the archive's "
                        f"folder; this is not the published archive, get it again."
                    )
                members.extract(member, target)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"data_path: '{archive}' cannot be extracted ({reason_of(error)}); if it is damaged, remove it and get it again."
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays besides plain Python values; any other name in the file is refused, not imported."""

    _makers: ClassVar[dict[str, Any]] = {
        maker.__name__: maker
        for maker in (
            np.ndarray,
            np.dtype,
            np.empty(0).__reduce__()[0],  # numpy's `_reconstruct`, whose module differs between versions
            np.empty(1).__reduce_ex__(5)[0],  # `_frombuffer`, of pickle protocol 5
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._makers:
            return self._makers[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(
            f"data_path: '{path}' cannot be read ({error.strerror}); if it is missing, remove the folder "
            f"'{path.parent}' and get it again."
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _damaged(path, reason_of(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}")
    return content


def _read_images(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[n, 3072]` and labels int64 `[n]` of one file."""
    content = _unpickle(path)
    data = content.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _BYTES:
        raise _damaged(path, f"no array of {_BYTES} bytes per image under 'data'")
    key = "fine_labels" if "fine_labels" in content else "labels"
    labels = content.get(key)
    if not isinstance(labels, list) or not all(isinstance(label, int) and 0 <= label < classes for label in labels):
        raise _damaged(path, f"no list of labels below {classes} under '{key}'")
    if len(labels) != len(data):
        raise _damaged(path, f"{len(data)} images but {len(labels)} labels")
    return data, np.array(labels, dtype=np.int64)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"data_path: '{path}' is no intact CIFAR file ({why}); remove the folder '{path.parent}' and get it again."
    )
