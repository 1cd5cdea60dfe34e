"""How far a policy is from its reference, estimated on the tokens it sampled.

Schulman's three estimators of KL(policy || reference), with d = log policy - log reference:

    k1 = d                    unbiased, of high variance, may be negative
    k2 = d^2 / 2              biased, of low variance
    k3 = exp(-d) - 1 + d      unbiased, never negative (GRPO's)

As a loss the gradient is what counts (2506.09477). k2's and k3's are their own. That of k1, d log
policy, has mean 0 and would teach nothing, so k1 has here the gradient of the KL itself, d times
that of log policy: that of a reward that is less by d, and in expectation that of k2.
"""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def reference_kl(logprobs_BR: Tensor, reference_BR: Tensor, estimator: str) -> Tensor:
    """Return the estimate of each token [B, R], in nats, to be minimised."""
    difference_BR = logprobs_BR - reference_BR.detach()
    if estimator == "k1":
        value_BR = difference_BR.detach()
        return value_BR + value_BR * (logprobs_BR - logprobs_BR.detach())
    if estimator == "k2":
        return 0.5 * difference_BR.square()
    if estimator == "k3":
        return torch.exp((-difference_BR).clamp(max=20.0)) - 1.0 + difference_BR
    raise ValueError(f"estimator={estimator!r} must be one of {', '.join(ESTIMATORS)}")
