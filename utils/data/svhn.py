"""SVHN, Street View House Numbers (Netzer et al., 2011), in the files that torchvision keeps, and by its download.

Not by its reader: that one refuses every file but the published ones, by their MD5.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import SVHN

from utils.data.download import DownloadFailed, fetch, reason_of, staging
from utils.errors import UserError

_CLASSES = 10


def read_svhn(data_path: Path) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray, list[str]]:
    """Train images and labels, test images and labels (uint8 `[n, 3, 32, 32]`, int64 `[n]`) and class names.

    The files `train_32x32.mat` and `test_32x32.mat` are looked for in `data_path/svhn`, then in `data_path`; what is missing
    is downloaded into the first. Raises UserError when that fails or a file is damaged.
    """
    train, test = (_read(_find(data_path, *SVHN.split_list[split])) for split in ("train", "test"))
    return (*train, *test, [str(digit) for digit in range(_CLASSES)])


def _find(data_path: Path, url: str, name: str, md5: str) -> Path:
    folder = data_path / "svhn"
    for place in (folder, data_path):
        if (place / name).is_file():
            return place / name
    with staging(folder) as staged:
        try:
            return fetch([url], md5, staged).rename(folder / name)
        except DownloadFailed as error:
            raise UserError(
                f"data_path: neither '{folder / name}' nor '{data_path / name}' is there and the download failed ({error}); "
                f"get {url} where there is a network and put it into '{folder}'."
            ) from error


def _read(path: Path) -> tuple[Tensor, np.ndarray]:
    """Images and labels of one file: MATLAB's `X` `[32, 32, 3, n]` and `y` `[n, 1]`, where a nought has the label 10."""
    from scipy.io import loadmat  # imported when asked for: it takes a second to load

    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # a damaged file can raise nearly anything
        raise _damaged(path, reason_of(error)) from error
    pixels, labels = content.get("X"), content.get("y")
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise _damaged(path, "no array of 32 x 32 x 3 bytes per image under 'X'")
    if labels is None or labels.size != pixels.shape[3] or not np.isin(labels, np.arange(1, _CLASSES + 1)).all():
        raise _damaged(path, f"no label from 1 to {_CLASSES} for each of its {pixels.shape[3]} images under 'y'")
    return torch.from_numpy(pixels).permute(3, 2, 0, 1).contiguous(), labels.ravel().astype(np.int64) % _CLASSES


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"data_path: '{path}' is no intact SVHN file ({why}); remove it and get it again.")
