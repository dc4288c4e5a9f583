"""The data set `emoji`: the same concepts drawn by five hands, from the file that `python -m tools.build_emoji` makes.

A class is a subcategory of Unicode, an image one concept in one style, 64 x 64 pixels on white. The split is by concept: what
is tested in any style was trained in none. The data set `emoji_concepts` has the same images, and a class for every concept.
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
TESTED = "twemoji"  # the style in which concepts are tested where each is a class: the one nearest to another, Noto
ALIKE = 2.0  # mean difference in gray levels up to which two drawings are the same one
_ARRAYS = {"images": (np.uint8, 4), "labels": (np.int64, 1), "styles": (np.int64, 1), "test": (np.bool_, 1)}


def read_emoji(data_path: Path) -> tuple[
        Tensor, np.ndarray, Tensor, np.ndarray, list[str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Train images and labels, test images and labels (uint8 `[n, 3, 64, 64]`, int64 `[n]`), class names, and for each of
    `STYLES` the numbers of its images in both splits. Raises UserError when the file is missing or damaged."""
    content = _read(data_path)
    images, test = torch.from_numpy(content["images"]).permute(0, 3, 1, 2), content["test"]
    splits = []
    for part in (~test, test):
        splits += [images[torch.from_numpy(part)].contiguous(), content["labels"][part]]
    domains = {style: tuple(np.flatnonzero(content["styles"][part] == number) for part in (~test, test))
               for number, style in enumerate(STYLES)}
    return (*splits, content["classes"].tolist(), domains)


def read_emoji_concepts(data_path: Path) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray, list[str]]:
    """As `read_emoji`, with a class for every concept: four images to train on, in the styles but `TESTED`, and the one in
    that style to test on. Of concepts that some style draws alike only the first is a class: no other could be told from it.
    """
    content = _read(data_path, "concepts")
    styles = len(STYLES)
    images = content["images"].reshape(-1, styles, SIZE, SIZE, 3)
    in_turn = np.tile(np.arange(styles), len(images))
    if len(content["concepts"]) != len(images) or not np.array_equal(content["styles"], in_turn):
        raise _damaged(data_path / FILE, "'concepts' does not name the images of five styles each")
    apart = np.flatnonzero(told_apart(images))
    tensors = torch.from_numpy(images[apart]).permute(0, 1, 4, 2, 3)
    trained = [number for number, style in enumerate(STYLES) if style != TESTED]
    labels = np.arange(len(apart))
    return (tensors[:, trained].flatten(0, 1).contiguous(), labels.repeat(len(trained)),
            tensors[:, STYLES.index(TESTED)].contiguous(), labels, content["concepts"][apart].tolist())


def told_apart(images: np.ndarray) -> np.ndarray:
    """Which concepts, of `images` uint8 `[n, styles, 64, 64, 3]`, are drawn by no style like an earlier one of them, bool
    `[n]`: mean differences above `ALIKE` gray levels."""
    # Differences of means over 8 x 8 pixels are at most those of the pixels, and there are few pairs left to look at closely.
    coarse = images.reshape(*images.shape[:2], SIZE // 8, 8, SIZE // 8, 8, 3).mean((3, 5), dtype=np.float32)
    coarse = coarse.reshape(*images.shape[:2], -1)
    apart = np.ones(len(images), dtype=bool)
    for number in range(1, len(images)):
        near = (np.abs(coarse[:number] - coarse[number]).mean(2) <= ALIKE) & apart[:number, None]
        for other, style in np.argwhere(near):
            difference = images[other, style].astype(np.int16) - images[number, style]
            apart[number] &= np.abs(difference).mean() > ALIKE
    return apart


def _read(data_path: Path, *also: str) -> dict[str, np.ndarray]:
    """The arrays of the file, and those named `also`; raises UserError when it is missing or damaged."""
    path = data_path / FILE
    if not path.is_file():
        raise UserError(
            f"data_path: '{path}' is not there; `npm install {' '.join(PACKAGES)}` and then "
            f"`python -m tools.build_emoji node_modules --data-path {data_path}` make it."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in (*_ARRAYS, "classes", *also)}
    except Exception as error:  # a damaged archive can raise nearly anything
        raise _damaged(path, reason_of(error)) from error
    for name, (kind, dimensions) in _ARRAYS.items():
        array = content[name]
        if array.dtype != kind or array.ndim != dimensions or len(array) != len(content["images"]):
            raise _damaged(path, f"'{name}' is {array.dtype} of shape {array.shape}")
    if content["labels"].max(initial=0) >= len(content["classes"]) or content["styles"].max(initial=0) >= len(STYLES):
        raise _damaged(path, "a label or style is out of range")
    return content


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"data_path: '{path}' is no intact file of tools.build_emoji ({why}); remove it and build it again.")
