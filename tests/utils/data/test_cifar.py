"""CIFAR in the files that torchvision keeps: read, fetched, unpacked, and refused when damaged or hostile."""

import io
import pickle
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from threading import Timer

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

import utils.data.download
from tests.data_files import class_pixels, pack_cifar, write_cifar10, write_cifar100
from utils.data import load_dataset
from utils.errors import UserError


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """No test reaches the network: the archives' address is this socket, which refuses connections until it listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("no_proxy", "*")
        for source in (CIFAR10, CIFAR100):
            monkeypatch.setattr(source, "url", f"http://127.0.0.1:{server.getsockname()[1]}/{source.filename}")
        yield server


@pytest.mark.parametrize("name", ["cifar224", "cifar100"])
def test_cifar100_is_read_as_torchvision_reads_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, train_per_class=2)
    dataset = load_dataset(name, tmp_path)
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
def test_files_of_any_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    content = pickle.loads((folder / "train").read_bytes())
    (folder / "train").write_bytes(pickle.dumps(content, protocol=protocol))
    dataset = load_dataset("cifar224", tmp_path)
    assert np.array_equal(dataset.train.images.reshape(4, -1).numpy(), content["data"])


def test_data_path_may_be_the_folder_itself(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    assert load_dataset("cifar224", folder).classes == ["kind0", "kind1"]


def test_an_archive_is_extracted(tmp_path: Path) -> None:
    archive = pack_cifar(write_cifar100(tmp_path, classes=3), CIFAR100)
    assert len(load_dataset("cifar224", tmp_path).classes) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CIFAR100.base_folder, archive.name])


def test_missing_without_a_network(tmp_path: Path) -> None:
    place = tmp_path / "data"
    with pytest.raises(UserError) as error:
        load_dataset("cifar224", place)
    for part in (place / CIFAR100.base_folder, place / CIFAR100.filename, "download failed", CIFAR100.url):
        assert str(part) in str(error.value)
    assert "\n" not in str(error.value)
    assert list(place.iterdir()) == []


def test_a_silent_network_is_given_up(tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing; closed after a minute, so that waiting without end fails here, too."""
    monkeypatch.setattr(utils.data.download, "_TIMEOUT", 0.05)
    server.listen()
    closing = Timer(60, server.close)
    closing.start()
    with pytest.raises(UserError, match="download failed .*timed out"):
        load_dataset("cifar224", tmp_path)
    closing.cancel()
    assert socket.getdefaulttimeout() is None
    assert list(tmp_path.iterdir()) == []


def test_a_download_lands_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, folder: str, filename: str, md5: str) -> None:
        assert (url, filename, md5) == (CIFAR10.url, CIFAR10.filename, CIFAR10.tgz_md5)
        pack_cifar(write_cifar10(Path(folder)), CIFAR10)

    monkeypatch.setattr(utils.data.download.downloads, "download_url", fetch)
    assert len(load_dataset("cifar10_224", tmp_path).classes) == 10
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.base_folder]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=f"data_path: '{tmp_path / 'file' / 'data'}' cannot be written"):
        load_dataset("cifar224", tmp_path / "file" / "data")


@pytest.mark.parametrize("name, kind", [
    ("cifar-100-python/../../outside", tarfile.REGTYPE), ("/outside", tarfile.REGTYPE),
    ("cifar-100-python/soft", tarfile.SYMTYPE), ("cifar-100-python/hard", tarfile.LNKTYPE),
    ("cifar-100-python/pipe", tarfile.FIFOTYPE),
])
def test_a_hostile_archive_is_refused_whole(tmp_path: Path, name: str, kind: bytes) -> None:
    folder = write_cifar100(tmp_path / "data", classes=3)
    with tarfile.open(tmp_path / "data" / CIFAR100.filename, "w:gz") as out:
        out.add(folder, arcname=folder.name)
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "" if kind == tarfile.REGTYPE else "/etc/passwd"
        member.size = 3 if kind == tarfile.REGTYPE else 0
        out.addfile(member, io.BytesIO(b"bad"))
    rmtree(folder)
    with pytest.raises(UserError, match=f"'{name}'") as error:
        load_dataset("cifar224", tmp_path / "data")
    assert "\n" not in str(error.value) and not (tmp_path / "outside").exists()
    assert [path.name for path in (tmp_path / "data").iterdir()] == [CIFAR100.filename]


@pytest.mark.parametrize("damage", [
    lambda content: content[:2000], lambda content: content[:2000] + bytes(100) + content[2100:], lambda content: b"text",
], ids=["truncated", "overwritten", "another file"])
def test_a_damaged_archive_names_itself_and_leaves_nothing(tmp_path: Path, damage) -> None:
    archive = pack_cifar(write_cifar100(tmp_path, classes=3), CIFAR100)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(UserError, match=f"'{archive}' cannot be extracted") as error:
        load_dataset("cifar224", tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_an_archive_of_something_else_is_named(tmp_path: Path) -> None:
    archive = pack_cifar(write_cifar10(tmp_path), CIFAR10)
    archive.rename(tmp_path / CIFAR100.filename)
    with pytest.raises(UserError, match=f"holds no folder '{CIFAR100.base_folder}'"):
        load_dataset("cifar224", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR100.filename]


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
def test_a_damaged_file_is_named(
    tmp_path: Path, content: bytes, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    (folder / "train").write_bytes(content)
    with pytest.raises(UserError, match=why) as error:
        load_dataset("cifar224", tmp_path)
    assert str(folder / "train") in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_missing_file_and_missing_names(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": []}))
    with pytest.raises(UserError, match="meta"):
        load_dataset("cifar224", tmp_path)
    (folder / "meta").unlink()
    with pytest.raises(UserError, match=r"meta.*No such file"):
        load_dataset("cifar224", tmp_path)


def test_a_class_without_images(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path, classes=2)
    (folder / "train").write_bytes(_cifar_content(fine_labels=[1, 1]))
    with pytest.raises(UserError, match=r"'kind0'.*no training image"):
        load_dataset("cifar224", tmp_path)
