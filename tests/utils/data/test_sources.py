"""Batches of image files: keyed by the image, whatever is kept where."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data_files import write_class_folders
from utils.data import load_dataset
from utils.data.augmentation import Augmentation, center_image, cut_out, draw_boxes, resize_cut
from utils.data.readers import PathReader, View
from utils.data.sources import DecodedSource, EvaluationFileSource, FileSource

SIZE = 16


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return load_dataset("folder", write_class_folders(tmp_path, size=(40, 56))).train.images


CPU = torch.device("cpu")
KINDS = {"read when needed": (FileSource, None), "main memory": (FileSource, CPU), "decoded": (DecodedSource, CPU)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_the_box_of_its_own_index(paths: list[Path], kind: str) -> None:
    """I10: what `draw_boxes` says for (seed, task, epoch, index), whatever the order and the batch."""
    index = np.array([7, 2, 9, 4])
    made, home = KINDS[kind]
    source = made(paths, np.array([2, 4, 7, 9]), Augmentation(), SIZE, CPU, 0, home)
    views = torch.cat(list(source.train(index, View(3, 2, 1), batch_size=3)))
    for image, view in zip(index, views, strict=True):
        pixels = PathReader(paths).read(image)
        height, width = (np.array([side]) for side in pixels.shape[1:])
        box, = draw_boxes(Augmentation(), height, width, seed=3, task=2, epoch=1, index=np.array([image]))
        assert torch.equal(view, resize_cut(cut_out(pixels, box, SIZE), bool(box[4]), SIZE).float() / 255)
    for image, view in zip(index, torch.cat(list(source.evaluate(index, 3))), strict=True):
        pixels = PathReader(paths).read(image)
        assert torch.equal(view, center_image(pixels, SIZE, 256 / 224).float() / 255)


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
