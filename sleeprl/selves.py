"""The model after each step of a night, as checkpoints in the run and in engines.

``smaller-self-N`` is the model after the first N steps of the night's plan. It is written
when it is first needed: what a step trained is on disk, so a night that goes on after a
crash finds or rebuilds the same one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sleeprl import ladder
from sleeprl.actors.engine import EngineOptions
from sleeprl.actors.fleet import Fleet
from sleeprl.actors.learner import LearnerOptions
from sleeprl.chat import Chat
from sleeprl.files import atomic_directory
from sleeprl.memory.checkpoint import EXPERT, widen
from sleeprl.memory.growth import growth_named, growth_of, update
from sleeprl.memory.slots import LOW_RANK, Slots
from sleeprl.memory.transfer import Merge, Step, Transfer, from_dict, to_dict
from sleeprl.models import find_model
from sleeprl.run import Run
from sleeprl.trajectories.lake import Lake


class Selves:
    """The checkpoints of one run. Steps are counted from 0; there is a model before each."""

    def __init__(self, run: Run, dtype: str) -> None:
        self.run, self.config, self.dtype = run, run.config, dtype

    # --- the plan -----------------------------------------------------------------

    def plan(self, documents: Sequence[str]) -> dict[str, Any]:
        """Write the model as the night begins, and decide the night's steps.

        Returns ``parent`` (a generation), ``clock`` (its state after this night),
        ``steps``, and ``told``: the steps as a reader sees them.
        """
        config, manifest = self.config, ladder.parent(self.config)
        source = find_model(config)
        chat = Chat(source)
        slots = Slots.load(source)
        if slots is not None:
            ladder.require_layout(config, slots)
        clock = ladder.clock_of(config, manifest)
        lengths = [len(chat.text(document)) for document in documents]
        boundaries = clock.advance(ladder.lived(config, lengths))
        steps = ladder.steps_of(config, slots or ladder.new_slots(config), boundaries)
        growth, empty = growth_named(config.memory.growth), ladder.new_slots(config)
        growth.prepare(source, self._directory(0), empty.pools, empty.width, self.dtype)
        return {
            "parent": manifest.id if manifest else None,
            "clock": clock.state_dict(),
            "steps": [to_dict(step) for step in steps],
            "told": [ladder.told(step) for step in steps],
        }

    @property
    def steps(self) -> list[Step]:
        return [from_dict(step) for step in self.run.result("plan")["steps"]]

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
                update(source, directory, self.slots(index - 1), step, expert)
        return target

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

    def learner(self, index: int | None, rate: float, steps: int) -> LearnerOptions:
        """For a transfer; None trains every parameter of the model as the night began."""
        seeding, resources = self.config.consolidation, self.config.resources
        step = None if index is None else self.transfer(index)
        checkpoint = self.dense() if index is None else self.before(index)
        return LearnerOptions(
            checkpoint=str(checkpoint.resolve()),
            slot=step.slot if step else None,
            held=step.reset if step else (),
            dtype=self.dtype,
            seed=self.config.seed,
            learning_rate=rate,
            total_steps=steps,
            warmup=min(seeding.warmup, steps // 4),
            weight_decay=seeding.weight_decay,
            grad_clip=seeding.grad_clip,
            threads=resources.learner_threads,
            gpu=resources.learner_gpus > 0,
        )

    def larger(self) -> Iterator[tuple[str, Tensor]]:
        """The night's outcome, as tensors for an engine that holds ``before(last)``."""
        slots, step = self.slots(self.last), self.transfer(self.last)
        expert = load_file(self.expert() / EXPERT)
        return growth_of(slots).fold(
            self.before(self.last), slots, step.slot, expert, reset=step.reset
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

    def launch(self, index: int) -> Fleet:
        """Start engines that hold ``before(index)``."""
        resources, checkpoint, slots = self.config.resources, self.before(index), self.slots(index)
        options = EngineOptions(
            model=str(checkpoint.resolve()),
            dtype=self.dtype,
            max_length=self.config.model.max_length,
            threads=resources.engine_cpus,
            memory_gb=resources.engine_memory_gb,
            gpu=resources.engine_gpus > 0,
            gpu_utilization=resources.engine_gpu_utilization,
            seed=self.config.seed,
        )
        fleet = Fleet.launch(
            resources.engines, options, resources.engine_cpus, resources.engine_gpus
        )
        if slots.growth == LOW_RANK and slots.used:
            # The weights of such a checkpoint are the base alone; the slots lie beside them.
            fleet.publish(growth_of(slots).tensors(checkpoint, slots))
        return fleet
