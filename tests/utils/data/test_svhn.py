"""SVHN in the files that torchvision keeps: read, looked for, fetched, and refused when damaged."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import SVHN

import utils.data.download
from tests.data_files import write_svhn
from utils.data import load_dataset
from utils.errors import UserError


@pytest.fixture(autouse=True)
def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches the network."""
    def fail(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(utils.data.download.downloads, "download_url", fail)


@pytest.mark.parametrize("place", [".", "svhn"])
def test_it_is_read_as_torchvision_reads_it(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_svhn(tmp_path / place)
    dataset = load_dataset("svhn", tmp_path)
    monkeypatch.setattr(SVHN, "_check_integrity", lambda _: True)
    for split, name in ((dataset.train, "train"), (dataset.test, "test")):
        reference = SVHN(folder, split=name)
        assert np.array_equal(split.images.numpy(), reference.data) and split.labels.tolist() == reference.labels.tolist()
        assert split.images.is_contiguous() and split.labels.dtype == np.int64
    assert dataset.classes == list("0123456789")


def test_missing_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_dataset("svhn", tmp_path / "data")
    for part in (tmp_path / "data" / "svhn" / "train_32x32.mat", "no network", SVHN.split_list["train"][0]):
        assert str(part) in str(error.value)
    assert "\n" not in str(error.value) and list((tmp_path / "data" / "svhn").iterdir()) == []


def test_a_download_lands_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = write_svhn(tmp_path / "source"), []

    def fetch(url: str, folder: str, name: str, md5: str) -> None:
        asked.append([url, name, md5])
        Path(folder, name).write_bytes((source / name).read_bytes())

    monkeypatch.setattr(utils.data.download.downloads, "download_url", fetch)
    assert len(load_dataset("svhn", tmp_path / "data").train.labels) == 30
    assert asked == [SVHN.split_list["train"], SVHN.split_list["test"]]


@pytest.mark.parametrize("content, why", [
    (None, "no intact SVHN file"), ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "under 'y'"),
    ({"y": np.ones((2, 1))}, "under 'X'"),
    ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [11]])}, "from 1 to 10"),
    ({"X": np.zeros((2, 32, 32, 3), np.uint8), "y": np.ones((3, 1))}, "under 'X'"),
])
def test_a_damaged_file_is_named(tmp_path: Path, content: dict | None, why: str) -> None:
    path = write_svhn(tmp_path) / "test_32x32.mat"
    path.write_bytes(b"no file of MATLAB") if content is None else savemat(path, content)
    with pytest.raises(UserError, match=why) as error:
        load_dataset("svhn", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
