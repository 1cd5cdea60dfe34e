"""Ask the smaller self about texts, on this process's device or in actors of its own.

Where the teacher does not fit beside the trainer, or where there are machines to spare,
``resources.teachers`` actors have a frozen copy each. Their numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.config.schema import ResourcesConfig
from sleeprl.losses.chunked import chunked_top_k
from sleeprl.memory.gated_mlp import become_smaller_self
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.trainer.batching import Targets, TrainingExample, make_loss_batch, micro_batches
from sleeprl.trainer.packing import inputs
from sleeprl.trainer.response_model import ResponseModel


@torch.no_grad()
def compute_targets(
    forward: Callable[..., Any], batch: Sequence[TrainingExample], k: int, device: torch.device
) -> list[Targets]:
    """Return the teacher's targets of each row of one batch, on the CPU.

    Args:
        forward: A ``ResponseModel`` of the smaller self.
        batch: Rows that fit in one forward pass.
        k: Size of the top k; 0 asks for the last hidden states.
        device: Where the forward pass runs.
    """
    lengths = [len(row.response_ids) for row in batch]
    real_BR = make_loss_batch(batch, device).mask_BR != 0

    def read(hidden_BRH: Tensor, head_VH: Tensor) -> Targets:
        hidden_NH = hidden_BRH[real_BR]
        if not k:
            return (hidden_NH,)
        ids_NK, logprobs_NK1 = chunked_top_k(hidden_NH, head_VH, k)
        return ids_NK.int(), logprobs_NK1

    responses = [row.response_ids for row in batch]
    model_inputs = inputs([row.teacher_prompt for row in batch], responses, device)
    answers = [part.cpu().split(lengths) for part in forward(read, *model_inputs)]
    # Copies: a piece of a batch would keep the whole batch in memory.
    return [tuple(piece.clone() for piece in pieces) for pieces in zip(*answers, strict=True)]


class TeacherActor(RemoteActor):
    """A frozen smaller self. It has no state of its own, so a lost one is started again."""

    def __init__(
        self, checkpoint: str, own_slots: Sequence[int], dtype: str, threads: int, gpu: bool
    ) -> None:
        """Load the checkpoint; own_slots: those that the larger self has not."""
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if gpu else "cpu")
        slots = Slots.load(Path(checkpoint))
        assert slots is not None
        model = growth_of(slots).load(Path(checkpoint), slots, getattr(torch, dtype), own_slots)
        become_smaller_self(model)
        self.model = ResponseModel(model.to(self.device)).requires_grad_(False)

    def targets(self, rows: Sequence[TrainingExample], k: int, max_tokens: int) -> list[Targets]:
        """Return ``compute_targets``, in batches of at most ``max_tokens`` padded tokens."""
        found: dict[int, Targets] = {}
        length = TrainingExample.teacher_length
        for batch in micro_batches(rows, length, max_tokens, rank=0, ranks=1):
            answers = compute_targets(self.model, batch, k, self.device)
            found |= zip(map(id, batch), answers, strict=True)
        return [found[id(row)] for row in rows]


class Teachers:
    """Several teacher actors, asked as one."""

    def __init__(self, actors: Sequence[Any]) -> None:
        """Take the handles of ``TeacherActor`` actors."""
        self.group = ActorGroup("teacher", actors)

    def targets(self, rows: Sequence[TrainingExample], k: int, max_tokens: int) -> list[Targets]:
        """Return the targets of all rows, which are shared out; see ``TeacherActor.targets``."""
        count = len(self.group)
        shares = [{"rows": rows[n::count], "k": k, "max_tokens": max_tokens} for n in range(count)]
        found: list[Targets | None] = [None] * len(rows)
        for number, answers in enumerate(self.group.scatter("targets", shares)):
            found[number::count] = answers
        return [target for target in found if target is not None]


def launch_teachers(
    resources: ResourcesConfig, checkpoint: str, own_slots: Sequence[int], dtype: str
) -> list[Any]:
    """Start ``resources.teachers`` actors; none where the trainer's own module teaches."""
    actor = ray.remote(TeacherActor).options(
        num_cpus=resources.teacher_cpus,
        num_gpus=resources.teacher_gpus,
        max_restarts=-1,
        max_task_retries=-1,
    )
    gpu = resources.teacher_gpus > 0
    return [
        actor.remote(checkpoint, own_slots, dtype, resources.teacher_cpus, gpu)
        for _ in range(resources.teachers)
    ]
