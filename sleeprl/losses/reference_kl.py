"""KL from the policy to its reference, estimated on the sampled tokens.

Schulman's three estimators of KL(policy || reference), with d = log policy - log reference:

    k1 = d                    unbiased, high variance, can be negative
    k2 = d^2 / 2              biased, low variance
    k3 = exp(-d) - 1 + d      unbiased, never negative (GRPO's)

In a loss the gradient matters (2506.09477). k2 and k3 have their own gradients. The gradient of k1
is that of log policy, which has mean 0 and would not train anything. So k1 uses the gradient of the
KL itself, d times the gradient of log policy. That equals subtracting d from the reward, and in
expectation the gradient of k2.
"""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def reference_kl(logprobs_BR: Tensor, reference_BR: Tensor, estimator: str) -> Tensor:
    """Estimate the KL to the reference at each token, to be minimised.

    Args:
        logprobs_BR: Log-probabilities under the policy, in nats.
        reference_BR: Log-probabilities under the reference, in nats. They get no gradient.
        estimator: One of ``ESTIMATORS``.

    Returns:
        Estimates [B, R], in nats.

    Raises:
        ValueError: The estimator is unknown.
    """
    difference_BR = logprobs_BR - reference_BR.detach()
    if estimator == "k1":
        value_BR = difference_BR.detach()
        return value_BR + value_BR * (logprobs_BR - logprobs_BR.detach())
    if estimator == "k2":
        return 0.5 * difference_BR.square()
    if estimator == "k3":
        return torch.exp((-difference_BR).clamp(max=20.0)) - 1.0 + difference_BR
    raise ValueError(f"estimator={estimator!r} must be one of {', '.join(ESTIMATORS)}")
