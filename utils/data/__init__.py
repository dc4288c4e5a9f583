"""Data sets: where their files are, what is in them, how they are augmented.

`DATASETS` maps a name in a config to a function of `data_path` and seed. A new data set is one entry; nothing else in
the code knows a data set by name. Every loader gives labels in the natural order of the classes;
`utils.data_manager` turns them into a stream of tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from utils.data.augmentation import Augmentation
from utils.data.cifar import read_cifar
from utils.data.folder import Files, find_lists, find_root, read_class_folders, read_lists
from utils.errors import UserError, unknown

# Small drawn characters: mirrored they are other characters, cropped hard they are none.
CHARACTERS = Augmentation(scale=(0.7, 1.0), ratio=(0.85, 1.18), flip=False, test_resize=None)
PHOTOS = Augmentation()  # METHOD.md, section 4

_PILOT = "get the archive that LAMDA-PILOT links in its README and unpack it there as {name}/train and {name}/test"


@dataclass(frozen=True)
class Split:
    """Images, uint8 `[n, 3, h, w]` or one path each, and their labels, int64 `[n]`."""

    images: Tensor | list[Path]
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Both splits, with `labels` indexing `classes` (natural order), and how images are augmented."""

    name: str
    train: Split
    test: Split
    classes: list[str]
    augmentation: Augmentation = PHOTOS


def load_dataset(name: str, data_path: str | Path, seed: int = 0) -> Dataset:
    """The data set `name`, its files taken from `data_path`; whatever is wrong with them is a UserError.

    `seed` draws the images of a data set that is made rather than read (`glyphs`)."""
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    dataset = DATASETS[name](Path(data_path).expanduser(), seed)
    _check(dataset)
    return dataset


def _check(dataset: Dataset) -> None:
    """Every class needs an image to learn from and one to be tested on."""
    for split, labels in (("training", dataset.train.labels), ("test", dataset.test.labels)):
        counts = np.bincount(labels, minlength=len(dataset.classes))
        for label in np.flatnonzero(counts == 0):
            raise UserError(
                f"data_path: class '{dataset.classes[label]}' of data set '{dataset.name}' has no {split} image; "
                f"the files are incomplete, get them again."
            )


def _cifar100(data_path: Path, seed: int) -> Dataset:
    return _from_tensors("cifar224", read_cifar(data_path, CIFAR100), PHOTOS)


def _cifar10(data_path: Path, seed: int) -> Dataset:
    return _from_tensors("cifar10_224", read_cifar(data_path, CIFAR10), PHOTOS)


def _digits(data_path: Path, seed: int) -> Dataset:
    from utils.data.digits import load_digits  # imported when asked for: scikit-learn takes a second to load

    return _from_tensors("digits", load_digits(), CHARACTERS)


def _glyphs(data_path: Path, seed: int) -> Dataset:
    from utils.data.glyphs import load_glyphs  # imported when asked for: drawing them needs matplotlib

    return _from_tensors("glyphs", load_glyphs(seed), CHARACTERS)


def _imagenet_r(data_path: Path, seed: int) -> Dataset:
    return _class_folders("imagenetr", data_path, ("imagenet-r",), _PILOT.format(name="imagenet-r"))


def _imagenet_a(data_path: Path, seed: int) -> Dataset:
    return _class_folders("imageneta", data_path, ("imagenet-a",), _PILOT.format(name="imagenet-a"))


def _cub(data_path: Path, seed: int) -> Dataset:
    return _class_folders("cub", data_path, ("cub",), _PILOT.format(name="cub"))


def _domainnet(data_path: Path, seed: int) -> Dataset:
    """345 classes over all domains: by list files where there are any, else by class folders."""
    for root in (data_path / "domainnet", data_path):
        lists = find_lists(root)
        if lists is not None:
            return _from_files("domainnet", read_lists(root, *lists))
    advice = (
        "get the domains with their lists (<domain>_train.txt, <domain>_test.txt) from the DomainNet page "
        "and unpack them into domainnet/, or use folders domainnet/train and domainnet/test of class folders"
    )
    return _class_folders("domainnet", data_path, ("domainnet",), advice)


def _folder(data_path: Path, seed: int) -> Dataset:
    advice = "put your images into train/<class>/ and test/<class>/ under data_path"
    return _class_folders("folder", data_path, (), advice)


def _class_folders(name: str, data_path: Path, subfolders: tuple[str, ...], advice: str) -> Dataset:
    return _from_files(name, read_class_folders(find_root(data_path, subfolders, advice)))


def _from_files(name: str, files: Files) -> Dataset:
    train, test = Split(files.train, files.train_labels), Split(files.test, files.test_labels)
    return Dataset(name, train, test, files.classes, PHOTOS)


def _from_tensors(
    name: str, parts: tuple[Tensor, np.ndarray, Tensor, np.ndarray, list[str]], augmentation: Augmentation
) -> Dataset:
    train_images, train_labels, test_images, test_labels, classes = parts
    return Dataset(name, Split(train_images, train_labels), Split(test_images, test_labels), classes, augmentation)


DATASETS: dict[str, Callable[[Path, int], Dataset]] = {
    "cifar224": _cifar100,
    "cifar10_224": _cifar10,
    "imagenetr": _imagenet_r,
    "imageneta": _imagenet_a,
    "cub": _cub,
    "domainnet": _domainnet,
    "folder": _folder,
    "digits": _digits,
    "glyphs": _glyphs,
}
