"""Everything the command does, as functions: load, plan, run, resume and replay a night.

``from sleeprl import load_config, run_night`` is the way in. Importing this module brings neither
torch nor ray; a function imports what it needs when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sleeprl import plugins
from sleeprl.config import loader
from sleeprl.config.describe import to_annotated_yaml
from sleeprl.config.schema import NightConfig
from sleeprl.config.validation import name_plugins_by_path, validate_plugins

if TYPE_CHECKING:
    from rich.console import Console

    from sleeprl.night.orchestrator import FinishedPhase
    from sleeprl.night.replay import ReplayResult

ProgressStyle = Literal["auto", "plain", "none"]
"""``auto``: a live display on a terminal, plain lines elsewhere. ``plain``: lines. ``none``: nothing."""
_PROGRESS_STYLES = ("auto", "plain", "none")
_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without a GPU keeps the others visible
    "RAY_TRAIN_ENABLE_V2": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What Ray and the tokenizers must find in the environment before they are imported."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one state of the model."""

    recall: float | None
    """Share of the questions about the day that were answered right; None where none was asked."""
    two_hop: float | None
    """Share of the questions that join two facts of the day."""
    retention: float | None
    """Share of the questions on what was known before the night."""
    perplexity: float | None
    """Perplexity of held-out texts."""
    metrics: Mapping[str, float | None]
    """All figures by key, those of plug-ins among them."""
    counts: Mapping[str, int]
    """How many questions, or tokens, each figure was measured on."""

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> Figures:
        """Read the figures of one state as ``summary.json`` holds them."""
        counts: Mapping[str, int] = block.get("n", {})
        metrics = {
            key: value
            for key, value in block.items()
            if value is None or (key in counts and isinstance(value, int | float))
        }
        return cls(
            recall=block.get("recall"),
            two_hop=block.get("two_hop"),
            retention=block.get("retention"),
            perplexity=block.get("perplexity"),
            metrics=metrics,
            counts=counts,
        )


@dataclass(frozen=True)
class Generation:
    """A committed state of the model."""

    id: str
    """Its full id; a unique beginning of it names it as well."""
    path: Path
    """Its directory: a Hugging Face checkpoint with a manifest."""


@dataclass(frozen=True)
class NightResult:
    """What came of a finished night."""

    passed: bool
    """Whether the night passed its gate and was committed."""
    refused: str
    """Why the gate refused it; empty where it passed."""
    generation: Generation | None
    """What was committed, if anything was."""
    before: Figures
    """The model as the night began."""
    before_with_context: Figures
    """The same model with the day's text in its prompt: the upper bound."""
    after: Figures
    """The model after the night."""
    baselines: Mapping[str, Figures]
    """Each method of ``baselines`` on the same day, by name."""
    seconds: Mapping[str, float]
    """How long each phase took. ``starting``: seconds that only waited for processes to start."""
    wall_seconds: float
    """How long the whole night took, over all attempts."""
    run_dir: Path
    """Directory of the run."""
    report_path: Path
    """The HTML report."""
    summary: Mapping[str, Any]
    """All of ``summary.json``."""

    @classmethod
    def from_summary(cls, config: NightConfig, summary: Mapping[str, Any]) -> NightResult:
        """Read a night's ``summary.json``."""
        committed, gate = summary["generation"], summary["gate"]
        generations = Path(config.generations)
        return cls(
            passed=gate["passed"],
            refused=gate["refused"],
            generation=Generation(committed, generations / committed) if committed else None,
            before=Figures.from_dict(summary["before"]),
            before_with_context=Figures.from_dict(summary["before_with_context"]),
            after=Figures.from_dict(summary["after"]),
            baselines={n: Figures.from_dict(each) for n, each in summary["baselines"].items()},
            seconds=summary["seconds"],
            wall_seconds=summary["wall_seconds"],
            run_dir=config.run_dir,
            report_path=config.run_dir / "report.html",
            summary=summary,
        )


@dataclass(frozen=True)
class NightPlan:
    """What a night would do."""

    config: NightConfig
    """The resolved configuration."""
    lines: Sequence[tuple[str, str]]
    """The plan as names and texts: directory, actors, which memory levels sleep, and what each phase
    costs."""
    warnings: Sequence[str]
    """What would not be learned or does not fit, and what this machine lacks; the night may be meant
    for another."""

    @property
    def yaml(self) -> str:
        """The configuration as a file, with the meaning of each setting as a comment."""
        return to_annotated_yaml(self.config)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        return "\n".join(f"{name:{width}}  {text}" for name, text in self.lines)


def load_config(
    path: str | Path | None = None, *, overrides: Sequence[str] = (), **settings: Any
) -> NightConfig:
    """Load a night's configuration.

    Later layers win: the defaults, the catalogue's settings of ``model.name``, the file,
    ``overrides``, ``settings``. A run directory that is taken gets the first free number behind its
    name, unless ``overrides`` or ``settings`` give the name.

    Args:
        path: A YAML file.
        overrides: Words as on the command line: ``seed=1``.
        **settings: Values by dotted key: ``**{"wake.inputs": ["notes.jsonl"]}``.

    Raises:
        ConfigError: A setting cannot work; the message names it, its value and a fix.
    """
    from sleeprl.models.catalogue import CATALOGUE
    from sleeprl.night.run_dir import fresh_name, refuse_existing

    of_model = {spec.name: spec.night for spec in CATALOGUE.values()}
    config = loader.load(path, overrides, of_model, settings)
    if "name" in settings or any(word.startswith("name=") for word in overrides):
        refuse_existing(config)
    else:
        config.name = fresh_name(config)
    return config


def plan_night(config: NightConfig, *, read_inputs: bool = True) -> NightPlan:
    """Check everything that a night needs, and say what it would do; start nothing.

    Args:
        config: What ``load_config`` returned, or a ``NightConfig`` built in Python.
        read_inputs: Read the inputs, the questions and the model. No weights are
            fetched. A run that is resumed has read them already.

    Raises:
        ConfigError: A setting cannot work.
        PluginError: A plug-in cannot be found or called.
    """
    from sleeprl.cluster.preflight import refuse_unusable_places
    from sleeprl.night.schedule import describe_levels
    from sleeprl.utils.machine import available_cpus

    if read_inputs:
        config = loader.validated(config)
    validate_plugins(config)
    refuse_unusable_places(config)
    costs, warnings = list[tuple[str, str]](), list[str]()
    if read_inputs:
        model, warnings = _look_at_model(config)
        costs, more = _estimate(config, model)
        warnings += more + _name_left_out(config)
    have = config.resources
    learner = f"{have.learner_workers} x ({have.learner_cpus} cores, {have.learner_gpus:g} GPUs)"
    beside = (
        f"{have.scorers} x scorer ({have.scorer_gpus:g} GPUs), {have.reward_workers} x reward, "
        "curriculum (no core reserved)"
    )
    lines = [
        ("run directory", str(config.run_dir)),
        ("ray", have.address or f"local, {have.cpus or available_cpus()} cores"),
        ("engines", f"{have.engines} x ({have.engine_cpus} cores, {have.engine_gpus:g} GPUs)"),
        ("learner", f"{learner}, ZeRO-3"),
        ("beside them", beside),
        *describe_levels(config),
        *costs,
    ]
    return NightPlan(config, lines, [*warnings, *_find_lacks(config)])


def run_night(
    config: NightConfig,
    *,
    progress: ProgressStyle = "auto",
    callbacks: Sequence[Callable[[FinishedPhase], None]] = (),
) -> NightResult:
    """Run one whole night.

    Args:
        config: What ``load_config`` returned, or a ``NightConfig`` built in Python, which is
            checked as a file is.
        progress: How the phases are shown.
        callbacks: Called in this process with each phase that has finished.

    Raises:
        ConfigError: A setting cannot work.
        RunTaken: The run directory holds a night already.
        PluginError: A plug-in cannot be found or called.
        ActorFailure: A process of the night failed more often than it may be restarted.
        KeyboardInterrupt: The night was interrupted; ``resume_night`` finishes it.
    """
    from sleeprl.night.run_dir import claim, refuse_existing
    from sleeprl.night.schedule import describe_levels, verify_parent

    _prepare_process()
    config = name_plugins_by_path(loader.validated(config))
    refuse_existing(config)
    validate_plugins(config)
    from sleeprl.cluster.preflight import refuse_unusable_places
    from sleeprl.cluster.runtime import require_gpus
    from sleeprl.models.check import check_model
    from sleeprl.models.resolve import describe_model, find_model
    from sleeprl.night.preview import preview_night

    refuse_unusable_places(config)
    require_gpus(config.resources)
    verify_parent(config)
    describe_levels(config)  # refuses a layout that the model does not have
    if (described := describe_model(config)) is not None:  # before gigabytes are fetched
        check_model(config, described, weights=False)
        preview_night(config, described)
    check_model(config, model := find_model(config))  # fetched before anything starts
    _, warnings = _estimate(config, model)
    claim(config)
    return _run(config, progress, callbacks, [*warnings, *_name_left_out(config)])


def resume_night(
    run_dir: str | Path,
    *,
    progress: ProgressStyle = "auto",
    callbacks: Sequence[Callable[[FinishedPhase], None]] = (),
) -> NightResult:
    """Finish the unfinished night in a directory, as it was configured.

    Args:
        run_dir: Directory of the run.
        progress: How the phases are shown.
        callbacks: Called in this process with each phase that finishes now.

    Raises:
        ConfigError: The directory holds no run.
        RunTaken: Another process runs it.
        DamagedFile: A file of the run is damaged; the message names it.
        ActorFailure: A process of the night failed more often than it may be restarted.
    """
    from sleeprl.night.run_dir import RunLock, read_state
    from sleeprl.night.schedule import verify_parent

    _prepare_process()
    config = load_run_config(run_dir)
    RunLock(config.run_dir).release()  # refuses a night that is running before anything is loaded
    validate_plugins(config)
    if "plan" not in read_state(config.run_dir).get("results", {}):
        verify_parent(config)
    from sleeprl.cluster.preflight import refuse_unusable_places
    from sleeprl.cluster.runtime import require_gpus

    refuse_unusable_places(config)
    require_gpus(config.resources)
    return _run(config, progress, callbacks)


def replay_dreaming(run_dir: str | Path, *, engines_only: bool = False) -> ReplayResult:
    """Do a run's dreaming again with one half of the pipeline.

    Args:
        run_dir: Directory of the run.
        engines_only: Generate and score the same groups, and train nothing. Otherwise the trainer
            alone learns from the recorded dreams.

    Raises:
        ConfigError: The run has no updates of dreaming.
    """
    _prepare_process()
    from sleeprl.night.replay import replay

    return replay(Path(run_dir), engines_only=engines_only)


def load_run_config(run_dir: str | Path) -> NightConfig:
    """Load the configuration of a run from its directory.

    Raises:
        ConfigError: The directory holds no run.
    """
    from sleeprl.night.run_dir import resume

    return resume(Path(run_dir))


def _run(
    config: NightConfig,
    progress: ProgressStyle,
    callbacks: Sequence[Callable[[FinishedPhase], None]],
    warnings: Sequence[str] = (),
) -> NightResult:
    from sleeprl.night import orchestrator

    def on_phase(phase: FinishedPhase) -> None:
        for callback in callbacks:
            callback(phase)

    summary = orchestrator.run_night(config, _make_console(progress), on_phase, warnings)
    return NightResult.from_summary(config, summary)


def _make_console(progress: ProgressStyle) -> Console:
    """Make the console that shows a night's progress."""
    from sleeprl.reporting.terminal import make_console
    from sleeprl.utils.terminal_text import PlainConsole

    if progress not in _PROGRESS_STYLES:
        raise ValueError(f"progress={progress!r} must be one of {', '.join(_PROGRESS_STYLES)}")
    if progress == "auto":
        return make_console()
    return PlainConsole(force_interactive=False, quiet=progress == "none")


def _prepare_process() -> None:
    """Set what Ray needs in the environment, and refuse to start a night inside another one."""
    if (module := plugins.module_being_imported()) is not None:
        raise RuntimeError(
            f"{module} is imported for a plug-in and starts a night; put that below "
            '`if __name__ == "__main__":`'
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _look_at_model(config: NightConfig) -> tuple[Path | None, list[str]]:
    """Check a night's model, as far as that needs no weights that are not on this machine.

    Returns:
        The checkpoint, None where it is not on this machine; and what this machine lacks.
    """
    from sleeprl.models.check import check_model
    from sleeprl.models.hub import HubUnreachable
    from sleeprl.models.resolve import describe_model, local_model
    from sleeprl.night.schedule import verify_parent

    verify_parent(config)
    model = local_model(config)
    if model is not None:
        check_model(config, model)
        return model, []
    try:
        if (described := describe_model(config)) is not None:
            check_model(config, described, weights=False)
    except HubUnreachable as error:
        return None, [str(error)]
    return None, []


def _name_left_out(config: NightConfig) -> list[str]:
    """Name the files in the input directories that are not read."""
    from sleeprl.wake.folders import find_files

    left_out = [str(file) for file in find_files(config.wake.inputs)[1]]
    if not left_out:
        return []
    more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
    return [f"not data, left out of wake.inputs: {', '.join(left_out[:5])}{more}"]


def _estimate(config: NightConfig, model: Path | None) -> tuple[list[tuple[str, str]], list[str]]:
    """Read the day, estimate what a night costs, and find what cannot work.

    Args:
        config: The settings.
        model: The checkpoint; None where it is not on this machine.

    Returns:
        Lines of the plan, and warnings.

    Raises:
        ConfigError: An input or a question cannot be read, a prompt is too long, or the model is
            too large.
    """
    from sleeprl.models.resolve import device_dtype
    from sleeprl.night.estimate import ModelSize, NightEstimate
    from sleeprl.night.preview import preview_night

    day = preview_night(config, model)
    if day is None:
        return [("the day", "comes from stdin; its cost is not known before")], []
    dtype = device_dtype(config.model.dtype, config.resources)
    night = NightEstimate(config, day, ModelSize.read(model) if model else None, dtype)
    return night.describe(), night.warnings()


def _find_lacks(config: NightConfig) -> list[str]:
    """Say what this machine lacks for a night."""
    from sleeprl.cluster.preflight import describe_scarce_places

    lacks = describe_scarce_places(config)
    if not config.resources.gpus:
        return lacks
    from sleeprl.cluster.runtime import ResourceError, require_gpus

    try:
        require_gpus(config.resources)
    except ResourceError as error:
        lacks.append(str(error))
    return lacks
