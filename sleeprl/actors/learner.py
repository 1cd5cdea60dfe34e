"""The learner: DeepSpeed ZeRO-3 over any number of ranks, gloo on CPUs, NCCL on GPUs.

The same object serves the Ray Train job of consolidation and the actor group of
dreaming; both hand it rows and the weights of their streams.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sleeprl.actors.anchor import Anchor
from sleeprl.actors.response import ResponseModel, all_logits
from sleeprl.files import locked
from sleeprl.losses.chunked import chunked_top_k, token_logprobs
from sleeprl.losses.ewc import diagonal_fisher
from sleeprl.losses.streams import LossOptions, Part, Window, chunked_stream_loss, token_counts
from sleeprl.memory import checkpoint as ckpt
from sleeprl.memory.experts import load_training_form, smaller_self
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.weights.verify import Canary


@dataclass(frozen=True)
class Row:
    """One text to learn from.

    prompt_ids: what the student sees. response_ids: the tokens that are trained on.
    teacher_prompt_ids: what the teacher sees instead; None means the same prompt.
    advantage, behaviour: of a row in a ``pg`` part; behaviour has one entry per token.
    key: names a text that comes again; the teacher, who never changes, is asked about it once.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    part: str
    teacher_prompt_ids: list[int] | None = None
    advantage: float = 0.0
    behaviour: list[float] = field(default_factory=list)
    key: str = ""

    @property
    def teacher_prompt(self) -> list[int]:
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def student_length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def teacher_length(self) -> int:
        return len(self.teacher_prompt) + len(self.response_ids)


Targets = tuple[Tensor, Tensor]
"""The teacher on one row's R response tokens: top-k ids [R, K] and k+1 log-probabilities."""


@dataclass(frozen=True)
class LearnerOptions:
    """checkpoint: one that can grow. slot: the one to grow in; None trains every parameter.
    held: slots that only the smaller self has (``Transfer.reset``)."""

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


class Learner:
    """A rank of the learner. All ranks call the same methods in the same order.

    Same rows in, same step out, at any world size, within the dtype's rounding.
    """

    def __init__(self, options: LearnerOptions) -> None:
        os.environ["DS_ACCELERATOR"] = "cuda" if options.gpu else "cpu"
        torch.set_num_threads(options.threads)
        import deepspeed

        if not options.gpu:
            load_shared_memory_op()
        self.options = options
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if options.gpu
            else torch.device("cpu")
        )
        self.directory = Path(options.checkpoint)
        slots = Slots.load(self.directory)
        if slots is None:
            raise ValueError(f"{options.checkpoint} has no slots; widen it first")
        self.slots, self.growth = slots, growth_of(slots)
        dtype = getattr(torch, options.dtype)
        model = self.growth.load(self.directory, slots, dtype, options.held)
        if options.slot is None:
            trained = _all_but_tied(model)
        else:
            trained = self.growth.grow(model, slots.width, options.seed, options.slot)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=ResponseModel(model.to(self.device)),
            optimizer=torch.optim.AdamW(
                trained,
                lr=options.learning_rate,
                betas=(0.9, 0.99),
                weight_decay=options.weight_decay,
            ),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": options.grad_clip,
                "zero_optimization": {"stage": 3},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": dtype == torch.bfloat16},
                "steps_per_print": 10**9,
                "wall_clock_breakdown": False,
            },
        )
        self.steps = 0
        self._taught: dict[tuple[str, int], Targets] = {}
        self._anchor: Anchor | None = None

    # --- learning -----------------------------------------------------------------

    def step(
        self, rows: Sequence[Row], parts: Mapping[str, Part], options: LossOptions
    ) -> dict[str, float]:
        """One optimiser step on this rank's rows; the returned means are global."""
        counts_P = token_counts(parts, [r.part for r in rows], [len(r.response_ids) for r in rows])
        self._sum(counts_P)
        taught = any(part.kl for part in parts.values())
        targets = self._targets(rows, options.top_k) if taught else [None] * len(rows)
        of_row = dict(zip(map(id, rows), targets, strict=True))
        micro = self._micro_batches(rows, Row.student_length, least=1)
        self._set_learning_rate()
        totals: dict[str, float] = {}
        for number, batch in enumerate(micro):
            window = self._window(batch, [of_row.get(id(row)) for row in batch])
            within = partial(
                chunked_stream_loss,
                window=window,
                parts=parts,
                counts_P=counts_P,
                options=options,
            )
            inputs = self._inputs([row.prompt_ids for row in batch], batch)
            loss, metrics = self.engine(*inputs, within)
            last = number == len(micro) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            # DeepSpeed averages gradients over ranks; the loss is already a global mean.
            self.engine.backward(loss * self.world)
            for key, value in {**metrics, "loss": float(loss.detach())}.items():
                totals[key] = totals.get(key, 0.0) + value
        if self._anchor is not None:
            totals["ewc"] = self._anchor.pull()
        self.engine.step()
        self.steps += 1
        norm = self.engine.get_global_grad_norm()
        merged = self._sum_metrics(totals)
        merged["grad_norm"] = float(norm) if norm is not None else math.nan
        merged["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        merged["tokens"] = float(counts_P.sum())
        return merged

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
    def _targets(self, rows: Sequence[Row], k: int) -> list[Targets | None]:
        """What the smaller self says of each row, from memory where it said so before. Collective."""
        found = [self._taught.get((row.key, k)) if row.key else None for row in rows]
        missing = [index for index, target in enumerate(found) if target is None]
        place = {id(rows[index]): index for index in missing}
        for batch in self._micro_batches([rows[i] for i in missing], Row.teacher_length, least=0):
            lengths = [len(row.response_ids) for row in batch]
            kept_BR = self._window(batch).mask_BR != 0
            within = lambda hidden_BRH, head_VH, kept_BR=kept_BR: chunked_top_k(  # noqa: E731
                hidden_BRH[kept_BR], head_VH, k
            )
            inputs = self._inputs([row.teacher_prompt for row in batch], batch)
            ids_NK, logprobs_NK1 = self._smaller(*inputs, within)
            # Copies: a piece of a batch would keep the whole batch in memory.
            pieces = zip(ids_NK.int().cpu().split(lengths), logprobs_NK1.cpu().split(lengths))
            for row, (ids_RK, logprobs_RK1) in zip(batch, pieces, strict=True):
                if not row.response_ids:
                    continue
                target = (ids_RK.clone(), logprobs_RK1.clone())
                found[place[id(row)]] = target
                if row.key:
                    self._taught[row.key, k] = target
        return found

    def _smaller(self, *inputs: Any) -> Any:
        """What ``ResponseModel`` gives of the smaller self. Collective where the model has grown."""
        if self.options.slot is None:
            return self._origin(*inputs)
        with smaller_self(self.engine.module):
            return self.engine(*inputs)

    @cached_property
    def _origin(self) -> nn.Module:
        """A frozen copy of the model as it was. Only a model that is trained in full needs one."""
        model = load_training_form(self.directory, self.slots, getattr(torch, self.options.dtype))
        return ResponseModel(model.to(self.device)).requires_grad_(False)

    def anchor(self, rows: Sequence[Row], strength: float) -> None:
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
            self._origin(*self._inputs([row.prompt_ids], [row]), all_logits)[0]
            for row in rows
            if row.response_ids
        )
        generator = torch.Generator(self.device).manual_seed(self.options.seed)
        fisher = diagonal_fisher(list(origin.values()), passes, generator)
        self._origin.requires_grad_(False)
        self._anchor = Anchor(list(trained.values()), list(origin.values()), fisher, strength)

    # --- batches ------------------------------------------------------------------

    def _micro_batches(
        self, rows: Sequence[Row], length: Callable[[Row], int], least: int
    ) -> list[list[Row]]:
        """Rows in order of length, in batches of bounded padded size; equally many on every rank."""
        batches: list[list[Row]] = []
        for row in sorted(rows, key=length):
            if batches and length(row) * (len(batches[-1]) + 1) <= self.options.micro_batch_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        most = torch.tensor([len(batches)], device=self.device)
        if self.world > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        # An empty row keeps the ranks' collectives in step without adding to the loss.
        return batches + [[Row([0], [], "")] for _ in range(max(least, int(most)) - len(batches))]

    def _window(self, rows: Sequence[Row], targets: Sequence[Targets | None] = ()) -> Window:
        """What the loss needs of the rows, padded to the longest response."""
        longest = max(1, *(len(row.response_ids) for row in rows))
        pad = lambda lists, fill: torch.tensor(  # noqa: E731
            [list(values) + [fill] * (longest - len(values)) for values in lists],
            device=self.device,
        )
        window = Window(
            tokens_BR=pad([row.response_ids for row in rows], 0),
            mask_BR=pad([[1.0] * len(row.response_ids) for row in rows], 0.0),
            part=[row.part for row in rows],
            advantages_B=torch.tensor([row.advantage for row in rows], device=self.device),
            behaviour_BR=pad([row.behaviour or [0.0] * len(row.response_ids) for row in rows], 0.0),
        )
        known = [target for target in targets if target is not None]
        if known:
            k = known[0][0].shape[-1]
            window.teacher_ids_BRK = torch.zeros(
                len(rows), longest, k, dtype=torch.long, device=self.device
            )
            window.teacher_BRK1 = torch.zeros(len(rows), longest, k + 1, device=self.device)
            for row, target in enumerate(targets):
                if target is not None:
                    window.teacher_ids_BRK[row, : len(target[0])] = target[0]
                    window.teacher_BRK1[row, : len(target[1])] = target[1]
        return window

    def _inputs(
        self, prompts: Sequence[list[int]], answered: Sequence[Row]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded ids and mask [B, T] of the prompts with the rows' responses, and the
        positions [B, R] whose logits predict a response token."""
        responses = [row.response_ids for row in answered]
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        rows, width, window = len(prompts), max(lengths), max(1, max(map(len, responses)))
        ids = torch.zeros(rows, width, dtype=torch.long)
        mask = torch.zeros(rows, width, dtype=torch.long)
        index = torch.zeros(rows, window, dtype=torch.long)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            ids[row, : lengths[row]] = torch.tensor(prompt + response)
            mask[row, : lengths[row]] = 1
            index[row] = torch.arange(window).clamp(max=max(0, len(response) - 1)) + len(prompt) - 1
        return ids.to(self.device), mask.to(self.device), index.to(self.device)

    # --- reading ------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Row], *, smaller: bool = False) -> list[list[float]]:
        """Log-probabilities of each row's response tokens; ``smaller`` asks the smaller self."""
        window = self._window(rows)
        kept_BR = window.mask_BR != 0
        tokens_N = window.tokens_BR[kept_BR]
        within = lambda hidden_BRH, head_VH: token_logprobs(  # noqa: E731
            hidden_BRH[kept_BR], head_VH, tokens_N
        )
        forward = self._smaller if smaller else self.engine
        found_N = forward(*self._inputs([row.prompt_ids for row in rows], rows), within)
        return [piece.tolist() for piece in found_N.split([len(row.response_ids) for row in rows])]

    def canary(self, token_ids: list[int]) -> Canary:
        """What an engine must reproduce after it received this learner's weights. Collective."""
        (logprobs,) = self.logprobs([Row(token_ids[:1], token_ids[1:], "")])
        return Canary(token_ids, logprobs, 2e-3 if self.options.dtype == "float32" else 0.25)

    # --- weights and state --------------------------------------------------------

    def expert(self) -> dict[str, Tensor]:
        """The trained expert, whole, on the CPU, under checkpoint names. Collective."""
        return ckpt.expert_tensors(dict(self._gathered()))

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensors that differ from the checkpoint this learner started from. Collective.

        A grown model exports its MLPs with the expert folded in; a model trained in
        full exports all that it trained, at the checkpoint's width.
        """
        if self.options.slot is not None:
            expert, held = self.expert(), self.options.held
            yield from self.growth.fold(
                self.directory, self.slots, self.options.slot, expert, reset=held
            )
            return
        for name, tensor in self._gathered():
            name = name.removeprefix("model.")
            yield name, ckpt.scatter_columns(name, tensor, self.slots)

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters, whole."""
        import deepspeed

        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                # A clone: the gathered storage is gone when the gather closes.
                yield name, parameter.data.detach().cpu().clone()

    def set_expert(self, expert: Mapping[str, Tensor]) -> None:
        """Put an expert, whole, under checkpoint names, in the place of the present one. Collective."""
        self._set({f"model.{ckpt.training_name(name)}": tensor for name, tensor in expert.items()})

    def _set(self, values: Mapping[str, Tensor]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
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

    def _sum(self, values: Tensor) -> None:
        if self.world > 1:
            moved = values.to(self.device)
            dist.all_reduce(moved)
            values.copy_(moved)

    def _sum_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Sum over ranks. Keys may differ from rank to rank."""
        if self.world == 1:
            return dict(metrics)
        gathered: list[dict[str, float] | None] = [None] * self.world
        dist.all_gather_object(gathered, dict(metrics))
        merged: dict[str, float] = {}
        for part in gathered:
            for key, value in (part or {}).items():
                merged[key] = merged.get(key, 0.0) + value
        return merged


def load_shared_memory_op() -> None:
    """Load (the first time: compile) DeepSpeed's small C++ op for ranks on one host's CPUs.

    torch guards the compile with a file that a killed process leaves behind, and then waits
    for ever, without a word. We hold a lock of our own meanwhile, which dies with its process;
    so a guard that is found here is a dead one's.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    with locked(root / ".sleeprl.lock"):
        for guard in root.rglob("deepspeed_shm_comm/lock"):
            guard.unlink(missing_ok=True)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()


def _all_but_tied(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter; but embeddings that are also the head stay frozen, since an engine
    that packs its head keeps the old one when it is sent new embeddings."""
    config: Any = model.config
    if config.tie_word_embeddings:
        embeddings: Any = model.get_submodule("model.embed_tokens")
        embeddings.weight.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]
