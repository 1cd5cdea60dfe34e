"""DAPO (2503.14476): clip higher, every token alike, no group without a difference, no cut texts.

Its dynamic sampling (section 3.2, eq. 11) draws prompts until a batch is full of groups whose
rewards differ, since the others have no gradient and only make the batch smaller. Dreaming does
that (``dreaming/line.py``), within a bound; elsewhere such groups are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sleeprl.algorithms.base import Advantages, GroupClipped, RewardBatch


@dataclass(frozen=True)
class DAPO(GroupClipped):
    """redraws: an update sets aside at most so many times its number of groups, each for another
    group in its place; then it goes on with what it has. 0 draws none anew.

    overlong: in the last so many tokens before the limit a reward falls on a line, by
    ``overlong_penalty`` at the limit itself (its soft overlong punishment, eq. 13); 0 is none."""

    clip_high: float = 0.28
    mean: str = "token"
    skip_equal: bool = True
    redraws: int = 1
    overlong: int = 0
    overlong_penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlong < 0:
            raise ValueError(f"overlong={self.overlong} must be at least 0 tokens")
        if self.redraws < 0 or self.redraws != int(self.redraws):
            raise ValueError(f"redraws={self.redraws} must be a whole number, at least 0")

    def advantages(self, scores: RewardBatch) -> Advantages:
        return super().advantages(replace(scores, rewards=self.shaped(scores)))

    def shaped(self, scores: RewardBatch) -> list[float | None]:
        """Rewards less what length costs."""
        if not self.overlong:
            return list(scores.rewards)
        start = scores.limit - self.overlong
        over = [max(0, length - start) for length in scores.lengths]
        return [
            r if r is None or not n else r - self.overlong_penalty * n / self.overlong
            for r, n in zip(scores.rewards, over, strict=True)
        ]


@dataclass(frozen=True)
class DAPOUnscaled(DAPO):
    """Not over the group's deviation, which makes much of a group that nearly agrees (method 6.1)."""

    normalise: bool = False
