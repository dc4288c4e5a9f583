"""Fashion-MNIST in the files that torchvision and Debian keep: read packed and not, looked for, fetched, and refused when
damaged."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import FashionMNIST

import utils.data.download
import utils.data.sets
from tests.data_files import write_idx
from utils.data import load_dataset
from utils.errors import UserError

RAW = Path("FashionMNIST/raw")


@pytest.fixture(autouse=True)
def cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches the network or what the machine has installed."""
    def fail(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(utils.data.download.downloads, "download_url", fail)
    monkeypatch.setattr(utils.data.sets, "_DEBIAN_FASHION", tmp_path / "installed")


def test_it_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    write_idx(tmp_path / RAW, packed=False)
    dataset = load_dataset("fashion_mnist", tmp_path)
    for split, train in ((dataset.train, True), (dataset.test, False)):
        reference = FashionMNIST(tmp_path, train=train)
        assert split.images.shape == (len(reference), 3, 28, 28) and len(reference) == (30 if train else 20)
        assert all(np.array_equal(split.images[:, channel].numpy(), reference.data.numpy()) for channel in range(3))
        assert split.labels.dtype == np.int64 and split.labels.tolist() == reference.targets.tolist()
    assert dataset.classes == reference.classes


@pytest.mark.parametrize("place", [RAW, ".", "installed"])
def test_packed_files_are_found_wherever_they_are_kept(tmp_path: Path, place: str | Path) -> None:
    write_idx(tmp_path / place, packed=True)
    data_path = tmp_path / "none" if place == "installed" else tmp_path
    assert np.bincount(load_dataset("fashion_mnist", data_path).train.labels).tolist() == [3] * 10


def test_what_lies_under_data_path_comes_before_what_is_installed(tmp_path: Path) -> None:
    write_idx(tmp_path / "installed", train_per_class=1)
    write_idx(tmp_path / RAW, train_per_class=2)
    assert len(load_dataset("fashion_mnist", tmp_path).train.labels) == 20


def test_missing_without_a_network_names_the_places_and_the_package(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_dataset("fashion_mnist", tmp_path)
    for part in (tmp_path / RAW, tmp_path / "installed", "no network", "apt-get install dataset-fashion-mnist",
                 FashionMNIST.mirrors[0]):
        assert str(part) in str(error.value)
    assert "\n" not in str(error.value) and list((tmp_path / RAW).iterdir()) == []


def test_a_download_brings_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_idx(tmp_path / "source")
    (kept := write_idx(tmp_path / "data" / RAW) / "t10k-labels-idx1-ubyte.gz").unlink()
    asked = []

    def fetch(url: str, folder: str, name: str, md5: str) -> None:
        asked.append((name, md5))
        Path(folder, name).write_bytes((source / name).read_bytes())

    monkeypatch.setattr(utils.data.download.downloads, "download_url", fetch)
    assert len(load_dataset("fashion_mnist", tmp_path / "data").test.labels) == 20
    assert asked == [FashionMNIST.resources[3]] and kept.is_file() and len(list(kept.parent.iterdir())) == 4


@pytest.mark.parametrize("content, why", [
    (b"", "head"), (b"\0\0\x09\x01\0\0\0\1\0", "head"), (b"\0\0\x08\x01\0\0\0\x63\0", "1 bytes follow"),
    (b"\0\0\x08\x01\0\0\0\1\0", "1 labels for 30 images"),
    (b"\0\0\x08\x01\0\0\0\x1e" + b"\x0a" * 30, "label 10"), (None, "gzip"),
])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = write_idx(tmp_path / RAW) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(b"no gzip" if content is None else gzip.compress(content))
    with pytest.raises(UserError, match=why) as error:
        load_dataset("fashion_mnist", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
