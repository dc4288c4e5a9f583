"""utils/data/portions.py: how many of a class's images a stream learns from and is tested on, and which."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data_files import epoch, manager, tensor_dataset, views, write_class_folders
from utils.data import Dataset, load_dataset
from utils.data_manager import DataManager
from utils.errors import UserError

DOMAINS = {"scenario": "domain", "init_cls": 3, "increment": 3, "task_domains": ["plain", "negative"]}


def few(count: int | None, dataset: Dataset | None = None, **options) -> DataManager:
    return manager(dataset or tensor_dataset(), images_per_class=count, **options)


def chosen(data: DataManager, split: str = "train") -> list[set[int]]:
    """The images of every class of the stream, or of every cell."""
    return [set(images.tolist()) for images in data._members[split]]


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.25}, DOMAINS])
def test_so_many_of_every_class_and_all_test_images(options: dict) -> None:
    whole, data = few(None, **options), few(4, **options)
    cells = sum(len(data.task_cells(task)) for task in range(data.nb_tasks))
    held_out = 1 if "val_fraction" in options else 0
    assert [len(images) for images in chosen(data)] == [4 - held_out] * cells
    assert [len(images) for images in chosen(data, "val")] == [held_out] * cells
    for task in range(data.nb_tasks):
        assert torch.equal(views(data, "test", data.task_cells(task))[0], views(whole, "test", whole.task_cells(task))[0])
    if "scenario" not in options:  # else a task's images are copies, numbered by themselves
        everything = [train | val for train, val in zip(chosen(whole), chosen(whole, "val"))]
        assert all(train | val < both for train, val, both in zip(chosen(data), chosen(data, "val"), everything, strict=True))


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.25}, DOMAINS])
def test_so_many_test_images_of_every_class_and_all_to_learn_from(options: dict) -> None:
    whole, data = few(None, **options), few(None, test_images_per_class=1, **options)
    assert [chosen(data, split) for split in ("train", "val")] == [chosen(whole, split) for split in ("train", "val")]
    assert [len(images) for images in chosen(data, "test")] == [1] * len(chosen(data))
    if "scenario" not in options:
        assert all(one < other for one, other in zip(chosen(data, "test"), chosen(whole, "test"), strict=True))


def test_fewer_images_are_among_more() -> None:
    sizes = [chosen(few(count)) for count in (1, 3, 7, 8)]
    for smaller, larger in zip(sizes, sizes[1:]):
        assert all(one < other for one, other in zip(smaller, larger, strict=True))
    places = {tuple(sorted(image // 6 for image in images)) for images in sizes[1]}
    assert len(places) > 1, "not the same places of every class"


@pytest.mark.parametrize("count", [8, 1000])
def test_a_class_with_no_more_gives_all(count: int) -> None:
    whole, data = few(None), few(count)
    assert chosen(data) == chosen(whole)
    assert torch.equal(epoch(data, 1)[0], epoch(whole, 1)[0])


def test_the_seed_draws_them_and_nothing_else() -> None:
    by_class = [dict(zip(data.class_order, chosen(data))) for data in (
        few(3), few(3, order_seed=7), few(3, init_cls=4), few(3, nb_tasks=2), few(3, seed=7, order_seed=7))]
    assert by_class[0] == by_class[1] == by_class[2] and by_class[3].items() <= by_class[0].items()
    assert by_class[4] != by_class[0]


def test_batches_and_processes_do_not_move_them() -> None:
    data = few(3)
    images, labels = epoch(data, 1, batch_size=6)
    assert len(labels) == 6 and np.bincount(labels.numpy()).tolist() == [0, 0, 3, 3]
    shares = [list(data.train_batches(1, 0, 4, part=(number, 2))) for number in range(2)]
    together = torch.cat([share[0] for batch in zip(*shares) for share in batch])
    assert torch.equal(together, images)


def test_classes_that_come_back_have_so_many_in_every_domain(tmp_path: Path) -> None:
    for domain in ("photo", "drawing"):
        write_class_folders(tmp_path / domain, train_per_class=5, test_per_class=1)
    data = few(2, load_dataset("domain_folders", tmp_path), scenario="domain", init_cls=4, increment=4)
    paths = data.series.parts[0].train.images
    for task, domain in enumerate(data.task_domains):
        index, _ = data._gather("train", data.task_cells(task))
        assert [paths[image].is_relative_to(tmp_path / domain) for image in index] == [True] * 8
    places = [[paths[image].name for image in images] for images in chosen(data)]
    assert places[:4] != places[4:], "drawn anew"


def test_the_record_tells_streams_apart() -> None:
    records = [few(count).split_record() for count in (None, 3, 1000)]
    assert [record.get("images_per_class") for record in records] == [None, 3, 1000]
    assert "images_per_class" not in records[0], "older sums stay what they are"
    assert len({record["sha256"] for record in records}) == 3
    assert [task["train"]["images"] for task in records[1]["tasks"]] == [6] * 3


def test_a_single_image_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"^val_fraction: class 'class\d' has 1 training image, .* raise 'images_per_class'"):
        few(1, val_fraction=0.1)
