"""The data set `emoji`: the same concepts drawn by five hands, from the file that `python -m tools.build_emoji` makes.

A class is a subcategory of Unicode, an image one concept in one style, 64 x 64 pixels on white. The split is by concept: what
is tested in any style was trained in none.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data.download import reason_of
from utils.errors import UserError

FILE = "emoji.npz"
SIZE = 64
PACKAGES = ("emoji-datasource-google", "emoji-datasource-twitter", "openmoji", "@lobehub/fluent-emoji-3d")
STYLES = ("noto", "twemoji", "openmoji", "line", "fluent")  # line: OpenMoji's drawings without color
_ARRAYS = {"images": (np.uint8, 4), "labels": (np.int64, 1), "styles": (np.int64, 1), "test": (np.bool_, 1)}


def read_emoji(data_path: Path) -> tuple[
        Tensor, np.ndarray, Tensor, np.ndarray, list[str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Train images and labels, test images and labels (uint8 `[n, 3, 64, 64]`, int64 `[n]`), class names, and for each of
    `STYLES` the numbers of its images in both splits. Raises UserError when the file is missing or damaged."""
    path = data_path / FILE
    if not path.is_file():
        raise UserError(
            f"data_path: '{path}' is not there; `npm install {' '.join(PACKAGES)}` and then "
            f"`python -m tools.build_emoji node_modules --data-path {data_path}` make it."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in (*_ARRAYS, "classes")}
    except Exception as error:  # a damaged archive can raise nearly anything
        raise _damaged(path, reason_of(error)) from error
    for name, (kind, dimensions) in _ARRAYS.items():
        array = content[name]
        if array.dtype != kind or array.ndim != dimensions or len(array) != len(content["images"]):
            raise _damaged(path, f"'{name}' is {array.dtype} of shape {array.shape}")
    if content["labels"].max(initial=0) >= len(content["classes"]) or content["styles"].max(initial=0) >= len(STYLES):
        raise _damaged(path, "a label or style is out of range")
    images, test = torch.from_numpy(content["images"]).permute(0, 3, 1, 2), content["test"]
    splits = []
    for part in (~test, test):
        splits += [images[torch.from_numpy(part)].contiguous(), content["labels"][part]]
    domains = {style: tuple(np.flatnonzero(content["styles"][part] == number) for part in (~test, test))
               for number, style in enumerate(STYLES)}
    return (*splits, content["classes"].tolist(), domains)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"data_path: '{path}' is no intact file of tools.build_emoji ({why}); remove it and build it again.")
