"""utils/data/domains.py: what every domain promises, and the stream that shows every task in its own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data_files import write_class_folders
from utils.data import Dataset, Split, load_dataset
from utils.data.augmentation import Augmentation
from utils.data.domains import DOMAINS, DRAWS, apply_domain, check_domains, first_appearances
from utils.data_manager import DataManager
from utils.errors import UserError
from utils.rng import generator, uniforms

SEED = 7
RANDOM = {"grating", "dots", "blocks"}  # those that look different on every image
PAIRS = ["rotated+grating", "grating+edges", "dots+blur", "blocks+blocks"]


def pictures(count: int = 12, size: int = 32, key: str = "train") -> torch.Tensor:
    """Smooth noise, so that blurring and finding edges change something but not everything."""
    coarse = torch.rand(count, 3, 8, 8, generator=generator(0, "pictures", key))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8)


def shown(domain: str, images: torch.Tensor, index: np.ndarray | None = None, seed: int = SEED,
          split: str = "train") -> torch.Tensor:
    return apply_domain(domain, images, np.arange(len(images)) if index is None else index, seed, split)


def test_there_are_at_least_eight_and_plain_is_one() -> None:
    assert len(DOMAINS) >= 8 and "plain" in DOMAINS and RANDOM < set(DOMAINS)


@pytest.mark.parametrize("domain", [*DOMAINS, *PAIRS])
def test_a_domain_keeps_shape_and_kind_and_its_input(domain: str) -> None:
    for size in (32, 30, 8):
        images = pictures(size=size)
        before = images.clone()
        result = shown(domain, images)
        assert result.shape == images.shape and result.dtype == torch.uint8 and torch.equal(images, before)
        assert torch.equal(result, images) is (domain == "plain")


def test_no_two_domains_look_alike() -> None:
    results = [shown(domain, pictures()) for domain in [*DOMAINS, *PAIRS]]
    for place, first in enumerate(results):
        for second in results[:place]:
            assert (first != second).float().mean() > 0.05


@pytest.mark.parametrize("domain", [*DOMAINS, *PAIRS])
def test_an_image_looks_the_same_whatever_is_converted_with_it(domain: str) -> None:
    images, index = pictures(), np.arange(12) * 1000
    whole = shown(domain, images, index)
    order = generator(0, "order")
    for picks in (torch.tensor([5]), torch.tensor([11, 0, 4]), torch.randperm(12, generator=order)):
        assert torch.equal(shown(domain, images[picks], index[picks.numpy()]), whole[picks])
    assert torch.equal(shown(domain, images, index), whole), "nothing is advanced by a call"


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_is_drawn_follows_seed_split_and_index(domain: str) -> None:
    images = pictures(1).expand(12, 3, 32, 32)
    first = shown(domain, images)
    others = [shown(domain, images, seed=SEED + 1), shown(domain, images, split="test"),
              shown(domain, images, np.arange(12) + 500)]
    assert all(torch.equal(first, other) is (domain not in RANDOM) for other in others)
    assert (len(set(map(bytes, first.flatten(1).numpy()))) > 6) is (domain in RANDOM), "each image has numbers of its own"


def test_domains_that_are_their_own_definition() -> None:
    images = pictures()
    assert torch.equal(shown("negative", images), 255 - images)
    assert np.array_equal(shown("rotated", images), np.rot90(images.numpy(), axes=(2, 3)))
    assert np.array_equal(shown("mirror", images), images.numpy()[..., ::-1])
    flat = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    assert not shown("edges", flat).any() and torch.equal(shown("blur", flat), flat)
    assert torch.equal(shown("pixelated", flat), flat)
    halves = shown("blocks", torch.zeros(40, 3, 32, 32, dtype=torch.uint8))
    assert set(halves.unique().tolist()) == {0, 255} and 0.4 < (halves == 255).float().mean() < 0.6


@pytest.mark.parametrize("domain", PAIRS)
def test_domains_compose_from_left_to_right(domain: str) -> None:
    images, index = pictures(), np.arange(12)
    first, second = domain.split("+")
    value = images.float() / 255
    for place, name in enumerate((first, second)):
        drawn = uniforms(SEED, "domain", "train", place, name, index=index, count=DRAWS)
        value = DOMAINS[name](value, torch.from_numpy(drawn).float())
    assert torch.equal(shown(domain, images), (255 * value).round().clamp(0, 255).to(torch.uint8))
    assert not torch.equal(shown(domain, images), shown(f"{second}+{first}", images)) or first == second


def test_drawing_twice_draws_other_numbers() -> None:
    """A second mosaic that was the first again would undo it."""
    images = pictures()
    assert not torch.equal(shown("blocks+blocks", images), images)


@pytest.mark.parametrize(("domains", "words"), [
    (["plain", "gratin"], ["task_domains", "gratin", "Did you mean 'grating'?"]),
    (["plain", "rotated+"], ["task_domains", "''"]),
    (["plain", "edges+sepia"], ["task_domains", "sepia", "pixelated"]),
    (["plain"], ["task_domains", "1 entries", "2 tasks"]),
    ([], ["task_domains", "0 entries"]),
])
def test_lists_that_do_not_fit_are_one_sentence(domains: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_domains(domains, 2)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_longer_list_is_cut_and_none_stays_none() -> None:
    assert check_domains(["plain", "edges", "plain"], 2) == ["plain", "edges"] and check_domains(None, 2) is None


def test_one_domain_has_one_spelling() -> None:
    """Otherwise a blank would make a domain new, and the right answer wrong."""
    assert check_domains(["edges + grating", "edges+grating", " plain"], 3) == ["edges+grating", "edges+grating", "plain"]


def test_first_appearances() -> None:
    assert first_appearances(["a", "b", "a", "c", "b", "a+b", "a"]) == [True, True, False, True, False, True, False]
    assert first_appearances([]) == [] and first_appearances(["a"] * 3) == [True, False, False]


# ---- the stream


def tensors(classes: int = 7, per_class: int = 4) -> Dataset:
    """Classes one after another over and over, so that the images of a task lie apart."""
    train, test = (Split(pictures(count * classes, size=12, key=key), np.tile(np.arange(classes), count))
                   for key, count in (("train", per_class), ("test", 2)))
    return Dataset("tensors", train, test, [str(label) for label in range(classes)], Augmentation())


def stream(dataset: Dataset, **options) -> DataManager:
    """Tasks of two classes; with three tasks one class of the data set is in none."""
    return DataManager(dataset, **{"init_cls": 2, "increment": 2, "seed": SEED, "image_size": 12, "nb_tasks": 3, **options})


STREAM = ["negative", "grating+edges", "negative"]


@pytest.mark.parametrize("val_fraction", [0.0, 0.25])
def test_every_task_is_shown_in_its_domain(val_fraction: float) -> None:
    dataset = tensors()
    before = dataset.train.images.clone(), dataset.test.images.clone()
    data = stream(dataset, task_domains=[*STREAM, "plain"], val_fraction=val_fraction)
    assert data.task_domains == STREAM
    assert torch.equal(dataset.train.images, before[0]) and torch.equal(dataset.test.images, before[1])
    part, = data.series.parts
    for name, given, made in (("train", dataset.train, part.train), ("test", dataset.test, part.test)):
        expected = given.images.clone()
        for task, domain in enumerate(STREAM):
            wanted = np.isin(given.labels, [data.class_order[label] for label in data.task_classes(task)])
            index = np.flatnonzero(wanted)
            expected[index] = shown(domain, given.images[index], index, split=name)
        assert torch.equal(made.images, expected) and np.array_equal(made.labels, given.labels)
        assert torch.equal(made.images[given.labels == 6], given.images[given.labels == 6]) is (6 not in data.class_order)


def test_batches_come_in_the_domain_of_their_task() -> None:
    plain, lens = stream(tensors()), stream(tensors(), task_domains=["plain", "negative", "plain"])
    for split in ("train", "test"):
        for task in range(3):
            batches = (data.eval_batches(split, data.task_classes(task), 5) for data in (plain, lens))
            for (images, labels), (seen, same) in zip(*batches, strict=True):
                assert torch.equal(labels, same)
                assert torch.allclose(seen, 1 - images if task == 1 else images, atol=0.02), "resized after it was shown"
    trained = [next(data.train_batches(1, 0, 8))[0] for data in (plain, lens)]
    assert not torch.allclose(trained[0], trained[1], atol=0.1)


def test_the_seed_draws_what_is_seen() -> None:
    def images(seed: int) -> torch.Tensor:
        return stream(tensors(), seed=seed, shuffle=False, task_domains=["grating"] * 3).series.parts[0].train.images

    assert torch.equal(images(1), images(1)) and not torch.equal(images(1), images(2))


def test_the_split_record_names_the_domains_and_sums_what_is_seen() -> None:
    plain, lens = stream(tensors()).split_record(), stream(tensors(), task_domains=STREAM).split_record()
    assert lens["task_domains"] == STREAM and "task_domains" not in plain
    assert lens["images"]["train"] != plain["images"]["train"] and lens["images"]["test"] != plain["images"]["test"]
    assert lens["sha256"] != plain["sha256"] and lens["tasks"] == plain["tasks"]


def test_image_files_have_no_domains(tmp_path: Path) -> None:
    dataset = load_dataset("folder", write_class_folders(tmp_path, train_per_class=1, test_per_class=1))
    with pytest.raises(UserError, match="task_domains: data set 'folder'") as caught:
        DataManager(dataset, init_cls=2, increment=2, seed=0, image_size=16, task_domains=["plain", "plain"])
    assert "\n" not in str(caught.value)
