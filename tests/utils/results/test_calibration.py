"""utils/results/calibration.py: expected calibration error against a plain loop, and worked by hand."""

import math

import pytest
import torch

from utils.results.calibration import BINS, Calibration, tally_confidence
from utils.rng import generator


def plain_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The definition of Guo et al. (2017), bin by bin and image by image, in points."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        exps = [math.exp(value - max(row)) for value in row]
        confidence = max(exps) / sum(exps)
        number = next(b for b in range(15) if b / 15 < confidence <= (b + 1) / 15)
        bins.setdefault(number, []).append((confidence, row.index(max(row)) == label))
    return 100 * sum(len(members) / len(labels) * abs(sum(right for _, right in members) / len(members)
                                                      - sum(value for value, _ in members) / len(members))
                     for members in bins.values())


def tallied(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return tally_confidence(logits, logits.argmax(1) == labels)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_error_is_that_of_the_definition(scale: float, dtype: torch.dtype) -> None:
    stream = generator(0, "logits")
    logits = (scale * torch.randn(400, 7, generator=stream)).to(dtype)
    labels = torch.where(torch.rand(400, generator=stream) < 0.5, logits.argmax(1), torch.randint(7, (400,), generator=stream))
    found = Calibration.of(tallied(logits, labels))
    assert found.error() == pytest.approx(plain_error(logits, labels), abs=1e-4) and found.error() > 1
    assert sum(found.images) == 400 and sum(found.right) == (logits.argmax(1) == labels).sum()


def test_worked_by_hand() -> None:
    # Confidences 0.8 (wrong), 0.8 (right), 0.6 (right): bins of two and one image, |1/2 - 0.8| and |1 - 0.6|.
    logits = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4]]).log()
    found = Calibration.of(tallied(logits, torch.tensor([1, 1, 0])))
    assert found.error() == pytest.approx(100 * (2 * 0.3 + 0.4) / 3, abs=1e-4)
    assert found.images[11] == 2 and found.right[11] == 1 and found.confidence[11] == pytest.approx(1.6)


def test_the_ends_of_the_scale() -> None:
    sure = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    assert Calibration.of(tallied(sure, torch.tensor([0, 1]))).error() == 0
    assert Calibration.of(tallied(sure, torch.tensor([1, 0]))).error() == 100
    assert Calibration.of(tallied(sure, torch.tensor([0, 1]))).images == [0] * (BINS - 1) + [2]
    assert Calibration.of(torch.zeros(3, BINS, dtype=torch.long)).error() is None
    nothing_known = Calibration.of(tallied(torch.zeros(4, 4), torch.arange(4)))  # one of four is right, at a quarter each
    assert nothing_known.error() == pytest.approx(0)


def test_a_network_that_has_diverged_is_as_wrong_as_can_be() -> None:
    logits = torch.tensor([[1.0, float("nan")]])
    assert Calibration.of(tally_confidence(logits, torch.tensor([False]))).error() == 100


def test_the_sums_hang_on_no_order_of_batches() -> None:
    logits = torch.randn(1000, 5, generator=generator(0, "x"))
    labels = torch.randint(5, (1000,), generator=generator(0, "y"))
    whole = tallied(logits, labels)
    parts = [tallied(x, y) for x, y in zip(logits.split(17), labels.split(17), strict=True)]
    assert torch.equal(sum(parts), whole) and torch.equal(sum(reversed(parts)), whole)


def test_a_record_without_it_has_none() -> None:
    assert Calibration.of_record({"counts": {}}) is None
    entry = {"images": [1], "right": [0], "confidence": [0.5]}
    assert Calibration.of_record({"calibration": entry}).error() == 50
