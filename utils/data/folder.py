"""Folders of class folders and lists of files: paths, labels and class names, read before anything trains.

A class is numbered by the place of its name among the sorted names, as torchvision's `ImageFolder` does, and a file is an
image by the same suffixes. torchvision's own walk passes in silence over a folder that it may not read, and counts hidden
entries (a leading dot); here the first is an error, and the second are passed over.
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError

Files = tuple[list[Path], np.ndarray]  # images and their labels, int64
Domains = dict[str, tuple[np.ndarray, np.ndarray]]  # the numbers of a domain's training and test images
Listing = tuple[list[Path], np.ndarray, list[Path], np.ndarray, list[str]]  # both splits' Files, and the class names
DomainListing = tuple[list[Path], np.ndarray, list[Path], np.ndarray, list[str], Domains]


def read_folders(data_path: Path, name: str | None, advice: str) -> Listing:
    """`train/<class>/**` and `test/<class>/**` under `data_path/<name>`, or else under `data_path` itself.

    `advice` tells how to get the data; it ends the error when there is nothing. Raises UserError, too, for a folder that
    cannot be read, a class without an image, or one that only one split has.
    """
    root = _find_root([data_path / name, data_path] if name else [data_path], advice)
    train, test = root / "train", root / "test"
    classes, tested = class_names(train), class_names(test)
    for label in sorted(set(classes) ^ set(tested)):
        has, lacks = (train, test) if label in classes else (test, train)
        raise UserError(
            f"data_path: class '{label}' is in '{has}' but not in '{lacks}'; both need the same class folders."
        )
    return (*read_split(train, classes), *read_split(test, classes), classes)


def _find_root(candidates: list[Path], advice: str) -> Path:
    """The first of these folders that has both splits."""
    for root in candidates:
        if (root / "train").is_dir() and (root / "test").is_dir():
            return root
    for root in candidates:
        for there, missing in (("train", "test"), ("test", "train")):
            if (root / there).is_dir():
                raise UserError(f"data_path: '{root}' has a folder '{there}' but no folder '{missing}'; {advice}.")
    looked = " nor ".join(f"'{root / 'train'}'" for root in candidates)
    raise UserError(f"data_path: {f'neither {looked} is' if len(candidates) > 1 else f'{looked} is not'} there; {advice}.")


def class_names(folder: Path) -> list[str]:
    """The folders in `folder`, sorted; raises UserError where there is none."""
    _, names, _ = next(os.walk(folder, onerror=_unreadable))
    names = sorted(name for name in names if not name.startswith("."))
    if not names:
        raise UserError(
            f"data_path: '{folder}' holds no class folders; give each class a folder of its own under it, "
            f"as in '{folder.name}/<class>/<image>.jpg'."
        )
    check_names(folder / name for name in names)
    return names


def check_names(paths: Iterable[Path]) -> None:
    """Raises UserError for a name that is not UTF-8, as those of an archive from another system may be: no record of a run
    could hold it."""
    for path in paths:
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            raise UserError(f"data_path: the name of '{shown}' is not UTF-8; rename it.") from error


def read_split(folder: Path, classes: list[str]) -> Files:
    """The images of these class folders; raises UserError for one without any."""
    images = [images_under(folder / name) for name in classes]
    check_names(path for found in images for path in found)
    for name, found in zip(classes, images, strict=True):
        if not found:
            raise UserError(
                f"data_path: the class folder '{folder / name}' holds no image files ({', '.join(IMG_EXTENSIONS)}); "
                f"add images or remove the class from both splits."
            )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in images])
    return [path for found in images for path in found], labels


def images_under(folder: Path, named: str = "data_path") -> list[Path]:
    """Image files at any depth, in a fixed order: those of a folder before those of the folders in it, each by name.

    named: what named the folder, for the error of one that cannot be read."""
    images = []
    for place, folders, files in os.walk(folder, onerror=partial(_unreadable, named=named), followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images += [Path(place, name) for name in sorted(files)
                   if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")]
    return images


def _unreadable(error: OSError, named: str = "data_path") -> None:
    raise UserError(
        f"{named}: the folder '{error.filename}' cannot be read ({error.strerror}); check its permissions."
    ) from error


def read_domainnet(data_path: Path) -> Listing | DomainListing:
    """345 classes over all domains: by list files in `data_path/domainnet` or `data_path` where there are any, else by class
    folders. Lists of each domain, `<domain>_train.txt` and `<domain>_test.txt`, make the domains known."""
    for root in (data_path / "domainnet", data_path):
        if lists := _find_lists(root):
            return _read_lists(root, *lists)
    advice = (
        "get the domains with their lists (<domain>_train.txt, <domain>_test.txt) from the DomainNet page "
        "and unpack them into domainnet/, or use folders domainnet/train and domainnet/test of class folders"
    )
    return read_folders(data_path, "domainnet", advice)


def _find_lists(root: Path) -> tuple[list[Path], list[Path]] | None:
    """The training and test lists in `root`: `train.txt` and `test.txt`, else every `<domain>_train.txt` pair.

    None when there is no list; UserError when a list has no counterpart.
    """
    train, test = ([root / f"{split}.txt"] if (root / f"{split}.txt").is_file() else sorted(root.glob(f"*_{split}.txt"))
                   for split in ("train", "test"))
    wanted = {path.name.replace("train.txt", "test.txt") for path in train}
    for name in sorted(wanted ^ {path.name for path in test}):
        missing = name if name in wanted else name.replace("test.txt", "train.txt")
        raise UserError(f"data_path: the list '{root / missing}' is missing; every training list needs its test list.")
    return (train, test) if train else None


def _read_lists(root: Path, train: list[Path], test: list[Path]) -> Listing | DomainListing:
    """Files named by lines `relative/path/to/class/image.jpg label`, relative to `root`.

    A class takes the name of the folder of its first image. Labels need not be gapless: they are renumbered in order.
    """
    train_paths, train_labels, train_parts = _read_lines(root, train)
    test_paths, test_labels, test_parts = _read_lines(root, test)
    labels, first = np.unique(train_labels, return_index=True)
    for label in np.setxor1d(labels, test_labels):
        has, lacks = ("train", "test") if label in labels else ("test", "train")
        raise UserError(
            f"data_path: label {label} is in the {has} lists of '{root}' but not in the {lacks} lists; get both again."
        )
    classes = [train_paths[index].parent.name for index in first]
    listing = train_paths, np.searchsorted(labels, train_labels), test_paths, np.searchsorted(labels, test_labels), classes
    suffix = "_train.txt"
    if not all(file.name.endswith(suffix) for file in train):
        return listing
    return *listing, {file.name.removesuffix(suffix): parts
                      for file, *parts in zip(train, train_parts, test_parts, strict=True)}


def _read_lines(root: Path, lists: list[Path]) -> tuple[list[Path], np.ndarray, list[np.ndarray]]:
    """The images that `lists` name, their labels, and which of them each list names."""
    paths, labels, parts = [], [], []
    for file in lists:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data_path: the list '{file}' cannot be read ({error}); get it again.") from error
        before = len(paths)
        for number, line in enumerate(lines, start=1):
            name, _, label = line.strip().rpartition(" ")
            if line.strip() and (not name or not label.isdecimal()):
                raise UserError(
                    f"data_path: '{file}', line {number}: '{line}' is not 'relative/path label'; get the list again."
                )
            if name:
                paths.append(root / name.strip())
                labels.append(int(label))
        if len(paths) == before:
            raise UserError(f"data_path: the list '{file}' names no image; get it again.")
        if not paths[before].is_file():
            raise UserError(
                f"data_path: '{paths[before]}', the first image of '{file.name}', is not there; "
                f"unpack the images beside their lists."
            )
        parts.append(np.arange(before, len(paths)))
    return paths, np.array(labels, dtype=np.int64), parts
