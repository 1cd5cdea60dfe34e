"""Refuse settings that an algorithm's flags do not allow. Built-in algorithms bring no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleeprl import plugins
from sleeprl.config.schema import ConfigError, ConsolidationConfig, DreamingConfig, NightConfig

if TYPE_CHECKING:
    from sleeprl.algorithms.base import Algorithm


def check_algorithms(config: NightConfig, *, builtin_only: bool) -> None:
    """Check each section's algorithm against the settings beside it.

    Args:
        config: Settings of a night.
        builtin_only: Leave out a user's own algorithm, whose module would be imported.

    Raises:
        ConfigError: The algorithm cannot learn with these settings.
        PluginError: A user's own algorithm cannot be made.
    """
    seeding, dreaming = config.consolidation, config.dreaming
    if algorithm := _make(seeding, builtin_only):
        if algorithm.needs_critic:
            raise ConfigError(
                f"consolidation.algorithm={seeding.algorithm} needs a critic, and a consolidation has "
                "none; choose another, such as dapo (dreaming has a critic)"
            )
        imitates = seeding.rollout_prompts > 0 and seeding.distillation < 1
        if imitates or "grpo" in config.baselines:
            _check_group_size("consolidation", seeding, algorithm)
    if algorithm := _make(dreaming, builtin_only):
        off = dreaming.importance_weight.level == "off"
        if dreaming.max_staleness > 0 and off and not algorithm.has_ratio:
            raise ConfigError(
                f"dreaming.max_staleness={dreaming.max_staleness} with "
                f"dreaming.importance_weight.level=off and dreaming.algorithm={dreaming.algorithm}, "
                "which has no ratio, trains on old policies as if they were new; set "
                "dreaming.importance_weight.level=token or dreaming.max_staleness=0"
            )
        if dreaming.enabled and dreaming.loss.policy_gradient > 0:
            _check_group_size("dreaming", dreaming, algorithm)


def _make(part: ConsolidationConfig | DreamingConfig, builtin_only: bool) -> Algorithm | None:
    """Return the section's algorithm; None where it is left out."""
    builtin = part.algorithm in plugins.BUILTIN["algorithm"]
    if builtin_only and not builtin:
        return None
    try:
        algorithm: Algorithm = plugins.create(part.algorithm, "algorithm", part.algorithm_options)
    except plugins.PluginError:
        if builtin_only:  # the check of the plug-ins says what is wrong
            return None
        raise
    return algorithm


def _check_group_size(
    name: str, part: ConsolidationConfig | DreamingConfig, algorithm: Algorithm
) -> None:
    """Refuse groups of one where an advantage is relative to a group."""
    if algorithm.compares_within_group and part.group_size == 1:
        raise ConfigError(
            f"{name}.group_size=1 leaves {name}.algorithm={part.algorithm} nothing to compare with, "
            f"and no gradient; set {name}.group_size=2 or more, or an algorithm such as reinforce"
        )
