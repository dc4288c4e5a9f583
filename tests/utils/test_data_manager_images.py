"""utils/data_manager.py: where images are kept, what is done about bad ones, the record of a split, parts of a batch."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data_files import epoch, manager, tensor_dataset, views, write_cifar100, write_class_folders, write_domainnet
from utils.data import Dataset, load_dataset
from utils.data.readers import PathReader
from utils.data.sources import DecodedSource, FileSource, TestView
from utils.data_manager import DataManager
from utils.errors import UserError

slow = pytest.mark.slow  # starts workers


def test_auto_keeps_files_in_memory_only_if_they_fit(folders: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    read = PathReader.read
    monkeypatch.setattr(PathReader, "read", lambda self, image: opened.append(image) or read(self, image))
    total = sum(np.prod(read(PathReader(folders.train.images), i).shape) for i in range(20))
    needed = int(total) + 8 * 3 * 16 * 16
    for free, decoded in ((4 * needed, 20), (4 * needed - 4, 2 * 10)):
        opened.clear()
        monkeypatch.setattr("utils.data_manager.free_memory", lambda free=free: free)
        data = manager(folders, placement="auto")
        for number in range(2):
            epoch(data, 0, number)
        assert len(opened) == decoded
        assert type(data._sources["train"]) is (DecodedSource if free == 4 * needed else FileSource)


@pytest.mark.parametrize("placement, on_gpu, in_main, home", [
    ("auto", 400, 0, "cuda"), ("memory", 400, 0, "cuda"), ("auto", 399, 400, "cpu"), ("memory", 399, 0, "cpu"),
    ("auto", 399, 399, None), ("lazy", 400, 400, None)])
def test_images_are_kept_on_the_device_if_they_fit(
    placement: str, on_gpu: int, in_main: int, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of what is free may be taken: of the device's memory first, then of the main memory."""
    data = manager(tensor_dataset(), placement=placement)
    data.device = torch.device("cuda")  # the choice alone; nothing is put there
    monkeypatch.setattr("utils.data_manager.free_memory", lambda device=torch.device("cpu"):  # noqa: B008
                        on_gpu if device.type == "cuda" else in_main)
    assert data._home(100) == (None if home is None else torch.device(home))


def test_memory_holds_the_stream_and_no_more(folders: Dataset) -> None:
    data = manager(folders, placement="memory", nb_tasks=1)
    epoch(data)
    views(data, "test", range(2))
    assert len(data._sources["train"]._reader.shapes) == 10
    assert data._sources["test"]._views.shape == (4, 3, 16, 16)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _no_image(path: Path) -> None:
    path.write_text("hello")


@pytest.mark.parametrize("damage", [_truncate, _no_image, Path.unlink])
@pytest.mark.parametrize(("placement", "num_workers"), [
    ("lazy", 0), ("memory", 0), pytest.param("lazy", 1, marks=slow)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_undecodable_image_is_named_when_met(
    tmp_path: Path, damage: object, placement: str, num_workers: int, split: str
) -> None:
    dataset = load_dataset("folder", write_class_folders(tmp_path, suffix=".jpg"))
    path = getattr(dataset, split).images[-1]
    damage(path)
    data = manager(dataset, shuffle=False, placement=placement, num_workers=num_workers)
    with pytest.raises(UserError, match=f"^data_path: the image '{path}' (cannot be decoded|is not there)") as error:
        epoch(data, 1) if split == "train" else views(data, "test", range(4))
    assert "\n" not in str(error.value)


def test_split_record_says_what_was_split(folders: Dataset) -> None:
    data = manager(folders, val_fraction=0.2)
    record = data.split_record()
    assert record["dataset"] == "folder"
    assert record["class_order"] == data.class_order
    assert record["class_names"] == data.class_names
    assert [task["classes"] for task in record["tasks"]] == [data.class_order[:2], data.class_order[2:]]
    assert [task[split]["images"] for task in record["tasks"] for split in ("train", "val", "test")] == [8, 2, 4] * 2
    assert len(record["sha256"]) == 64


def test_split_record_follows_the_split_and_not_the_place(tmp_path: Path) -> None:
    def total(root: Path, **options: object) -> str:
        return manager(load_dataset("folder", root), **options).split_record()["sha256"]

    here, there = write_class_folders(tmp_path / "here"), write_class_folders(tmp_path / "there" / "deeper")
    assert total(here) == total(there)
    assert len({total(here), total(here, seed=1), total(here, val_fraction=0.4), total(here, nb_tasks=1)}) == 4
    image = there / "test" / "cat" / "0.png"
    image.write_bytes(image.read_bytes() + b"x")
    assert total(here) != total(there)


def test_split_record_sees_every_pixel_and_label_of_tensors() -> None:
    def total(dataset: Dataset) -> str:
        return manager(dataset, nb_tasks=1).split_record()["sha256"]

    expected, dataset = total(tensor_dataset()), tensor_dataset()
    assert total(dataset) == expected
    dataset.test.images[-1, 2, -1, -1] ^= 1
    assert total(dataset) != expected
    dataset = tensor_dataset()
    dataset.train.labels[[0, 1]] = dataset.train.labels[[1, 0]]
    assert total(dataset) != expected


def test_real_formats_reach_the_network_size(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    write_domainnet(tmp_path / "domainnet", classes=4)
    write_class_folders(tmp_path / "imagenet-r")
    for name in ("cifar224", "domainnet", "imagenetr"):
        data = manager(load_dataset(name, tmp_path), image_size=224)
        images, labels = next(iter(data.train_batches(1, 0, 3)))
        assert images.shape == (3, 3, 224, 224)
        assert set(labels.tolist()) <= {2, 3}
        images, _ = next(iter(data.eval_batches("test", range(2), 2)))
        assert images.shape == (2, 3, 224, 224)


def test_bad_images_are_left_out_and_listed(tmp_path: Path) -> None:
    write_class_folders(tmp_path, classes=("ant", "bee"), train_per_class=4, test_per_class=2)
    bad = sorted(tmp_path.glob("train/*/*"))[1]
    bad.write_bytes(bad.read_bytes()[:40])
    dataset = load_dataset("folder", tmp_path)
    options = {"init_cls": 2, "increment": 2, "seed": 0, "image_size": 16}
    data = DataManager(dataset, bad_images="skip", **options)
    assert data.bad_images == [str(bad)] and data.train_size(0) == 7
    assert sum(len(labels) for _, labels in data.train_batches(0, 0, 4)) == 7
    with pytest.raises(UserError, match=bad.name):
        list(DataManager(dataset, **options).train_batches(0, 0, 4))


def test_a_class_without_a_usable_image_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path, classes=("ant", "bee"), train_per_class=2, test_per_class=1)
    for path in sorted(tmp_path.glob("train/*/*"))[:2]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image of class"):
        DataManager(load_dataset("folder", tmp_path), init_cls=2, increment=2, seed=0, image_size=16, bad_images="skip")


@pytest.mark.parametrize("parts, batch_size", [(2, 5), (3, 7), (4, 4)])
def test_parts_share_every_batch(parts: int, batch_size: int) -> None:
    """Of 16 images: batches of 5, 5, 5, 1 in two parts; 7, 7, 2 in three; 4 times 4 in four."""
    whole = list(manager(tensor_dataset()).train_batches(0, 1, batch_size))
    shared = [list(manager(tensor_dataset()).train_batches(0, 1, batch_size, part=(k, parts))) for k in range(parts)]
    for number, (images, labels) in enumerate(whole):
        sizes = [len(share[number][1]) for share in shared]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
        assert torch.equal(torch.cat([share[number][0] for share in shared]), images)
        assert torch.equal(torch.cat([share[number][1] for share in shared]), labels)
        assert len(images) == manager(tensor_dataset()).images_in_batch(0, number, batch_size)
    assert {len(share) for share in shared} == {len(whole)}
    later = [labels for _, labels in manager(tensor_dataset()).train_batches(0, 1, batch_size, skip=1, part=(1, parts))]
    assert all(torch.equal(a, b) for a, b in zip(later, [labels for _, labels in shared[1][1:]], strict=True))


def test_parts_of_an_evaluation_hold_every_image_once(folders: Dataset) -> None:
    for dataset, classes in ((folders, range(4)), (tensor_dataset(), range(3))):
        images, labels = views(manager(dataset), "test", classes)
        parts = [list(manager(dataset).eval_batches("test", classes, 4, (k, 5))) for k in range(5)]
        shared = [pair for number in range(len(parts[0])) for pair in (part[number] for part in parts)]
        assert torch.equal(torch.cat([i for i, _ in shared]), images)
        assert torch.equal(torch.cat([n for _, n in shared]), labels)


def test_a_part_may_be_empty_altogether() -> None:
    batches = list(manager(tensor_dataset()).eval_batches("val", range(2), 4, (0, 2)))
    assert batches == []
    (images, labels), = manager(tensor_dataset()).eval_batches("test", range(1), 4, (3, 4))
    assert images.shape == (0, 3, 16, 16) and labels.shape == (0,)


@pytest.mark.parametrize("kind", ["tensors", "files"])
def test_the_view_that_a_record_keeps_is_that_of_the_evaluation(kind: str, folders: Dataset) -> None:
    """To the bit, by way of JSON, for images of any size."""
    data = manager(tensor_dataset(6) if kind == "tensors" else folders, mean_std=((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    view = TestView(**json.loads(json.dumps(asdict(data.test_view()))))
    images, _ = views(data, "test", data.task_classes(0))
    test = data.series.parts[0].test
    stored, labels = test.images, test.labels
    chosen = [image for label in data.task_classes(0) for image in np.flatnonzero(labels == data.class_order[label])]
    raw = [stored[image] if kind == "tensors" else PathReader(stored).read(int(image)) for image in chosen]
    assert torch.equal(torch.stack([view(image) for image in raw]), images)
