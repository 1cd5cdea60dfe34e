"""Inputs of the loss: weights of its terms, options, and a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sleeprl.algorithms.base import Algorithm
from sleeprl.algorithms.dapo import DAPO
from sleeprl.losses.off_policy import ImportanceWeight


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms for the rows of one part."""

    pg: float = 0.0
    """Policy gradient."""
    ce: float = 0.0
    """Cross-entropy."""
    kl: float = 0.0
    """Divergence from the teacher."""
    activity_penalty: float = 0.0
    """Weight of the new expert's activity on the part's tokens, including those of the prompts
    (``ActivationMeter``). The trainer adds this penalty, because it does not depend on the logits."""


@dataclass(frozen=True)
class LossOptions:
    """Settings of the loss terms, the same for all parts."""

    beta: float = 0.0
    """``kl`` term: interpolates between forward (0) and reverse KL (1), see ``divergence``."""
    top_k: int = 32
    """``kl`` term: number of tokens to compare."""
    support: str = "teacher"
    """``kl`` term: whose likeliest tokens to compare, ``teacher`` or ``student``; or ``full``."""
    pointwise_clip: float | None = None
    """``kl`` term: upper bound of the contribution of one token of the support, in nats."""
    algorithm: Algorithm = DAPO()
    """``pg`` term: the algorithm."""
    max_response_tokens: int = 0
    """Maximum length of a response, for an algorithm whose loss is a mean over a ``constant``."""
    importance_weight: ImportanceWeight = ImportanceWeight()
    """Off-policy correction. With a correction, the algorithm's ratio is taken to the current
    policy, where its value is 1 but its gradient is not zero, and the importance weight multiplies
    the token's loss (the decoupled objective, 2505.24298, with one step per batch). ``off`` takes
    the ratio to the policy that sampled, which the algorithm itself bounds."""
    reference_kl: float = 0.0
    """Weight of the KL to the reference policy within the ``pg`` term."""
    reference_estimator: str = "k3"
    """Estimator of that KL, see ``losses.reference_kl``."""

    def __post_init__(self) -> None:
        if self.algorithm.loss_aggregation == "constant" and self.max_response_tokens <= 0:
            raise ValueError(
                f"max_response_tokens={self.max_response_tokens} must be positive for a mean over "
                "a constant"
            )


@dataclass
class LossBatch:
    """Inputs of the loss for B rows, padded to R response tokens.

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
    """Advantages for the ``pg`` term; [B, 1] if all tokens of a row share one. NaN means none: the
    term skips the row and does not average it in as zero."""
    rollout_logprobs_BR: Tensor
    """Log-probabilities under the policy that sampled, in nats."""
    age: Sequence[int | None] = ()
    """Number of versions by which the oldest weights that sampled each row trail the trainer's, or
    None [B]."""
    reference_logprobs_BR: Tensor | None = None
    """Log-probabilities under the reference policy, in nats."""
    values_BR: Tensor | None = None
    """The critic's values before the update."""
    returns_BR: Tensor | None = None
    """Regression targets of the critic."""
    teacher_ids_BRK: Tensor | None = None
    """Ids of the teacher's K likeliest tokens."""
    teacher_logprobs_BRK1: Tensor | None = None
    """Their log-probabilities, then that of all other tokens together, in nats."""
    teacher_logits_BRV: Tensor | None = None
    """The teacher's logits over the vocabulary."""
    teacher_hidden_BRH: Tensor | None = None
    """The teacher's last hidden states."""
