"""Ask the smaller self: by the trainer's own module, a frozen copy of it, or actors of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sleeprl.memory.gated_mlp import load_training_form, smaller_self
from sleeprl.memory.slots import Slots
from sleeprl.trainer.batching import PADDING_EXAMPLE, Targets, TrainingExample, micro_batches
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.response_model import ResponseModel
from sleeprl.trainer.teacher import Teachers, compute_targets
from sleeprl.trainer.teacher_cache import TeacherCache


class SmallerSelf:
    """The model as it was before this training, as one rank asks it.

    A model that grows contains it: its new expert is off. Of a model that is trained in full a
    frozen copy is loaded when it is first needed.
    """

    def __init__(
        self, engine: Any, options: TrainerOptions, device: torch.device, teachers: Teachers | None
    ) -> None:
        self.cache = TeacherCache()
        self._engine, self._options, self._device = engine, options, device
        self._teachers = teachers

    def forward(self, *arguments: Any) -> Any:
        """Call it as a ``ResponseModel``. Collective where the model has grown."""
        if self._options.slot is None:
            return self.frozen_copy(*arguments)
        with smaller_self(self._engine.module):
            return self._engine(*arguments)

    def head(self) -> Tensor | None:
        """Return its own language head [V, H], which a model that is trained in full has."""
        if self._options.slot is not None:
            return None
        return self.frozen_copy.get_parameter("model.lm_head.weight")

    @cached_property
    def frozen_copy(self) -> nn.Module:
        """The model of the checkpoint; needed only where every parameter is trained."""
        directory, dtype = Path(self._options.checkpoint), getattr(torch, self._options.dtype)
        slots = Slots.load(directory)
        assert slots is not None
        model = load_training_form(directory, slots, dtype)
        return ResponseModel(model.to(self._device)).requires_grad_(False)

    @torch.no_grad()
    def targets(self, rows: Sequence[TrainingExample], k: int) -> list[Targets | None]:
        """Return its targets of this rank's rows. Collective, unless teachers are actors.

        Args:
            rows: Texts, different on every rank.
            k: Size of the top k; 0 asks for hidden states.
        """
        return self.cache.get_or_compute(rows, k, partial(self._compute_targets, k=k))

    def _compute_targets(self, rows: Sequence[TrainingExample], k: int) -> list[Targets]:
        if self._teachers is not None:
            budget = self._options.micro_batch_tokens
            return self._teachers.targets(rows, k, budget) if rows else []
        found: dict[int, Targets] = {}
        for batch in self._equalise_batches(rows):
            answers = compute_targets(self.forward, batch, k, self._device)
            found |= zip(map(id, batch), answers, strict=True)
        return [found[id(row)] for row in rows]

    def _equalise_batches(self, rows: Sequence[TrainingExample]) -> list[list[TrainingExample]]:
        """Return this rank's rows in batches, as many as on the rank that has most."""
        budget, length = self._options.micro_batch_tokens, TrainingExample.teacher_length
        found = micro_batches(rows, length, budget, rank=0, ranks=1) if rows else []
        most = torch.tensor([len(found)], device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return found + [[PADDING_EXAMPLE] for _ in range(int(most) - len(found))]
