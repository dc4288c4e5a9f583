"""Augmentation keyed by the image, on batches held in memory and on single decoded images.

Shapes: b images, h x w pixels in, S x S pixels out, n boxes. A box is one row `(top, left, height, width,
flip)` of an int64 array `[n, 5]`, in pixels of the image it belongs to.

Which part of an image is seen, and whether it is mirrored, is a pure function of (seed, task, epoch, index of
the image) (METHOD.md, invariant I10): batch size, workers and processes cannot move it. Cropping and resizing
a batch of small images is then two matrix products with a resampling matrix per image, which is the same
arithmetic as torchvision's antialiased `resized_crop` and needs no loop over images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from utils.rng import uniforms

BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
_FINEST = 4  # times the input size: detail beyond that does not survive the resize to come
_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries so often before it takes the central crop


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image before the network sees it.

    `scale` and `ratio` are the ranges of area (as a fraction) and aspect (width over height) of the random
    crop. `test_resize` is the shorter side over the input size before the central crop at test time; None
    resizes straight to the input size.
    """

    scale: tuple[float, float] = (0.05, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    test_resize: float | None = 256 / 224


def draw_boxes(
    augmentation: Augmentation,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    seed: int,
    task: int,
    epoch: int,
    index: np.ndarray,
) -> np.ndarray:
    """Boxes `[n, 5]` for the images `index` of sizes `heights` x `widths` (arrays `[n]`, pixels).

    The rule is torchvision's `RandomResizedCrop.get_params`: up to ten draws of area and log aspect, the
    first that fits, else the largest central crop of an allowed aspect.
    """
    draws = uniforms(seed, "augment", task, epoch, index=index, count=2 * _ATTEMPTS + 3)
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    low, high = augmentation.scale
    area = (heights * widths)[:, None] * (low + (high - low) * draws[:, :_ATTEMPTS])  # [n, 10]
    log_low, log_high = math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])
    aspect = np.exp(log_low + (log_high - log_low) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS])
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (width > 0) & (height > 0) & (width <= widths[:, None]) & (height <= heights[:, None])
    found = fits.any(axis=1)
    rows, first = np.arange(len(index)), fits.argmax(axis=1)

    central_height, central_width = _largest_allowed(heights, widths, augmentation.ratio)
    height = np.where(found, height[rows, first], central_height)
    width = np.where(found, width[rows, first], central_width)
    top, left = heights - height, widths - width
    top = np.where(found, np.floor(draws[:, -3] * (top + 1)), top // 2)
    left = np.where(found, np.floor(draws[:, -2] * (left + 1)), left // 2)
    flip = (draws[:, -1] < 0.5) & augmentation.flip
    return np.stack([top, left, height, width, flip], axis=1).astype(np.int64)


def _largest_allowed(
    heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest crop whose aspect lies within `ratio`."""
    aspect = widths / heights
    height = np.where(aspect < ratio[0], np.rint(widths / ratio[0]), heights)
    width = np.where(aspect > ratio[1], np.rint(heights * ratio[1]), widths)
    return height, width


def augment_batch(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop, resize (antialiased bilinear) and mirror: uint8 `[b, 3, h, w]`, int64 `[b, 5]` -> float32 `[b, 3, S, S]`.

    Values are in 0..1. Equals torchvision's `resized_crop(..., antialias=True)` on float images, then a
    mirror.
    """
    top, left, height, width, flip = boxes.unbind(1)
    rows = _resampling(top, height, images.shape[2], size, _triangle, 1.0)  # [b, S, h]
    columns = _resampling(left, width, images.shape[3], size, _triangle, 1.0)  # [b, S, w]
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns)
    return _resample(images, rows, columns)


def center_batch(images: Tensor, size: int, test_resize: float | None) -> Tensor:
    """The test-time view: uint8 `[b, 3, h, w]` -> float32 `[b, 3, S, S]` in 0..1; bicubic, antialiased.

    Bicubic weights overshoot at edges; values are cut to 0..1 after each of the two passes, as PIL and
    torchvision do on 8-bit images, from which this differs by their rounding alone.
    """
    count, _, height, width = images.shape
    new_height, new_width = _test_size(height, width, size, test_resize)
    rows = _central_resampling(height, new_height, size, images.device).expand(count, -1, -1)
    columns = _central_resampling(width, new_width, size, images.device).expand(count, -1, -1)
    return _resample(images, rows, columns, cut=True)


def _test_size(height: int, width: int, size: int, test_resize: float | None) -> tuple[int, int]:
    """Height and width after the test-time resize: the shorter side is `round(size * test_resize)`."""
    if test_resize is None:
        return size, size
    shorter = round(size * test_resize)
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def _central_resampling(length: int, resized: int, size: int, device: torch.device) -> Tensor:
    """The `size` central rows of the bicubic resampling of `length` pixels to `resized`: `[1, size, length]`."""
    start = torch.zeros(1, dtype=torch.int64, device=device)
    matrix = _resampling(start, start + length, length, resized, _cubic, 2.0)
    first = round((resized - size) / 2.0)
    return matrix[:, first : first + size]


def _resample(images: Tensor, rows: Tensor, columns: Tensor, cut: bool = False) -> Tensor:
    """`rows @ image @ columns^T` for every image and channel; `cut` to 0..1 after each product.

    Kept out of autocast: eight-bit images would lose half their levels in bfloat16.
    """
    count, channels, height, width = images.shape
    with torch.autocast(images.device.type, enabled=False):
        pixels = images.to(torch.float32).div_(255.0)
        # (b, 3 * 32, 32) @ (b, 32, 224) -> (b, 96, 224)
        wide = torch.bmm(pixels.reshape(count, channels * height, width), columns.transpose(1, 2))
        wide = wide.clamp_(0.0, 1.0) if cut else wide
        # (b, 1, 224, 32) @ (b, 3, 32, 224) -> (b, 3, 224, 224)
        out = torch.matmul(rows[:, None], wide.view(count, channels, height, -1))
        return out.clamp_(0.0, 1.0) if cut else out


def _resampling(
    start: Tensor, length: Tensor, pixels: int, size: int, kernel: Callable[[Tensor], Tensor], support: float
) -> Tensor:
    """Matrices `[b, size, pixels]` that resize the pixels `start .. start + length` to `size` pixels.

    Row `o` weighs the pixels of the crop by `kernel`, widened by the factor of reduction (the antialiasing of
    PIL and torchvision), and sums to one.
    """
    scale = (length.to(torch.float32) / size)[:, None, None]
    center = scale * (torch.arange(size, device=start.device)[:, None] + 0.5)  # [b, size, 1], within the crop
    offset = torch.arange(pixels, device=start.device) - start[:, None, None]  # [b, 1, pixels], pixel of the crop
    distance = ((offset + 0.5 - center) / scale.clamp(min=1.0)).abs_()
    weights = kernel(distance.clamp_(max=support))
    weights.masked_fill_((offset < 0) | (offset >= length[:, None, None]), 0.0)
    return weights.div_(weights.sum(2, keepdim=True))


def _triangle(distance: Tensor) -> Tensor:
    """The bilinear kernel on distances 0..1."""
    return 1.0 - distance


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5 on distances 0..2 (what PIL and torchvision's antialiased bicubic use)."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return torch.where(distance < 1.0, near, far)


def cut_out(image: Tensor, box: np.ndarray, size: int) -> Tensor:
    """What the box `[5]` shows of one decoded image: uint8 `[3, h, w]` -> uint8 `[3, height, width]`.

    At most `_FINEST * S` pixels a side, so that batches of large photographs stay small on their way to the device.
    """
    top, left, height, width, _ = box.tolist()
    part, finest = image[:, top : top + height, left : left + width], _FINEST * size
    if max(height, width) <= finest:
        return part
    return functional.resize(part, [min(height, finest), min(width, finest)], BILINEAR, antialias=True)


def resize_cut(part: Tensor, flip: bool, size: int) -> Tensor:
    """What `cut_out` gave, as the network sees it in training: uint8 `[3, h, w]` -> uint8 `[3, S, S]`."""
    seen = functional.resize(part, [size, size], BILINEAR, antialias=True)
    return functional.horizontal_flip(seen) if flip else seen


def center_image(image: Tensor, size: int, test_resize: float | None) -> Tensor:
    """The test-time view of one decoded image: uint8 `[3, h, w]` -> uint8 `[3, S, S]`."""
    target = list(_test_size(image.shape[1], image.shape[2], size, test_resize))
    return functional.center_crop(functional.resize(image, target, BICUBIC, antialias=True), [size, size])
