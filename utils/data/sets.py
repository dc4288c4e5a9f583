"""The data sets by their names in a config.

A new one is an entry of `READERS`; nothing else in the code knows a data set by name. Readers give labels in the natural
order of the classes; `utils.data_manager` turns them into a stream of tasks.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST

from utils.data.augmentation import Augmentation
from utils.data.cifar import read_cifar
from utils.data.domain_folders import read_cddb, read_core50, read_domain_folders
from utils.data.emoji import read_emoji, read_emoji_concepts
from utils.data.folder import read_domainnet, read_folders
from utils.data.idx import read_idx
from utils.data.svhn import read_svhn
from utils.errors import UserError, unknown

PHOTOS = Augmentation()  # METHOD.md, section 4
# Small characters: mirrored they are other characters, cropped hard they are none.
DRAWINGS = Augmentation(scale=(0.7, 1.0), ratio=(0.85, 1.18), flip=False, test_resize=None)
# Small pictures that fill their frame: their mirror image is as good, a hard crop leaves nothing.
PICTURES = replace(DRAWINGS, flip=True)

Images = Tensor | list[Path]  # uint8 [n, 3, h, w], or one path each
# Training and test images and labels, class names; of a set with domains of its own, these too (`Dataset.domains`).
Contents = tuple[Images, np.ndarray, Images, np.ndarray, list[str]] | tuple[
    Images, np.ndarray, Images, np.ndarray, list[str], dict[str, tuple[np.ndarray, np.ndarray]]]

_PILOT = "get the archive that LAMDA-PILOT links in its README and unpack it there as {name}/train and {name}/test"
_OWN = "put your images into train/<class>/ and test/<class>/ under data_path"
_LETTERS = ("unpack notMNIST_large.tar.gz of http://yaroslavvb.com/upload/notMNIST/ as notmnist/train and "
            "notMNIST_small.tar.gz as notmnist/test, and set 'bad_images' to skip, since a few of its files are damaged")
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it


@dataclass(frozen=True)
class Split:
    """Images and their labels, int64 `[n]`."""

    images: Images
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Both splits, with `labels` indexing `classes` (natural order), and how images are augmented.

    domains: those that the set has of its own, with the training and the test images (ascending int64 numbers) of each; a
    stream with `task_domains` then shows a task's classes by the images of its domain alone.
    """

    name: str
    train: Split
    test: Split
    classes: list[str]
    augmentation: Augmentation = PHOTOS
    domains: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def load_dataset(name: str, data_path: str | Path, seed: int = 0) -> Dataset:
    """The data set `name`, its files taken from `data_path`; whatever is wrong with them is a UserError.

    `seed` draws the images of a data set that is made rather than read (`glyphs`)."""
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    dataset = DATASETS[name](Path(os.path.expanduser(data_path)), seed)  # as a config's; "~nobody" stays
    for split, labels in (("training", dataset.train.labels), ("test", dataset.test.labels)):
        for label in np.flatnonzero(np.bincount(labels, minlength=len(dataset.classes)) == 0):
            raise UserError(
                f"data_path: class '{dataset.classes[label]}' of data set '{dataset.name}' has no {split} image; "
                f"the files are incomplete, get them again."
            )
    return dataset


def load_datasets(names: str | Sequence[str], data_path: str | Path, seed: int = 0) -> list[Dataset]:
    """The data sets that the key `dataset` names, in its order; as `load_dataset`."""
    names = [names] if isinstance(names, str) else names
    for name in names:  # before the first is read or downloaded
        if name not in DATASETS:
            raise unknown("dataset", name, DATASETS)
    return [load_dataset(name, data_path, seed) for name in names]


def _digits(data_path: Path, seed: int) -> Contents:
    from utils.data.digits import load_digits  # imported when asked for: scikit-learn takes a second to load

    return load_digits()


def _glyphs(data_path: Path, seed: int) -> Contents:
    from utils.data.glyphs import load_glyphs  # imported when asked for: drawing them needs matplotlib

    return load_glyphs(seed)


def _fashion_mnist(data_path: Path, seed: int) -> Contents:
    return read_idx(data_path, FashionMNIST, _DEBIAN_FASHION, "dataset-fashion-mnist")


def _pilot(folder: str) -> Callable[[Path, int], Contents]:
    return lambda data_path, seed: read_folders(data_path, folder, _PILOT.format(name=folder))


# How the images are augmented, and what gives them for (data_path, seed).
READERS: dict[str, tuple[Augmentation, Callable[[Path, int], Contents]]] = {
    "cifar224": (PHOTOS, lambda data_path, seed: read_cifar(data_path, CIFAR100)),  # as SD-LoRA's configs call it
    "cifar100": (PHOTOS, lambda data_path, seed: read_cifar(data_path, CIFAR100)),
    "cifar10_224": (PHOTOS, lambda data_path, seed: read_cifar(data_path, CIFAR10)),
    "imagenetr": (PHOTOS, _pilot("imagenet-r")),
    "imageneta": (PHOTOS, _pilot("imagenet-a")),
    "cub": (PHOTOS, _pilot("cub")),
    "cub200": (PHOTOS, _pilot("cub")),  # what LiteLoRA's configs call it
    "domainnet": (PHOTOS, lambda data_path, seed: read_domainnet(data_path)),
    "folder": (PHOTOS, lambda data_path, seed: read_folders(data_path, None, _OWN)),
    "domain_folders": (PHOTOS, lambda data_path, seed: read_domain_folders(data_path)),
    "core50": (PHOTOS, lambda data_path, seed: read_core50(data_path)),
    "cddb": (PHOTOS, lambda data_path, seed: read_cddb(data_path)),
    "cifar10": (PHOTOS, lambda data_path, seed: read_cifar(data_path, CIFAR10)),  # as the five-datasets benchmark calls it
    "mnist": (DRAWINGS, lambda data_path, seed: read_idx(data_path, MNIST)),
    "svhn": (DRAWINGS, lambda data_path, seed: read_svhn(data_path)),
    "notmnist": (DRAWINGS, lambda data_path, seed: read_folders(data_path, "notmnist", _LETTERS)),
    "fashion_mnist": (PICTURES, _fashion_mnist),
    "emoji": (PICTURES, lambda data_path, seed: read_emoji(data_path)),
    "emoji_concepts": (PICTURES, lambda data_path, seed: read_emoji_concepts(data_path)),
    "digits": (DRAWINGS, _digits),
    "glyphs": (DRAWINGS, _glyphs),
}


def _load(name: str, data_path: Path, seed: int) -> Dataset:
    augmentation, read = READERS[name]
    images, labels, test_images, test_labels, classes, *domains = read(data_path, seed)
    return Dataset(name, Split(images, labels), Split(test_images, test_labels), classes, augmentation, *domains)


DATASETS: dict[str, Callable[[Path, int], Dataset]] = {name: partial(_load, name) for name in READERS}
