"""Decides which memory levels sleep tonight: parent generation, clock, and steps of the plan.

Imports neither torch nor ray, so that a dry run is fast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.lineage import LineageStore, Manifest
from sleeprl.lineage.store import MANIFEST
from sleeprl.memory.levels import CONTEXT, Clock, Due
from sleeprl.memory.slots import PoolFull, Slots
from sleeprl.memory.transfer import Merge, Step, Transfer, plan_night

_ID = re.compile(r"[0-9a-f]{16}")
"""The id of a generation, which is the name of its directory."""


def parent(config: NightConfig) -> Manifest | None:
    """Find the generation that ``model.name`` refers to, if any."""
    return LineageStore(config.generations).find(config.model.name)


def verify_parent(config: NightConfig) -> None:
    """Compare the generation that the night starts from with its manifest, as a rollback does.

    Raises:
        ConfigError: A file differs, is missing or does not belong.
    """
    store, name = LineageStore(config.generations), config.model.name
    named = Path(name)
    if not named.is_dir():
        manifest = store.find(name)
    elif (named / MANIFEST).is_file() and _ID.fullmatch(named.resolve().name):  # of any store
        store = LineageStore(named.resolve().parent)
        manifest = store.get(named.resolve().name)
    else:  # a plain checkpoint, or a copy under another name
        manifest = None
    if manifest is not None and (problems := store.verify(manifest.id)):
        raise ConfigError(
            f"model.name={name!r}: the generation {store.root / manifest.id} is not intact: "
            f"{'; '.join(problems)}. Restore it from a copy, or start from another "
            "(`sleeprl lineage`)"
        )


def clock_of(config: NightConfig, manifest: Manifest | None) -> Clock:
    """Return the clock at the start of the night: that of the parent generation, or a new one.

    Raises:
        ConfigError: The generation's clock counts in another unit.
    """
    clock = config.memory.clock()
    if manifest is not None and manifest.clock:
        try:
            clock.load_state_dict(manifest.clock)
        except ValueError as error:
            raise ConfigError(f"memory.unit of model.name={config.model.name!r}: {error}") from None
    return clock


def new_slots(config: NightConfig) -> Slots:
    """Return the layout that ``memory`` describes, with empty slots; the checkpoint has the
    ``base_width``."""
    memory = config.memory
    pools = tuple(level.slots for level in memory.levels)
    return Slots(0, memory.width, sum(pools), (), pools, memory.growth)


def require_layout(config: NightConfig, slots: Slots) -> None:
    """Refuse a checkpoint whose slots differ from the layout that ``memory`` describes.

    Raises:
        ConfigError: They differ; the message names the setting and a fix.
    """
    wanted = new_slots(config)
    for field, setting, found in (
        ("growth", wanted.growth, slots.growth),
        ("width", wanted.width, slots.width),
        ("levels (slots)", list(wanted.pools), list(slots.pools)),
    ):
        if setting != found:
            raise ConfigError(
                f"memory.{field}={setting}, but model.name={config.model.name!r} was grown with "
                f"{found}; set it to that, or start from a plain model"
            )


def steps_of(config: NightConfig, slots: Slots, boundaries: Sequence[Due]) -> tuple[Step, ...]:
    """Plan the steps of a night.

    Args:
        config: The settings.
        slots: The layout at the start of the night, with the filled slots.
        boundaries: The levels that are due.

    Raises:
        ConfigError: A level is full, or a transfer between levels has too little replay.
    """
    try:
        steps = plan_night(slots, boundaries, config.memory.when_full, config.memory.reset)
    except PoolFull as error:
        raise ConfigError(f"memory.levels: {error}") from None
    replay = config.self_study.replay_questions
    if replay < 2 and any(isinstance(s, Transfer) and not s.teacher_has_context for s in steps):
        raise ConfigError(
            f"self_study.replay_questions={replay}, but a level is handed on tonight with what the model "
            "writes freely; set self_study.replay_questions to 100 or more"
        )
    return steps


def elapsed_units(config: NightConfig, documents: Sequence[int]) -> int:
    """Return how far a night advances the clock, in ``memory.unit``.

    Args:
        config: The settings.
        documents: Lengths of the day's documents in tokens.
    """
    return {
        "tokens": sum(documents),
        "optimizer_steps": config.consolidation.steps,
        "episodes": len(documents),
        "nights": 1,
    }[config.memory.unit]


def describe_step(step: Step) -> str:
    """Describe a step of the plan in words."""
    if isinstance(step, Merge):
        return f"slot {step.slot} into the base"
    if step.sender == CONTEXT:
        return f"context into slot {step.slot} of level {step.receiver}"
    slots = ", ".join(map(str, step.teacher_only))
    text = f"level {step.sender} (slots {slots}) into slot {step.slot} of level {step.receiver}"
    return text if step.reset else f"{text}, which keeps them"


def describe_levels(config: NightConfig) -> list[tuple[str, str]]:
    """Describe each level, and what is due this night as far as it is known in advance.

    Returns:
        Name and description of each.
    """
    manifest = parent(config)
    clock, unit = clock_of(config, manifest), config.memory.unit
    named = LineageStore(config.generations).path(manifest.id) if manifest else config.model.name
    slots = Slots.load(Path(named)) or new_slots(config)
    require_layout(config, slots)
    lines = []
    for number, level in enumerate(clock.levels, start=1):
        ahead = (clock.now // level.period + 1) * level.period
        sleeps = f"every {level.period} {unit}, next at {ahead} (now {clock.now})"
        if number == slots.levels:
            sleeps = f"the slowest: keeps what it has; when_full={config.memory.when_full}"
        used = f"{len(slots.used_in(number))} of {level.slots} slots used"
        lines.append((f"level {number}", f"{used}; {sleeps}"))
    if unit in ("tokens", "episodes"):
        return [
            *lines,
            ("this night", f"adds the day's {unit}; what is due is known after the wake"),
        ]
    steps = steps_of(config, slots, clock.advance(elapsed_units(config, ())))
    return [*lines, ("this night", "; ".join(map(describe_step, steps)))]
