"""The learner: DeepSpeed ZeRO-3 over any number of ranks, gloo on CPUs, NCCL on GPUs.

The same object serves the Ray Train job of consolidation and the actor group of
dreaming; both hand it rows and the weights of their streams.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from sleeprl.losses.chunked import token_logprobs
from sleeprl.losses.combined import (
    LossOptions,
    LossWeights,
    add_metrics,
    chunked_combined_loss,
    token_counts,
)
from sleeprl.losses.ewc import diagonal_fisher
from sleeprl.memory import checkpoint as ckpt
from sleeprl.memory.gated_mlp import (
    ActivationMeter,
    keep_held,
    load_training_form,
    measure_activity,
    smaller_self,
)
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.trainer.batching import (
    PADDING_EXAMPLE,
    Targets,
    TrainingExample,
    make_loss_batch,
    micro_batches,
)
from sleeprl.trainer.cpu_tuning import count_devices_once, keep_memory, load_shared_memory_op
from sleeprl.trainer.deepspeed_config import deepspeed_config, gather_by_layer
from sleeprl.trainer.ewc import EWCRegularizer
from sleeprl.trainer.gather import gathered
from sleeprl.trainer.packing import Inputs, inputs, padded
from sleeprl.trainer.response_model import ResponseModel, all_logits
from sleeprl.trainer.teacher import Teachers, teach
from sleeprl.weight_sync.verification import Canary

LONG_BARRIER_TIMEOUT = timedelta(hours=1)
"""How long ranks wait for one another outside of their common work."""


@dataclass(frozen=True)
class TrainerOptions:
    """checkpoint: one that can grow. slot: the one to grow in; None trains every parameter, as
    baselines and plain RL do; dreaming goes on with an expert, so it needs a slot.
    held: slots that only the smaller self has (``Transfer.held``). keeps: the larger self has them
    too once it has learnt (``memory.reset`` is off). routed: the expert gets a gate of its own,
    which ``LossWeights.quiet`` teaches to close. wake: file of the gradients that only the larger self
    has applied (``wake_learning``)."""

    checkpoint: str
    slot: int | None
    dtype: str
    seed: int
    learning_rate: float
    total_steps: int
    warmup: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    threads: int = 1
    gpu: bool = False
    micro_batch_tokens: int = 8192
    """Padded tokens that one forward pass may hold."""
    held: tuple[int, ...] = ()
    keeps: bool = False
    routed: bool = False
    wake: str = ""
    offload: str = "none"
    """See ``resources.offload``. Without a GPU all is in the host's memory as it is."""
    critic: bool = False
    """A value head beside the language head, for an algorithm that asks for one (PPO)."""
    colocated: bool = False
    """Engines work on the same device while it does not; they sleep while it steps."""


class Trainer:
    """A rank of the learner. All ranks call the same methods in the same order.

    Same rows in, same step out, at any world size, within the dtype's rounding.
    teachers: the smaller self in actors of its own; without them it is this module with
    its newborn expert off.
    """

    def __init__(self, options: TrainerOptions, teachers: Teachers | None = None) -> None:
        os.environ["DS_ACCELERATOR"] = "cuda" if options.gpu else "cpu"
        torch.set_num_threads(options.threads)
        import deepspeed

        if not options.gpu:
            load_shared_memory_op()
            count_devices_once()
            keep_memory()
        self.options, self.teachers = options, teachers
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._patient = (
            dist.new_group(backend="gloo", timeout=LONG_BARRIER_TIMEOUT) if self.world > 1 else None
        )
        self.device = torch.device(f"cuda:{torch.cuda.current_device()}" if options.gpu else "cpu")
        self.directory = Path(options.checkpoint)
        slots = Slots.load(self.directory)
        if slots is None:
            raise ValueError(f"{options.checkpoint} has no slots; widen it first")
        self.slots, self.growth = slots, growth_of(slots)
        dtype = getattr(torch, options.dtype)
        self._wake = load_file(options.wake) if options.wake else None
        self._emptied = options.held
        """Slots that the larger self does not have, as an engine has to be told."""
        model = self.growth.load(self.directory, slots, dtype, options.held, self._wake)
        if options.slot is None:
            trained = _all_but_tied(model)
        else:
            trained = self.growth.grow(
                model, slots.width, options.seed, options.slot, routed=options.routed
            )
        gather_by_layer(model)
        module = ResponseModel(model.to(self.device), critic=options.critic)
        if module.critic is not None:
            trained = [*trained, *module.critic.parameters()]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(
                trained,
                lr=options.learning_rate,
                betas=(0.9, 0.99),
                weight_decay=options.weight_decay,
            ),
            config=deepspeed_config(
                dtype=options.dtype,
                grad_clip=options.grad_clip,
                gpu=options.gpu,
                offload=options.offload,
            ),
        )
        self.steps = 0
        self._taught: dict[tuple[str, int], Targets] = {}
        self._fresh: dict[tuple[int, ...], list[float] | None] = {}
        self._anchor: EWCRegularizer | None = None

    # --- learning -----------------------------------------------------------------

    def step(
        self,
        rows: Sequence[TrainingExample],
        parts: Mapping[str, LossWeights],
        options: LossOptions,
    ) -> dict[str, float]:
        """One optimiser step; the returned means are global.

        rows: of the whole batch, the same on every rank. They are shared out here.
        """
        counts_P3 = token_counts(
            parts,
            [row.part for row in rows],
            [len(row.response_ids) for row in rows],
            [row.advantage for row in rows],
        )
        quiet = [row.student_length() for row in rows if parts[row.part].quiet]
        micro = self._micro_batches(rows, TrainingExample.student_length)
        mine = [row for batch in micro for row in batch if row is not PADDING_EXAMPLE]
        taught = any(part.kl for part in parts.values())
        targets = self._targets(mine, options) if taught else [None] * len(mine)
        of_row = dict(zip(map(id, mine), targets, strict=True))
        head = self._teacher_head() if taught and options.support != "teacher" else None
        self._set_learning_rate()
        totals: dict[str, float] = {}
        for number, batch in enumerate(micro):
            within = partial(
                chunked_combined_loss,
                window=make_loss_batch(batch, self.device, [of_row.get(id(row)) for row in batch]),
                parts=parts,
                counts_P3=counts_P3,
                options=options,
                teacher_head_VH=head,
            )
            loss, metrics = self._forward(batch, parts, sum(quiet), within)
            last = number == len(micro) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            # DeepSpeed averages gradients over ranks; the loss is already a global mean.
            self.engine.backward(loss * self.world)
            add_metrics(totals, {**metrics, "loss": float(loss.detach())})
        if self._anchor is not None:
            totals["ewc"] = self._anchor.pull()
        self.engine.step()
        self.steps += 1
        norm = self.engine.get_global_grad_norm()
        merged = self._sum_metrics(totals)
        merged["grad_norm"] = float(norm) if norm is not None else math.nan
        merged["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        merged["tokens"] = float(counts_P3[:, 0].sum())
        return merged

    def _micro_batches(
        self, rows: Sequence[TrainingExample], length: Callable[[TrainingExample], int]
    ) -> list[list[TrainingExample]]:
        budget = self.options.micro_batch_tokens
        return micro_batches(rows, length, budget, rank=self.rank, ranks=self.world)

    def _inputs(self, rows: Sequence[TrainingExample]) -> Inputs:
        responses = [row.response_ids for row in rows]
        return inputs([row.prompt_ids for row in rows], responses, self.device)

    def _forward(
        self,
        batch: Sequence[TrainingExample],
        parts: Mapping[str, LossWeights],
        quiet: int,
        within: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """A micro-batch's share of the loss and of the metrics."""
        judged = self.options.critic
        if not quiet:
            loss, metrics = self.engine(within, *self._inputs(batch), judged=judged)
            return loss, metrics
        # How loud the expert is on each text is wanted, so each has a sequence of its own.
        prompts, responses = [r.prompt_ids for r in batch], [r.response_ids for r in batch]
        asked = [part.to(self.device) for part in padded(prompts, responses)]
        with self._listening(batch, parts, asked[1], quiet) as listener:
            loss, metrics = self.engine(within, *asked, judged=judged)
        return loss + listener.total, {**metrics, "quiet": float(listener.total.detach())}

    @contextmanager
    def _listening(
        self,
        rows: Sequence[TrainingExample],
        parts: Mapping[str, LossWeights],
        mask_BT: Tensor,
        tokens: int,
    ) -> Iterator[ActivationMeter]:
        """Around a forward pass: how loud the newborn expert is, as its share of the penalty."""
        weights = [parts[row.part].quiet if row.part else 0.0 for row in rows]
        weights_B1 = torch.tensor(weights, device=self.device)[:, None]
        with measure_activity(self.engine.module, weights_B1 * mask_BT / tokens) as listener:
            yield listener

    def _set_learning_rate(self) -> None:
        done, options = self.steps, self.options
        if done < options.warmup:
            scale = (done + 1) / options.warmup
        else:
            progress = (done - options.warmup) / max(1, options.total_steps - options.warmup)
            scale = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * scale

    @torch.no_grad()
    def _targets(
        self, rows: Sequence[TrainingExample], options: LossOptions
    ) -> list[Targets | None]:
        """What the smaller self says of each row, from memory where it said so before. Collective."""
        k = options.top_k if options.support == "teacher" else 0
        found = [self._taught.get((row.key, k)) if row.key else None for row in rows]
        missing = [index for index, target in enumerate(found) if target is None]
        said = self._taught_now([rows[index] for index in missing], k)
        for index, target in zip(missing, said, strict=True):
            found[index] = target
            if key := rows[index].key:
                self._taught[key, k] = target
        return found

    def _taught_now(self, rows: Sequence[TrainingExample], k: int) -> list[Targets]:
        """Collective, unless there are teachers apart."""
        if self.teachers is not None:
            budget = self.options.micro_batch_tokens
            return self.teachers.targets(rows, k, budget) if rows else []
        said: dict[int, Targets] = {}
        for batch in self._in_step(rows):
            said |= zip(map(id, batch), teach(self._smaller, batch, k, self.device), strict=True)
        return [said[id(row)] for row in rows]

    def _in_step(self, rows: Sequence[TrainingExample]) -> list[list[TrainingExample]]:
        """This rank's rows in batches for the teacher, as many as on the rank that has most."""
        budget = self.options.micro_batch_tokens
        found = (
            micro_batches(rows, TrainingExample.teacher_length, budget, rank=0, ranks=1)
            if rows
            else []
        )
        most = torch.tensor([len(found)], device=self.device)
        if self.world > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return found + [[PADDING_EXAMPLE] for _ in range(int(most) - len(found))]

    def taught(self) -> dict[str, Tensor]:
        """What this rank remembers of the teacher, to be kept with a checkpoint.

        It could be asked again, but in other batches, and the last bit of an answer
        depends on its batch.
        """
        return {
            f"{k}:{number}:{key}": part
            for (key, k), parts in self._taught.items()
            for number, part in enumerate(parts)
        }

    def load_taught(self, kept: Mapping[str, Tensor]) -> None:
        """Remember what ``taught`` gave, of this rank or another; what is known stays."""
        found: dict[tuple[str, int], Targets] = {}
        for name in sorted(kept):
            k, _, key = name.split(":", 2)
            found[key, int(k)] = (*found.get((key, int(k)), ()), kept[name])
        self._taught = found | self._taught

    def _smaller(self, *inputs: Any) -> Any:
        """What ``ResponseModel`` gives of the smaller self. Collective where the model has grown."""
        if self.options.slot is None:
            return self._origin(*inputs)
        with smaller_self(self.engine.module):
            return self.engine(*inputs)

    def _teacher_head(self) -> Tensor | None:
        """Of a model that is trained in full the smaller self has a head of its own."""
        if self.options.slot is not None:
            return None
        return self._origin.get_parameter("model.lm_head.weight")

    @cached_property
    def _origin(self) -> nn.Module:
        """A frozen copy of the model as it was. Only a model that is trained in full needs one."""
        model = load_training_form(self.directory, self.slots, getattr(torch, self.options.dtype))
        return ResponseModel(model.to(self.device)).requires_grad_(False)

    def anchor(self, rows: Sequence[TrainingExample], strength: float) -> None:
        """Let every step from here on pull the model back to the smaller self (EWC).

        rows: texts the smaller self wrote, on which the Fisher is estimated; the same on
        all ranks, so that it does not depend on their number. strength: the weight of the
        penalty. Raises ValueError for a model that grows, of which the smaller self is a part.
        """
        if self.options.slot is not None:
            raise ValueError("only a model that is trained in full can be anchored; set slot=None")
        trained = {n: p for n, p in self.engine.module.named_parameters() if p.requires_grad}
        origin = {n: p for n, p in self._origin.named_parameters() if n in trained}
        for parameter in origin.values():
            parameter.requires_grad_(True)
        passes = (
            self._origin(all_logits, *self._inputs([row]))[0] for row in rows if row.response_ids
        )
        generator = torch.Generator(self.device).manual_seed(self.options.seed)
        fisher = diagonal_fisher(list(origin.values()), passes, generator)
        self._origin.requires_grad_(False)
        self._anchor = EWCRegularizer(
            list(trained.values()), list(origin.values()), fisher, strength
        )

    # --- reading ------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(
        self, rows: Sequence[TrainingExample], *, smaller: bool = False
    ) -> list[list[float]]:
        """Log-probabilities of each row's response tokens; ``smaller`` asks the smaller self."""
        asked = make_loss_batch(rows, self.device)
        kept_BR = asked.mask_BR != 0
        tokens_N = asked.tokens_BR[kept_BR]
        within = lambda hidden_BRH, head_VH: token_logprobs(  # noqa: E731
            hidden_BRH[kept_BR], head_VH, tokens_N
        )
        forward = self._smaller if smaller else self.engine
        found_N = forward(within, *self._inputs(rows))
        return [piece.tolist() for piece in found_N.split([len(row.response_ids) for row in rows])]

    @torch.no_grad()
    def values(self, rows: Sequence[TrainingExample]) -> list[list[float]]:
        """What the critic expects at each response token of each row. Collective."""
        found: dict[int, list[float]] = {}
        budget = self.options.micro_batch_tokens
        for batch in micro_batches(rows, TrainingExample.student_length, budget, rank=0, ranks=1):
            judge = lambda hidden_BRH, head_VH, critic_BR: critic_BR  # noqa: E731
            values_BR = self.engine(judge, *self._inputs(batch), judged=True).tolist()
            found |= {
                id(row): values[: len(row.response_ids)]
                for row, values in zip(batch, values_BR, strict=True)
            }
        return [found[id(row)] for row in rows]

    def canary(self, token_ids: list[int]) -> Canary:
        """What an engine must reproduce after it received this learner's weights. Collective.

        In half precision right weights differ by as much as 0.4 nats on an unlikely token (135 M,
        seen on a CPU), wrong ones by several.
        """
        rows, ids = [TrainingExample(token_ids[:1], token_ids[1:], "")], tuple(token_ids)
        (now,) = self.logprobs(rows)
        if ids not in self._fresh and self.options.slot is not None:
            (self._fresh[ids],) = self.logprobs(rows, smaller=True)
        fresh = self._fresh.setdefault(ids, None if self.steps else now)  # no copy for this alone
        return Canary(token_ids, now, 2e-3 if self.options.dtype == "float32" else 1.0, fresh)

    def release(self) -> None:
        """Let engines on the same device have the memory that was needed for a step."""
        if self.options.gpu and self.options.colocated:
            torch.cuda.empty_cache()

    # --- weights and state --------------------------------------------------------

    def expert(self) -> dict[str, Tensor]:
        """The trained expert, whole, on the CPU, under checkpoint names. Collective."""
        return ckpt.expert_tensors(dict(self._gathered()))

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensors that differ from the checkpoint this learner started from. Collective;
        rank 0 alone is given them, the others take part and get nothing.

        A grown model exports its MLPs with the expert folded in; a model trained in
        full exports all that it trained, at the checkpoint's width.
        """
        first = self.rank == 0
        if self.options.slot is not None:
            expert = ckpt.expert_tensors(dict(self._gathered(keep=first)))
            if first:
                yield from self.growth.fold(
                    self.directory,
                    self.slots,
                    self.options.slot,
                    expert,
                    reset=self._emptied,
                    wake=self._wake,
                )
            return
        for name, tensor in self._gathered(keep=first):
            name = name.removeprefix("model.")
            yield name, ckpt.scatter_columns(name, tensor, self.slots)

    def _gathered(self, *, keep: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters, whole."""
        named = [
            (name, parameter)
            for name, parameter in self.engine.module.named_parameters()
            if parameter.requires_grad and not name.startswith("critic.")
        ]
        return gathered(named, keep=keep)

    def settle(self) -> None:
        """Become the generation that this makes, after the last step: what the sender keeps is on."""
        if self.options.keeps:
            keep_held(self.engine.module)
            self._emptied = ()

    def set_expert(self, expert: Mapping[str, Tensor]) -> None:
        """Put an expert, whole, under checkpoint names, in the place of the present one. Collective."""
        self._set({f"model.{ckpt.training_name(name)}": tensor for name, tensor in expert.items()})

    def _set(self, values: Mapping[str, Tensor]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.engine.module.named_parameters():
            # An expert comes without a critic.
            if parameter.requires_grad and (name in values or not name.startswith("critic.")):
                value = values[name].to(self.device)
                # Both copies: the optimiser's master and the one the forward pass reads.
                safe_set_full_fp32_param(parameter, value)
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Trained parameters and optimiser moments, whole: independent of the world size. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {"steps": torch.tensor(self.steps)}
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                state[name] = safe_get_full_fp32_param(parameter).cpu().clone()
                # Before the first step the optimiser has no moments to give.
                for moment in ("exp_avg", "exp_avg_sq") if self.steps else ():
                    value = safe_get_full_optimizer_state(parameter, moment)
                    state[f"{moment}:{name}"] = value.cpu().clone()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Collective."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.steps = int(state["steps"])
        self._set(state)
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            # A fresh optimiser has no moments to write into.
            moments = self.optimizer.optimizer.state[flat]
            if not moments:
                moments["step"] = torch.zeros(())
                moments["exp_avg"] = torch.zeros_like(flat)
                moments["exp_avg_sq"] = torch.zeros_like(flat)
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                for moment in ("exp_avg", "exp_avg_sq"):
                    if f"{moment}:{name}" in state:
                        safe_set_full_optimizer_state(
                            parameter, state[f"{moment}:{name}"].to(self.device), moment
                        )
        for slot in self.optimizer.optimizer.state.values():
            if "step" in slot:
                slot["step"] = torch.full_like(slot["step"], float(self.steps))

    # --- collectives --------------------------------------------------------------

    def meet(self) -> None:
        """Wait for all ranks, for longer than any other collective waits and off the GPU: one of
        them may be waiting for engines."""
        if self._patient is not None:
            dist.barrier(group=self._patient)

    def _sum_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Over ranks. Keys may differ from rank to rank."""
        if self.world == 1:
            return dict(metrics)
        gathered: list[dict[str, float] | None] = [None] * self.world
        dist.all_gather_object(gathered, dict(metrics))
        merged: dict[str, float] = {}
        for part in gathered:
            add_metrics(merged, part or {})
        return merged


def _all_but_tied(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter; but embeddings that are also the head stay frozen, since an engine
    that packs its head keeps the old one when it is sent new embeddings."""
    config: Any = model.config
    if config.tie_word_embeddings:
        embeddings: Any = model.get_submodule("model.embed_tokens")
        embeddings.weight.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]
