"""Data sets with a folder for each domain, from tiny files as their archives leave them, and streams of them."""

from pathlib import Path

import numpy as np
import pytest

from tests.data_files import manager, write_cddb, write_class_folders, write_core50, write_domainnet, write_emoji
from utils.data import Dataset, load_dataset
from utils.data.domain_folders import CORE50_TESTED, CORE50_TRAINED
from utils.data.emoji import FILE, STYLES, TESTED
from utils.data_manager import DataManager
from utils.errors import UserError


def stream(dataset: Dataset, classes: int, **options) -> DataManager:
    return manager(dataset, init_cls=classes, increment=classes, scenario="domain", **options)


def shown(data: DataManager, task: int, split: str) -> set[Path]:
    """The images of a task."""
    index, _ = data._gather(split, data.task_cells(task))
    images = getattr(data.series.parts[0], split).images
    return {images[number] for number in index}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for domain in ("photo", "drawing"):
        write_class_folders(tmp_path / domain, train_per_class=2, test_per_class=1)
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_folders_of_one_s_own(own: Path) -> None:
    data = stream(load_dataset("domain_folders", own), 4)
    assert data.task_domains == ["drawing", "photo"] and data.nb_tasks == 2 and sorted(data.class_names) == [
        "ant", "bee", "cat", "dog"]
    for task, domain in enumerate(data.task_domains):
        for split, count in (("train", 8), ("test", 4)):
            paths = shown(data, task, split)
            assert len(paths) == count and all(path.is_relative_to(own / domain / split) for path in paths)
    index, cells = data._gather("train", data.task_cells(1))
    paths = data.series.parts[0].train.images
    assert [paths[number].parent.name for number in index] == [
        data.class_names[data.tasks.label_of_cell[cell]] for cell in cells]


def test_the_order_of_domains_can_be_given_and_cut(own: Path) -> None:
    data = stream(load_dataset("domain_folders", own), 2, task_domains=["photo", "drawing"], nb_tasks=1)
    assert data.task_domains == ["photo"] and len(shown(data, 0, "train")) == 4


def test_a_class_that_a_domain_lacks_is_named(own: Path) -> None:
    for split in ("train", "test"):
        (own / "photo" / split / "dog").rename(own / "photo" / split / "wolf")
    with pytest.raises(UserError, match="class '(dog|wolf)' has no image of the domain '(photo|drawing)'"):
        stream(load_dataset("domain_folders", own), 5)


def test_domainnet_is_split_by_its_lists(tmp_path: Path) -> None:
    root = write_domainnet(tmp_path / "domainnet", domains=("real", "clipart", "sketch"))
    data = stream(load_dataset("domainnet", tmp_path), 4)
    assert data.task_domains == ["clipart", "real", "sketch"]
    for task, domain in enumerate(data.task_domains):
        assert len(shown(data, task, "test")) == 8
        assert all(path.is_relative_to(root / domain) for split in ("train", "test") for path in shown(data, task, split))
    assert manager(load_dataset("domainnet", tmp_path)).train_size(0) == 12, "as before, all domains at once"


def test_core50_trains_on_eight_sessions_and_tests_each_on_the_three_others(tmp_path: Path) -> None:
    root = write_core50(tmp_path / "core50")
    dataset = load_dataset("core50", tmp_path)
    assert dataset.classes == [f"o{number}" for number in range(1, 13)]
    data = stream(dataset, 12)
    assert tuple(data.task_domains) == CORE50_TRAINED
    every = {path for session in CORE50_TESTED for path in (root / session).rglob("*.png")}
    for task, session in enumerate(CORE50_TRAINED):
        assert shown(data, task, "train") == set((root / session).rglob("*.png")) and shown(data, task, "test") == every
    batches = list(data.test_batches(1, 16))
    assert sum(len(labels) for _, labels, _ in batches) == 2 * len(every) == 144
    tasks = np.concatenate([owners[:, 0] for _, _, owners in batches])
    assert np.bincount(tasks).tolist() == [72, 72]


def test_cddb_has_real_and_fake_images_at_any_depth(tmp_path: Path) -> None:
    root = write_cddb(tmp_path / "CDDB", of_objects=["cyclegan"])
    dataset = load_dataset("cddb", tmp_path)
    assert dataset.classes == ["0_real", "1_fake"]
    data = stream(dataset, 2, task_domains=["gaugan", "cyclegan"], shuffle=False)
    assert [data.train_size(task) for task in (0, 1)] == [4, 8]
    assert all(path.is_relative_to(root / "cyclegan" / "val") for path in shown(data, 1, "test"))
    fake, _ = data._gather("train", range(3, 4))
    assert {dataset.train.images[number].parent.name for number in fake} == {"1_fake"}


@pytest.mark.parametrize("name, words", [
    ("domain_folders", ["'<domain>/train/<class>/<image>.jpg'"]),
    ("core50", ["core50_128x128.zip", "https://vlomonaco.github.io/core50"]),
    ("cddb", ["https://coral79.github.io/CDDB_web/", "cddb/gaugan/train/0_real"]),
])
def test_a_missing_folder_is_one_sentence_with_what_to_do(name: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(name, tmp_path / "nothing")
    assert all(word in str(caught.value) for word in ["data_path", str(tmp_path), *words]) and "\n" not in str(caught.value)


def test_what_is_missing_from_an_archive_is_named(tmp_path: Path) -> None:
    (write_core50(tmp_path, objects=1, per_session=1) / "s7").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no folder 's7', a session of CORe50"):
        load_dataset("core50", tmp_path)
    (write_cddb(tmp_path / "cddb") / "biggan/val/1_fake").rename(tmp_path / "fakes")
    with pytest.raises(UserError, match="biggan/val' has no image in a folder '1_fake'"):
        load_dataset("cddb", tmp_path)


def test_every_concept_is_a_class_of_its_own(tmp_path: Path) -> None:
    """Four images to train on, and the one in a style that the class has not been seen in."""
    path = write_emoji(tmp_path / FILE)
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    content["images"][5 * 4 + 2] = content["images"][5 * 1 + 2]  # concept 4 is drawn as concept 1, in one style
    np.savez(path, **content)
    dataset = load_dataset("emoji_concepts", tmp_path)
    assert dataset.classes == [f"concept {number}" for number in range(12) if number != 4]
    assert np.bincount(dataset.train.labels).tolist() == [4] * 11 and dataset.test.labels.tolist() == list(range(11))
    place = STYLES.index(TESTED)
    assert np.array_equal(dataset.test.images[4].permute(1, 2, 0), content["images"][5 * 5 + place])
    first = dataset.train.images[:4].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(first, np.delete(content["images"][:5], place, axis=0))
    del content["concepts"]
    np.savez(path, **content)
    with pytest.raises(UserError, match="no intact file of tools.build_emoji"):
        load_dataset("emoji_concepts", tmp_path)
