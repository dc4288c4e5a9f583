"""Single images on their way from a file to a batch, and the memory they take."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data_files import write_class_folders
from utils.augment import Augmentation, augment_image, center_image, draw_boxes
from utils.data import load_dataset
from utils.data_source import FileSource, PathReader, View, decoded_bytes, free_memory

SIZE = 16


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return load_dataset("folder", write_class_folders(tmp_path, size=(40, 56))).train.images


@pytest.mark.parametrize("in_memory", [False, True])
def test_each_image_has_the_box_of_its_own_index(paths: list[Path], in_memory: bool) -> None:
    """I10: what `draw_boxes` says for (seed, task, epoch, index), whatever the order and the batch."""
    augmentation, device, index = Augmentation(), torch.device("cpu"), np.array([7, 2, 9, 4])
    source = FileSource(paths, np.array([2, 4, 7, 9]), augmentation, SIZE, device, 0, in_memory)
    views = torch.cat(list(source.train(index, View(3, 2, 1), batch_size=3)))
    for image, view in zip(index, views, strict=True):
        pixels = PathReader(list(map(str, paths))).read(image)
        height, width = (np.array([side]) for side in pixels.shape[1:])
        boxes = draw_boxes(augmentation, height, width, seed=3, task=2, epoch=1, index=np.array([image]))
        assert torch.equal(view, augment_image(pixels, boxes[0], SIZE).float() / 255)
    for image, view in zip(index, torch.cat(list(source.evaluate(index, 3))), strict=True):
        pixels = PathReader(list(map(str, paths))).read(image)
        assert torch.equal(view, center_image(pixels, SIZE, 256 / 224).float() / 255)


def test_gray_and_transparent_files_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 100).save(tmp_path / "gray.png")
    Image.new("RGBA", (5, 4), (10, 20, 30, 40)).save(tmp_path / "clear.png")
    reader = PathReader([str(tmp_path / "gray.png"), str(tmp_path / "clear.png")])
    assert reader.shape(0) == (4, 5)
    assert reader.read(0).shape == (3, 4, 5)
    assert reader.read(0).unique().tolist() == [100]
    assert reader.read(1)[:, 0, 0].tolist() == [10, 20, 30]


def test_decoded_bytes_of_a_small_split_are_exact(paths: list[Path]) -> None:
    members = np.array([0, 3, 8])
    reader = PathReader(list(map(str, paths)))
    assert decoded_bytes(paths, members) == sum(reader.read(image).numel() for image in members)
    assert decoded_bytes(paths, members[:0]) == 0


def test_free_memory_is_plausible() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < free_memory() <= total
