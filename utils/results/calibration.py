"""How far the confidence of predictions is from how often they are right: expected calibration error (Guo et al., 2017).

The confidence of a prediction is the largest softmax probability of its logits over all seen classes, at temperature 1: of a
method that predicts by cosines these are its logits, and its softmax is as flat as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 15  # of equal width, as in Guo et al.
# Confidences are added up as whole numbers of this unit, so that their sum hangs on no order of batches or processes.
UNIT = 2.0**-30


@dataclass(frozen=True)
class Calibration:
    """Sums over test images by confidence; bin `b` has confidences in `(b / BINS, (b + 1) / BINS]`.

    `images`: how many. `right`: of which the true class is first. `confidence`: the sum of their confidences.
    """

    images: list[int]
    right: list[int]
    confidence: list[float]

    @classmethod
    def of(cls, tally: Tensor) -> "Calibration":
        """From a sum of `tally_confidence`, int64 `[3, BINS]`; waits for the device."""
        images, right, units = tally.tolist()
        return cls(images, right, [UNIT * count for count in units])

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> "Calibration | None":
        """From a task's record; None where that is older than this figure."""
        return cls(**entry["calibration"]) if "calibration" in entry else None

    def error(self) -> float | None:
        """Expected calibration error in points: the mean over the images of their bin's `|accuracy - mean confidence|`.

        None without an image.
        """
        images = sum(self.images)
        gaps = (abs(right - confidence) for right, confidence in zip(self.right, self.confidence, strict=True))
        return 100 * math.fsum(gaps) / images if images else None


def tally_confidence(logits: Tensor, right: Tensor) -> Tensor:
    """Sums of one batch by confidence where it is, int64 `[3, BINS]` (images, right ones, confidences in `UNIT`), to be added
    up over batches and processes.

    `logits`: `[n, seen]`; `right`: bool `[n]`. Logits that are not numbers count as full confidence, so that a network that
    has diverged is not well calibrated.
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    confidence = logits.softmax(1, dtype=kind).amax(1).nan_to_num(nan=1.0)
    per_image = torch.stack([torch.ones_like(right, dtype=torch.long), right.long(), (confidence / UNIT).round().long()])
    tally = torch.zeros(3, BINS, dtype=torch.long, device=logits.device)
    return tally.index_add_(1, (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1), per_image)
