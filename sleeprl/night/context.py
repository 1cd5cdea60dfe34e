"""The state that the phases of a night share: its run, model, engines and training processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from sleeprl.cluster.warm import processes_may_wait
from sleeprl.config.methods import METHODS
from sleeprl.config.schema import NightConfig
from sleeprl.consolidation.messages import JobEnd, StepReport
from sleeprl.consolidation.ray_job import TrainingProcesses
from sleeprl.consolidation.train_loop import Job
from sleeprl.dreaming.launch import prestart_actors
from sleeprl.evaluation.measure import measure
from sleeprl.evaluation.metrics import metrics_of
from sleeprl.evaluation.questions import Day
from sleeprl.models.resolve import device_dtype
from sleeprl.night.model_stages import ModelStages
from sleeprl.night.run_dir import ANSWERS, RunDirectory
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.options import TrainerOptions
from sleeprl.weight_sync.factory import transport_class

OnStep = Callable[[int], None]
DAY, STUDY, TRAIN = "day.json", "study.json", "train"
"""Files of a run that one phase writes and others read, and the directory of Ray Train's jobs."""
SHARED = "session"
"""Subdirectory of ``TRAIN`` for processes that run several jobs in turn."""


class Night:
    """The context of a night's phases.

    Phases exchange all results on disk, so a night that resumes after a crash reads the same.
    """

    def __init__(self, run: RunDirectory, engines: EnginePool | None = None) -> None:
        """Create the context.

        Args:
            run: The directory of the night, with the results of the finished phases.
            engines: Running engines that serve the smaller self; by default ``start_engines``
                starts them.
        """
        self.run = run
        self.config: NightConfig = run.config
        self.stages = ModelStages(run, device_dtype(run.config.model.dtype, run.config.resources))
        self.lake = self.stages.lake_of(None)
        self._engines = engines
        self._processes: TrainingProcesses | None = None

    # --- the day ------------------------------------------------------------------

    @property
    def day(self) -> Day:
        """The current documents, questions and held-out texts of the night."""
        return Day.load(self.run.dir / DAY)

    @cached_property
    def chat(self) -> ChatFormatter:
        """The chat format of the model; no step of a night changes it."""
        return ChatFormatter(self.stages.checkpoint_before(0))

    @cached_property
    def canary(self) -> list[int]:
        """Token ids that trainer and engines both score after each weight update."""
        length = min(64, self.config.model.max_length // 2)
        return self.chat.prompt(self.day.documents[0])[:length]

    # --- engines ------------------------------------------------------------------

    @property
    def engines(self) -> EnginePool:
        """The running engines."""
        if self._engines is None:
            raise RuntimeError("no engines are running; the phase `prepare` starts them")
        return self._engines

    def start_engines(self, step: int) -> EnginePool:
        """Start engines that serve the smaller self of a step of the plan."""
        self._engines = self.stages.launch_engines(step)
        return self._engines

    def stop_engines(self) -> None:
        """Stop the engines, if there are any."""
        engines, self._engines = self._engines, None
        if engines is not None:
            engines.shutdown()

    def restart_engines(self, step: int) -> None:
        """Restart the engines for another step, whose model may be wider or narrower."""
        self.stop_engines()
        self.start_engines(step)

    def measure(self, state: str, *, with_context: bool = False) -> dict[str, Any]:
        """Measure the model in the engines; the answers go to ``answers/STATE.jsonl``.

        Args:
            state: Name of the model's state, such as ``after``.
            with_context: Whether the prompt contains the question's document.

        Returns:
            The figures by metric, with the number of questions under ``n``.
        """
        measurement = measure(
            self.engines,
            self.chat,
            self.day,
            [metric.key for metric in metrics_of(self.config)],
            with_context=with_context,
            max_tokens=self.config.evaluation.max_tokens,
            max_length=self.config.model.max_length,
        )
        measurement.save(self.run.dir / ANSWERS / f"{state}.jsonl", self.lake)
        return measurement.figures

    # --- training -----------------------------------------------------------------

    def prestart_training(self, step: int) -> None:
        """Start the processes of a transfer early, while a core is idle: they import and wait.

        With a transport between GPUs, updates of the engines need the trainer's GPU until the
        transfer begins, so nothing is started.
        """
        key, seeding = self.stages.step_key(step), self.config.consolidation
        if transport_class(self.config.resources.transport).needs_gpu or self.run.is_done(key):
            return
        options = self.stages.trainer_options(step, seeding.learning_rate, seeding.steps)
        self.start_training(options, key)

    def prestart_dreaming(self, step: int) -> None:
        """Start the processes of dreaming early, while a core is idle, if dreaming follows this step."""
        to_dream = self.config.dreaming.enabled and not self.run.is_done("dreaming")
        if to_dream and step == self.stages.last_step:
            prestart_actors(self.config, self.stages.dreaming_options())

    def prestart_baseline(self, trained: str = "") -> None:
        """Start the processes of the next baseline, if there is one, while the engines measure.

        Args:
            trained: The baseline whose model is being measured.
        """
        done = {trained, *self.run.state["results"]}
        missing = [name for name in self.config.baselines if name not in done]
        if missing and not transport_class(self.config.resources.transport).needs_gpu:
            name, seeding = missing[0], self.config.consolidation
            step = self.stages.context_step if METHODS[name].grows else None
            options = self.stages.trainer_options(step, seeding.learning_rate, seeding.steps)
            self.start_training(options, name)

    def start_training(self, options: TrainerOptions, key: str) -> None:
        """Start the processes of a training job, or reuse those of the previous job.

        Args:
            options: Options of its trainer.
            key: Key of its phase.
        """
        name = SHARED if processes_may_wait(self.config.resources) else key
        if self._processes is not None and self._processes.name != name:
            self.stop_training()
        if self._processes is None:
            place = self.run.dir / TRAIN
            self._processes = TrainingProcesses(options, self.config.resources, place, name)

    def close(self) -> None:
        """Stop all processes that the night started."""
        self.stop_training()
        self.stop_engines()

    def stop_training(self) -> None:
        """Stop the training processes, if there are any."""
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.close()

    def training_job(self, method: str, step: int | None, output: str = "") -> Job:
        """Describe a training job.

        Args:
            method: A name in ``METHODS``.
            step: The step of the plan that it carries out; None trains every parameter of the model
                at the start of the night.
            output: Directory for the trained expert; empty for a baseline, of which only the
                figures remain.
        """
        config, longest = self.config, self.config.model.max_length
        rate = METHODS[method].learning_rate(method, config.consolidation, config.fixed_capacity)
        return Job(
            method=method,
            learner=self.stages.trainer_options(step, rate, config.consolidation.steps),
            config=config.consolidation,
            fixed=config.fixed_capacity,
            seed=config.seed,
            lake=str(self.stages.lake_of(step).directory.resolve()),
            output=output,
            canary=self.canary,
            first_version=self.engines.version + 1,
            passages=[self.chat.text(text)[:longest] for text in self.day.documents],
        )

    def train(
        self, job: Job, key: str, bar_metrics: tuple[str, ...], on_step: OnStep | None = None
    ) -> JobEnd:
        """Run a training job to its end, from its last checkpoint if there is one.

        Args:
            job: A job from ``training_job``.
            key: Key of the phase, and name of the job in the run's directory.
            bar_metrics: Metrics to display beside the progress bar.
            on_step: Called with the number of each finished step.

        Returns:
            ``step``, ``tokens``, ``version``, and which engines are ``verified`` at it.
        """

        def log_step(report: StepReport) -> None:
            total = job.learner.total_steps
            self.run.log(key, report.step, dict(report.metrics), total, *bar_metrics)
            if on_step is not None:
                on_step(report.step)

        self.start_training(job.learner, key)
        assert self._processes is not None
        recorded = self.run.recorded_steps(key)
        end = self._processes.run(job, self.engines, log_step, recorded)
        if not self._processes.reusable:
            self.stop_training()
        return end
