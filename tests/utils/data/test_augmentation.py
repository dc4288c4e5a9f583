"""The keyed, batched augmentation against torchvision's."""


import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from utils.data.augmentation import (
    Augmentation,
    augment_batch,
    center_batch,
    center_image,
    cut_out,
    draw_boxes,
    resize_cut,
)


def _boxes(augmentation: Augmentation, height: int, width: int, count: int, **keys: int) -> np.ndarray:
    keys = {"seed": 1, "task": 0, "epoch": 0, **keys}
    heights, widths = np.full(count, height), np.full(count, width)
    return draw_boxes(augmentation, heights, widths, index=np.arange(count), **keys)


def _images(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.05, 1.0), (3 / 4, 4 / 3)),
        (100, 260, (0.05, 1.0), (3 / 4, 4 / 3)),
        (300, 80, (0.5, 1.0), (3 / 4, 4 / 3)),  # most draws do not fit: the central crop
        (32, 32, (0.7, 1.0), (0.85, 1.18)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count = 2000
    ours = _boxes(Augmentation(scale, ratio), height, width, count)[:, :4].astype(np.float64)
    blank = torch.empty(3, height, width)
    torch.manual_seed(0)
    draws = [transforms.RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(count)]
    theirs = np.array(draws, dtype=np.float64)

    def measures(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, tall, wide = boxes.T
        return {"area": tall * wide, "ratio": wide / tall, "top": top, "left": left, "bottom": top + tall}

    for name, values in measures(ours).items():
        assert ks_2samp(values, measures(theirs)[name]).pvalue > 1e-3, name


def test_boxes_where_nothing_fits_are_torchvisions_central_crop() -> None:
    for height, width in ((10, 400), (400, 10), (17, 200)):
        augmentation = Augmentation(scale=(0.9, 1.0))
        box = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        assert _boxes(augmentation, height, width, 3)[:, :4].tolist() == [list(box)] * 3


def test_boxes_lie_inside_and_flips_are_fair() -> None:
    boxes = _boxes(Augmentation(), 32, 20, 4000)
    top, left, height, width, flip = boxes.T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(height, width) > 0).all()
    assert (top + height <= 32).all()
    assert (left + width <= 20).all()
    assert 0.46 < flip.mean() < 0.54
    assert set(flip.tolist()) == {0, 1}
    assert not _boxes(Augmentation(flip=False), 32, 20, 100)[:, 4].any()


def test_a_box_depends_on_its_keys_and_nothing_else() -> None:
    """I10, at the level of the draw."""
    augmentation = Augmentation()
    heights, widths = np.array([32, 40, 50, 60]), np.array([50, 40, 30, 35])
    index = np.array([5, 90_000, 7, 11])
    keys = {"seed": 3, "task": 2, "epoch": 1}
    together = draw_boxes(augmentation, heights, widths, index=index, **keys)
    for row in (3, 0, 2, 1):
        one = slice(row, row + 1)
        alone = draw_boxes(augmentation, heights[one], widths[one], index=index[one], **keys)
        assert alone[0].tolist() == together[row].tolist()
    for change in ({"seed": 4}, {"task": 3}, {"epoch": 2}):
        other = draw_boxes(augmentation, heights, widths, index=index, **{**keys, **change})
        assert (other[:, :4] != together[:, :4]).any(axis=1).all()


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 224), (32, 32, 32), (40, 23, 16), (64, 90, 20)])
def test_batch_equals_torchvisions_resized_crop(height: int, width: int, size: int) -> None:
    images = _images(12, height, width)
    boxes = _boxes(Augmentation(), height, width, 12)
    assert set(boxes[:, 4].tolist()) == {0, 1}
    ours = augment_batch(images, torch.from_numpy(boxes), size)
    assert ours.dtype == torch.float32
    for image, box, result in zip(images, boxes.tolist(), ours, strict=True):
        expected = functional.resized_crop(image.float() / 255, *box[:4], [size, size], antialias=True)
        expected = functional.horizontal_flip(expected) if box[4] else expected
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_batch_and_single_image_differ_by_rounding_alone() -> None:
    images, boxes = _images(12, 32, 32), _boxes(Augmentation(), 32, 32, 12)
    batch = augment_batch(images, torch.from_numpy(boxes), 48) * 255
    single = torch.stack([resize_cut(cut_out(image, box, 48), box[4], 48) for image, box in zip(images, boxes, strict=True)])
    assert single.dtype == torch.uint8
    assert (batch - single).abs().max() < 1.5


def test_batch_does_not_depend_on_its_neighbours() -> None:
    images, boxes = _images(20, 32, 32), torch.from_numpy(_boxes(Augmentation(), 32, 32, 20))
    together = augment_batch(images, boxes, 40)
    alone = [augment_batch(images[row : row + 1], boxes[row : row + 1], 40) for row in range(20)]
    assert torch.equal(together, torch.cat(alone))


def test_batch_ignores_autocast() -> None:
    images, boxes = _images(4, 32, 32), torch.from_numpy(_boxes(Augmentation(), 32, 32, 4))
    plain = augment_batch(images, boxes, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment_batch(images, boxes, 40), plain)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 224), (40, 23, 16), (30, 77, 20), (32, 32, 32)])
def test_test_view_is_what_pil_and_torchvision_make(height: int, width: int, size: int) -> None:
    images = _images(6, height, width)
    published = transforms.Compose(
        [transforms.Resize(round(size * 256 / 224), InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    )
    batch = center_batch(images, size, 256 / 224)
    assert 0 <= batch.min() <= batch.max() <= 1
    for image, result in zip(images, batch, strict=True):
        photo = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(published(photo))).permute(2, 0, 1)
        assert (result * 255 - expected).abs().max() < 1.5
        assert (center_image(image, size, 256 / 224).int() - expected.int()).abs().max() <= 1


def test_test_view_without_resize_keeps_images_of_the_input_size() -> None:
    images = _images(5, 32, 32)
    torch.testing.assert_close(center_batch(images, 32, None), images / 255, rtol=0, atol=1e-6)
    assert torch.equal(center_image(images[0], 32, None), images[0])


def test_test_view_without_resize_shows_the_whole_image() -> None:
    images = _images(3, 40, 20)
    expected = functional.resize(images, [24, 24], InterpolationMode.BICUBIC, antialias=True)
    assert (center_batch(images, 24, None) * 255 - expected).abs().max() < 1.5
    assert torch.equal(center_image(images[0], 24, None), expected[0])


@pytest.mark.parametrize(("height", "width"), [(90, 140), (64, 64), (300, 50)])
def test_a_cut_is_torchvisions_crop_and_large_ones_shrink_on_the_way(height: int, width: int) -> None:
    """Up to four times the input size a side, resizing what was cut out is torchvision's one-step transform to the bit;
    beyond, a resize to that size comes first, which moves a photograph's pixels by little."""
    size, box = 16, np.array([0, 0, height, width, 1])
    ramp = torch.linspace(0, 255, height)[:, None] * 0.4 + torch.linspace(0, 255, width) * 0.6
    image = torch.stack([ramp, ramp.flip(0), 255 - ramp]).round().to(torch.uint8)
    part = cut_out(image, box, size)
    assert part.shape == (3, min(height, 64), min(width, 64))
    expected = functional.horizontal_flip(functional.resized_crop(image, *box[:4].tolist(), [size, size], antialias=True))
    seen = resize_cut(part, True, size)
    assert (seen.int() - expected.int()).abs().max() <= (0 if max(height, width) <= 64 else 2)
