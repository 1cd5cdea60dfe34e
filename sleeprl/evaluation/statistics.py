"""What may be said of figures over seeds: intervals, a paired test, and the trade-off of two aims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from statistics import fmean, stdev

# scipy.stats takes longer to import than torch: the functions do that, most actors need none.


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t); infinite for fewer than two values."""
    if len(values) < 2:
        return fmean(values), math.inf
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values), float(half)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference, half-width of its 95 % interval, and the two-sided p of a paired t-test.

    Entry i of both is the same seed. p is NaN for fewer than two pairs, and where all differ by the
    same: chance cannot be told from so few without spread.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, half = interval(differences)
    if len(differences) < 2:
        return mean, half, math.nan
    if not half:  # no spread at all: the test's statistic is 0/0 or infinite
        return mean, half, math.nan if mean else 1.0
    from scipy import stats

    return mean, half, float(stats.ttest_rel(ours, theirs).pvalue)


def coverage(drawn: Iterable[Hashable], known: Collection[Hashable] = ()) -> float | None:
    """How likely the next draw is one that was drawn before: 1 - singletons / draws (Good 1953).

    Of draws with repetition from an unknown distribution; None without draws. known: what else
    counts as drawn, from elsewhere.
    """
    times, elsewhere = Counter(drawn), set(known)
    once = sum(count == 1 and each not in elsewhere for each, count in times.items())
    return 1.0 - once / times.total() if times else None


def trade_off(recall: float, retention: float, retention_before: float) -> float:
    """Harmonic mean of recall and of retention as a share of what it was before, in [0, 1]."""
    kept = min(1.0, retention / retention_before)
    return 2 * recall * kept / (recall + kept) if recall + kept else 0.0
