"""The phases of a night: one table, in the order in which they run.

A phase is a row of ``PHASES`` and a function that takes the ``Night`` and returns plain JSON; large
results stay on disk. A plug-in of kind "phase" returns such a row (``examples/my_phase.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sleeprl.config.methods import METHODS
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.consolidation.ray_job import limit_to_budget
from sleeprl.data.lake import TRAJECTORIES
from sleeprl.data.trajectory import to_batch
from sleeprl.dreaming.launch import DreamingContext, make_tasks, run_dreaming
from sleeprl.evaluation.measure import ask_own_questions, describe_figures, write_own_texts
from sleeprl.memory.checkpoint import all_tensors
from sleeprl.memory.transfer import Merge
from sleeprl.models.resolve import find_model
from sleeprl.night.context import DAY, STUDY, TRAIN, Night, OnStep
from sleeprl.night.gate import commit_generation
from sleeprl.night.parts import split_day
from sleeprl.plugins import create
from sleeprl.self_study import question_bank
from sleeprl.self_study.sampler import TextSampler
from sleeprl.self_study.study import describe_study, load_probes, write_rehearsal, write_study
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.publish import CANARY
from sleeprl.wake.day import build_day
from sleeprl.weight_sync.verification import Canary

Result = dict[str, Any]
OWN_SHARE = 0.25
"""Share of the freely written questions and facts that is held out, for nights that measure
retention and perplexity on the model's own texts."""


def _always(config: NightConfig) -> bool:
    return True


def _no_reason(night: Night) -> str:
    return ""


def _no_note(result: Result) -> str:
    return ""


@dataclass(frozen=True)
class Phase:
    """A row of the table: a part of the night that is displayed, timed, recorded and run once."""

    key: str
    """Name of its result in ``state.json`` and of its time in ``summary.json``."""
    title: str
    """Title in the progress display."""
    run: Callable[[Night], Result]
    """Does the work; returns plain JSON."""
    note: Callable[[Result], str] = _no_note
    """Describes the result in a few words for the progress display."""
    enabled: Callable[[NightConfig], bool] = _always
    """Whether a night with this configuration has the phase."""
    skip_reason: Callable[[Night], str] = _no_reason
    """Why the phase is skipped this time; empty where it runs."""
    every_attempt: bool = False
    """Run it again in a resumed night, and add up its seconds."""
    after: str = ""
    """For a plug-in: key of the phase that it follows; empty for the last place before the gate."""
    summary_key: str = ""
    """Name of its result in ``summary.json``; empty to leave it out."""
    row: str = ""
    """Key of the row that displays it, if it has no row of its own."""
    expand: Callable[[Night], Sequence[Phase]] | None = None
    """Returns the phases to run in its place, where they depend on the night's plan."""

    @property
    def display_key(self) -> str:
        """Key of the row that displays it."""
        return self.row or self.key


# --- evening ----------------------------------------------------------------------


def meet_day(night: Night) -> Result:
    """Record the day into the lake, and save its documents, long ones in parts, and its questions."""
    day = build_day(night.config, night.lake)
    chat = ChatFormatter(find_model(night.config), night.config.model.chat_template_kwargs)
    day, _ = split_day(day, night.config, chat)
    day.save(night.run.dir / DAY)
    return day.counts()


def plan_levels(night: Night) -> Result:
    """Decide which memory levels sleep tonight, and write the model at the start of the night."""
    return night.stages.plan(night.day.documents)


def learn_in_wake(night: Night) -> Result:
    """Add the day's gradients to those that wait for level 1."""
    return night.stages.accumulate_wake_gradients(night.day.documents)


def prepare_engines(night: Night) -> Result:
    """Start the engines with the model for the next step, and the processes that train it.

    An engine starts on one core, and while it writes the study another core is idle too.
    """
    step = night.stages.next_step
    if not isinstance(night.stages.steps[step], Merge):
        night.prestart_training(step)
    engines = night.start_engines(step)
    night.prestart_dreaming(step)
    return {"engines": len(engines.group)}


def study_day(night: Night) -> Result:
    """Let the smaller self write the texts that the larger one learns from."""
    config, known = night.config, night.run.result("wake")
    sampler = TextSampler(
        night.engines,
        night.chat,
        config.self_study,
        config.seed,
        config.model.max_length,
        lambda count: night.run.progress.update("self_study", texts=count),
    )
    written = write_study(
        sampler,
        night.day.documents,
        hold_out=0.0 if known["retention"] else OWN_SHARE,
        question_bank=question_bank.load(night.stages.checkpoint_before(0)),
    )
    night.lake.rewrite(to_batch(written.trajectories), TRAJECTORIES)
    written.save(night.run.dir / STUDY)
    question_bank.save(written.question_bank, night.run.dir)
    day, asked_with = night.day, (night.engines, night.chat, config.evaluation)
    if not known["retention"]:
        day = ask_own_questions(day, written.held_questions, *asked_with)
    if not known["texts"]:
        day = write_own_texts(day, written.held_facts, *asked_with)
    day.save(night.run.dir / DAY)
    if config.dreaming.enabled:  # raises before consolidation rather than after it
        make_tasks(day.documents, written.probes, config)
    purposes = [text.purpose for text in written.trajectories]
    return {
        "new": purposes.count("self_study"),
        "replay": purposes.count("replay"),
        "probes": len(written.probes),
        "written": written.written,
        "malformed": written.malformed,
        "replay_coverage": written.coverage,
    }


def measure_before(night: Night) -> Result:
    """Measure the smaller self, with and without the day in its prompt."""
    return {
        "before": night.measure("before"),
        "before_with_context": night.measure("before_with_context", with_context=True),
    }


# --- the steps of the plan ----------------------------------------------------------


def plan_phases(night: Night) -> list[Phase]:
    """List the phases of the steps of the plan.

    A transfer between levels has a phase before it that writes its texts; consolidation has the
    day's.
    """
    phases = []
    for index, step in enumerate(night.stages.steps):
        key = night.stages.step_key(index)
        row = "consolidation" if key == "consolidation" else "levels"
        if isinstance(step, Merge):
            phases.append(Phase(key, "", partial(merge_slot, step=index), _exact, row=row))
            continue
        if not step.teacher_has_context:
            texts = partial(rehearse_level, step=index)
            phases.append(Phase(f"{key}-texts", "", texts, _count_texts, row=row))
        phases.append(Phase(key, "", partial(run_transfer, step=index), _count_steps, row=row))
    return phases


def merge_slot(night: Night, step: int) -> Result:
    """Merge a slot into the base.

    Nothing is trained. The base may become wider, which needs new engines.
    """
    night.restart_engines(step + 1)
    return {"width": night.stages.slots_before(step + 1).base_width}


def rehearse_level(night: Night, step: int) -> Result:
    """Let the smaller self write the texts of a transfer between levels.

    After tonight's consolidation the texts cover the day as well.
    """
    config, stages = night.config, night.stages
    learned = step > stages.context_step
    seed, length = config.seed + step, config.model.max_length
    sampler = TextSampler(night.engines, night.chat, config.self_study, seed, length)
    bank = question_bank.load(night.run.dir if learned else stages.checkpoint_before(0))
    written = write_rehearsal(sampler, bank)
    stages.lake_of(step).rewrite(to_batch(written.trajectories), TRAJECTORIES)
    new = sum(text.purpose == "self_study" for text in written.trajectories)
    return {"new": new, "replay": len(written.trajectories) - new}


def run_transfer(night: Night, step: int, on_step: OnStep | None = None) -> Result:
    """Train the new slot of a step: the smaller self teaches the larger one."""
    key = night.stages.step_key(step)
    job = night.training_job("seeding", step, str((night.run.dir / key).resolve()))
    bar_metrics = ("loss", "new/kl", "replay/kl", "imitation_reward_new")
    end = night.train(job, key, bar_metrics, on_step)
    return {"steps": end.steps, "tokens": end.tokens}


def dreaming_context(night: Night) -> DreamingContext:
    """Collect the inputs of dreaming, after consolidation."""
    stages = night.stages
    return DreamingContext(
        config=night.config,
        trainer=stages.dreaming_options(),
        expert=stages.expert_directory(stages.last_step),
        run_dir=night.run.dir,
        chat=night.chat,
        documents=night.day.documents,
        probes=load_probes(night.run.dir / STUDY),
        canary=night.canary,
    )


def dream(night: Night) -> Result:
    """Train the last slot further, by RL on the model's dreams."""
    run, steps = night.run, night.config.dreaming.steps
    bar_metrics = ("reward", "gap", "staleness")
    return run_dreaming(
        dreaming_context(night),
        night.engines,
        run.progress.warn,
        lambda step, metrics: run.log("dreaming", step, metrics, steps, *bar_metrics),
    )


# --- morning ----------------------------------------------------------------------


def measure_after(night: Night) -> Result:
    """Measure the larger self."""
    canary = Canary.load(night.stages.expert_directory() / CANARY)
    night.stages.publish_tensors(night.engines, night.stages.grown_tensors(), canary)
    night.prestart_baseline()
    return {"after": night.measure("after")}


def run_baseline(night: Night, name: str) -> Result:
    """Train another method on the same day and as many tokens; only its figures remain."""
    stages = night.stages
    step = stages.context_step if METHODS[name].grows else None
    if stages.has_merge:  # then the engines are wider than this method's checkpoint
        night.restart_engines(step or 0)
    budget = night.run.result("consolidation")["tokens"]
    job = limit_to_budget(night.training_job(name, step), budget)
    end = night.train(job, name, ("loss", "imitation_reward"))
    night.prestart_baseline(name)
    figures = night.measure(name)
    if not stages.has_merge:
        stages.publish_tensors(night.engines, all_tensors(stages.dense_checkpoint()))
    shutil.rmtree(night.run.dir / TRAIN / name, ignore_errors=True)
    return {"figures": figures, "steps": end.steps, "tokens": end.tokens}


def commit(night: Night) -> Result:
    """Stop all processes, and commit the grown model if it passes the gate."""
    night.close()
    return commit_generation(night.run, night.stages)


# --- notes --------------------------------------------------------------------------


def _exact(result: Result) -> str:
    return "exact"


def _count_texts(result: Result) -> str:
    return f"{result['new']} texts"


def _count_steps(result: Result) -> str:
    return f"{result['steps']} steps"


def _no_level_due(night: Night) -> str:
    return "no level is due" if len(night.stages.steps) == 1 else ""


def _not_dreaming(night: Night) -> str:
    return "" if night.config.dreaming.enabled else "dreaming.enabled=false"


def _committed(night: Night) -> str:
    return "done before" if night.run.is_done("commit") else ""


def _not_run(night: Night) -> Result:
    raise RuntimeError("this row only shows what other phases do")


# --- the table ----------------------------------------------------------------------

PHASES = (
    Phase("wake", "Wake: meet the day", meet_day, lambda r: f"{r['documents']} documents"),
    Phase(
        "plan", "Clock: which levels sleep", plan_levels, lambda r: "; ".join(r["told"]),
        summary_key="memory",
    ),
    Phase(
        "wake_learning", "Wake: learn in passing", learn_in_wake, lambda r: r["told"],
        enabled=lambda config: config.wake.learning_rate > 0,
    ),
    Phase(
        "prepare", "Start the engines", prepare_engines, lambda r: f"{r['engines']} running",
        every_attempt=True, skip_reason=_committed,
    ),
    Phase(
        "self_study", "Self-study: write the lessons", study_day, describe_study,
        summary_key="self_study",
    ),
    Phase("before", "Evening: what is known", measure_before, describe_figures),
    Phase("consolidation", "Consolidate: grow and distil", _not_run, expand=plan_phases),
    Phase(
        "levels", "Levels: make room, hand on", _not_run, expand=lambda night: (),
        skip_reason=_no_level_due,
    ),
    Phase(
        "dreaming", "Dream: write, reward, learn", dream, lambda r: f"{r['dreams']} dreams",
        skip_reason=_not_dreaming,
    ),
    Phase("after", "Morning: what is known now", measure_after, describe_figures),
    Phase("commit", "Gate and commit", commit, lambda r: r["verdict"]),
)  # fmt: skip
"""The phases of every night; ``phases_of`` inserts baselines and plug-ins."""
LAST_OF_EVENING = "before"
"""Key of the last phase before the model changes."""


def phases_of(config: NightConfig) -> list[Phase]:
    """List a night's phases in order: the enabled ones of ``PHASES``, its baselines and its plug-ins.

    Raises:
        ConfigError: A plug-in has the key of another phase, or follows an unknown one.
    """
    *phases, gate = [phase for phase in PHASES if phase.enabled(config)]
    for name in config.baselines:
        title = f"Baseline: {METHODS[name].title}"
        phases.append(Phase(name, title, partial(run_baseline, name=name), describe_figures))
    phases.append(gate)
    for name in config.phases:
        plugin: Phase = create(name, "phase", {})
        if plugin.enabled(config):
            phases.insert(_place_of(plugin, phases, name), plugin)
    return phases


def _place_of(plugin: Phase, phases: Sequence[Phase], name: str) -> int:
    """Find the position of a plug-in among the phases; several after the same phase stay in order."""
    keys = [phase.key for phase in phases]
    if plugin.key in keys:
        raise ConfigError(
            f"phases: {name!r} has the key {plugin.key!r} of another phase; rename it"
        )
    if not plugin.after:
        return keys.index("commit")
    if plugin.after not in keys:
        raise ConfigError(
            f"phases: {name!r} comes after {plugin.after!r}, which this night does not have; "
            f"its phases are {', '.join(keys)}"
        )
    place = keys.index(plugin.after) + 1
    while place < len(phases) and phases[place].after == plugin.after:
        place += 1
    return place


def rows_of(phases: Sequence[Phase]) -> list[tuple[str, str]]:
    """List key and title of each row of the progress display."""
    return [(phase.key, phase.title) for phase in phases]


def results_for_summary(phases: Sequence[Phase], result: Callable[[str], Any]) -> Mapping[str, Any]:
    """Collect the results for ``summary.json``, by their name there."""
    return {phase.summary_key: result(phase.key) for phase in phases if phase.summary_key}
