"""The model after each step of a night, as checkpoints in the run and in engines.

``smaller-self-N`` is the model after the first N steps of the night's plan. It is written
when it is first needed: what a step trained is on disk, so a night that goes on after a
crash finds or rebuilds the same one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleeprl.config.schema import NightConfig
from sleeprl.data.lake import Lake
from sleeprl.memory.checkpoint import EXPERT, WAKE, widen
from sleeprl.memory.growth import engine_extra_tensors, growth_named, growth_of, update
from sleeprl.memory.slots import LOW_RANK, Slots
from sleeprl.memory.transfer import Merge, Step, Transfer, from_dict, to_dict
from sleeprl.memory.wake_learning import wake_gradient
from sleeprl.models.resolve import find_model
from sleeprl.night import schedule
from sleeprl.night.run_dir import RunDirectory
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.publish import publish_from_gpu
from sleeprl.utils.files import atomic_directory, atomic_path
from sleeprl.weight_sync.base import BETWEEN_GPUS
from sleeprl.weight_sync.verification import Canary


def learner_options(
    config: NightConfig,
    checkpoint: Path,
    step: Transfer | None,
    dtype: str,
    rate: float,
    steps: int,
) -> TrainerOptions:
    """What a night's settings say of a learner that starts from ``checkpoint``; without a transfer
    it trains every parameter."""
    seeding, resources = config.consolidation, config.resources
    return TrainerOptions(
        checkpoint=str(checkpoint.resolve()),
        slot=step.slot if step else None,
        teacher_only_slots=step.held if step else (),
        keep_sender_slots=step is not None and step.held != step.reset,
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
    """The checkpoints of one run. Steps are counted from 0; there is a model before each."""

    def __init__(self, run: RunDirectory, dtype: str) -> None:
        self.run, self.config, self.dtype = run, run.config, dtype

    # --- the plan -----------------------------------------------------------------

    def plan(self, documents: Sequence[str]) -> dict[str, Any]:
        """Write the model as the night begins, and decide the night's steps.

        Returns ``parent`` (a generation), ``clock`` (its state after this night),
        ``steps``, and ``told``: the steps as a reader sees them.
        """
        config, manifest = self.config, schedule.parent(self.config)
        source = find_model(config)
        chat = ChatFormatter(source)
        slots = Slots.load(source)
        if slots is not None:
            schedule.require_layout(config, slots)
        clock = schedule.clock_of(config, manifest)
        lengths = [len(chat.text(document)) for document in documents]
        boundaries = clock.advance(schedule.elapsed_units(config, lengths))
        steps = schedule.steps_of(config, slots or schedule.new_slots(config), boundaries)
        growth, empty = growth_named(config.memory.growth), schedule.new_slots(config)
        growth.prepare(source, self._directory(0), empty.pools, empty.width, self.dtype)
        return {
            "parent": manifest.id if manifest else None,
            "clock": clock.state_dict(),
            "steps": [to_dict(step) for step in steps],
            "told": [schedule.describe_step(step) for step in steps],
        }

    @property
    def steps(self) -> list[Step]:
        return [from_dict(step) for step in self.run.result("plan")["steps"]]

    @property
    def merge(self) -> bool:
        """Whether a step makes the base take a slot in, and so maybe wider."""
        return any(isinstance(step, Merge) for step in self.steps)

    @property
    def last(self) -> int:
        """The last step. It is a transfer; dreaming goes on with its expert."""
        return len(self.steps) - 1

    @property
    def from_context(self) -> int:
        """The step that brings the day into the weights; every night has one."""
        return next(i for i in range(len(self.steps)) if self.key(i) == "consolidation")

    def transfer(self, index: int) -> Transfer:
        step = self.steps[index]
        assert isinstance(step, Transfer)
        return step

    def key(self, index: int) -> str:
        """Name of a step's phase, of its job, and of the directory of its expert."""
        step = self.steps[index]
        from_context = isinstance(step, Transfer) and step.teacher_has_context
        return "consolidation" if from_context else f"levels-{index}"

    @property
    def next(self) -> int:
        """The step that is to be done, or the last, whose expert is worked on to the end."""
        done = sum(self.run.done(self.key(index)) for index in range(len(self.steps)))
        return min(done, self.last)

    # --- checkpoints --------------------------------------------------------------

    def before(self, index: int) -> Path:
        """The smaller self of step ``index``: the model after all steps before it."""
        target = self._directory(index)
        if not target.is_dir():
            source, step = self.before(index - 1), self.steps[index - 1]
            merged = isinstance(step, Merge)
            expert = None if merged else load_file(self.expert(index - 1) / EXPERT)
            with atomic_directory(target) as directory:
                slots, wake = self.slots(index - 1), self.wake(index - 1)
                update(source, directory, slots, step, expert, wake)
        return target

    @property
    def accumulated(self) -> Path | None:
        """File of what was learned in wake and not applied yet: tonight's, or as the night began."""
        for directory in (self.run.dir, self._directory(0)):
            if (directory / WAKE).is_file():
                return directory / WAKE
        return None

    def applies_wake(self, index: int) -> bool:
        """Whether the step hands level 1 on: only then is what it learned in wake applied."""
        step = self.steps[index]
        return isinstance(step, Transfer) and (step.sender, step.receiver) == (1, 2)

    def wake(self, index: int) -> dict[str, Tensor] | None:
        """What the update of a step subtracts from the base, if anything."""
        if not self.applies_wake(index) or self.accumulated is None:
            return None
        return load_file(self.accumulated)

    def learn_in_wake(self, documents: Sequence[str]) -> dict[str, Any]:
        """Equation (2): the day's gradients are added to what waits for level 1's boundary."""
        config, resources, before = self.config, self.config.resources, self.before(0).resolve()
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
            save_file(ray.get(total), path)
        due = any(map(self.applies_wake, range(len(self.steps))))
        return {"applied": due, "told": "applied tonight" if due else "kept for level 1's boundary"}

    def slots(self, index: int) -> Slots:
        """The layout of ``before(index)``."""
        slots = Slots.load(self.before(index))
        assert slots is not None
        return slots

    def expert(self, index: int | None = None) -> Path:
        """Where a step's expert is; by default the night's last word, which dreaming may have."""
        if index is None and self.config.dreaming.enabled:
            return self.run.dir / "dreaming"
        return self.run.dir / self.key(self.last if index is None else index)

    def lake(self, index: int | None) -> Lake:
        """The texts that a transfer learns from: the night's, or between levels its own."""
        if index is None or self.transfer(index).teacher_has_context:
            return Lake(self.run.dir / "lake")
        return Lake(self.expert(index) / "lake")

    def learner(self, index: int | None, rate: float, steps: int) -> TrainerOptions:
        """For a transfer; None trains every parameter of the model as the night began."""
        if index is None:
            return learner_options(self.config, self.dense(), None, self.dtype, rate, steps)
        step, before = self.transfer(index), self.before(index)
        options = learner_options(self.config, before, step, self.dtype, rate, steps)
        if self.applies_wake(index) and self.accumulated:
            return replace(options, wake_gradients_path=str(self.accumulated.resolve()))
        return options

    def dreamer(self) -> TrainerOptions:
        """For dreaming, which goes on with the expert of the last transfer."""
        dreaming = self.config.dreaming
        learner = self.learner(self.last, dreaming.learning_rate, dreaming.steps)
        # A gate of its own is part of the expert by now; what a level keeps is on again.
        return replace(
            learner,
            teacher_only_slots=self.transfer(self.last).reset,
            keep_sender_slots=False,
            grad_clip=dreaming.grad_clip,
            gated_expert=False,
        )

    def larger(self, index: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """The night's outcome, as tensors for an engine that holds ``before(last)``; or, with the
        last index, what it was before dreaming."""
        slots, step = self.slots(self.last), self.transfer(self.last)
        expert = load_file(self.expert(index) / EXPERT)
        return growth_of(slots).fold(
            self.before(self.last),
            slots,
            step.slot,
            expert,
            reset=step.reset,
            wake=self.wake(self.last),
        )

    def dense(self) -> Path:
        """The model as the night began, for a baseline that trains every parameter.

        Of a low-rank model a copy with its slots merged, and no room for more.
        """
        if self.slots(0).growth != LOW_RANK:
            return self.before(0)
        target = self.run.dir / "dense"
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=self.run.dir) as scratch:
                growth_of(self.slots(0)).export(self.before(0), Path(scratch) / "plain")
                widen(Path(scratch) / "plain", target, 0, self.slots(0).width, self.dtype)
        return target

    def _directory(self, index: int) -> Path:
        return self.run.dir / f"smaller-self-{index}"

    # --- engines ------------------------------------------------------------------

    def launch(self, index: int) -> EnginePool:
        """Start engines that hold ``before(index)``."""
        resources, checkpoint = self.config.resources, self.before(index)
        options = EngineOptions.of(self.config, str(checkpoint.resolve()), self.dtype)
        fleet = EnginePool.launch(
            resources.engines,
            options,
            resources.engine_cpus,
            resources.engine_gpus,
            resources.engine,
        )
        if rest := engine_extra_tensors(checkpoint):
            self.send(fleet, rest)
        return fleet

    def send(
        self, fleet: EnginePool, tensors: Iterable[tuple[str, Tensor]], canary: Canary | None = None
    ) -> None:
        """Weights that no learner holds, to all engines."""
        resources = self.config.resources
        if resources.transport in BETWEEN_GPUS:
            publish_from_gpu(fleet, tensors, canary, resources.learner_gpus)
        else:
            fleet.publish(tensors, canary)
