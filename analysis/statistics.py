"""Tests on paired differences over seeds: pure functions on `n` differences, method minus baseline, `[n]`.

The seeds are the sample: a p value speaks about seeds (class orders, initial weights, images) of the same stream, not
about other data. Where a test is undefined the result is None, never a number that merely looks like one:

- one pair has no spread, so there is neither an interval nor a t test;
- differences that are the same on every seed have no spread either: the t statistic would be x / 0. The signed-rank
  test, which needs none, stays defined.

Differences are rounded to `DECIMALS` first: those that are equal in exact arithmetic must not become a spread, or
different ranks, by rounding errors of subtraction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

DECIMALS = 9


@dataclass(frozen=True)
class Paired:
    """A method against the baseline on `n` common seeds, in the unit of the measure; None where a figure is undefined.

    `low`, `high`: the two-sided interval of the mean difference. `wilcoxon_smallest_p`: the smallest p that the
    signed-rank test can give with so many seeds. `no_worse_p`, `equal_p`: None too for a measure without a margin.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    t_p: float | None
    wilcoxon_p: float | None
    wilcoxon_smallest_p: float
    no_worse_p: float | None
    equal_p: float | None
    note: str


def paired(method: Sequence[float], baseline: Sequence[float], margin: float | None = None, higher_is_better: bool = True
           ) -> Paired:
    """Everything about one measure of two methods; entry `i` of both comes from the same seed.

    With a `margin`, no-worse and equivalence are tested too; for a measure that is better when lower, no worse means
    that the difference is below `+margin`. Raises ValueError for sequences of unlike length or without an entry.
    """
    if len(method) != len(baseline) or not len(method):
        raise ValueError(f"{len(method)} values cannot be paired with {len(baseline)}")
    d = np.round(np.subtract(method, baseline, dtype=np.float64), DECIMALS)
    low, high = interval(d) or (None, None)
    return Paired(
        n=len(d), mean=float(d.mean()), sd=float(d.std(ddof=1)) if len(d) > 1 else None, low=low, high=high, t_p=t_p(d),
        wilcoxon_p=wilcoxon_p(d), wilcoxon_smallest_p=smallest_wilcoxon_p(len(d)),
        no_worse_p=None if margin is None else no_worse_p(d if higher_is_better else -d, margin),
        equal_p=None if margin is None else equal_p(d, margin), note=_note(d))


def has_spread(d: np.ndarray) -> bool:
    """Whether the t statistic of the differences is defined: two at least, and not all the same."""
    return len(d) > 1 and np.ptp(d) > 0


def interval(d: np.ndarray, confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of the mean difference; assumes differences drawn independently from a normal distribution."""
    if not has_spread(d):
        return None
    low, high = stats.ttest_1samp(d, 0.0).confidence_interval(confidence)
    return float(low), float(high)


def t_p(d: np.ndarray) -> float | None:
    """Two-sided paired t test of H0 `mean difference = 0`; assumes independent, normally distributed differences."""
    return float(stats.ttest_1samp(d, 0.0).pvalue) if has_spread(d) else None


def no_worse_p(d: np.ndarray, margin: float) -> float | None:
    """One-sided paired t test of H0 `mean difference <= -margin`, of differences of which larger is better.

    A small p speaks for "no worse by `margin`". Assumes independent, normally distributed differences.
    """
    return float(stats.ttest_1samp(d, -margin, alternative="greater").pvalue) if has_spread(d) else None


def equal_p(d: np.ndarray, margin: float) -> float | None:
    """TOST (Schuirmann, 1987) of H0 `|mean difference| >= margin`: the larger p of the two one-sided paired t tests.

    A small p speaks for "equal within `margin`". Assumes independent, normally distributed differences.
    """
    if not has_spread(d):
        return None
    lower = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    upper = stats.ttest_1samp(d, margin, alternative="less").pvalue
    return float(max(lower, upper))


def wilcoxon_p(d: np.ndarray) -> float | None:
    """Two-sided Wilcoxon signed-rank test of H0 `the differences are symmetric about 0`; assumes them independent.

    Zeros are dropped, as Wilcoxon did. Exact up to 50 differences (13 where some are zero or tie in size), by the normal
    approximation beyond. 1 when all are zero: every assignment of signs looks the same. None for one pair.
    """
    if len(d) < 2:
        return None
    return float(stats.wilcoxon(d).pvalue) if d.any() else 1.0


def smallest_wilcoxon_p(n: int) -> float:
    """The smallest two-sided p of the signed-rank test with `n` pairs: two of the `2^n` assignments of signs."""
    return min(1.0, 2.0 / 2.0**n)


def _note(d: np.ndarray) -> str:
    if len(d) == 1:
        return "one seed: no interval, no test"
    if not d.any():
        return "identical on every seed: no interval, no t test"
    if not has_spread(d):
        return "the same difference on every seed: no interval, no t test"
    zeros = int((d == 0).sum())
    dropped = f"Wilcoxon drops {zeros} zero{'s' * (zeros > 1)}: its p is at least {smallest_wilcoxon_p(len(d) - zeros):.4g}"
    return dropped if zeros else ""
