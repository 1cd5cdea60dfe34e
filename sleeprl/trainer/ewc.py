"""Elastic weight consolidation under ZeRO-3: each rank pulls the part of the model it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sleeprl.losses.ewc import ewc_gradient, ewc_penalty


class EWCRegularizer:
    """Adds the penalty's gradient to the gradients that ZeRO-3 has partitioned.

    The penalty is a sum over single numbers, so no rank needs more of the model than its own
    partition, and what goes through a whole parameter in autograd would have to gather it.

    trained: parameters of the engine. origin, fisher: for each, what it was and how much
    it matters, whole. strength: weight of the penalty.
    """

    def __init__(
        self,
        trained: Sequence[Any],
        origin: Sequence[Tensor],
        fisher: Sequence[Tensor],
        strength: float,
    ) -> None:
        self.strength = strength
        self.held = [
            (parameter, _partition(parameter, value.detach()), _partition(parameter, matters))
            for parameter, value, matters in zip(trained, origin, fisher, strict=True)
        ]

    @torch.no_grad()
    def pull(self) -> float:
        """Between the last backward pass and the step. This rank's share of the penalty, in the
        units of the loss; the ranks' sum is the whole."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_grad,
            safe_set_local_grad,
        )

        penalty = 0.0
        for parameter, anchor, fisher in self.held:
            value = safe_get_local_fp32_param(parameter)
            gradient = safe_get_local_grad(parameter)
            pull = self.strength * ewc_gradient(value, anchor, fisher)
            safe_set_local_grad(parameter, gradient + pull)
            penalty += self.strength * float(ewc_penalty(value, anchor, fisher))
        return penalty


def _partition(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's piece of a tensor of the parameter's shape, cut as ZeRO-3 cuts the parameter."""
    size = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank()
    piece = whole.float().flatten()[rank * size : (rank + 1) * size]
    # The last piece is padded; a Fisher of 0 there pulls at nothing.
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))
