"""Learning to Imitate, step 2 of Knowledge Seeding: rewards a text that goes on as the teacher's does."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from sleeprl.text.normalise import normalise


def lexical(
    student: Sequence[int], teacher: Sequence[int], threshold: float, z0_mode: str = "ratio"
) -> float:
    """Compute r_abs = 1 - z / max length if z is within the threshold, else 0 (eq. 4).

    z is the Levenshtein distance of the token ids.

    Args:
        student: Token ids of the student's text.
        teacher: Token ids of the teacher's text.
        threshold: Largest z that is rewarded.
        z0_mode: ``ratio`` takes ``threshold`` as a share of the longer text, because an absolute
            distance penalises long texts; ``abs`` is the paper's formula, a number of edits.

    Returns:
        The reward, in [0, 1]; 1 for two empty texts.

    Raises:
        ValueError: ``z0_mode`` is unknown.
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
    """Return 1 if both texts are equal after ``normalise``, else 0: the verdict of the exact judge."""
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
    """Compute r = gamma * r_sem + (1 - gamma) * r_abs (eq. 3), in [0, 1].

    Args:
        student: Token ids of the student's text.
        teacher: Token ids of the teacher's text.
        judgement: r_sem, 0 or 1, the verdict of a judge (``judges``).
        gamma: Weight of r_sem.
        threshold: See ``lexical``.
        z0_mode: See ``lexical``.
    """
    return gamma * judgement + (1.0 - gamma) * lexical(student, teacher, threshold, z0_mode)
