"""DAPO (2503.14476): clip higher, every token alike, no group without a difference, no cut texts.

Its dynamic sampling (section 3.2, eq. 11) draws prompts until a batch is full of groups whose
rewards differ, since the others have no gradient and only make the batch smaller. Dreaming does
that within a bound (``dreaming/admission.py``); elsewhere such groups are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sleeprl.algorithms.base import Advantages, GroupClipped, RewardBatch


@dataclass(frozen=True)
class DAPO(GroupClipped):
    """GRPO with DAPO's four changes."""

    clip_high: float = 0.28
    """How far above 1 a ratio counts."""
    loss_aggregation: str = "token"
    """See ``Algorithm.loss_aggregation``."""
    filter_zero_std: bool = True
    """Pass over a group whose rewards are all equal."""
    max_resample_rounds: int = 1
    """An update replaces at most so many times its number of groups, then goes on with what it
    has. 0 replaces none."""
    overlong_buffer_tokens: int = 0
    """In the last so many tokens before the limit a reward falls on a line (eq. 13); 0 is none."""
    overlong_penalty: float = 1.0
    """By how much it has fallen at the limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlong_buffer_tokens < 0:
            raise ValueError(
                f"overlong_buffer_tokens={self.overlong_buffer_tokens} must be at least 0 tokens"
            )
        rounds = self.max_resample_rounds
        if rounds < 0 or rounds != int(rounds):
            raise ValueError(f"max_resample_rounds={rounds} must be a whole number, at least 0")

    def advantages(self, rewards: RewardBatch) -> Advantages:
        return super().advantages(replace(rewards, rewards=self.shape_rewards(rewards)))

    def is_informative(self, rewards: RewardBatch) -> bool:
        return super().is_informative(replace(rewards, rewards=self.shape_rewards(rewards)))

    def shape_rewards(self, batch: RewardBatch) -> list[float | None]:
        """Return the rewards less what length costs."""
        if not self.overlong_buffer_tokens:
            return list(batch.rewards)
        start = batch.max_response_tokens - self.overlong_buffer_tokens
        over = [max(0, length - start) for length in batch.lengths]
        return [
            r if r is None or not n else r - self.overlong_penalty * n / self.overlong_buffer_tokens
            for r, n in zip(batch.rewards, over, strict=True)
        ]


@dataclass(frozen=True)
class DAPOUnscaled(DAPO):
    """DAPO without the group's deviation, which makes much of a group that nearly agrees."""

    normalise: bool = False
    """Divide by the group's deviation."""
