"""Image files as pixels, what is cut out of them, and the memory they take."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data_files import write_class_folders
from tests.helpers import ROOT
from utils.data import load_dataset
from utils.data.augmentation import Augmentation, draw_boxes
from utils.data.readers import Loader, PathReader, View, decoded_bytes, free_memory

SIZE = 16


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return load_dataset("folder", write_class_folders(tmp_path, size=(40, 56))).train.images


def test_what_is_sent_is_what_is_seen_at_its_own_resolution(paths: list[Path]) -> None:
    """Resizing is left to the device: what crosses to it has the sizes of the boxes."""
    reader, requests = PathReader(paths), [(image, View(3, 2, 1)) for image in range(10)]
    cuts, = Loader(reader, Augmentation(), SIZE, num_workers=0, pin=False).batches([requests])
    heights, widths = np.array([reader.shape(image) for image, _ in requests]).T
    boxes = draw_boxes(Augmentation(), heights, widths, seed=3, task=2, epoch=1, index=np.arange(10))
    assert boxes[:, 2:4].max() <= 4 * SIZE
    assert cuts.shapes.tolist() == boxes[:, 2:4].tolist() and cuts.flips.tolist() == (boxes[:, 4] == 1).tolist()
    assert cuts.pixels.dtype == torch.uint8 and len(cuts.pixels) == 3 * cuts.shapes.prod(1).sum()
    for (image, _), box, (cut, _) in zip(requests, boxes.tolist(), cuts.on(torch.device("cpu")), strict=True):
        top, left, height, width, _ = box
        assert torch.equal(cut, reader.read(image)[:, top:top + height, left:left + width])


@pytest.mark.slow
def test_a_process_ends_though_its_workers_are_still_held(paths: list[Path]) -> None:
    """As they are at the end of every run whose worker processes read the files."""
    script = f"""
from pathlib import Path
from utils.data.augmentation import Augmentation
from utils.data.readers import Loader, PathReader
loader = Loader(PathReader([Path(path) for path in {[str(path) for path in paths]}]), Augmentation(), {SIZE}, 1, pin=False)
cuts = loader.batches([[(0, None)], [(1, None)], [(2, None)]])
print(len(next(cuts).flips))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


def test_gray_and_transparent_files_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 100).save(tmp_path / "gray.png")
    Image.new("RGBA", (5, 4), (10, 20, 30, 40)).save(tmp_path / "clear.png")
    reader = PathReader([tmp_path / "gray.png", tmp_path / "clear.png"])
    assert reader.shape(0) == (4, 5)
    assert reader.read(0).shape == (3, 4, 5)
    assert reader.read(0).unique().tolist() == [100]
    assert reader.read(1)[:, 0, 0].tolist() == [10, 20, 30]


def test_decoded_bytes_of_a_small_split_are_exact(paths: list[Path]) -> None:
    members = np.array([0, 3, 8])
    reader = PathReader(paths)
    assert decoded_bytes(paths, members) == sum(reader.read(image).numel() for image in members)
    assert decoded_bytes(paths, members[:0]) == 0


def test_free_memory_is_plausible() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < free_memory() <= total
