"""Folders of class folders and lists of files: paths, labels and class names, read before anything trains.

A class is numbered by the place of its name among the sorted names, as torchvision's `ImageFolder` does.
Hidden entries (a leading dot) are passed over.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Files(NamedTuple):
    """Image files of the training and the test split, their labels (int64), and the class names."""

    train: list[Path]
    train_labels: np.ndarray
    test: list[Path]
    test_labels: np.ndarray
    classes: list[str]


def find_root(data_path: Path, names: tuple[str, ...], advice: str) -> Path:
    """The folder with `train` and `test`: `data_path/<one of names>`, or `data_path` itself.

    `advice` tells how to get the data; it ends the error when there is nothing.
    """
    candidates = [data_path / name for name in names] + [data_path]
    for root in candidates:
        if (root / "train").is_dir() and (root / "test").is_dir():
            return root
    for root in candidates:
        for there, missing in (("train", "test"), ("test", "train")):
            if (root / there).is_dir():
                raise UserError(f"data_path: '{root}' has a folder '{there}' but no folder '{missing}'; {advice}.")
    looked = " nor ".join(f"'{root / 'train'}'" for root in candidates)
    raise UserError(
        f"data_path: {'neither ' if names else ''}{looked} {'is there' if names else 'is not there'}; {advice}."
    )


def read_class_folders(root: Path) -> Files:
    """`root/train/<class>/**` and `root/test/<class>/**`.

    Raises UserError for a folder that cannot be read, a class without an image, or one that only one split
    has.
    """
    classes = _class_names(root / "train")
    tested = _class_names(root / "test")
    for name in sorted(set(classes) ^ set(tested)):
        has, lacks = ("train", "test") if name in classes else ("test", "train")
        raise UserError(
            f"data_path: class '{name}' is in '{root / has}' but not in '{root / lacks}'; "
            f"both need the same class folders."
        )
    return Files(*_read_split(root / "train", classes), *_read_split(root / "test", classes), classes)


def _class_names(folder: Path) -> list[str]:
    with _entries(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(
            f"data_path: '{folder}' holds no class folders; give each class a folder of its own under it, "
            f"as in '{folder.name}/<class>/<image>.jpg'."
        )
    return names


def _read_split(folder: Path, classes: list[str]) -> tuple[list[Path], np.ndarray]:
    paths, counts = [], []
    for name in classes:
        found = _images_under(folder / name)
        if not found:
            raise UserError(
                f"data_path: the class folder '{folder / name}' holds no image files ({', '.join(EXTENSIONS)}); "
                f"add images or remove the class from both splits."
            )
        paths += found
        counts.append(len(found))
    return paths, np.repeat(np.arange(len(classes), dtype=np.int64), counts)


def _images_under(folder: Path) -> list[Path]:
    """Image files under `folder`, at any depth, in a fixed order."""
    files, folders = [], []
    with _entries(folder) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(Path(entry.path))
            elif entry.name.lower().endswith(EXTENSIONS):
                files.append(Path(entry.path))
    return files + [path for inner in folders for path in _images_under(inner)]


def _entries(folder: Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise UserError(
            f"data_path: the folder '{folder}' cannot be read ({error.strerror}); check its permissions."
        ) from error


def find_lists(root: Path) -> tuple[list[Path], list[Path]] | None:
    """The training and test lists in `root`: `train.txt` and `test.txt`, else every `<domain>_train.txt` pair.

    None when there is no list; UserError when a list has no counterpart.
    """
    if not root.is_dir():
        return None
    train = [root / "train.txt"] if (root / "train.txt").is_file() else sorted(root.glob("*_train.txt"))
    test = [root / "test.txt"] if (root / "test.txt").is_file() else sorted(root.glob("*_test.txt"))
    wanted = {path.name.replace("train.txt", "test.txt") for path in train}
    for name in sorted(wanted ^ {path.name for path in test}):
        missing = name if name in wanted else name.replace("test.txt", "train.txt")
        raise UserError(f"data_path: the list '{root / missing}' is missing; every training list needs its test list.")
    return (train, test) if train else None


def read_lists(root: Path, train: list[Path], test: list[Path]) -> Files:
    """Files named by lines `relative/path/to/class/image.jpg label`, relative to `root`.

    A class takes the name of the folder of its first image. Labels need not be gapless: they are renumbered
    in order.
    """
    train_paths, train_labels = _read_lines(root, train)
    test_paths, test_labels = _read_lines(root, test)
    labels, first = np.unique(train_labels, return_index=True)
    for label in np.setxor1d(labels, test_labels):
        has, lacks = ("train", "test") if label in labels else ("test", "train")
        raise UserError(f"data_path: label {label} is in the {has} lists of '{root}' but not in the {lacks} lists.")
    classes = [train_paths[index].parent.name for index in first]
    renumbered = [np.searchsorted(labels, part).astype(np.int64) for part in (train_labels, test_labels)]
    return Files(train_paths, renumbered[0], test_paths, renumbered[1], classes)


def _read_lines(root: Path, lists: list[Path]) -> tuple[list[Path], np.ndarray]:
    paths, labels = [], []
    for source in lists:
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data_path: the list '{source}' cannot be read ({error}); get it again.") from error
        before = len(paths)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, _, label = line.strip().rpartition(" ")
            if not name or not label.isdecimal():
                raise UserError(f"data_path: '{source}', line {number}: '{line}' is not 'relative/path label'.")
            paths.append(root / name.strip())
            labels.append(int(label))
        if len(paths) == before:
            raise UserError(f"data_path: the list '{source}' names no image; get it again.")
        if not paths[before].is_file():
            raise UserError(
                f"data_path: '{paths[before]}', the first image of '{source.name}', is not there; "
                f"unpack the images beside their lists."
            )
    return paths, np.array(labels, dtype=np.int64)
