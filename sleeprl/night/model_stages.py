"""The model after each step of a night, as checkpoints in the run and in engines.

``smaller-self-N`` is the model after the first N steps of the night's plan. It is written on first
use. Every trained expert is on disk, so a night that resumes after a crash finds or rebuilds the
same checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from safetensors.torch import load_file
from torch import Tensor

from sleeprl.config.schema import NightConfig
from sleeprl.data.lake import Lake
from sleeprl.memory.checkpoint import EXPERT, WAKE, stop_at, widen
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.growth import engine_extra_tensors, growth_named, growth_of, update
from sleeprl.memory.slots import LOW_RANK, Slots
from sleeprl.memory.transfer import Merge, Step, Transfer, from_dict, to_dict
from sleeprl.memory.wake_learning import wake_gradient
from sleeprl.models.resolve import find_model
from sleeprl.night import schedule
from sleeprl.night.run_dir import RunDirectory
from sleeprl.pretrained import save_tensors
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.text.chat import ChatFormatter, store_template_kwargs
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.publish import publish_from_gpu
from sleeprl.utils.files import atomic_directory, atomic_path
from sleeprl.weight_sync.factory import transport_class
from sleeprl.weight_sync.verification import Canary


def build_trainer_options(
    config: NightConfig,
    checkpoint: Path,
    step: Transfer | None,
    dtype: str,
    rate: float,
    steps: int,
) -> TrainerOptions:
    """Build the options of a trainer from a night's settings.

    Args:
        config: The settings.
        checkpoint: The checkpoint to start from.
        step: The transfer whose slot is trained; None trains every parameter.
        dtype: Number format of the frozen parameters.
        rate: The peak learning rate.
        steps: Number of updates.
    """
    seeding, resources = config.consolidation, config.resources
    return TrainerOptions(
        checkpoint=str(checkpoint.resolve()),
        slot=step.slot if step else None,
        teacher_only_slots=step.teacher_only if step else (),
        keep_sender_slots=step is not None and step.teacher_only != step.reset,
        dtype=dtype,
        seed=config.seed,
        learning_rate=rate,
        total_steps=steps,
        warmup=min(seeding.warmup, steps // 4),
        weight_decay=seeding.weight_decay,
        grad_clip=seeding.grad_clip,
        threads=resources.learner_threads,
        gpu=resources.learner_gpus > 0,
        colocated=resources.layout == "colocated",
        offload=resources.offload,
        # Room for the longest row: a document, a question and an answer.
        micro_batch_tokens=max(resources.micro_batch_tokens, config.model.max_length + 64),
        gated_expert=step is not None and seeding.expert_gate > 0,
    )


class ModelStages:
    """The checkpoints of one run, and the engines that hold them.

    Steps of the plan are counted from 0; there is a model before each.
    """

    def __init__(self, run: RunDirectory, dtype: str) -> None:
        self.run, self.config, self.dtype = run, run.config, dtype

    # --- the plan -----------------------------------------------------------------

    def plan(self, documents: Sequence[str]) -> dict[str, Any]:
        """Write the model at the start of the night, and plan the night's steps.

        Args:
            documents: The documents of the day.

        Returns:
            ``parent``, the id of a generation or None; ``clock``, its state after this night;
            ``steps`` as plain data, and the same steps described in words.
        """
        config, manifest = self.config, schedule.parent(self.config)
        source = find_model(config)
        chat = ChatFormatter(source, config.model.chat_template_kwargs)
        slots = Slots.load(source)
        if slots is not None:
            schedule.require_layout(config, slots)
        clock = schedule.clock_of(config, manifest)
        lengths = [len(chat.text(document)) for document in documents]
        boundaries = clock.advance(schedule.elapsed_units(config, lengths))
        steps = schedule.steps_of(config, slots or schedule.new_slots(config), boundaries)
        growth, empty = growth_named(config.memory.growth), schedule.new_slots(config)
        growth.add_slots(source, self._directory(0), empty.pools, empty.width, self.dtype)
        store_template_kwargs(self._directory(0), config.model.chat_template_kwargs)
        stop_at(self._directory(0), chat.end)
        return {
            "parent": manifest.id if manifest else None,
            "clock": clock.state_dict(),
            "steps": [to_dict(step) for step in steps],
            "told": [schedule.describe_step(step) for step in steps],
        }

    @property
    def steps(self) -> list[Step]:
        """The steps of the plan."""
        return [from_dict(step) for step in self.run.result("plan")["steps"]]

    @property
    def has_merge(self) -> bool:
        """Whether a step merges a slot into the base, which may make the base wider."""
        return any(isinstance(step, Merge) for step in self.steps)

    @property
    def last_step(self) -> int:
        """Index of the last step. It is a transfer; dreaming continues with its expert."""
        return len(self.steps) - 1

    @property
    def context_step(self) -> int:
        """Index of the step that consolidates the day; every night has one."""
        return next(i for i in range(len(self.steps)) if self.step_key(i) == "consolidation")

    def transfer(self, index: int) -> Transfer:
        """Return a step that is a transfer."""
        step = self.steps[index]
        assert isinstance(step, Transfer)
        return step

    def step_key(self, index: int) -> str:
        """Return the name of a step's phase, of its job, and of the directory of its expert."""
        step = self.steps[index]
        from_context = isinstance(step, Transfer) and step.teacher_has_context
        return "consolidation" if from_context else f"levels-{index}"

    @property
    def next_step(self) -> int:
        """Index of the next step to do; the last step once all are done."""
        done = sum(self.run.is_done(self.step_key(index)) for index in range(len(self.steps)))
        return min(done, self.last_step)

    # --- checkpoints --------------------------------------------------------------

    def checkpoint_before(self, index: int) -> Path:
        """Return the smaller self of a step: the model after all earlier steps, written on first use."""
        target = self._directory(index)
        if not target.is_dir():
            source, step = self.checkpoint_before(index - 1), self.steps[index - 1]
            merged = isinstance(step, Merge)
            expert = None if merged else load_file(self.expert_directory(index - 1) / EXPERT)
            with atomic_directory(target) as directory:
                slots, wake = self.slots_before(index - 1), self.wake_gradients(index - 1)
                update(source, directory, slots, step, expert, wake)
        return target

    @property
    def accumulated_gradients(self) -> Path | None:
        """File of the wake gradients that are not applied yet: tonight's, or those from earlier nights."""
        for directory in (self.run.dir, self._directory(0)):
            if (directory / WAKE).is_file():
                return directory / WAKE
        return None

    def applies_wake_gradients(self, index: int) -> bool:
        """Decide whether the step is the transfer from level 1 to level 2, which applies the wake
        gradients."""
        step = self.steps[index]
        return isinstance(step, Transfer) and (step.sender, step.receiver) == (1, 2)

    def wake_gradients(self, index: int) -> dict[str, Tensor] | None:
        """Return what the update of a step subtracts from the base, or None."""
        if not self.applies_wake_gradients(index) or self.accumulated_gradients is None:
            return None
        return load_file(self.accumulated_gradients)

    def accumulate_wake_gradients(self, documents: Sequence[str]) -> dict[str, Any]:
        """Add the day's gradients to those that wait for level 1's boundary (equation 2)."""
        config, resources, before = (
            self.config,
            self.config.resources,
            self.checkpoint_before(0).resolve(),
        )
        chat, waiting = ChatFormatter(before), before / WAKE
        task = ray.remote(wake_gradient).options(
            num_cpus=resources.learner_cpus, num_gpus=resources.learner_gpus
        )
        total = task.remote(
            before,
            [chat.text(document)[: config.model.max_length] for document in documents],
            config.wake.learning_rate,
            load_file(waiting) if waiting.is_file() else {},
            gpu=resources.learner_gpus > 0,
        )
        with atomic_path(self.run.dir / WAKE) as path:
            save_tensors(ray.get(total), path)
        due = any(map(self.applies_wake_gradients, range(len(self.steps))))
        return {"applied": due, "told": "applied tonight" if due else "kept for level 1's boundary"}

    def slots_before(self, index: int) -> Slots:
        """Return the layout of ``checkpoint_before(index)``."""
        slots = Slots.load(self.checkpoint_before(index))
        assert slots is not None
        return slots

    def expert_directory(self, index: int | None = None) -> Path:
        """Return the directory of a step's expert; by default the night's final one, after any dreaming."""
        if index is None and self.config.dreaming.enabled:
            return self.run.dir / "dreaming"
        return self.run.dir / self.step_key(self.last_step if index is None else index)

    def lake_of(self, index: int | None) -> Lake:
        """Return the texts that a transfer learns from: the night's, or its own between levels."""
        if index is None or self.transfer(index).teacher_has_context:
            return Lake(self.run.dir / "lake")
        return Lake(self.expert_directory(index) / "lake")

    def trainer_options(self, index: int | None, rate: float, steps: int) -> TrainerOptions:
        """Build the options for a transfer; None trains every parameter of the model at the start
        of the night."""
        if index is None:
            return build_trainer_options(
                self.config, self.dense_checkpoint(), None, self.dtype, rate, steps
            )
        step, before = self.transfer(index), self.checkpoint_before(index)
        options = build_trainer_options(self.config, before, step, self.dtype, rate, steps)
        if self.applies_wake_gradients(index) and self.accumulated_gradients:
            return replace(options, wake_gradients_path=str(self.accumulated_gradients.resolve()))
        return options

    def dreaming_options(self) -> TrainerOptions:
        """Build the options for dreaming, which continues with the expert of the last transfer."""
        dreaming = self.config.dreaming
        options = self.trainer_options(self.last_step, dreaming.learning_rate, dreaming.steps)
        # The expert's own gate is folded in by now; slots that are not reset are active again.
        return replace(
            options,
            teacher_only_slots=self.transfer(self.last_step).reset,
            keep_sender_slots=False,
            grad_clip=dreaming.grad_clip,
            gated_expert=False,
        )

    def grown_tensors(self, index: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the night's outcome, as tensors for an engine that serves the last smaller self.

        Args:
            index: The last step, for the expert before dreaming; None for the final expert.
        """
        slots, step = self.slots_before(self.last_step), self.transfer(self.last_step)
        expert = load_file(self.expert_directory(index) / EXPERT)
        return growth_of(slots).fold(
            self.checkpoint_before(self.last_step),
            slots,
            ExpertUpdate(
                step.slot,
                expert,
                reset=step.reset,
                wake_gradients=self.wake_gradients(self.last_step),
            ),
        )

    def dense_checkpoint(self) -> Path:
        """Return the model at the start of the night, for a baseline that trains every parameter.

        For a low-rank model it is a copy with its slots merged, and without room for more.
        """
        if self.slots_before(0).growth != LOW_RANK:
            return self.checkpoint_before(0)
        target = self.run.dir / "dense"
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=self.run.dir) as scratch:
                growth_of(self.slots_before(0)).export(
                    self.checkpoint_before(0), Path(scratch) / "plain"
                )
                widen(Path(scratch) / "plain", target, 0, self.slots_before(0).width, self.dtype)
        return target

    def _directory(self, index: int) -> Path:
        return self.run.dir / f"smaller-self-{index}"

    # --- engines ------------------------------------------------------------------

    def launch_engines(self, index: int) -> EnginePool:
        """Start engines that serve ``checkpoint_before(index)``, and wait until all can generate."""
        resources, checkpoint = self.config.resources, self.checkpoint_before(index)
        options = EngineOptions.from_config(self.config, str(checkpoint.resolve()), self.dtype)
        engines = EnginePool.launch(
            resources.engines,
            options,
            resources.engine_cpus,
            resources.engine_gpus,
            resources.engine,
        )
        if rest := engine_extra_tensors(checkpoint):
            self.publish_tensors(engines, rest)
        return engines

    def publish_tensors(
        self,
        engines: EnginePool,
        tensors: Iterable[tuple[str, Tensor]],
        canary: Canary | None = None,
    ) -> None:
        """Send weights that are not in a trainer to all engines."""
        resources = self.config.resources
        if transport_class(resources.transport).needs_gpu:
            publish_from_gpu(engines, tensors, canary, resources.learner_gpus)
        else:
            engines.publish(tensors, canary)
