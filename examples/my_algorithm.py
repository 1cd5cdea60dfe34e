"""Learn by an algorithm of your own, here one with a critic: advantage actor-critic (1602.01783).

From the root of the repository: sleeprl night examples/my_algorithm.yaml
"""

from dataclasses import dataclass

from sleeprl.algorithms.base import CriticAlgorithm


@dataclass(frozen=True)
class ActorCritic(CriticAlgorithm):
    """The reward less the critic's value, at every token. ``CriticAlgorithm`` has the rest."""

    value_weight: float = 0.5
    """Weight of the critic's loss."""

    def estimate_advantages(self, rewards, values):
        pairs = list(zip(rewards, values, strict=True))
        advantages = [
            None if reward is None else [reward - v for v in row] for reward, row in pairs
        ]
        returns = [row if reward is None else [reward] * len(row) for reward, row in pairs]
        return advantages, returns

    def surrogate(self, inputs):
        return -inputs.log_ratio_BR().exp() * inputs.advantages_BR
