"""Apply elastic weight consolidation under ZeRO-3: each rank pulls the part of the model it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sleeprl.losses.ewc import diagonal_fisher, ewc_gradient, ewc_penalty
from sleeprl.trainer.batching import TrainingExample, student_inputs
from sleeprl.trainer.response_model import all_logits
from sleeprl.trainer.state import trained_parameters


class EWCRegularizer:
    """Add the penalty's gradient to the gradients that ZeRO-3 has partitioned.

    The penalty is a sum over single numbers, so no rank needs more of the model than its own
    partition. Through autograd the penalty would have to gather whole parameters.
    """

    def __init__(
        self,
        trained: Sequence[Any],
        origin: Sequence[Tensor],
        fisher: Sequence[Tensor],
        strength: float,
    ) -> None:
        """Cut the whole tensors into this rank's shards.

        Args:
            trained: Parameters of the engine.
            origin: What each of them was, whole.
            fisher: How much each of their numbers matters, whole.
            strength: Weight of the penalty.
        """
        self.strength = strength
        self.shards = [
            (parameter, _shard(parameter, value.detach()), _shard(parameter, matters))
            for parameter, value, matters in zip(trained, origin, fisher, strict=True)
        ]

    @classmethod
    def from_texts(
        cls,
        module: nn.Module,
        frozen_copy: nn.Module,
        rows: Sequence[TrainingExample],
        strength: float,
        seed: int,
    ) -> EWCRegularizer:
        """Estimate the Fisher information of the frozen copy and pull the module back to it.

        Args:
            module: The engine's module, of which every parameter is trained.
            frozen_copy: A ``ResponseModel`` of it as it was, on its device.
            rows: Texts on which the Fisher information is estimated.
            strength: Weight of the penalty.
            seed: Of the tokens whose scores make the Fisher information.
        """
        trained = trained_parameters(module)
        origin = {n: p for n, p in frozen_copy.named_parameters() if n in trained}
        for parameter in origin.values():
            parameter.requires_grad_(True)
        device = next(iter(origin.values())).device
        passes = (
            frozen_copy(all_logits, *student_inputs([row], device))[0]
            for row in rows
            if row.response_ids
        )
        generator = torch.Generator(device).manual_seed(seed)
        fisher = diagonal_fisher(list(origin.values()), passes, generator)
        frozen_copy.requires_grad_(False)
        return cls(list(trained.values()), list(origin.values()), fisher, strength)

    @torch.no_grad()
    def add_gradient(self) -> float:
        """Add the pull, between the last backward pass and the step.

        Returns:
            This rank's share of the penalty, in the loss's units; the ranks' sum is the whole.
        """
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_grad,
            safe_set_local_grad,
        )

        penalty = 0.0
        for parameter, origin, fisher in self.shards:
            value = safe_get_local_fp32_param(parameter)
            gradient = safe_get_local_grad(parameter)
            pull = self.strength * ewc_gradient(value, origin, fisher)
            safe_set_local_grad(parameter, gradient + pull)
            penalty += self.strength * float(ewc_penalty(value, origin, fisher))
        return penalty


def _shard(parameter: Any, whole: Tensor) -> Tensor:
    """Return this rank's piece of a tensor, cut as ZeRO-3 cuts the parameter of its shape."""
    size = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank()
    piece = whole.float().flatten()[rank * size : (rank + 1) * size]
    # The last piece is padded; a Fisher of 0 there pulls at nothing.
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))
