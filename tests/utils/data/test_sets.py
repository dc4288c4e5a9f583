"""Reading data sets in the formats they are distributed in, and refusing damaged ones."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

import utils.data.cifar
from tests.data_files import (
    class_pixels,
    pack_cifar,
    write_cifar10,
    write_cifar100,
    write_class_folders,
    write_domainnet,
)
from utils.data import DATASETS, load_dataset
from utils.errors import UserError


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No test reaches the network; the addresses that were asked for are listed."""
    asked = []

    def refuse(url: str, *_args: object, **_kwargs: object) -> None:
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(utils.data.cifar.downloads, "download_and_extract_archive", refuse)
    return asked


def test_cifar100_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, train_per_class=2)
    dataset = load_dataset("cifar224", tmp_path)
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for split, train in ((dataset.train, True), (dataset.test, False)):
        reference = CIFAR100(tmp_path, train=train)
        assert split.images.shape == (100 * (2 if train else 1), 3, 32, 32)
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), reference.data)
        assert split.labels.tolist() == reference.targets
        assert split.labels.dtype == np.int64
    assert dataset.classes == reference.classes


def test_cifar10_joins_its_five_files(tmp_path: Path) -> None:
    write_cifar10(tmp_path, train_per_class=5)
    dataset = load_dataset("cifar10_224", tmp_path)
    assert np.bincount(dataset.train.labels).tolist() == [5] * 10
    assert dataset.classes[3] == "thing3"
    row = np.flatnonzero(dataset.train.labels == 7)[0]
    expected = {class_pixels(7, number, 32, 32).tobytes() for number in range(5)}
    assert dataset.train.images[row].permute(1, 2, 0).numpy().tobytes() in expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_files_of_any_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    content = pickle.loads((folder / "train").read_bytes())
    (folder / "train").write_bytes(pickle.dumps(content, protocol=protocol))
    dataset = load_dataset("cifar224", tmp_path)
    assert np.array_equal(dataset.train.images.reshape(4, -1).numpy(), content["data"])


def test_cifar_data_path_may_be_the_folder_itself(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    assert load_dataset("cifar224", folder).classes == ["kind0", "kind1"]


def test_cifar_archive_is_extracted(tmp_path: Path, offline: list[str]) -> None:
    archive = pack_cifar(write_cifar100(tmp_path, classes=3), CIFAR100)
    assert len(load_dataset("cifar224", tmp_path).classes) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CIFAR100.base_folder, archive.name])
    assert offline == []


def test_cifar_missing_and_offline(tmp_path: Path, offline: list[str]) -> None:
    place = tmp_path / "data"
    with pytest.raises(UserError) as error:
        load_dataset("cifar224", place)
    for part in (
        str(place / CIFAR100.base_folder),
        str(place / CIFAR100.filename),
        "no network",
        CIFAR100.url,
    ):
        assert part in str(error.value)
    assert offline == [CIFAR100.url]
    assert list(place.iterdir()) == []


def test_cifar_download_lands_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, folder: str, filename: str, md5: str) -> None:
        assert (url, filename, md5) == (CIFAR10.url, CIFAR10.filename, CIFAR10.tgz_md5)
        write_cifar10(Path(folder))

    monkeypatch.setattr(utils.data.cifar.downloads, "download_and_extract_archive", fetch)
    assert len(load_dataset("cifar10_224", tmp_path).classes) == 10
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.base_folder]


@pytest.mark.parametrize("name", ["cifar-100-python/../../outside", "/outside", "cifar-100-python/link"])
def test_cifar_archive_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    place = tmp_path / "data"
    place.mkdir()
    with tarfile.open(place / CIFAR100.filename, "w:gz") as out:
        member = tarfile.TarInfo(name)
        if name.endswith("link"):
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        else:
            member.size = 3
        out.addfile(member, io.BytesIO(b"bad"))
    with pytest.raises(UserError, match=f"'{name}'"):
        load_dataset("cifar224", place)
    assert not (tmp_path / "outside").exists()
    assert [path.name for path in place.iterdir()] == [CIFAR100.filename]


def test_cifar_truncated_archive_names_it(tmp_path: Path) -> None:
    archive = pack_cifar(write_cifar100(tmp_path, classes=3), CIFAR100)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(UserError, match=CIFAR100.filename):
        load_dataset("cifar224", tmp_path)
    assert not (tmp_path / CIFAR100.base_folder).exists()


class _Intruder:
    """Pickles into a call of `print`."""

    def __reduce__(self) -> tuple:
        return print, ("unpickled",)


def _cifar_content(**changes: object) -> bytes:
    content = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1], **changes}
    return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (_cifar_content()[:3000], "train"),
        (b"", "train"),
        (_cifar_content(data=_Intruder()), "print"),
        (pickle.dumps([1, 2]), "list"),
        (_cifar_content(data=np.zeros((2, 3000), np.uint8)), "3072"),
        (_cifar_content(data=np.zeros((2, 3072))), "3072"),
        (_cifar_content(fine_labels=[0]), "2 images but 1 labels"),
        (_cifar_content(fine_labels=[0, 2]), "below 2"),
        (_cifar_content(fine_labels=["a", "b"]), "below 2"),
    ],
)
def test_cifar_damaged_file_names_it(
    tmp_path: Path, content: bytes, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    (folder / "train").write_bytes(content)
    with pytest.raises(UserError, match=why) as error:
        load_dataset("cifar224", tmp_path)
    assert str(folder / "train") in str(error.value)
    assert capsys.readouterr().out == ""


def test_cifar_missing_file_and_names(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": []}))
    with pytest.raises(UserError, match="meta"):
        load_dataset("cifar224", tmp_path)
    (folder / "meta").unlink()
    with pytest.raises(UserError, match=r"meta.*No such file"):
        load_dataset("cifar224", tmp_path)


def test_cifar_class_without_images(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    (folder / "train").write_bytes(_cifar_content(fine_labels=[1, 1]))
    with pytest.raises(UserError, match=r"'kind0'.*no training image"):
        load_dataset("cifar224", tmp_path)


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


def _remove_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: _remove_tree(root / "test"), "no folder 'test'"),
        (lambda root: _remove_tree(root / "train"), "no folder 'train'"),
        (lambda root: _remove_tree(root / "test" / "bee"), "class 'bee' is in '.*train' but not in '.*test'"),
        (
            lambda root: _remove_tree(root / "train" / "bee"),
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
        (lambda root: [_remove_tree(path) for path in (root / "train").iterdir()], "holds no class folders"),
        (_remove_tree, "train' is not there; put your images"),
    ],
)
def test_folder_damaged(tmp_path: Path, damage: object, message: str) -> None:
    root = write_class_folders(tmp_path / "mine")
    damage(root)
    with pytest.raises(UserError, match=message):
        load_dataset("folder", root)


def test_unreadable_folder_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_class_folders(tmp_path)
    scandir = utils.data.folder.os.scandir

    def refuse(folder: Path) -> object:
        if folder == root / "train" / "bee":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(utils.data.folder.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"train/bee' cannot be read \(Permission denied\)"):
        load_dataset("folder", root)


@pytest.mark.parametrize("name", ["imagenetr", "imageneta", "cub", "domainnet"])
def test_missing_data_says_what_where_and_how(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as error:
        load_dataset(name, tmp_path)
    subfolder = {"imagenetr": "imagenet-r", "imageneta": "imagenet-a"}.get(name, name)
    assert str(tmp_path / subfolder / "train") in str(error.value)
    assert str(tmp_path / "train") in str(error.value)
    assert "get the" in str(error.value)


@pytest.mark.parametrize(("name", "classes"), [("digits", 10), ("glyphs", 100)])
def test_bundled_sets_need_no_files(tmp_path: Path, name: str, classes: int) -> None:
    dataset = load_dataset(name, tmp_path / "nowhere")
    assert len(dataset.classes) == classes
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.images.shape[1:] == (3, 32, 32)
    assert not dataset.augmentation.flip


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'cifar224'") as error:
        load_dataset("cifar244", tmp_path)
    assert all(name in str(error.value) for name in DATASETS)
