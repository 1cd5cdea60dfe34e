"""Train a model with DeepSpeed ZeRO-3 over any number of ranks, gloo on CPUs, NCCL on GPUs.

The same object serves the Ray Train job of consolidation and the actor group of dreaming. Both
give it training examples and the loss weights of their parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from sleeprl.losses.chunked import token_logprobs
from sleeprl.losses.combined import add_metrics, chunked_combined_loss
from sleeprl.losses.types import LossOptions, LossWeights
from sleeprl.memory import checkpoint as ckpt
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import (
    enable_teacher_slots,
    measure_activity,
)
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.trainer.batching import (
    PADDING_EXAMPLE,
    TrainingExample,
    count_tokens,
    make_loss_batch,
    micro_batches,
    student_inputs,
)
from sleeprl.trainer.ewc import EWCRegularizer
from sleeprl.trainer.gather import gather_trained
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.packing import padded
from sleeprl.trainer.setup import load_module, prepare_process, start_deepspeed
from sleeprl.trainer.smaller_self import SmallerSelf
from sleeprl.trainer.state import read_state, set_parameters, write_state
from sleeprl.trainer.teacher import Teachers
from sleeprl.weight_sync.verification import Canary

LONG_BARRIER_TIMEOUT = timedelta(hours=1)
"""How long ranks wait for one another outside of their common work."""


class Trainer:
    """One rank of the training group. All ranks call the same methods in the same order.

    Guarantees:

    * The same examples make the same step at any world size, within the dtype's rounding.
    * The state of one world size can be loaded at another.
    """

    def __init__(self, options: TrainerOptions, teachers: Teachers | None = None) -> None:
        """Load the checkpoint, grow the expert and start DeepSpeed. Collective.

        Args:
            options: See ``TrainerOptions``.
            teachers: Actors that hold the smaller self. Without them it is this trainer's own
                module with its new expert off.

        Raises:
            ValueError: The checkpoint has no slots.
        """
        prepare_process(options)
        self.options = options
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._long_barrier_group = (
            dist.new_group(backend="gloo", timeout=LONG_BARRIER_TIMEOUT) if self.world > 1 else None
        )
        self.device = torch.device(f"cuda:{torch.cuda.current_device()}" if options.gpu else "cpu")
        self.directory = Path(options.checkpoint)
        slots = Slots.load(self.directory)
        if slots is None:
            raise ValueError(f"{options.checkpoint} has no slots; widen it first")
        self.slots, self.growth = slots, growth_of(slots)
        path = options.wake_gradients_path
        self._wake_gradients = load_file(path) if path else None
        self._reset_slots = options.teacher_only_slots
        """Slots that an export empties, since the larger self does not have them."""
        module, trained = load_module(options, slots, self._wake_gradients)
        self.engine, self.optimizer = start_deepspeed(module.to(self.device), trained, options)
        self.steps = 0
        self.smaller_self = SmallerSelf(self.engine, options, self.device, teachers)
        self._initial_logprobs: dict[tuple[int, ...], list[float] | None] = {}
        self._ewc: EWCRegularizer | None = None

    # --- learning -----------------------------------------------------------------

    def step(
        self,
        rows: Sequence[TrainingExample],
        parts: Mapping[str, LossWeights],
        options: LossOptions,
    ) -> dict[str, float]:
        """Do one optimiser step. Collective.

        Args:
            rows: Examples of the whole batch, the same on every rank. They are shared out here.
            parts: Loss weights by the name of a part; every row's part is among them.
            options: What the loss is made of.

        Returns:
            Means over the whole batch, by name, the same on every rank.
        """
        counts_P3 = count_tokens(rows, parts)
        metered = sum(row.student_length() for row in rows if parts[row.part].activity_penalty)
        length, budget = TrainingExample.student_length, self.options.micro_batch_tokens
        micro = micro_batches(rows, length, budget, rank=self.rank, ranks=self.world)
        own = [row for batch in micro for row in batch if row is not PADDING_EXAMPLE]
        distils = any(part.kl for part in parts.values())
        k = options.top_k if options.support == "teacher" else 0
        targets = self.smaller_self.targets(own, k) if distils else [None] * len(own)
        target_of = dict(zip(map(id, own), targets, strict=True))
        head = self.smaller_self.head() if distils and options.support != "teacher" else None
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate_at(self.steps)
        totals: dict[str, float] = {}
        for number, batch in enumerate(micro):
            loss_fn = partial(
                chunked_combined_loss,
                batch=make_loss_batch(
                    batch, self.device, [target_of.get(id(row)) for row in batch]
                ),
                parts=parts,
                counts_P3=counts_P3,
                options=options,
                teacher_head_VH=head,
            )
            loss, metrics = self._forward(batch, parts, metered, loss_fn)
            last = number == len(micro) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            # DeepSpeed averages gradients over ranks; the loss is already a global mean.
            self.engine.backward(loss * self.world)
            add_metrics(totals, {**metrics, "loss": float(loss.detach())})
        if self._ewc is not None:
            totals["ewc"] = self._ewc.add_gradient()
        self.engine.step()
        self.steps += 1
        norm = self.engine.get_global_grad_norm()
        merged = _sum_over_ranks(totals)
        merged["grad_norm"] = float(norm) if norm is not None else math.nan
        merged["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        merged["tokens"] = float(counts_P3[:, 0].sum())
        return merged

    def _forward(
        self,
        batch: Sequence[TrainingExample],
        parts: Mapping[str, LossWeights],
        metered: int,
        loss_fn: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return a micro-batch's share of the loss and of the metrics.

        metered: tokens of the whole batch over which the expert's activity is a mean.
        """
        with_values = self.options.critic
        if not metered:
            loss, metrics = self.engine(
                loss_fn, *student_inputs(batch, self.device), with_values=with_values
            )
            return loss, metrics
        # The expert's activity is wanted for each text, so each has a sequence of its own.
        prompts, responses = [r.prompt_ids for r in batch], [r.response_ids for r in batch]
        padded_inputs = [part.to(self.device) for part in padded(prompts, responses)]
        weights = [parts[row.part].activity_penalty if row.part else 0.0 for row in batch]
        weights_B1 = torch.tensor(weights, device=self.device)[:, None]
        with measure_activity(self.engine.module, weights_B1 * padded_inputs[1] / metered) as meter:
            loss, metrics = self.engine(loss_fn, *padded_inputs, with_values=with_values)
        return loss + meter.total, {**metrics, "activity_penalty": float(meter.total.detach())}

    def add_ewc_penalty(self, rows: Sequence[TrainingExample], strength: float) -> None:
        """Let every later step pull the model back to the smaller self (EWC). Collective.

        Args:
            rows: Texts of the smaller self on which the Fisher information is estimated; the same
                on all ranks, so that it does not depend on their number.
            strength: Weight of the penalty.

        Raises:
            ValueError: The model grows, and the smaller self is a part of it.
        """
        if self.options.slot is not None:
            raise ValueError("only a model that is trained in full can be anchored; set slot=None")
        self._ewc = EWCRegularizer.from_texts(
            self.engine.module, self.smaller_self.frozen_copy, rows, strength, self.options.seed
        )

    # --- reading ------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(
        self, rows: Sequence[TrainingExample], *, smaller: bool = False
    ) -> list[list[float]]:
        """Return the log-probability of each response token, in nats. Collective.

        Args:
            rows: Texts of one batch, the same on every rank.
            smaller: Whether to ask the smaller self.
        """
        batch = make_loss_batch(rows, self.device)
        real_BR = batch.mask_BR != 0
        tokens_N = batch.tokens_BR[real_BR]
        loss_fn = lambda hidden, head: token_logprobs(hidden[real_BR], head, tokens_N)  # noqa: E731
        forward = self.smaller_self.forward if smaller else self.engine
        found_N = forward(loss_fn, *student_inputs(rows, self.device))
        return [piece.tolist() for piece in found_N.split([len(row.response_ids) for row in rows])]

    @torch.no_grad()
    def values(self, rows: Sequence[TrainingExample]) -> list[list[float]]:
        """Return the critic's value at each response token of each row. Collective."""
        found: dict[int, list[float]] = {}
        budget = self.options.micro_batch_tokens
        read = lambda hidden_BRH, head_VH, critic_BR: critic_BR  # noqa: E731
        for batch in micro_batches(rows, TrainingExample.student_length, budget, rank=0, ranks=1):
            values_BR = self.engine(
                read, *student_inputs(batch, self.device), with_values=True
            ).tolist()
            found |= {
                id(row): values[: len(row.response_ids)]
                for row, values in zip(batch, values_BR, strict=True)
            }
        return [found[id(row)] for row in rows]

    def make_canary(self, token_ids: list[int]) -> Canary:
        """Return what an engine must reproduce once it has this trainer's weights. Collective.

        In half precision right weights differ by as much as 0.4 nats on an unlikely token (135 M,
        seen on a CPU), wrong ones by several.
        """
        rows, ids = [TrainingExample(token_ids[:1], token_ids[1:], "")], tuple(token_ids)
        now, tolerance = self.logprobs(rows)[0], 2e-3 if self.options.dtype == "float32" else 1.0
        if ids not in self._initial_logprobs and self.options.slot is not None:
            (self._initial_logprobs[ids],) = self.logprobs(rows, smaller=True)
        # A model that is trained in full would need a copy for this alone.
        initial = self._initial_logprobs.setdefault(ids, None if self.steps else now)
        return Canary(token_ids, now, tolerance, initial)

    # --- weights and state --------------------------------------------------------

    def gather_expert(self) -> dict[str, Tensor]:
        """Return the trained expert, whole, on the CPU, under checkpoint names. Collective."""
        return ckpt.expert_tensors(dict(gather_trained(self.engine.module)))

    def set_expert(self, expert: Mapping[str, Tensor]) -> None:
        """Replace the expert by a whole one under checkpoint names. Collective."""
        values = {f"model.{ckpt.training_name(name)}": value for name, value in expert.items()}
        set_parameters(self.engine.module, values, self.device)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the checkpoint tensors that differ from the checkpoint it started from. Collective.

        A grown model exports its MLPs with the expert folded in. A model trained in full exports
        all that it trained, at the checkpoint's width. Rank 0 alone is given the tensors; the
        other ranks take part and get nothing.
        """
        first = self.rank == 0
        if self.options.slot is not None:
            expert = ckpt.expert_tensors(dict(gather_trained(self.engine.module, keep=first)))
            if first:
                slot, reset = self.options.slot, self._reset_slots
                update = ExpertUpdate(slot, expert, reset, self._wake_gradients)
                yield from self.growth.fold(self.directory, self.slots, update)
            return
        for name, tensor in gather_trained(self.engine.module, keep=first):
            name = name.removeprefix("model.")
            yield name, ckpt.scatter_columns(name, tensor, self.slots)

    def finalise(self) -> None:
        """Become the generation this makes, after the last step: turn on what the sender keeps."""
        if self.options.keep_sender_slots:
            enable_teacher_slots(self.engine.module)
            self._reset_slots = ()

    def state_dict(self) -> dict[str, Tensor]:
        """Return trained parameters and optimiser moments, whole, for any world size. Collective."""
        return read_state(self.engine.module, self.steps)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state_dict`` returned. Collective."""
        self.steps = write_state(self.engine.module, self.optimizer, state, self.device)

    def long_barrier(self) -> None:
        """Wait for all ranks longer than other collectives do, and off the GPU.

        One of them may be waiting for engines.
        """
        if self._long_barrier_group is not None:
            dist.barrier(group=self._long_barrier_group)


def _sum_over_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Add every rank's share of the metrics. Keys may differ from rank to rank."""
    world = dist.get_world_size()
    if world == 1:
        return dict(metrics)
    shares: list[dict[str, float] | None] = [None] * world
    dist.all_gather_object(shares, dict(metrics))
    merged: dict[str, float] = {}
    for share in shares:
        add_metrics(merged, share or {})
    return merged
