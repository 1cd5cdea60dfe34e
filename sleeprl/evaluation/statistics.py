"""Statistics of figures: intervals, perplexity, a paired test, coverage, and the trade-off."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from statistics import fmean, stdev

_Z95 = 1.959963984540054
# scipy.stats takes longer to import than torch and most actors do not need it, so functions import it.


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and the half-width of its 95 % interval (Student's t).

    Args:
        values: Independent samples; with fewer than two the half-width is infinite.
    """
    if len(values) < 2:
        return fmean(values), math.inf
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values), float(half)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Compute the 95 % Wilson score interval of a proportion.

    Args:
        successes: Number of successes.
        n: Independent trials, at least 1.

    Returns:
        The lower and the upper bound.

    Raises:
        ValueError: The numbers are no proportion.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials is not a proportion")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def perplexity(nats: float, tokens: int) -> float:
    """Compute the perplexity per token.

    Args:
        nats: Sum of the negative log-probabilities.
        tokens: Number of tokens.
    """
    return math.exp(nats / tokens)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Compare paired samples with a t-test.

    Args:
        ours: Values by seed.
        theirs: Values of the same seeds.

    Returns:
        The mean difference, the half-width of its 95 % interval, and the two-sided p. p is NaN for
        fewer than two pairs, and where all pairs differ by the same amount other than 0.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, half = interval(differences)
    if len(differences) < 2:
        return mean, half, math.nan
    if not half:  # without spread the test statistic is 0/0 or infinite
        return mean, half, math.nan if mean else 1.0
    from scipy import stats

    return mean, half, float(stats.ttest_rel(ours, theirs).pvalue)


def coverage(drawn: Iterable[Hashable], known: Collection[Hashable] = ()) -> float | None:
    """Estimate the probability that the next draw repeats an earlier one: 1 - singletons / draws
    (Good 1953).

    The draws are with repetition, from an unknown distribution.

    Args:
        drawn: The draws.
        known: What else counts as drawn, from elsewhere.

    Returns:
        The estimate; None without draws.
    """
    times, elsewhere = Counter(drawn), set(known)
    once = sum(count == 1 and each not in elsewhere for each, count in times.items())
    return 1.0 - once / times.total() if times else None


def trade_off(recall: float, retention: float, retention_before: float) -> float:
    """Compute the harmonic mean of recall and retained knowledge, in [0, 1].

    Args:
        recall: Recall after the night, a share.
        retention: Retention after the night, a share.
        retention_before: Retention before the night; retained knowledge is relative to it.
    """
    retained = min(1.0, retention / retention_before)
    return 2 * recall * retained / (recall + retained) if recall + retained else 0.0
