"""What may be said of figures: intervals, perplexity, a paired test, and the trade-off of two aims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from statistics import fmean, stdev

_Z95 = 1.959963984540054
# scipy.stats takes longer to import than torch: the functions do that, most actors need none.


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval (Student's t), infinite for fewer than two."""
    if len(values) < 2:
        return fmean(values), math.inf
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values), float(half)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion.

    Args:
        successes: Of the trials.
        n: Independent trials, at least 1.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials is not a proportion")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def perplexity(nats: float, tokens: int) -> float:
    """Return the perplexity per token of texts whose negative log-probabilities add up to ``nats``."""
    return math.exp(nats / tokens)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return mean difference, half-width of its 95 % interval, and the two-sided p of a paired t-test.

    Entry i of both is the same seed. p is NaN for fewer than two pairs, and where all differ by the
    same: so few without spread do not tell chance apart.
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
    """Estimate how likely the next draw is one that was drawn before: 1 - singletons / draws (Good 1953).

    Of draws with repetition from an unknown distribution; None without draws. known: what else
    counts as drawn, from elsewhere.
    """
    times, elsewhere = Counter(drawn), set(known)
    once = sum(count == 1 and each not in elsewhere for each, count in times.items())
    return 1.0 - once / times.total() if times else None


def trade_off(recall: float, retention: float, retention_before: float) -> float:
    """Return the harmonic mean of recall and of retention as a share of what it was before, in [0, 1]."""
    retained = min(1.0, retention / retention_before)
    return 2 * recall * retained / (recall + retained) if recall + retained else 0.0
