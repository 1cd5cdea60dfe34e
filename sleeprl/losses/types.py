"""What the loss is made of: weights of its terms, options, and a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sleeprl.algorithms.base import Algorithm
from sleeprl.algorithms.dapo import DAPO
from sleeprl.losses.off_policy import ImportanceWeight


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss's terms for the rows of one part."""

    pg: float = 0.0
    """Policy gradient."""
    ce: float = 0.0
    """Cross-entropy."""
    kl: float = 0.0
    """Divergence from the teacher."""
    activity_penalty: float = 0.0
    """Activity of the new expert on the part's tokens, the prompts' too (``ActivationMeter``). It
    does not come from the logits: the trainer adds it."""


@dataclass(frozen=True)
class LossOptions:
    """What the terms are made of, the same for all parts."""

    beta: float = 0.0
    """Of the ``kl`` term: between forward (0) and reverse (1), see ``divergence``."""
    top_k: int = 32
    """Of the ``kl`` term: tokens that are compared."""
    support: str = "teacher"
    """Of the ``kl`` term: whose likeliest tokens these are, or ``full``."""
    pointwise_clip: float | None = None
    """Of the ``kl`` term: most that one token of the support may contribute."""
    algorithm: Algorithm = DAPO()
    """Of the ``pg`` term."""
    max_response_tokens: int = 0
    """Most tokens of a response, for an algorithm whose loss is a mean over a ``constant``."""
    importance_weight: ImportanceWeight = ImportanceWeight()
    """Off-policy correction of texts of another policy. The algorithm's ratio is then taken to the
    current policy, where it is 1 in value and not in gradient, and the correction weighs the token
    (the decoupled objective, 2505.24298, with one step per batch). ``off`` takes the ratio to the
    policy that sampled, which the algorithm itself bounds."""
    reference_kl: float = 0.0
    """Weight of the KL to the reference policy within the ``pg`` term."""
    reference_estimator: str = "k3"
    """Which estimator of that KL, see ``losses.reference_kl``."""

    def __post_init__(self) -> None:
        if self.algorithm.loss_aggregation == "constant" and self.max_response_tokens <= 0:
            raise ValueError(
                f"max_response_tokens={self.max_response_tokens} must be positive for a mean over "
                "a constant"
            )


@dataclass
class LossBatch:
    """What the loss needs of B rows, padded to R response tokens.

    The teacher of the ``kl`` term is one of: ``teacher_ids_BRK`` with ``teacher_logprobs_BRK1``;
    ``teacher_logits_BRV``; or, for ``chunked_combined_loss``, ``teacher_hidden_BRH``.
    """

    tokens_BR: Tensor
    """Ids of the response tokens."""
    mask_BR: Tensor
    """1 on response tokens."""
    part: Sequence[str]
    """Name of each row's part [B]."""
    advantages_BR: Tensor
    """For the ``pg`` term; [B, 1] where all tokens of a row share one. NaN is none: the term passes
    over the row, which is not a zero to average with."""
    rollout_logprobs_BR: Tensor
    """Log-probabilities under the policy that sampled, in nats."""
    age: Sequence[int | None] = ()
    """By how many versions the oldest weights in each row trail the trainer's, or None [B]."""
    reference_logprobs_BR: Tensor | None = None
    """Log-probabilities under the reference policy, in nats."""
    values_BR: Tensor | None = None
    """The critic's values before the step."""
    returns_BR: Tensor | None = None
    """What the critic is to learn."""
    teacher_ids_BRK: Tensor | None = None
    """The teacher's K likeliest tokens."""
    teacher_logprobs_BRK1: Tensor | None = None
    """Their log-probabilities, and the last that of all other tokens together."""
    teacher_logits_BRV: Tensor | None = None
    """The teacher's logits over the vocabulary."""
    teacher_hidden_BRH: Tensor | None = None
    """The teacher's last hidden states."""
