"""One night as straight code: wake, measure, study, consolidate, dream, and the morning after.

Each phase is a function that returns plain JSON and leaves what is large on disk;
``RunDirectory.phase`` records it, so a killed night resumes at the phase it died in. What memory levels do
is a list of steps: room where it is needed, the context into level 1, each level that is due into the next.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import NightConfig
from sleeprl.consolidation import ray_job as train
from sleeprl.consolidation.methods import METHODS
from sleeprl.consolidation.train_loop import Job
from sleeprl.data.trajectory import to_batch
from sleeprl.dreaming import launch as dreaming
from sleeprl.evaluation import measure as figures
from sleeprl.evaluation.questions import Day
from sleeprl.memory.checkpoint import all_tensors
from sleeprl.memory.transfer import Merge
from sleeprl.models.resolve import device_dtype
from sleeprl.night import gate
from sleeprl.night.model_stages import ModelStages
from sleeprl.night.run_dir import ANSWERS, SUMMARY, RunDirectory
from sleeprl.plugins import create
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.report import write_report
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.self_study import question_bank as notebook
from sleeprl.self_study.study import describe_study, load_probes, study, write_rehearsal
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.publish import CANARY
from sleeprl.utils.files import write_json_atomic
from sleeprl.wake.day import build_day
from sleeprl.weight_sync.verification import Canary

PHASES = [
    ("wake", "Wake: meet the day"),
    ("plan", "Clock: which levels sleep"),
    ("prepare", "Start the engines"),
    ("self_study", "Self-study: write the lessons"),
    ("before", "Evening: what is known"),
    ("consolidation", "Consolidate: grow and distil"),
    ("levels", "Levels: make room, hand on"),
    ("dreaming", "Dream: write, reward, learn"),
    ("after", "Morning: what is known now"),
    ("commit", "Gate and commit"),
]


def phases(config: NightConfig) -> list[tuple[str, str]]:
    """Key and title of each phase: the night's own, and one per baseline before the gate."""
    baselines = [(name, f"Baseline: {METHODS[name].title}") for name in config.baselines]
    learns = [("wake_learning", "Wake: learn in passing")] if config.wake.learning_rate else []
    return [*PHASES[:2], *learns, *PHASES[2:-1], *baselines, PHASES[-1]]


def run_night(config: NightConfig) -> dict[str, Any]:
    """Run or resume the night that ``config`` describes; returns its summary."""
    for part in (config.consolidation, config.dreaming):  # a wrong option is told before the night
        create(part.algorithm, "algorithm", part.algorithm_options)
    with NightProgress(phases(config)) as progress:
        run = RunDirectory(config, progress)
        try:
            with cluster(config.resources, on_stall=progress.warn):
                summary = Night(run).sleep()
        finally:
            run.close()
    write_json_atomic(run.dir / SUMMARY, summary)
    write_report(run.dir)
    return summary


class Night:
    """The night's few shared things; the phases are its methods, in the order they happen."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.config = run, run.config
        self.dtype = device_dtype(self.config.model.dtype, self.config.resources)
        self.selves = ModelStages(run, self.dtype)
        self.lake = self.selves.lake(None)
        self.fleet: EnginePool | None = None

    def sleep(self) -> dict[str, Any]:
        run, config = self.run, self.config
        try:
            self.evening()
            for index in range(len(self.selves.steps)):
                self.step(index)
            if len(self.selves.steps) == 1:
                run.progress.skip("levels", "no level is due")
            if config.dreaming.enabled:
                run.phase("dreaming", self.dream, lambda r: f"{r['dreams']} dreams")
            else:
                run.progress.skip("dreaming", "dreaming.enabled=false")
            run.phase("after", self.after, gate.describe_figures)
            for name in config.baselines:
                run.phase(name, partial(self.baseline, name), gate.describe_figures)
        finally:
            if self.fleet is not None:
                self.fleet.shutdown()
        run.phase("commit", lambda: gate.commit(run, self.selves), lambda r: r["verdict"])
        return gate.summarise(run)

    # --- evening ------------------------------------------------------------------

    def evening(self) -> None:
        """All that comes before the model changes."""
        run = self.run
        run.phase("wake", self.wake, lambda r: f"{r['documents']} documents")
        day = Day.load(run.dir / "day.json")
        run.phase("plan", lambda: self.selves.plan(day.documents), lambda r: "; ".join(r["told"]))
        if self.config.wake.learning_rate:
            learn = partial(self.selves.learn_in_wake, day.documents)
            run.phase("wake_learning", learn, lambda r: r["told"])
        if not run.done("commit"):
            self.prepare(day)
        run.phase("self_study", self.self_study, describe_study)
        run.phase("before", self.before, gate.describe_figures)

    def wake(self) -> dict[str, Any]:
        day = build_day(self.config, self.lake)
        day.save(self.run.dir / "day.json")
        return day.counts()

    def prepare(self, day: Day) -> None:
        """Start the engines with the model that the next step needs; every attempt has to."""
        start = lambda: self.attach(day, self.selves.launch(self.selves.next))  # noqa: E731
        self.run.attempt("prepare", start, lambda _: f"{len(self._engines().group)} running")

    def attach(self, day: Day, fleet: EnginePool) -> None:
        """Work on this day with these engines, which hold the smaller self's weights."""
        self.day, self.fleet = day, fleet
        self.chat = ChatFormatter(self.selves.before(0))
        length = min(64, self.config.model.max_length // 2)
        self.canary = self.chat.prompt(day.documents[0])[:length]

    def before(self) -> dict[str, Any]:
        return {
            "before": self.measure("before"),
            "before_with_context": self.measure("before_with_context", with_context=True),
        }

    def self_study(self) -> dict[str, Any]:
        config, asked = self.config, self.run.result("wake")["retention"]
        written = study(
            self._engines(), self.chat, self.day.documents, config.self_study, config.seed,
            config.model.max_length,
            hold_out=0.0 if asked else 0.25, notebook=notebook.load(self.selves.before(0)),
            on_written=lambda count: self.run.progress.update("self_study", texts=count),
        )  # fmt: skip
        self.lake.rewrite(to_batch(written.trajectories), "trajectories")
        written.save(self.run.dir / "study.json")
        notebook.save(written.notebook, self.run.dir)
        its_own = (self._engines(), self.chat, config.evaluation)
        if not asked:
            self.day = figures.own_retention(self.day, written.held_questions, *its_own)
        if not self.run.result("wake")["texts"]:
            self.day = figures.own_texts(self.day, written.held_facts, *its_own)
        self.day.save(self.run.dir / "day.json")
        if config.dreaming.enabled:  # told now, and not after consolidation
            dreaming.make_tasks(self.day.documents, written.probes, config.seed)
        purposes = [t.purpose for t in written.trajectories]
        return {
            "new": purposes.count("self_study"),
            "replay": purposes.count("replay"),
            "probes": len(written.probes),
            "written": written.written,
            "malformed": written.malformed,
            "replay_coverage": written.coverage,
        }

    # --- night --------------------------------------------------------------------

    def step(self, index: int) -> None:
        """One step of the plan: text to do it with, unless the day was the text; then the doing."""
        run, key, step = self.run, self.selves.key(index), self.selves.steps[index]
        if isinstance(step, Merge):
            run.phase(key, lambda: self.merge(index), lambda r: "exact")
            return
        if not step.teacher_has_context:
            run.phase(f"{key}-texts", lambda: self.recollect(index), lambda r: f"{r['new']} texts")
        run.phase(key, lambda: self.transfer(index), lambda r: f"{r['steps']} steps")

    def merge(self, index: int) -> dict[str, Any]:
        """Nothing is trained; but the base may have become wider, which an engine cannot."""
        self.restart(index + 1)
        return {"width": self.selves.slots(index + 1).base_width}

    def recollect(self, index: int) -> dict[str, Any]:
        """What the smaller self of a transfer between levels says of itself; of tonight if it slept on it."""
        config, learned = self.config, index > self.selves.from_context
        asked = notebook.load(self.run.dir if learned else self.selves.before(0))
        written = write_rehearsal(
            self._engines(), self.chat, config.self_study, config.seed + index,
            config.model.max_length, notebook=asked,
        )  # fmt: skip
        self.selves.lake(index).rewrite(to_batch(written.trajectories), "trajectories")
        new = sum(text.purpose == "self_study" for text in written.trajectories)
        return {"new": new, "replay": len(written.trajectories) - new}

    def transfer(
        self, index: int, on_step: Callable[[int], None] = lambda _: None
    ) -> dict[str, Any]:
        seeding, key = self.config.consolidation, self.selves.key(index)
        job = self._job("seeding", index, str((self.run.dir / key).resolve()))
        shown = ("loss", "new/kl", "replay/kl", "imitation_reward_new")
        metrics = self._train(job, key, key, seeding.steps, shown, on_step)
        return {"steps": metrics["step"], "tokens": metrics["tokens"]}

    def dream(self) -> dict[str, Any]:
        probes = load_probes(self.run.dir / "study.json")
        steps = self.config.dreaming.steps
        learner, born = self.selves.dreamer(), self.selves.expert(self.selves.last)
        shown = ("reward", "gap", "staleness")
        return dreaming.run_dreaming(
            self.config, self._engines(), learner, born, self.chat,
            self.day.documents, probes, self.run.dir, self.canary, self.run.progress.warn,
            lambda step, metrics: self.run.log("dreaming", step, metrics, steps, *shown),
        )  # fmt: skip

    # --- morning ------------------------------------------------------------------

    def after(self) -> dict[str, Any]:
        canary = Canary.load(self.selves.expert() / CANARY)
        self.selves.send(self._engines(), self.selves.larger(), canary)
        return {"after": self.measure("after")}

    def baseline(self, name: str) -> dict[str, Any]:
        """Another method on the same day and as many training tokens; only its figures stay."""
        index = self.selves.from_context if METHODS[name].grows else None
        if self.selves.merge:  # then the engines are wider than what this method starts from
            self.restart(index or 0)
        job = train.budgeted(self._job(name, index), self.run.result("consolidation")["tokens"])
        shown = ("loss", "imitation_reward")
        end = self._train(job, name, name, job.learner.total_steps, shown)
        figures = self.measure(name)
        if not self.selves.merge:
            self.selves.send(self._engines(), all_tensors(self.selves.dense()))
        shutil.rmtree(self.run.dir / "train" / name, ignore_errors=True)
        return {"figures": figures, "steps": end["step"], "tokens": end["tokens"]}

    # --- helpers ------------------------------------------------------------------

    def _engines(self) -> EnginePool:
        assert self.fleet is not None
        return self.fleet

    def restart(self, index: int) -> None:
        """New engines, with the smaller self of a step: it may be wider or narrower."""
        self._engines().shutdown()
        self.fleet = None
        self.fleet = self.selves.launch(index)

    def measure(self, state: str, *, with_context: bool = False) -> dict[str, Any]:
        """The figures of what the engines hold; every answer goes to ``answers/STATE.jsonl``."""
        return figures.measure(
            self._engines(),
            self.chat,
            self.day,
            with_context=with_context,
            max_tokens=self.config.evaluation.max_tokens,
            max_length=self.config.model.max_length,
            record=self.run.dir / ANSWERS / f"{state}.jsonl",
            lake=self.lake,
        )

    def _job(self, name: str, index: int | None, output: str = "") -> Job:
        """A method on one step of the plan, or (None) on the model as the night began."""
        method, config, longest = METHODS[name], self.config, self.config.model.max_length
        rate = method.learning_rate(name, config.consolidation, config.fixed_capacity)
        return Job(
            method=name,
            learner=self.selves.learner(index, rate, config.consolidation.steps),
            config=config.consolidation,
            fixed=config.fixed_capacity,
            seed=config.seed,
            lake=str(self.selves.lake(index).directory.resolve()),
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

        place = self.run.dir / "train"
        return train.run(job, self._engines(), self.config.resources, place, name, on_metrics)
