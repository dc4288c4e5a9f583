"""Class folders and lists of files, read as their makers mean them, and refused by name when something is missing."""

import os
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from tests.data_files import write_class_folders, write_domainnet
from utils.data import load_dataset
from utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "subfolder"),
    [("imagenetr", "imagenet-r"), ("imageneta", "imagenet-a"), ("cub", "cub"), ("domainnet", "domainnet")],
)
def test_class_folders_are_read_as_image_folder_reads_them(tmp_path: Path, name: str, subfolder: str) -> None:
    root = write_class_folders(tmp_path / subfolder, classes=["n2", "n10", "a", "B"])
    _ = (root / "train" / "a" / "notes.txt").write_text("no image")
    nested = root / "train" / "a" / "more" / "x.PNG"
    nested.parent.mkdir()
    (root / "train" / "a" / "0.png").rename(nested)
    for place in (tmp_path, root):
        dataset = load_dataset(name, place)
        for split, folder in ((dataset.train, "train"), (dataset.test, "test")):
            reference = ImageFolder(root / folder)
            found = sorted(zip(map(str, split.images), split.labels.tolist(), strict=True))
            assert found == sorted(reference.samples)
        assert dataset.classes == reference.classes == ["B", "a", "n10", "n2"]
        assert dataset.name == name


def test_folder_takes_data_path_itself_and_skips_hidden_entries(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "mine")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "._0.png").write_bytes(b"")
    dataset = load_dataset("folder", str(root))
    assert dataset.classes == ["ant", "bee", "cat", "dog"]
    assert len(dataset.train.images) == 12
    assert len(dataset.test.images) == 8


def test_domainnet_lists_pool_their_domains(tmp_path: Path) -> None:
    write_domainnet(tmp_path / "domainnet", classes=3, per_class=2)
    dataset = load_dataset("domainnet", tmp_path)
    assert dataset.classes == ["thing_0", "thing_1", "thing_2"]
    assert np.bincount(dataset.train.labels).tolist() == [4, 4, 4]
    names = {path.relative_to(tmp_path / "domainnet").parts[:2] for path in dataset.train.images}
    assert names == {(domain, f"thing_{label}") for domain in ("clipart", "sketch") for label in range(3)}
    for path, label in zip(dataset.test.images, dataset.test.labels, strict=True):
        assert path.parent.name == f"thing_{label}"
        assert path.is_file()


def test_domainnet_single_pair_of_lists_with_gaps_in_the_labels(tmp_path: Path) -> None:
    root = write_domainnet(tmp_path, domains=["real"], classes=3)
    for split in ("train", "test"):
        lines = (root / f"real_{split}.txt").read_text().splitlines()
        (root / f"{split}.txt").write_text("\n".join(line for line in lines if not line.endswith(" 1")))
        (root / f"real_{split}.txt").unlink()
    dataset = load_dataset("domainnet", root)
    assert dataset.classes == ["thing_0", "thing_2"]
    assert set(dataset.test.labels.tolist()) == {0, 1}


def _break_line(root: Path) -> None:
    with open(root / "clipart_train.txt", "a") as out:
        out.write("clipart/thing_0/x.png three\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_line, "clipart_train.txt', line 9: .*three"),
        (lambda root: (root / "sketch_test.txt").unlink(), "sketch_test.txt' is missing"),
        (lambda root: (root / "sketch_test.txt").write_text("\n"), "sketch_test.txt' names no image"),
        (lambda root: (root / "sketch_test.txt").write_bytes(b"\xff\xfe"), "sketch_test.txt' cannot be read"),
        (lambda root: (root / "clipart/thing_0/0.png").unlink(), "clipart/thing_0/0.png.*clipart_train.txt"),
        (
            lambda root: (root / "clipart_train.txt").write_text("clipart/thing_0/0.png 7"),
            "label 7 is in the train lists",
        ),
    ],
)
def test_domainnet_damaged_lists(tmp_path: Path, damage: object, message: str) -> None:
    damage(write_domainnet(tmp_path))
    with pytest.raises(UserError, match=message):
        load_dataset("domainnet", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: rmtree(root / "test"), "no folder 'test'"),
        (lambda root: rmtree(root / "train"), "no folder 'train'"),
        (lambda root: rmtree(root / "test" / "bee"), "class 'bee' is in '.*train' but not in '.*test'"),
        (
            lambda root: rmtree(root / "train" / "bee"),
            "class 'bee' is in '.*test' but not in '.*train'",
        ),
        (
            lambda root: [path.unlink() for path in (root / "train/cat").iterdir()],
            "train/cat' holds no image files",
        ),
        (
            lambda root: [path.unlink() for path in (root / "test/cat").iterdir()],
            "test/cat' holds no image files",
        ),
        (lambda root: [rmtree(path) for path in (root / "train").iterdir()], "holds no class folders"),
        (rmtree, "train' is not there; put your images"),
    ],
)
def test_folder_damaged(tmp_path: Path, damage: object, message: str) -> None:
    root = write_class_folders(tmp_path / "mine")
    damage(root)
    with pytest.raises(UserError, match=message):
        load_dataset("folder", root)


@pytest.mark.parametrize("name", [b"train/caf\xe9", b"train/bee/caf\xe9.jpg"])
def test_a_name_that_no_record_can_hold_is_refused(tmp_path: Path, name: bytes) -> None:
    root = write_class_folders(tmp_path)
    image = next((root / "train/bee").iterdir())
    place = os.fsencode(root) + b"/" + name
    if name.endswith(b".jpg"):
        os.link(image, place)
    else:
        os.rename(root / "train/bee", place)
    with pytest.raises(UserError, match=r"data_path: the name of '.*caf\\xe9.*' is not UTF-8; rename it"):
        load_dataset("folder", root)


@pytest.mark.parametrize("place", ["train", "test/bee", "train/bee/more"])
def test_an_unreadable_folder_is_named(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a folder that the system refuses to list, since permissions do not bind a superuser."""
    root = write_class_folders(tmp_path)
    (root / "train/bee/more").mkdir()
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if Path(folder) == root / place:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"{place}' cannot be read \(Permission denied\)"):
        load_dataset("folder", root)


def test_the_order_of_nested_folders_is_fixed(tmp_path: Path) -> None:
    """Files before folders, each by name; an image's place in this order draws its augmentation."""
    root = write_class_folders(tmp_path, classes=["ant"], train_per_class=1, test_per_class=1)
    names = ["0.png", "a/0.png", "a/9.png", "a/b/0.png", "a-b/0.png", "z.png"]
    for name in names[1:]:
        (root / "train/ant" / name).parent.mkdir(exist_ok=True)
        (root / "train/ant" / name).write_bytes(b"")
    found = [path.relative_to(root / "train/ant").as_posix() for path in load_dataset("folder", root).train.images]
    assert found == ["0.png", "z.png", "a/0.png", "a/9.png", "a/b/0.png", "a-b/0.png"]


@pytest.mark.parametrize("name, subfolder, advice", [
    ("imagenetr", "imagenet-r", "LAMDA-PILOT"), ("imageneta", "imagenet-a", "imagenet-a/train"), ("cub", "cub", "LAMDA-PILOT"),
    ("domainnet", "domainnet", "<domain>_train.txt")])
def test_missing_data_says_what_where_and_how(tmp_path: Path, name: str, subfolder: str, advice: str) -> None:
    with pytest.raises(UserError) as error:
        load_dataset(name, tmp_path)
    for part in (f"neither '{tmp_path / subfolder / 'train'}' nor '{tmp_path / 'train'}' is there; get the ", advice):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
