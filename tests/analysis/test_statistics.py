"""analysis/statistics.py: against scipy, against cases worked by hand, and in simulations where the truth is known."""

import itertools
import warnings

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import equal_p, interval, no_worse_p, paired, smallest_wilcoxon_p, t_p, wilcoxon_p


@pytest.fixture(autouse=True)
def no_warnings():
    """An undefined test is to be seen before scipy divides by zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def differences(seed: int, n: int = 5, mean: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, n)


def signed_rank_p(d: np.ndarray) -> float:
    """The two-sided exact p of Wilcoxon's test from its definition: every assignment of signs to the ranks."""
    d = d[d != 0]
    ranks = stats.rankdata(np.abs(d))
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product([False, True], repeat=len(d))])
    observed = ranks[d > 0].sum()
    return min(1.0, 2 * min(np.mean(sums <= observed + 1e-9), np.mean(sums >= observed - 1e-9)))


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_tests_and_interval_are_those_of_scipy_on_the_pairs(n):
    rng = np.random.default_rng(n)
    method, baseline = rng.normal(60, 2, n), rng.normal(59, 2, n)
    result = paired(method, baseline, margin=0.5)
    d = method - baseline
    assert result.n == n and result.mean == pytest.approx(d.mean()) and result.sd == pytest.approx(np.std(d, ddof=1))
    assert result.t_p == pytest.approx(stats.ttest_rel(method, baseline).pvalue, rel=1e-5)
    low, high = stats.t.interval(0.95, n - 1, loc=d.mean(), scale=stats.sem(d))
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-6)
    assert result.wilcoxon_p == pytest.approx(stats.wilcoxon(method, baseline).pvalue)
    assert result.no_worse_p == pytest.approx(stats.ttest_rel(method + 0.5, baseline, alternative="greater").pvalue, rel=1e-5)
    assert result.note == ""


def test_a_case_worked_by_hand():
    # Mean 2, deviation 1, n = 3: t = 2 sqrt(3); with 2 degrees of freedom P(T > t) = (1 - t / sqrt(2 + t^2)) / 2.
    result = paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], margin=0.5)
    t = 2 * 3**0.5
    assert result.t_p == pytest.approx(1 - t / (2 + t**2) ** 0.5)
    t = 2.5 * 3**0.5
    assert result.no_worse_p == pytest.approx((1 - t / (2 + t**2) ** 0.5) / 2)
    half = 4.302652729911275 / 3**0.5  # the 97.5 % quantile of t with 2 degrees of freedom
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half))
    assert result.wilcoxon_p == result.wilcoxon_smallest_p == 0.25


@pytest.mark.parametrize("seed", range(20))
def test_tost_is_two_one_sided_tests_and_agrees_with_the_90_percent_interval(seed):
    d, margin = differences(seed, n=8, mean=0.0), 0.6
    t = [(d.mean() + margin) / stats.sem(d), (margin - d.mean()) / stats.sem(d)]
    assert equal_p(d, margin) == pytest.approx(stats.t.sf(min(t), len(d) - 1))
    low, high = interval(d, 0.9)
    assert (equal_p(d, margin) < 0.05) == (-margin < low and high < margin)
    assert equal_p(d, margin) == equal_p(-d, margin) == max(no_worse_p(d, margin), no_worse_p(-d, margin))


def test_no_worse_agrees_with_the_lower_end_of_the_90_percent_interval():
    cases = [differences(seed) for seed in range(60)]
    verdicts = [no_worse_p(d, 0.5) < 0.05 for d in cases]
    assert verdicts == [interval(d, 0.9)[0] > -0.5 for d in cases]
    assert any(verdicts) and not all(verdicts)


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5], [-1, 2, 3, -4, 5], [1, 1, 1, 2, -2], [0, 1, -2, 3, 3], [1, 0, 0, -1, 2]])
def test_wilcoxon_is_exact_with_ties_and_zeros_too(values):
    assert wilcoxon_p(np.array(values, dtype=float)) == pytest.approx(signed_rank_p(np.array(values, dtype=float)))


@pytest.mark.parametrize("n", range(2, 9))
def test_the_smallest_p_is_attained_when_all_differences_have_one_sign(n):
    d = np.arange(1.0, n + 1)
    assert wilcoxon_p(d) == wilcoxon_p(-d) == pytest.approx(smallest_wilcoxon_p(n)) == pytest.approx(2 / 2**n)
    mixed = np.concatenate([[-1.0], d[1:]])
    assert wilcoxon_p(mixed) > smallest_wilcoxon_p(n)


def test_five_seeds_never_reach_five_percent_by_wilcoxon():
    assert smallest_wilcoxon_p(5) == 0.0625 and smallest_wilcoxon_p(6) < 0.05 and smallest_wilcoxon_p(1) == 1.0


def test_one_seed_gives_a_difference_and_nothing_else():
    result = paired([61.0], [60.0], margin=0.5)
    assert (result.n, result.mean, result.wilcoxon_smallest_p) == (1, 1.0, 1.0)
    assert {result.sd, result.low, result.high, result.t_p, result.wilcoxon_p, result.no_worse_p, result.equal_p} == {None}
    assert result.note == "one seed: no interval, no test"


@pytest.mark.parametrize("shift, wilcoxon, words", [(0.0, 1.0, "identical"), (-8.0, 0.0625, "the same difference"),
                                                    (0.1, 0.0625, "the same difference")])
def test_differences_without_spread_have_no_t_test(shift, wilcoxon, words):
    baseline = np.array([60.1, 61.7, 59.3, 60.2, 58.9])  # 0.1 more is not the same float each time
    result = paired(baseline + shift, baseline, margin=0.5)
    assert result.sd == pytest.approx(0) and result.mean == pytest.approx(shift)
    assert {result.low, result.high, result.t_p, result.no_worse_p, result.equal_p} == {None}
    assert result.wilcoxon_p == pytest.approx(wilcoxon) and words in result.note


def test_dropped_zeros_are_told():
    assert "drops 2 zeros: its p is at least 0.25" in paired([1.0, 2, 3, 4, 5], [1.0, 2, 1, 1, 1]).note


def test_no_worse_of_what_is_better_when_lower():
    lower, higher = [10.0, 11.0, 12.5, 9.0, 10.0], [15.0, 15.5, 17.0, 14.2, 15.1]
    less = paired(lower, higher, margin=0.5, higher_is_better=False)
    more = paired(higher, lower, margin=0.5, higher_is_better=False)
    assert less.mean < 0 and less.no_worse_p < 0.001 and more.no_worse_p > 0.999
    assert paired(lower, higher, margin=0.5).no_worse_p > 0.999
    assert less.equal_p == pytest.approx(more.equal_p) and less.t_p == pytest.approx(more.t_p)


def test_a_measure_without_margin_has_no_verdicts():
    result = paired([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert result.no_worse_p is None and result.equal_p is None and result.t_p is not None


@pytest.mark.parametrize("method, baseline", [([], []), ([1.0], [1.0, 2.0])])
def test_what_cannot_be_paired_is_refused(method, baseline):
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(method, baseline)


@pytest.mark.slow
def test_the_interval_covers_and_the_tests_keep_their_size():
    """1000 experiments of five seeds: each rate within 3.3 standard errors of its 95 or 5 %."""
    rng, count, margin = np.random.default_rng(0), 1000, 0.5
    error = 3.3 * (0.05 * 0.95 / count) ** 0.5
    noise = rng.normal(0, 1, (count, 5))
    covered = np.mean([low < 0 < high for low, high in map(interval, noise)])
    assert abs(covered - 0.95) < error
    assert abs(np.mean([t_p(d) < 0.05 for d in noise]) - 0.05) < error
    # At the boundary of H0 the one-sided test errs in one of twenty cases; inside H0 less often.
    assert abs(np.mean([no_worse_p(d - margin, margin) < 0.05 for d in noise]) - 0.05) < error
    assert np.mean([no_worse_p(d - 2 * margin, margin) < 0.05 for d in noise[:500]]) < 0.05
    # TOST never errs more often than that, at a small spread just as often.
    assert abs(np.mean([equal_p(0.1 * d + margin, margin) < 0.05 for d in noise]) - 0.05) < error
    assert np.mean([equal_p(d + margin, margin) < 0.05 for d in noise[:500]]) < 0.05
