"""Learning to Imitate (method 2.4, step 2): what continuing a teacher's text is worth."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from sleeprl.text.normalise import normalise


def lexical(
    student: Sequence[int], teacher: Sequence[int], threshold: float, z0_mode: str = "ratio"
) -> float:
    """Return r_abs = 1 - z / max length when z is within the threshold, else 0 (eq. 4); in [0, 1].

    z is the Levenshtein distance on token ids. z0_mode: ``ratio`` takes ``threshold``
    as a share of the longer text, because a raw distance punishes long texts; ``abs``
    is the paper's formula, a number of edits.
    """
    if z0_mode not in ("ratio", "abs"):
        raise ValueError(f"z0_mode={z0_mode!r} must be 'ratio' or 'abs'")
    longest = max(len(student), len(teacher))
    if longest == 0:
        return 1.0
    distance = Levenshtein.distance(student, teacher)
    most = threshold * longest if z0_mode == "ratio" else threshold
    return 1.0 - distance / longest if distance <= most else 0.0


def semantic(student: str, teacher: str) -> float:
    """Return 1 when both texts are the same after ``normalise``: the exact judge."""
    return float(normalise(student) == normalise(teacher))


def imitation_reward(
    student: Sequence[int],
    teacher: Sequence[int],
    judgement: float,
    *,
    gamma: float,
    threshold: float,
    z0_mode: str = "ratio",
) -> float:
    """Return r = gamma * r_sem + (1 - gamma) * r_abs (eq. 3), in [0, 1].

    Args:
        student, teacher: Token ids.
        judgement: r_sem, 0 or 1, of a judge (``judges``).
        gamma: Share of r_sem.
        threshold, z0_mode: See ``lexical``.
    """
    return gamma * judgement + (1.0 - gamma) * lexical(student, teacher, threshold, z0_mode)
