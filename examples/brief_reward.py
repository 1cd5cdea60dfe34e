"""A reward of one's own: dreams that teach, but in few words.

From the root of the repository: sleeprl night examples/brief_reward.yaml
"""

from sleeprl.dreaming.types import Dream
from sleeprl.plugins import register


@register("reward", "brief")
def brief(per_token: float = 0.01):
    """Pay for the gain of a dream (see ``Dream.gain``), less a price for every token."""

    def reward(dream: Dream) -> float | None:
        if dream.parsed is None or dream.gain is None:
            return 0.0
        return 10 * dream.gain - per_token * len(dream.token_ids)

    return reward
