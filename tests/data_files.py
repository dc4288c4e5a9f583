"""Tiny data sets in the formats of the real ones and in memory, and streams of them, for tests.

Every image is a plain color drawn from its class with some noise, so that a network can learn the classes.
"""

import gzip
import pickle
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100

from utils.data import Dataset, Split
from utils.data.augmentation import Augmentation
from utils.data_manager import DataManager
from utils.rng import generator


def class_pixels(label: int, number: int, height: int, width: int) -> np.ndarray:
    """Image `number` of class `label`: uint8 `[height, width, 3]`."""
    color = np.random.default_rng(label).integers(40, 216, size=3)
    noise = np.random.default_rng((label, number, 1)).integers(-40, 40, size=(height, width, 3))
    return (color + noise).astype(np.uint8)


def write_cifar100(root: Path, train_per_class: int = 2, test_per_class: int = 1, classes: int = 100) -> Path:
    """`root/cifar-100-python` as torchvision leaves it, with few images; returns that folder."""
    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    for (name, _), count in (
        (CIFAR100.train_list[0], train_per_class),
        (CIFAR100.test_list[0], test_per_class),
    ):
        data, labels = _cifar_rows(classes, count)
        _pickle(
            folder / name,
            {"data": data, "fine_labels": labels, "coarse_labels": [label // 5 for label in labels]},
        )
    _pickle(
        folder / CIFAR100.meta["filename"],
        {CIFAR100.meta["key"]: [f"kind{label}" for label in range(classes)]},
    )
    return folder


def write_cifar10(root: Path, train_per_class: int = 5, test_per_class: int = 1) -> Path:
    """`root/cifar-10-batches-py` as torchvision leaves it, the training images spread over its five files."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    data, labels = _cifar_rows(10, train_per_class)
    for part, (name, _) in enumerate(CIFAR10.train_list):
        _pickle(folder / name, {"data": data[part::5], "labels": labels[part::5]})
    data, labels = _cifar_rows(10, test_per_class)
    _pickle(folder / CIFAR10.test_list[0][0], {"data": data, "labels": labels})
    _pickle(folder / CIFAR10.meta["filename"], {CIFAR10.meta["key"]: [f"thing{label}" for label in range(10)]})
    return folder


def pack_cifar(folder: Path, source: type[CIFAR10]) -> Path:
    """Replaces the extracted `folder` by torchvision's archive of it; returns the archive."""
    archive = folder.parent / source.filename
    with tarfile.open(archive, "w:gz") as out:
        out.add(folder, arcname=source.base_folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return archive


def _cifar_rows(classes: int, per_class: int) -> tuple[np.ndarray, list[int]]:
    """Images uint8 `[n, 3072]`, classes alternating, and their labels."""
    labels = [label for _ in range(per_class) for label in range(classes)]
    images = [class_pixels(label, row // classes, 32, 32) for row, label in enumerate(labels)]
    return np.stack(images).transpose(0, 3, 1, 2).reshape(len(labels), -1), labels


def _pickle(path: Path, content: dict) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_idx(folder: Path, train_per_class: int = 3, test_per_class: int = 2, packed: bool = True) -> Path:
    """The four IDX files of MNIST and its like in `folder`, ten classes of 28 x 28 pixels; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train_per_class), ("t10k", test_per_class)):
        labels = np.tile(np.arange(10, dtype=np.uint8), count)
        images = np.stack([class_pixels(int(label), row, 28, 28)[:, :, 0] for row, label in enumerate(labels)])
        for part, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            path = folder / f"{split}-{part}{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_svhn(folder: Path, train_per_class: int = 3, test_per_class: int = 2) -> Path:
    """`train_32x32.mat` and `test_32x32.mat` in `folder`, where a nought has the label 10; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train_per_class), ("test", test_per_class)):
        labels = np.tile(np.arange(1, 11, dtype=np.uint8), count)
        images = np.stack([class_pixels(int(label), row, 32, 32) for row, label in enumerate(labels)], axis=3)
        savemat(folder / f"{split}_32x32.mat", {"X": images, "y": labels[:, None]}, do_compression=True)
    return folder


def write_emoji(path: Path, classes: int = 3, concepts: int = 4) -> Path:
    """A file of tools.build_emoji with so many concepts a class, the first of each for testing; returns `path`."""
    numbers = np.arange(classes * concepts)
    labels, styles = np.repeat(numbers // concepts, 5), np.tile(np.arange(5), len(numbers))
    images = np.stack([class_pixels(int(label), row, 64, 64) for row, label in enumerate(labels)])
    names = np.array([f"kind {number}" for number in range(classes)])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images, labels=labels, styles=styles, test=np.repeat(numbers % concepts == 0, 5),
                        classes=names, concepts=np.array([f"concept {number}" for number in numbers]))
    return path


def write_class_folders(
    root: Path,
    classes: Sequence[str] = ("ant", "bee", "cat", "dog"),
    train_per_class: int = 3,
    test_per_class: int = 2,
    size: tuple[int, int] = (40, 56),
    suffix: str = ".png",
) -> Path:
    """`root/train/<class>/` and `root/test/<class>/`, images about `size` (height, width), no two alike; returns `root`."""
    for split, count, first in (("train", train_per_class, 0), ("test", test_per_class, 1000)):
        for label, name in enumerate(classes):
            for number in range(count):
                path = root / split / name / f"{number}{suffix}"
                _save(path, class_pixels(label, first + number, size[0] + 3 * label, size[1] + number))
    return root


def write_domainnet(
    root: Path, domains: Sequence[str] = ("clipart", "sketch"), classes: int = 4, per_class: int = 2
) -> Path:
    """Images `root/<domain>/<class>/<n>.png` and the lists `<domain>_train.txt`, `<domain>_test.txt`; returns `root`."""
    for domain in domains:
        for split, first in (("train", 0), ("test", 1000)):
            lines = []
            for label in range(classes):
                for number in range(first, first + per_class):
                    name = f"{domain}/thing_{label}/{number}.png"
                    _save(root / name, class_pixels(label, number, 36, 40))
                    lines.append(f"{name} {label}\n")
            (root / f"{domain}_{split}.txt").write_text("".join(lines))
    return root


def write_core50(root: Path, objects: int = 12, per_session: int = 2) -> Path:
    """`root/core50_128x128` as its archive leaves it, few objects and frames; returns that folder."""
    for session in range(1, 12):
        for thing in range(objects):
            for frame in range(per_session):
                path = root / f"core50_128x128/s{session}/o{thing + 1}/C_{session:02}_{thing + 1:02}_{frame:03}.png"
                _save(path, class_pixels(thing, 100 * session + frame, 32, 32))
    return root / "core50_128x128"


def write_cddb(root: Path, sources: Sequence[str] = ("gaugan", "biggan"), of_objects: Sequence[str] = (), images: int = 2
               ) -> Path:
    """`<source>/train/0_real/` and so on, with a folder of objects in between for some sources; returns `root`."""
    for place, source in enumerate([*sources, *of_objects]):
        for split, first in (("train", 0), ("val", 1000)):
            for label, name in enumerate(("0_real", "1_fake")):
                for thing in ("apple", "horse") if source in of_objects else ("",):
                    for number in range(images):
                        path = root / source / split / thing / name / f"{number}.png"
                        _save(path, class_pixels(label, first + 100 * place + number, 36, 40))
    return root


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def tensor_dataset(classes: int = 6, per_class: int = 8, size: int = 12) -> Dataset:
    """Random images, no two alike."""

    def split(count: int, key: str) -> Split:
        labels = np.tile(np.arange(classes), count)
        images = torch.randint(
            0, 256, (len(labels), 3, size, size), dtype=torch.uint8, generator=generator(0, "images", key)
        )
        return Split(images, labels)

    names = [f"class{label}" for label in range(classes)]
    return Dataset("tensors", split(per_class, "train"), split(3, "test"), names, Augmentation())


def manager(dataset: Dataset | Sequence[Dataset], **options: object) -> DataManager:
    return DataManager(dataset, **{"init_cls": 2, "increment": 2, "seed": 1993, "image_size": 16, **options})


def epoch(data: DataManager, task: int = 0, number: int = 0, batch_size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of an epoch, in order."""
    images, labels = zip(*data.train_batches(task, number, batch_size), strict=True)
    return torch.cat(images), torch.cat(labels)


def views(data: DataManager, split: str, classes: range, batch_size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*data.eval_batches(split, classes, batch_size), strict=True)
    return torch.cat(images), torch.cat(labels)
