"""The data set `emoji`: its file, its own domains, and streams that show a task in one of them."""

from pathlib import Path

import numpy as np
import pytest

from tests.data_files import manager, write_emoji
from tests.helpers import tiny_config
from trainer import run
from utils.data import Dataset, load_dataset
from utils.data.emoji import FILE, STYLES
from utils.errors import UserError

TASKS = ["noto", "line", "noto"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_emoji(tmp_path_factory.mktemp("emoji") / FILE, classes=6).parent


@pytest.fixture(scope="module")
def emoji(place: Path) -> Dataset:
    return load_dataset("emoji", place)


def test_every_image_is_in_one_split_and_of_one_style(emoji: Dataset) -> None:
    assert (len(emoji.train.labels), len(emoji.test.labels)) == (90, 30) and emoji.train.images.shape[1:] == (3, 64, 64)
    for split, number in ((emoji.train, 0), (emoji.test, 1)):
        every = np.concatenate([domain[number] for domain in emoji.domains.values()])
        assert sorted(every) == list(range(len(split.labels)))
    assert list(emoji.domains) == list(STYLES) and emoji.classes[2] == "kind 2"


def test_a_task_has_the_images_of_its_style_alone(emoji: Dataset) -> None:
    data = manager(emoji, task_domains=TASKS)
    assert [data.train_size(task) for task in range(3)] == [6, 6, 6] and data.task_domains == TASKS
    for task, style in enumerate(TASKS):
        for split, number in (("train", 0), ("test", 1)):
            index, labels = data._gather(split, data.task_classes(task))
            assert set(index) <= set(emoji.domains[style][number])
            given = getattr(emoji, split).labels[index]
            assert given.tolist() == [data.class_order[label] for label in labels]


def test_without_domains_a_task_has_all_styles(emoji: Dataset) -> None:
    assert manager(emoji).train_size(0) == 30


def test_held_out_images_are_of_the_style_too(emoji: Dataset) -> None:
    data = manager(emoji, task_domains=TASKS, val_fraction=0.4)
    assert [len(images) for images in data._members["val"]] == [1] * 6 and data.train_size(0) == 4


@pytest.mark.parametrize("domains, message", [
    (["noto", "grating", "line"], "task_domains: 'grating' is not known; choose one of fluent, line, noto"),
    (["noto"], "it has 1 entries for 3 tasks"),
])
def test_domains_that_are_none_of_its_own_are_refused(emoji: Dataset, domains: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        manager(emoji, task_domains=domains)


def test_a_class_that_a_style_lacks_is_named(emoji: Dataset) -> None:
    lacking = {**emoji.domains, "line": (np.empty(0, np.int64), emoji.domains["line"][1])}
    with pytest.raises(UserError, match=r"class 'kind \d' has no image of the domain 'line'"):
        manager(Dataset("emoji", emoji.train, emoji.test, emoji.classes, domains=lacking), task_domains=TASKS)


def test_a_run_reports_which_tasks_brought_a_style(place: Path, tmp_path: Path) -> None:
    result, = run(tiny_config(tmp_path, dataset="emoji", data_path=str(place), task_domains=TASKS, gate="evidence"))
    assert result["metrics"]["kept_set"]["truth"] == [True, True, False]


def test_a_missing_file_names_both_commands(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_dataset("emoji", tmp_path)
    for part in (str(tmp_path / FILE), "npm install emoji-datasource-google", "python -m tools.build_emoji node_modules"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["bytes", "lengths", "labels", "pickle"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = write_emoji(tmp_path / FILE, classes=2, concepts=2)
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    if damage == "lengths":
        content["styles"] = content["styles"][1:]
    if damage == "labels":
        content["labels"] += 2
    if damage == "pickle":
        content["classes"] = np.array(["kind", None], dtype=object)
    np.savez(path, **content)
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="no intact file of tools.build_emoji") as error:
        load_dataset("emoji", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
