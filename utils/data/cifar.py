"""CIFAR-10 and CIFAR-100 in the files that torchvision uses.

torchvision's own reader refuses every file whose MD5 is not the published one, and unpickles without limits.
This one reads the same layout (`cifar-100-python/train`, ...) whatever the number of images, with an
unpickler that can build arrays, bytes, lists and dicts and nothing else; torchvision is asked for the
download alone.
"""

import pickle
import shutil
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets import utils as downloads

from utils.errors import UserError

_BYTES = 3 * 32 * 32  # one image: the red, the green, then the blue plane
_TIMEOUT = 30.0  # seconds without an answer after which a download is given up


def read_cifar(data_path: Path, source: type[CIFAR10]) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray, list[str]]:
    """Train images and labels, test images and labels (uint8 `[n, 3, 32, 32]`, int64 `[n]`) and class names.

    `source` is torchvision's class, for its names of files. Raises UserError when files are missing and
    cannot be downloaded, or are damaged.
    """
    folder = _find_folder(data_path, source)
    classes = _read_names(folder / source.meta["filename"], source.meta["key"])
    train = [_read_images(folder / name, len(classes)) for name, _ in source.train_list]
    test = [_read_images(folder / name, len(classes)) for name, _ in source.test_list]
    return (*_join(train), *_join(test), classes)


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, np.ndarray]:
    images = np.concatenate([data for data, _ in parts]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), np.concatenate([labels for _, labels in parts])


def _find_folder(data_path: Path, source: type[CIFAR10]) -> Path:
    """The folder of the extracted files: as it is, or from the archive beside it, or downloaded."""
    if data_path.name == source.base_folder and data_path.is_dir():
        return data_path
    folder, archive = data_path / source.base_folder, data_path / source.filename
    if folder.is_dir():
        return folder
    if archive.is_file():
        with _staging(data_path) as staging:
            _extract(archive, staging)
            _publish(staging / source.base_folder, folder, archive)
        return folder
    try:
        with _staging(data_path) as staging, _socket_timeout(_TIMEOUT):
            downloads.download_and_extract_archive(
                source.url, str(staging), filename=source.filename, md5=source.tgz_md5
            )
            _publish(staging / source.base_folder, folder, archive)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data_path: neither '{folder}' nor '{archive}' is there and the download failed ({_reason(error)}); "
            f"get {source.url} where there is a network and put it into '{data_path}'."
        ) from error
    return folder


@contextmanager
def _staging(data_path: Path) -> Iterator[Path]:
    """A folder under `data_path` that is removed afterwards, so that an interruption leaves no half data set."""
    try:
        data_path.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".extract-", dir=data_path))
    except OSError as error:
        raise UserError(
            f"data_path: '{data_path}' cannot be written ({_reason(error)}); choose another folder."
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision opens its connections without a timeout: a silent network would be waited for without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _publish(staged: Path, folder: Path, archive: Path) -> None:
    if not staged.is_dir():
        raise UserError(f"data_path: '{archive}' holds no folder '{folder.name}'; get the archive again.")
    if not folder.is_dir():  # another process may have been faster
        staged.rename(folder)


def _extract(archive: Path, target: Path) -> None:
    """Write the regular files of `archive` under `target`; a member that would land elsewhere is refused by name."""
    try:
        with tarfile.open(archive) as members:
            for member in members:
                path = (target / member.name).resolve()
                if not path.is_relative_to(target.resolve()) or not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"data_path: the member '{member.name}' of '{archive}' is no plain file inside the archive's "
                        f"folder; this is not the published archive, get it again."
                    )
                if member.isfile():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with members.extractfile(member) as content, open(path, "wb") as out:
                        shutil.copyfileobj(content, out)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"data_path: '{archive}' cannot be extracted ({_reason(error)}); if it is damaged, remove it and get it again."
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
        raise _damaged(path, _reason(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}")
    return content


def _read_names(path: Path, key: str) -> list[str]:
    names = _unpickle(path).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _damaged(path, f"no list of names under '{key}'")
    return names


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


def _reason(error: BaseException) -> str:
    """The error in one line, its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
