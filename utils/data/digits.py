"""The data set `digits`: the 1797 handwritten digits that come with scikit-learn, 8 x 8 pixels in 17 grays.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits as read_digits
from torch.nn import functional

from utils.rng import uniforms

SIZE = 32
TEST_FRACTION = 0.2
_SEED = 0
_INK = 16.0  # the darkest of the gray levels


def load_digits() -> tuple[torch.Tensor, np.ndarray, torch.Tensor, np.ndarray, list[str]]:
    """Train images, train labels, test images, test labels and class names.

    Images are uint8 `[n, 3, 32, 32]`, light ink on dark paper, enlarged bicubically; labels are int64 `[n]`. A
    fixed fifth of every class is the test set. The images keep scikit-learn's order within both parts.
    """
    bunch = read_digits()
    labels = bunch.target.astype(np.int64)
    test = _test_part(labels)
    images = _enlarge(bunch.images)
    names = [str(digit) for digit in range(10)]
    return images[torch.from_numpy(~test)], labels[~test], images[torch.from_numpy(test)], labels[test], names


def _test_part(labels: np.ndarray) -> np.ndarray:
    """Bool `[n]`: in every class, the `TEST_FRACTION` of the images that drew the smallest numbers."""
    draw = uniforms(_SEED, "digits", "split", index=np.arange(len(labels)), count=1)[:, 0]
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        test[members[np.argsort(draw[members])[: round(TEST_FRACTION * len(members))]]] = True
    return test


def _enlarge(images: np.ndarray) -> torch.Tensor:
    """Gray levels 0..16 `[n, 8, 8]` -> uint8 `[n, 3, 32, 32]`; in float64, so that all machines round alike."""
    gray = torch.from_numpy(images.astype(np.float64) / _INK)[:, None]
    large = functional.interpolate(gray, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return (large.clamp(0.0, 1.0) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
