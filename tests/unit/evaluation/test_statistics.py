"""Intervals and tests against scipy and by hand."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sleeprl.evaluation.statistics import coverage, interval, paired, trade_off

values = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


def test_an_interval_by_hand() -> None:
    # 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / math.sqrt(3)), abs=1e-4)
    assert interval([0.5]) == (0.5, math.inf)


@given(values, st.floats(-3, 3))
def test_a_shifted_copy_differs_by_the_shift_alone(ours: list[float], shift: float) -> None:
    mean, half, p = paired([value + shift for value in ours], ours)
    assert mean == pytest.approx(shift, abs=1e-6) and half == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(p) or 0.0 <= p <= 1.0


def test_a_paired_test_is_scipy_s() -> None:
    ours, theirs = [0.9, 0.8, 0.85, 0.7], [0.5, 0.6, 0.55, 0.3]
    mean, half, p = paired(ours, theirs)
    assert p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    low, high = stats.ttest_rel(ours, theirs).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(paired([1.0], [0.0])[2]) and paired([1.0, 1.0], [1.0, 1.0])[2] == 1.0
    assert math.isnan(paired([1.0, 1.0], [0.0, 0.0])[2])


def test_coverage_is_what_comes_again() -> None:
    assert coverage("aabbbc") == pytest.approx(5 / 6)
    assert coverage("abc") == 0.0 and coverage("aaa") == 1.0 and coverage("") is None
    assert coverage("abc", known="bx") == pytest.approx(1 / 3)
    # Of 100 equally likely things, 300 draws leave out some 5 %: (1 - 1/100)^300.
    rng = random.Random(0)
    found = [coverage(rng.choices(range(100), k=300)) or 0.0 for _ in range(50)]
    assert interval(found)[0] == pytest.approx(1 - 0.99**300, abs=0.01)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 1))
def test_the_trade_off_lies_between_its_parts(recall: float, kept: float, before: float) -> None:
    found = trade_off(recall, kept, before)
    share = min(1.0, kept / before)
    assert min(recall, share) - 1e-9 <= found <= max(recall, share) + 1e-9
    assert found <= 2 * min(recall, share) + 1e-9
