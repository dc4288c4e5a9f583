"""Data sets whose images lie in a folder for each domain: of one's own, CORe50, CDDB.

CORe50 (Lomonaco & Maltoni, CoRL 2017) and CDDB (Li et al., WACV 2023) are read as they are unpacked, and split as
iamwangyabin/S-Prompts at 0fc9d4f and RanPAC/RanPAC at a460ac0 do.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.data.folder import DomainListing, check_names, class_names, images_under, read_split
from utils.errors import UserError

ByClass = Mapping[str, Sequence[Path]]  # images by the names of their classes

CORE50_TRAINED = ("s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11")
CORE50_TESTED = ("s3", "s7", "s10")
CDDB_CLASSES = ("0_real", "1_fake")


def read_domain_folders(data_path: Path) -> DomainListing:
    """`data_path/<domain>/train/<class>/**` and `.../test/<class>/**`, domains by their names; raises UserError."""
    found = _folders_with(data_path, "train", "test")
    if not found:
        raise UserError(
            f"data_path: no folder in '{data_path}' has a folder 'train' and a folder 'test'; give each domain a folder with "
            f"both, as in '<domain>/train/<class>/<image>.jpg'."
        )
    return joined({domain.name: tuple(_classes_in(domain / split) for split in ("train", "test")) for domain in found})


def read_cddb(data_path: Path) -> DomainListing:
    """`<source>/train/**/0_real/*`, `.../1_fake/*` and `<source>/val/**` for every source of images, in `data_path/cddb`,
    `data_path/CDDB` or `data_path`; some sources have folders of objects in between. Raises UserError."""
    for root in (data_path / "cddb", data_path / "CDDB", data_path):
        if found := _folders_with(root, "train", "val"):
            return joined({source.name: (_real_and_fake(source / "train"), _real_and_fake(source / "val"))
                           for source in found})
    raise UserError(
        f"data_path: no folder in '{data_path / 'cddb'}' has a folder 'train' and a folder 'val'; get CDDB from "
        f"https://coral79.github.io/CDDB_web/ and unpack its sources there, as in 'cddb/gaugan/train/0_real/<image>.png'."
    )


def read_core50(data_path: Path) -> DomainListing:
    """Sessions `s1` to `s11` of objects `o1` to `o50`, in `core50_128x128` under `data_path/core50` or `data_path`, or in
    these themselves; raises UserError.

    Eight sessions are trained on, each a domain; the three others are the one test set that all of them are tested on.
    """
    places = [place / "core50_128x128" for place in (data_path / "core50", data_path)]
    for root in (*places, data_path / "core50", data_path):
        if not (root / "s1").is_dir():
            continue
        for session in (*CORE50_TRAINED, *CORE50_TESTED):
            if not (root / session).is_dir():
                raise UserError(f"data_path: '{root}' has no folder '{session}', a session of CORe50; unpack "
                                f"core50_128x128.zip again.")
        test: dict[str, list[Path]] = {}
        for session in CORE50_TESTED:
            for name, images in _classes_in(root / session).items():
                test.setdefault(name, []).extend(images)
        first, *others = CORE50_TRAINED
        *listing, domains = joined({first: (_classes_in(root / first), test),
                                    **{session: (_classes_in(root / session), {}) for session in others}})
        return *listing, {session: (trained, domains[first][1]) for session, (trained, _) in domains.items()}
    raise UserError(
        f"data_path: '{places[0]}' has no folder 's1'; get core50_128x128.zip from "
        f"https://vlomonaco.github.io/core50/index.html#dataset and unpack it in '{data_path / 'core50'}'."
    )


def joined(parts: Mapping[str, tuple[ByClass, ByClass]]) -> DomainListing:
    """A data set of the training and test images of every domain, one domain after another; classes by their names, numbers in
    a name by their value."""
    names = sorted({name for splits in parts.values() for split in splits for name in split}, key=_natural)
    paths: tuple[list[Path], list[Path]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    domains = {}
    for domain, splits in parts.items():
        starts = [len(each) for each in paths]
        for split, images in enumerate(splits):
            for name in sorted(images, key=_natural):
                paths[split].extend(images[name])
                labels[split].extend([names.index(name)] * len(images[name]))
        domains[domain] = tuple(np.arange(start, len(each)) for start, each in zip(starts, paths))
    train, test = (np.array(each, dtype=np.int64) for each in labels)
    return paths[0], train, paths[1], test, names, domains


def _natural(name: str) -> tuple[int, str]:
    """So that `o2` comes before `o10`."""
    return len(name) if name[1:].isdecimal() else 0, name


def _folders_with(root: Path, *splits: str) -> list[Path]:
    """Those folders in `root` that have folders of these names."""
    inside = sorted(root.iterdir()) if root.is_dir() else []
    return [place for place in inside if not place.name.startswith(".") and all((place / split).is_dir() for split in splits)]


def _classes_in(folder: Path) -> dict[str, list[Path]]:
    """The images of every class folder."""
    names = class_names(folder)
    paths, labels = read_split(folder, names)
    bounds = np.searchsorted(labels, np.arange(len(names) + 1))
    return {name: paths[bounds[label] : bounds[label + 1]] for label, name in enumerate(names)}


def _real_and_fake(folder: Path) -> dict[str, list[Path]]:
    """The images in folders `0_real` and `1_fake` at any depth."""
    images = images_under(folder)
    check_names(images)
    found = {name: [path for path in images if name in path.relative_to(folder).parts[:-1]] for name in CDDB_CLASSES}
    for name, paths in found.items():
        if not paths:
            raise UserError(f"data_path: '{folder}' has no image in a folder '{name}'; unpack this source of CDDB again.")
    return found
