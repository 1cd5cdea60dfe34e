"""What the smaller self says of a text: by the learner's own module, or by actors of its own.

Where the teacher does not fit beside the learner, or where there are machines to spare,
``resources.teachers`` actors hold a frozen copy; what they say is the same numbers.
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
from sleeprl.memory.gated_mlp import become_smaller
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.trainer.batching import Targets, TrainingExample, make_loss_batch, micro_batches
from sleeprl.trainer.packing import inputs
from sleeprl.trainer.response_model import ResponseModel


@torch.no_grad()
def teach(
    forward: Callable[..., Any], batch: Sequence[TrainingExample], k: int, device: torch.device
) -> list[Targets]:
    """The teacher's word on each row of one batch, on the CPU.

    forward: a ``ResponseModel`` of the smaller self. k: of its top k; 0 asks for its hidden states.
    """
    lengths = [len(row.response_ids) for row in batch]
    kept_BR = make_loss_batch(batch, device).mask_BR != 0

    def within(hidden_BRH: Tensor, head_VH: Tensor) -> Targets:
        hidden_NH = hidden_BRH[kept_BR]
        if not k:
            return (hidden_NH,)
        ids_NK, logprobs_NK1 = chunked_top_k(hidden_NH, head_VH, k)
        return ids_NK.int(), logprobs_NK1

    responses = [row.response_ids for row in batch]
    asked = inputs([row.teacher_prompt for row in batch], responses, device)
    said = [part.cpu().split(lengths) for part in forward(within, *asked)]
    # Copies: a piece of a batch would keep the whole batch in memory.
    return [tuple(piece.clone() for piece in pieces) for pieces in zip(*said, strict=True)]


class TeacherActor(RemoteActor):
    """A frozen smaller self. It has no state of its own, so a lost one is started again.

    held: slots that it has and the larger self has not (``Transfer.held``).
    """

    def __init__(
        self, checkpoint: str, held: Sequence[int], dtype: str, threads: int, gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if gpu else "cpu")
        slots = Slots.load(Path(checkpoint))
        assert slots is not None
        model = growth_of(slots).load(Path(checkpoint), slots, getattr(torch, dtype), held)
        become_smaller(model)
        self.model = ResponseModel(model.to(self.device)).requires_grad_(False)

    def targets(self, rows: Sequence[TrainingExample], k: int, max_tokens: int) -> list[Targets]:
        """See ``teach``; in batches of at most ``max_tokens`` padded tokens."""
        found: dict[int, Targets] = {}
        for batch in micro_batches(
            rows, TrainingExample.teacher_length, max_tokens, rank=0, ranks=1
        ):
            found |= zip(map(id, batch), teach(self.model, batch, k, self.device), strict=True)
        return [found[id(row)] for row in rows]


class Teachers:
    """Several of them, asked as one. actors: handles of ``TeacherActor``."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.group = ActorGroup("teacher", actors)

    def targets(self, rows: Sequence[TrainingExample], k: int, max_tokens: int) -> list[Targets]:
        count = len(self.group)
        asked = [{"rows": rows[n::count], "k": k, "max_tokens": max_tokens} for n in range(count)]
        found: list[Targets | None] = [None] * len(rows)
        for number, said in enumerate(self.group.scatter("targets", asked)):
            found[number::count] = said
        return [target for target in found if target is not None]


def launch_teachers(
    resources: ResourcesConfig, checkpoint: str, held: Sequence[int], dtype: str
) -> list[Any]:
    """As many as ``resources.teachers``; none where the learner's own module teaches."""
    actor = ray.remote(TeacherActor).options(
        num_cpus=resources.teacher_cpus,
        num_gpus=resources.teacher_gpus,
        max_restarts=-1,
        max_task_retries=-1,
    )
    gpu = resources.teacher_gpus > 0
    return [
        actor.remote(checkpoint, held, dtype, resources.teacher_cpus, gpu)
        for _ in range(resources.teachers)
    ]
