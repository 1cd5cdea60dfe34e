"""Runs a night: walks the table of phases.

``RunDirectory`` records the result of each phase, so a killed night resumes with the phase that it
died in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from sleeprl.cluster.preflight import describe_scarce_places
from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import NightConfig
from sleeprl.night.context import Night
from sleeprl.night.phases import LAST_OF_EVENING, Phase, phases_of, rows_of
from sleeprl.night.run_dir import SUMMARY, RunDirectory
from sleeprl.night.summary import summarise
from sleeprl.plugins import create
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.report import write_report
from sleeprl.reporting.terminal import quiet_libraries
from sleeprl.utils.files import write_json_atomic


@dataclass(frozen=True)
class FinishedPhase:
    """A finished phase of a night."""

    key: str
    """Name of the phase; its result and its seconds have this key in ``state.json``."""
    title: str
    """Title for the progress display."""
    note: str
    """The outcome in a few words."""
    seconds: float
    """Duration."""
    result: Any
    """Return value of the phase: plain JSON."""


def ignore_phase(phase: FinishedPhase) -> None:
    """Do nothing with a phase."""


def run_night(
    config: NightConfig,
    console: Console | None = None,
    on_phase: Callable[[FinishedPhase], None] = ignore_phase,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Run or resume a night.

    Args:
        config: The validated settings; ``config.run_dir`` may have an unfinished run of them.
        console: Where the progress is displayed; by default the standard output.
        on_phase: Called with each phase that finishes, but not with those of an earlier attempt.
        warnings: Lines to show before the first phase.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: A setting cannot work; the message names it and a fix.
        ActorFailure: A process of the night failed more often than it may be restarted.
    """
    # A wrong option raises before the night starts.
    for part in (config.consolidation, config.dreaming):
        create(part.algorithm, "algorithm", part.algorithm_options)
    phases = phases_of(config)
    with quiet_libraries(), NightProgress(rows_of(phases), console) as progress:
        run = RunDirectory(config, progress)
        for line in (*warnings, *describe_scarce_places(config)):
            progress.warn(line)
        try:
            with describe_resume(run), cluster(config.resources, on_stall=progress.warn):
                run_phases(Night(run), phases, on_phase)
        finally:
            run.close()
    summary = summarise(run, phases)
    write_json_atomic(run.dir / SUMMARY, summary)
    write_report(run.dir)
    return summary


@contextmanager
def describe_resume(run: RunDirectory) -> Iterator[None]:
    """Add to every error how to finish the night."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Nothing finished is lost; go on with: sleeprl night --resume {run.dir}")
        raise


def run_phases(
    night: Night,
    phases: Sequence[Phase],
    on_phase: Callable[[FinishedPhase], None] = ignore_phase,
) -> None:
    """Run the phases in their order; stop all processes at the end, also after an error."""
    try:
        for phase in phases:
            run_phase(night, phase, on_phase)
    finally:
        night.close()


def run_evening(night: Night) -> None:
    """Run the phases before the model changes; the engines stay up."""
    for phase in phases_of(night.config):
        run_phase(night, phase)
        if phase.key == LAST_OF_EVENING:
            return


def run_phase(
    night: Night, phase: Phase, on_phase: Callable[[FinishedPhase], None] = ignore_phase
) -> None:
    """Run one phase, or skip it; a result of an earlier attempt is reused."""
    run = night.run
    if reason := phase.skip_reason(night):
        run.progress.skip(phase.display_key, reason)
        return
    for part in [phase] if phase.expand is None else phase.expand(night):
        recorded = run.is_done(part.key) and not part.every_attempt
        do = run.run_always if part.every_attempt else run.run_once
        result = do(part.key, partial(part.run, night), part.note, part.display_key)
        if not recorded:
            seconds = run.state["seconds"][part.key]
            title = part.title or phase.title
            on_phase(FinishedPhase(part.key, title, part.note(result), seconds, result))
