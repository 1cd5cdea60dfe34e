"""One night as straight code: wake, measure, study, consolidate, dream, and the morning after.

Each phase is a function that returns plain JSON and leaves what is large on disk;
``Run.phase`` records it, so a killed night resumes at the phase it died in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sleeprl import config as cfg
from sleeprl import morning
from sleeprl.actors.cluster import cluster
from sleeprl.actors.engine import EngineOptions
from sleeprl.actors.fleet import Fleet
from sleeprl.actors.learner import LearnerOptions
from sleeprl.actors.publish import CANARY
from sleeprl.chat import Chat
from sleeprl.config import NightConfig
from sleeprl.consolidation import job as train
from sleeprl.consolidation.methods import METHODS
from sleeprl.consolidation.self_study import load_probes, study
from sleeprl.consolidation.worker import Job
from sleeprl.dreaming import phase as dreaming
from sleeprl.evaluation import figures
from sleeprl.evaluation.probes import Day
from sleeprl.files import write_json_atomic
from sleeprl.memory.checkpoint import EXPERT, all_tensors, fold, widen
from sleeprl.memory.slots import Slots
from sleeprl.models import device_dtype, find_model
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.report import write_report
from sleeprl.run import SUMMARY, Run
from sleeprl.trajectories.lake import Lake
from sleeprl.trajectories.schema import to_batch
from sleeprl.wake.day import live
from sleeprl.weights.verify import Canary

PHASES = [
    ("wake", "Wake: meet the day"),
    ("prepare", "Prepare model and engines"),
    ("self_study", "Self-study: write the lessons"),
    ("before", "Evening: what is known"),
    ("consolidation", "Consolidate: grow and distil"),
    ("dreaming", "Dream: write, reward, learn"),
    ("after", "Morning: what is known now"),
    ("commit", "Gate and commit"),
]


def phases(config: NightConfig) -> list[tuple[str, str]]:
    """Key and title of each phase: the night's own, and one per baseline before the gate."""
    baselines = [(name, f"Baseline: {METHODS[name].title}") for name in config.baselines]
    return [*PHASES[:-1], *baselines, PHASES[-1]]


def run_night(config: NightConfig) -> dict[str, Any]:
    """Run or resume the night that ``config`` describes; returns its summary."""
    with NightProgress(phases(config)) as progress:
        run = Run(config, progress)
        try:
            with cluster(config.resources):
                summary = Night(run).sleep()
        finally:
            run.close()
    write_json_atomic(run.dir / SUMMARY, summary)
    write_report(run.dir)
    return summary


class Night:
    """The night's few shared things; the phases are its methods, in the order they happen."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.dtype = device_dtype(self.config.model.dtype, self.config.resources)
        self.lake = Lake(run.dir / "lake")
        self.self_dir = run.dir / "smaller-self"
        self.fleet: Fleet | None = None

    def sleep(self) -> dict[str, Any]:
        run, config = self.run, self.config
        try:
            self.evening()
            run.phase("consolidation", self.consolidate, lambda r: f"{r['steps']} steps")
            if config.dreaming.enabled:
                run.phase("dreaming", self.dream, lambda r: f"{r['dreams']} dreams")
            run.phase("after", self.after, morning.told)
            for name in config.baselines:
                run.phase(name, partial(self.baseline, name), morning.told)
        finally:
            if self.fleet is not None:
                self.fleet.shutdown()
        run.phase(
            "commit",
            lambda: morning.commit(run, self.self_dir, self._expert_dir()),
            lambda r: r["verdict"],
        )
        return morning.summarise(run)

    # --- evening ------------------------------------------------------------------

    def evening(self) -> None:
        """All that comes before the model changes."""
        run = self.run
        run.phase("wake", self.wake, lambda r: f"{r['documents']} documents")
        day = Day.load(run.dir / "day.json")
        if not run.done("commit"):
            self.prepare(day)
        run.phase(
            "self_study", self.self_study, lambda r: f"{r['new']} new, {r['replay']} replayed"
        )
        run.phase("before", self.before, morning.told)

    def wake(self) -> dict[str, Any]:
        day = live(self.config, self.lake)
        if not day.documents:
            raise cfg.ConfigError("wake.inputs hold no experience; there is nothing to sleep on")
        day.save(self.run.dir / "day.json")
        return {"documents": len(day.documents), "questions": len(day.probes)}

    def prepare(self, day: Day) -> None:
        """Widen the model once, start the engines. Needed by every attempt, so never recorded."""
        self.run.progress.start("prepare")
        model, resources = self.config.model, self.config.resources
        if not (self.self_dir / "config.json").is_file():
            widen(find_model(self.config), self.self_dir, model.slots, model.slot_width, self.dtype)
        options = EngineOptions(
            model=str(self.self_dir.resolve()),
            dtype=self.dtype,
            max_length=model.max_length,
            threads=resources.engine_cpus,
            memory_gb=resources.engine_memory_gb,
            gpu=resources.engine_gpus > 0,
            gpu_utilization=resources.engine_gpu_utilization,
            seed=self.config.seed,
        )
        engines = resources.engines
        self.attach(
            day, Fleet.launch(engines, options, resources.engine_cpus, resources.engine_gpus)
        )
        self.run.progress.finish(
            "prepare", f"{self.slots.count} slots, {len(self.slots.used)} used"
        )

    def attach(self, day: Day, fleet: Fleet) -> None:
        """Work on this day with these engines, which hold the smaller self's weights."""
        slots = Slots.load(self.self_dir)
        assert slots is not None
        self.day, self.fleet = day, fleet
        self.slots, self.slot = slots, slots.next_free()
        self.chat = Chat(self.self_dir)
        length = min(64, self.config.model.max_length // 2)
        self.canary = self.chat.prompt(day.documents[0])[:length]

    def before(self) -> dict[str, Any]:
        return {
            "before": self.measure(with_context=False),
            "before_with_context": self.measure(with_context=True),
        }

    def self_study(self) -> dict[str, Any]:
        config = self.config
        written = study(
            self._engines(), self.chat, self.day.documents, config.self_study, config.seed,
            config.model.max_length,
        )  # fmt: skip
        self.lake.append(to_batch(written.trajectories), "trajectories")
        written.save(self.run.dir / "study.json")
        if not self.day.of_kind("retention"):
            stated = [t for t in written.trajectories if t.task_id == "fact"]
            self.day = figures.own_retention(
                self.day,
                [pair.question for pair in written.own_knowledge],
                [self.chat.decode(t.response_ids) for t in stated],
                self._engines(),
                self.chat,
                config.evaluation,
            )
            self.day.save(self.run.dir / "day.json")
        purposes = [t.purpose for t in written.trajectories]
        return {
            "new": purposes.count("self_study"),
            "replay": purposes.count("replay"),
            "probes": len(written.probes),
            "written": written.written,
            "malformed": written.malformed,
        }

    # --- night --------------------------------------------------------------------

    def consolidate(self, on_step: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        seeding = self.config.consolidation
        job = self._job("seeding", str((self.run.dir / "consolidation").resolve()))
        shown = ("loss", "new/kl", "replay/kl", "imitation_reward_new")
        metrics = self._train(job, "consolidation", "consolidation", seeding.steps, shown, on_step)
        return {"steps": metrics["step"], "tokens": metrics["tokens"]}

    def dream(self) -> dict[str, Any]:
        probes = load_probes(self.run.dir / "study.json")
        steps = self.config.dreaming.steps
        learner = self._learner(self.slot, self.config.dreaming.learning_rate, steps)
        learner = replace(learner, grad_clip=self.config.dreaming.grad_clip)
        shown = ("reward", "gap", "staleness")
        return dreaming.run(
            self.config, self._engines(), learner, self.chat, self.day.documents, probes, self.run.dir,
            self.canary, lambda step, metrics: self.run.log("dreaming", step, metrics, steps, *shown),
        )  # fmt: skip

    # --- morning ------------------------------------------------------------------

    def after(self) -> dict[str, Any]:
        directory = self._expert_dir()
        tensors = fold(self.self_dir, self.slots, self.slot, load_file(directory / EXPERT))
        canary = Canary.load(directory / CANARY)
        self._engines().publish(tensors, canary)
        return {"after": self.measure(with_context=False)}

    def baseline(self, name: str) -> dict[str, Any]:
        """Another method on the same day and as many training tokens; only its figures stay."""
        job = train.budgeted(self._job(name), self.run.result("consolidation")["tokens"])
        shown = ("loss", "imitation_reward")
        end = self._train(job, name, name, job.learner.total_steps, shown)
        figures = self.measure(with_context=False)
        self._engines().publish(all_tensors(self.self_dir))
        shutil.rmtree(self.run.dir / "train" / name, ignore_errors=True)
        return {"figures": figures, "steps": end["step"], "tokens": end["tokens"]}

    # --- helpers ------------------------------------------------------------------

    def _engines(self) -> Fleet:
        assert self.fleet is not None
        return self.fleet

    def measure(self, *, with_context: bool) -> dict[str, Any]:
        return figures.measure(
            self._engines(),
            self.chat,
            self.day,
            with_context=with_context,
            max_tokens=self.config.evaluation.max_tokens,
            max_length=self.config.model.max_length,
        )

    def _expert_dir(self) -> Path:
        return self.run.dir / ("dreaming" if self.config.dreaming.enabled else "consolidation")

    def _learner(self, slot: int | None, rate: float, steps: int) -> LearnerOptions:
        seeding, resources = self.config.consolidation, self.config.resources
        return LearnerOptions(
            checkpoint=str(self.self_dir.resolve()),
            slot=slot,
            dtype=self.dtype,
            seed=self.config.seed,
            learning_rate=rate,
            total_steps=steps,
            warmup=min(seeding.warmup, steps // 4),
            weight_decay=seeding.weight_decay,
            grad_clip=seeding.grad_clip,
            threads=resources.learner_cpus,
            gpu=resources.learner_gpus > 0,
        )

    def _job(self, name: str, output: str = "") -> Job:
        method, config, longest = METHODS[name], self.config, self.config.model.max_length
        rate = method.learning_rate(name, config.consolidation, config.fixed_capacity)
        slot = self.slot if method.grows else None
        return Job(
            method=name,
            learner=self._learner(slot, rate, config.consolidation.steps),
            config=config.consolidation,
            fixed=config.fixed_capacity,
            seed=config.seed,
            lake=str(self.lake.directory.resolve()),
            output=output,
            canary=self.canary,
            first_version=self._engines().version + 1,
            passages=[self.chat.text(text)[:longest] for text in self.day.documents],
        )

    def _train(
        self, job: Job, phase: str, name: str, steps: int, shown: tuple[str, ...],
        on_step: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Any]:  # fmt: skip
        def on_metrics(record: dict[str, Any]) -> None:
            step = int(record.pop("step"))
            self.run.log(phase, step, record, steps, *shown)
            on_step(step)

        storage = self.run.dir / "train"
        return train.run(job, self._engines(), self.config.resources, storage, name, on_metrics)
