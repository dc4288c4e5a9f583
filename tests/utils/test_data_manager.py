"""utils/data_manager.py: class order, tasks, and batches that depend on nothing but their keys."""


import numpy as np
import pytest
import torch

from tests.data_files import epoch, manager, tensor_dataset, views
from utils.data import Dataset, Split
from utils.data_manager import DataManager, class_order, task_sizes
from utils.errors import UserError

slow = pytest.mark.slow  # starts workers


def test_order_seed_draws_the_class_order_and_nothing_else() -> None:
    plain, apart, other = (manager(tensor_dataset(), seed=seed, order_seed=order, val_fraction=0.25)
                           for seed, order in ((5, None), (5, 6), (6, None)))
    assert apart.class_order == other.class_order != plain.class_order
    first = [data.split_record()["tasks"][0] for data in (apart, other)]
    assert first[0]["classes"] == first[1]["classes"] and first[0]["val"] != first[1]["val"], "held out by the run's own seed"


def test_class_order_is_the_published_one() -> None:
    order = class_order(100, 1993, shuffle=True)
    assert order[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert sorted(order) == list(range(100))
    assert class_order(5, 1993, shuffle=False) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("classes", "init_cls", "increment", "nb_tasks", "sizes"),
    [
        (100, 10, 10, None, [10] * 10),
        (100, 50, 10, None, [50, 10, 10, 10, 10, 10]),
        (10, 4, 3, None, [4, 3, 3]),
        (10, 3, 5, None, [3, 5, 2]),
        (10, 10, 10, None, [10]),
        (345, 69, 69, None, [69] * 5),
        (10, 2, 2, 2, [2, 2]),
        (7, 2, 2, 3, [2, 2, 2]),  # the single class left over is not reached
    ],
)
def test_task_sizes(classes: int, init_cls: int, increment: int, nb_tasks: int | None, sizes: list[int]) -> None:
    assert task_sizes(classes, init_cls, increment, nb_tasks) == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 2, None), "^init_cls: 11 .* 10 classes"),
        ((10, 2, 2, 6), "^nb_tasks: .* make 5 tasks, not 6"),
        ((10, 1, 3, None), "^init_cls: .* task 0 a single class"),
        ((10, 4, 1, None), "^increment: .* task 1 a single class"),
        ((7, 2, 2, None), "^increment: .* task 3 a single class"),
    ],
)
def test_impossible_tasks_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_sizes(*arguments)


def test_impossible_arguments_name_their_key() -> None:
    with pytest.raises(UserError, match=r"^seed"):
        manager(tensor_dataset(), seed=2**32)
    with pytest.raises(UserError, match=r"^data_placement"):
        manager(tensor_dataset(), placement="disk")


def test_stream_of_tasks() -> None:
    dataset = tensor_dataset(classes=7)
    data = manager(dataset, init_cls=3, increment=2)
    assert data.nb_tasks == 3
    assert data.task_sizes == [3, 2, 2]
    assert data.class_order == np.random.RandomState(1993).permutation(7).tolist()
    assert data.class_names == [f"class{label}" for label in data.class_order]
    assert [data.task_classes(task) for task in range(3)] == [range(0, 3), range(3, 5), range(5, 7)]
    assert [data.seen_classes(task) for task in range(3)] == [3, 5, 7]
    assert data.task_of_class.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert data.task_of_class.dtype == np.int64
    assert data.train_size(0) == 24
    assert [data.steps_per_epoch(0, size) for size in (5, 8, 24, 100)] == [5, 3, 1, 1]


def test_labels_are_stream_labels_of_the_right_images() -> None:
    """Images are constant in their class, so that a view of one tells its class."""
    labels = np.repeat(np.arange(120), 2)
    images = torch.from_numpy(labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    names = [str(label) for label in range(120)]
    data = manager(Dataset("big", Split(images, labels), Split(images, labels), names), init_cls=20, increment=50)
    for task in range(3):
        seen, targets = epoch(data, task, batch_size=7)
        natural = (seen.mean((1, 2, 3)) * 255).round().long().tolist()
        assert natural == [data.class_order[label] for label in targets]
        assert sorted(targets.tolist()) == sorted(2 * list(data.task_classes(task)))
    seen, targets = views(data, "test", range(15, 120), batch_size=16)
    natural = (seen.mean((1, 2, 3)) * 255).round().long().tolist()
    assert natural == [data.class_order[label] for label in targets]
    assert targets.tolist() == [label for label in range(15, 120) for _ in range(2)]


def test_stopping_early_changes_nothing_before() -> None:
    dataset = tensor_dataset()
    whole, short = manager(dataset), manager(dataset, nb_tasks=2)
    assert short.nb_tasks == 2
    assert short.class_order == whole.class_order[:4]
    assert len(short.class_names) == len(short.task_of_class) == 4
    assert torch.equal(epoch(short, 1)[0], epoch(whole, 1)[0])


def test_every_image_once_per_epoch_in_a_new_order() -> None:
    data = manager(tensor_dataset(), nb_tasks=1)
    data.series.parts[0].train.images[:] = torch.arange(48, dtype=torch.uint8).view(-1, 1, 1, 1)
    orders = []
    for number in range(2):
        images, _ = epoch(data, number=number, batch_size=5)
        orders.append((images.mean((1, 2, 3)) * 255).round().int().tolist())
        assert sorted(orders[-1]) == sorted(np.flatnonzero(np.isin(data.series.parts[0].train.labels, data.class_order)))
    assert orders[0] != orders[1]


def test_batches_are_shaped_as_asked() -> None:
    data = manager(tensor_dataset())
    batches = list(data.train_batches(1, 0, 6))
    assert [len(images) for images, _ in batches] == [6, 6, 4]
    for images, labels in batches:
        assert images.shape[1:] == (3, 16, 16)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize("placement", ["auto", "memory", "lazy"])
def test_tensor_batches_do_not_depend_on_batch_size_or_placement(placement: str) -> None:
    """I10 for sets held in memory."""
    dataset = tensor_dataset()
    expected = epoch(manager(dataset), 1, 3, batch_size=4)
    for batch_size in (1, 7, 100):
        images, labels = epoch(manager(dataset, placement=placement), 1, 3, batch_size)
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


@pytest.mark.parametrize(("placement", "num_workers"), [
    ("memory", 0), ("auto", 0), pytest.param("lazy", 2, marks=slow), pytest.param("memory", 2, marks=slow)])
def test_file_batches_do_not_depend_on_workers_batch_size_or_placement(
    folders: Dataset, placement: str, num_workers: int
) -> None:
    """I10 for image files: every tensor is the same to the bit."""
    expected = manager(folders, placement="lazy")
    data = manager(folders, placement=placement, num_workers=num_workers, val_fraction=0.0)
    for number, batch_size in ((0, 3), (1, 4)):  # the second epoch meets the workers of the first
        images, labels = epoch(data, 1, number, batch_size)
        reference = epoch(expected, 1, number, batch_size=10)
        assert torch.equal(images, reference[0])
        assert torch.equal(labels, reference[1])
    for split in ("test", "train"):
        images, labels = views(data, split, range(4), batch_size=3)
        reference = views(expected, split, range(4), batch_size=5)
        assert torch.equal(images, reference[0])
        assert torch.equal(labels, reference[1])


def test_augmentation_moves_with_seed_task_and_epoch(folders: Dataset) -> None:
    def sorted_images(data: DataManager, number: int) -> torch.Tensor:
        images, labels = epoch(data, 0, number)
        return images[torch.argsort(labels, stable=True)]

    first = sorted_images(manager(folders), 0)
    assert not torch.equal(first, sorted_images(manager(folders), 1))
    assert torch.equal(first, sorted_images(manager(folders), 0))


@pytest.mark.parametrize(("placement", "num_workers"), [
    ("lazy", 0), ("memory", 0), pytest.param("lazy", 1, marks=slow), pytest.param("memory", 1, marks=slow)])
def test_evaluation_moves_no_training_batch(folders: Dataset, placement: str, num_workers: int) -> None:
    """I8, at the level of the data: evaluating in the middle of an epoch, and giving up half-way."""
    expected = [images for images, _ in manager(folders, placement=placement).train_batches(0, 0, 3)]
    data = manager(folders, placement=placement, num_workers=num_workers)
    state = torch.get_rng_state()
    next(data.train_batches(0, 0, 3))
    for (images, _), reference in zip(data.train_batches(0, 0, 3), expected, strict=True):
        assert torch.equal(images, reference)
        views(data, "test", range(2))
        next(data.eval_batches("train", range(2), 2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["tensors", "files"])
def test_evaluating_first_in_inference_mode_spoils_no_gradient(kind: str, folders: Dataset) -> None:
    data = manager(tensor_dataset() if kind == "tensors" else folders, placement="memory")
    with torch.inference_mode():
        views(data, "train", range(2))
        views(data, "test", range(2))
    weight = torch.ones(3, requires_grad=True)
    images, _ = next(data.train_batches(0, 0, 4))
    (images.mean((2, 3)) @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, images.mean((2, 3)).sum(0))


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=slow)])
def test_two_passes_at_once_do_not_mix(folders: Dataset, num_workers: int) -> None:
    data = manager(folders, placement="lazy", num_workers=num_workers)
    pairs = list(zip(data.train_batches(0, 0, 5), data.train_batches(1, 0, 5), strict=True))
    for task in range(2):
        expected = epoch(manager(folders, placement="lazy"), task, batch_size=5)
        assert torch.equal(torch.cat([pair[task][0] for pair in pairs]), expected[0])


def test_held_out_images_are_a_part_of_each_class() -> None:
    dataset = tensor_dataset(per_class=8)
    whole, data = manager(dataset), manager(dataset, val_fraction=0.3)
    for task in range(3):
        classes = data.task_classes(task)
        assert data.train_size(task) == 2 * 6
        _, labels = views(data, "val", classes)
        assert labels.tolist() == [label for label in classes for _ in range(2)]
        both = torch.cat([views(data, "val", classes)[0], views(data, "train", classes)[0]])
        assert _as_set(both) == _as_set(views(whole, "train", classes)[0])
        assert len(both) == 16
    assert list(whole.eval_batches("val", range(6), 4)) == []
    places = set()
    for label in range(6):
        held_out = _as_set(views(data, "val", range(label, label + 1))[0])
        images = views(whole, "train", range(label, label + 1))[0]
        places.add(tuple(image.numpy().tobytes() in held_out for image in images))
    assert len(places) > 1  # not the same images of every class
    other = manager(dataset, val_fraction=0.3, seed=1994, shuffle=False)
    same = manager(dataset, val_fraction=0.3, shuffle=False)
    assert _as_set(views(other, "val", range(6))[0]) != _as_set(views(same, "val", range(6))[0])


def _as_set(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_each_side_keeps_an_image(fraction: float) -> None:
    data = manager(tensor_dataset(per_class=2), val_fraction=fraction)
    assert data.train_size(0) == 2
    assert len(views(data, "val", range(2))[1]) == 2


def test_single_image_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"^val_fraction: class 'class\d' has 1 training image"):
        manager(tensor_dataset(per_class=1), val_fraction=0.1)
    assert manager(tensor_dataset(per_class=1)).train_size(0) == 2


@pytest.mark.parametrize("kind", ["tensors", "files"])
def test_normalisation_is_applied_where_given(kind: str, folders: Dataset) -> None:
    dataset = tensor_dataset() if kind == "tensors" else folders
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    plain, normed = manager(dataset), manager(dataset, mean_std=(mean, std))
    center, spread = (torch.tensor(part).view(3, 1, 1) for part in (mean, std))
    torch.testing.assert_close(epoch(normed)[0], (epoch(plain)[0] - center) / spread)
    torch.testing.assert_close(
        views(normed, "test", range(2))[0], (views(plain, "test", range(2))[0] - center) / spread
    )
    assert torch.equal(views(normed, "test", range(2))[0], views(normed, "test", range(2))[0]), "not twice in place"


@pytest.mark.parametrize("change", [{"seed": 1994}, {"task": 1}, {"epoch": 1}])
def test_the_order_of_images_moves_with_seed_task_and_epoch(change: dict) -> None:
    def places(seed: int = 1993, task: int = 0, epoch: int = 0) -> list[int]:
        index, _ = manager(tensor_dataset(), seed=seed, shuffle=False)._shuffled(task, epoch)
        return np.argsort(np.argsort(index)).tolist()

    assert sorted(places()) == list(range(16)) and places() == places() != places(**change)
