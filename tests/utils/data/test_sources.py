"""Single images on their way from a file to a batch, and the memory they take."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data_files import write_class_folders
from utils.data import load_dataset
from utils.data.augmentation import Augmentation, center_image, cut_out, draw_boxes, resize_cut
from utils.data.readers import Loader, PathReader, View, decoded_bytes, free_memory
from utils.data.sources import DecodedSource, EvaluationFileSource, FileSource, Source

SIZE = 16


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return load_dataset("folder", write_class_folders(tmp_path, size=(40, 56))).train.images


CPU = torch.device("cpu")


def source_of(kind: str, paths: list[Path], members: np.ndarray) -> Source:
    same = (paths, members, Augmentation(), SIZE, CPU)
    if kind == "decoded":
        return DecodedSource(*same, threads=2)
    return FileSource(*same, num_workers=0, in_memory=kind == "main memory")


@pytest.mark.parametrize("kind", ["read when needed", "main memory", "decoded"])
def test_each_image_has_the_box_of_its_own_index(paths: list[Path], kind: str) -> None:
    """I10: what `draw_boxes` says for (seed, task, epoch, index), whatever the order and the batch."""
    index = np.array([7, 2, 9, 4])
    source = source_of(kind, paths, np.array([2, 4, 7, 9]))
    views = torch.cat(list(source.train(index, View(3, 2, 1), batch_size=3)))
    for image, view in zip(index, views, strict=True):
        pixels = PathReader(list(map(str, paths))).read(image)
        height, width = (np.array([side]) for side in pixels.shape[1:])
        box, = draw_boxes(Augmentation(), height, width, seed=3, task=2, epoch=1, index=np.array([image]))
        assert torch.equal(view, resize_cut(cut_out(pixels, box, SIZE), bool(box[4]), SIZE).float() / 255)
    for image, view in zip(index, torch.cat(list(source.evaluate(index, 3))), strict=True):
        pixels = PathReader(list(map(str, paths))).read(image)
        assert torch.equal(view, center_image(pixels, SIZE, 256 / 224).float() / 255)


def test_workers_send_what_is_seen_at_its_own_resolution(paths: list[Path]) -> None:
    """Resizing is left to the device: what crosses to it has the sizes of the boxes."""
    reader, keys = PathReader(list(map(str, paths))), [(image, View(3, 2, 1)) for image in range(10)]
    parts, = Loader(reader, Augmentation(), SIZE, num_workers=0, pin=False).batches([keys])
    heights, widths = np.array([reader.shape(image) for image, _ in keys]).T
    boxes = draw_boxes(Augmentation(), heights, widths, seed=3, task=2, epoch=1, index=np.arange(10))
    assert boxes[:, 2:4].max() <= 4 * SIZE
    assert parts.shapes.tolist() == boxes[:, 2:4].tolist() and parts.flips.tolist() == (boxes[:, 4] == 1).tolist()
    assert parts.pixels.dtype == torch.uint8 and len(parts.pixels) == 3 * parts.shapes.prod(1).sum()
    for (image, _), box, (part, _) in zip(keys, boxes.tolist(), parts.on(CPU), strict=True):
        top, left, height, width, _ = box
        assert torch.equal(part, reader.read(image)[:, top:top + height, left:left + width])


@pytest.mark.parametrize("home", [None, CPU], ids=["read when needed", "kept"])
def test_a_test_split_is_read_once_if_its_views_are_kept(
    paths: list[Path], home: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read = [], PathReader.read
    monkeypatch.setattr(PathReader, "read", lambda self, image: opened.append(image) or read(self, image))
    members = np.array([1, 3, 4])
    source = EvaluationFileSource(paths, members, Augmentation(), SIZE, CPU, 0, home)
    first, second = (torch.cat(list(source.evaluate(np.array([4, 1]), 1))) for _ in range(2))
    assert torch.equal(first, second) and opened == ([4, 1, 4, 1] if home is None else [1, 3, 4])


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
