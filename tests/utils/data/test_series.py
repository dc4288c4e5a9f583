"""Streams of several data sets: their order, their images, and that each is read as it would be alone."""

import json
from pathlib import Path

import pytest
import torch

from tests.data_files import epoch, manager, tensor_dataset, views, write_cifar10, write_class_folders, write_idx, write_svhn
from tests.helpers import tiny_config
from trainer import run
from utils.config import config_from_dict
from utils.data import Dataset, load_datasets
from utils.data.readers import View
from utils.data_manager import DataManager, JoinedStream, task_sizes
from utils.errors import UserError


def sets(folders: Dataset) -> list[Dataset]:
    """Six classes of 12 x 12 pixels held as tensors, then four classes of files."""
    return [tensor_dataset(), folders]


def test_each_set_comes_in_its_own_order_in_its_own_tasks(folders: Dataset) -> None:
    data = manager(sets(folders), increment=4)
    alone = [manager(each).class_order for each in sets(folders)]
    assert data.class_order == [*alone[0], *(6 + label for label in alone[1])]
    assert data.task_sizes == [2, 4, 4]
    assert data.class_names[:2] == [f"tensors/class{label}" for label in alone[0][:2]]
    assert data.class_names[6:] == [f"folder/{folders.classes[label]}" for label in alone[1]]


@pytest.mark.parametrize("placement", ["memory", "lazy"])
def test_images_are_those_of_each_set_alone(folders: Dataset, placement: str) -> None:
    data = manager(sets(folders), placement=placement)
    for first_task, first_class, dataset in ((0, 0, tensor_dataset()), (3, 6, folders)):
        alone = manager(dataset, placement=placement)
        for task in range(alone.nb_tasks):
            mine, theirs = (views(each, "test", classes) for each, classes in (
                (data, data.task_classes(first_task + task)), (alone, alone.task_classes(task))))
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1] - first_class, theirs[1])
            assert data.train_size(first_task + task) == alone.train_size(task)


def test_a_training_image_is_augmented_as_its_own_set_says(folders: Dataset) -> None:
    data = manager(sets(folders))
    images, labels = epoch(data, task=3)
    index, own = data._shuffled(3, 0)
    source = manager(folders)._sources["train"]
    expected = torch.cat(list(source.train(index - 48, View(1993, 3, 0), 4)))
    assert torch.equal(images, expected) and labels.tolist() == own.tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_batches_that_mix_sets_keep_their_order(folders: Dataset, batch_size: int) -> None:
    """As joint training and the evaluation of all seen classes ask for them."""
    data = manager(sets(folders))
    joined = JoinedStream(data)
    images, labels = epoch(joined, batch_size=batch_size)
    single, _ = epoch(joined, batch_size=1)
    assert torch.equal(images, single) and len(labels) == 48 + 20
    everything = range(10)
    assert torch.equal(views(data, "test", everything, batch_size)[0],
                       torch.cat([views(data, "test", range(label, label + 1))[0] for label in everything]))


def test_held_out_images_come_from_every_set(folders: Dataset) -> None:
    data = manager(sets(folders), val_fraction=0.25)
    assert [len(data._members["val"][label]) for label in range(10)] == [2] * 6 + [1] * 4


def test_the_split_of_a_set_in_a_list_of_one_is_that_of_the_set() -> None:
    assert manager([tensor_dataset()]).split_record() == manager(tensor_dataset()).split_record()


def test_the_record_names_every_set(folders: Dataset) -> None:
    record = manager(sets(folders)).split_record()
    assert record["dataset"] == ["tensors", "folder"] and record["tasks"][3]["classes"] == record["class_order"][6:8]
    assert record["images"]["test"] == [manager(each).split_record()["images"]["test"] for each in sets(folders)]


def test_files_that_cannot_be_decoded_are_left_out_of_their_own_set(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path, train_per_class=3)
    (root / "train" / "bee" / "1.png").write_bytes(b"damaged")
    data = manager([tensor_dataset(), *load_datasets("folder", root)], bad_images="skip", shuffle=False)
    assert data.bad_images == [str(root / "train" / "bee" / "1.png")]
    assert [data.train_size(task) for task in range(data.nb_tasks)] == [16, 16, 16, 5, 6]


@pytest.mark.parametrize("classes, init_cls, increment, sizes", [
    ([10, 10], 10, 10, [10, 10]), ([10, 7], 2, 4, [2, 4, 4, 4, 3]), ([5, 3, 9], 3, 5, [3, 2, 3, 5, 4]),
    ([4, 20], 4, 30, [4, 20]),
])
def test_the_last_task_of_every_set_takes_what_is_left(classes, init_cls, increment, sizes) -> None:
    assert task_sizes(classes, init_cls, increment, None) == sizes
    assert task_sizes(classes, init_cls, increment, 2) == sizes[:2]


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="increment: 4 and 7 classes with .* increment 2 leave task 5 a single class"):
        task_sizes([4, 7], 2, 2, None)
    with pytest.raises(UserError, match="init_cls: 6 is more than the 4 classes"):
        task_sizes([4, 7], 6, 2, None)
    with pytest.raises(UserError, match="4 and 6 classes .* make 5 tasks, not 6"):
        task_sizes([4, 6], 2, 2, 6)


BASE = {"init_cls": 2, "model_name": "sdlora"}


def test_a_list_of_one_is_its_name() -> None:
    assert config_from_dict({**BASE, "dataset": ["digits"]}).dataset == "digits"


@pytest.mark.parametrize("dataset", [[], ["digits", "digits"], ["digits", 3], [""], 3, ["digits", ["glyphs"]]])
def test_what_is_no_list_of_names_is_refused(dataset: object) -> None:
    with pytest.raises(UserError, match="'dataset' is .*; it must be a name, or a list of different names"):
        config_from_dict({**BASE, "dataset": dataset})


def test_task_domains_are_for_one_set() -> None:
    with pytest.raises(UserError, match="'task_domains' shows one data set .* 'dataset' names several"):
        config_from_dict({**BASE, "dataset": ["digits", "glyphs"], "task_domains": ["plain"]})


def test_an_unknown_name_comes_before_any_reading(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dataset: 'glyph' is not known.*Did you mean 'glyphs'"):
        load_datasets(["folder", "glyph"], tmp_path)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of exps/five_datasets.json, few images in each."""
    root = tmp_path_factory.mktemp("five")
    write_cifar10(root)
    write_idx(root / "MNIST" / "raw", packed=False)
    write_idx(root / "FashionMNIST" / "raw")
    write_svhn(root / "svhn")
    write_class_folders(root / "notmnist", classes="ABCDEFGHIJ", size=(28, 28))
    return root


def test_five_datasets_are_learned_from_their_own_files(five: Path, tmp_path: Path) -> None:
    names = ["cifar10", "mnist", "svhn", "notmnist", "fashion_mnist"]
    config = tiny_config(tmp_path, dataset=names, data_path=str(five), init_cls=10, increment=10, nb_tasks=None, eval_every=0)
    result, = run(config)
    assert [task["classes"] for task in result["tasks"]] == [10] * 5
    assert [sum(task["counts"]["images"]) for task in result["tasks"]] == [10, 30, 50, 70, 90]
    names_of_classes = json.loads((tmp_path / "split.json").read_text())["class_names"]
    assert [name.split("/")[0] for name in names_of_classes[::10]] == names


def test_sets_differ_in_size_and_test_transform(five: Path) -> None:
    datasets = load_datasets(["cifar10", "mnist", "notmnist"], five)
    data = DataManager(datasets, init_cls=10, increment=10, seed=0, image_size=16)
    assert datasets[0].augmentation.test_resize != datasets[1].augmentation.test_resize
    assert views(data, "test", range(30), 7)[0].shape == (10 + 20 + 20, 3, 16, 16)
