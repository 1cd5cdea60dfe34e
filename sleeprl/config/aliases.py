"""Old names of settings, read for one release. Imports neither torch nor ray."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from sleeprl.config.schema import NightConfig
from sleeprl.plugins import BUILTIN

logger = logging.getLogger(__name__)

ALIASES: Mapping[str, str] = {
    "dreaming.correction_high": "dreaming.importance_weight.high",
    "dreaming.correction_level": "dreaming.importance_weight.level",
    "dreaming.correction_low": "dreaming.importance_weight.low",
    "dreaming.correction_mode": "dreaming.importance_weight.mode",
    "dreaming.hold": "dreaming.loss.replay_kl",
    "dreaming.learn": "dreaming.loss.sft",
    "dreaming.policy": "dreaming.loss.policy_gradient",
    "dreaming.reward_deadline": "dreaming.reward_timeout_s",
    "dreaming.staleness": "dreaming.max_staleness",
    "dreaming.trial_probes": "dreaming.trial_questions",
    "evaluation.retention": "evaluation.retention_questions",
    "evaluation.texts": "evaluation.perplexity_texts",
    "gate.perplexity": "gate.max_perplexity_ratio",
    "gate.tolerance": "gate.max_retention_drop",
    "resources.engine_gpu_utilization": "resources.engine_gpu_memory_utilization",
    "resources.engine_memory_gb": "resources.engine_kv_cache_gb",
    "resources.learner_workers_most": "resources.learner_workers_max",
    "resources.rewards": "resources.reward_workers",
    "self_study.conversations": "self_study.replay_conversations",
    "self_study.examples": "self_study.few_shot_examples",
    "self_study.notebook": "self_study.question_bank_size",
    "self_study.opening": "self_study.assistant_prefix",
    "self_study.probe_share": "self_study.held_out_share",
    "self_study.replay": "self_study.replay_questions",
    "self_study.sentences": "self_study.excerpt_sentences",
    "self_study.whole": "self_study.full_document_share",
}
"""The present key of each old one."""

ALGORITHM_OPTIONS: Mapping[str, str] = {
    "cap": "max_ratio",
    "discount": "gamma",
    "mean": "loss_aggregation",
    "overlong": "overlong_buffer_tokens",
    "redraws": "max_resample_rounds",
    "skip_equal": "filter_zero_std",
    "trace": "gae_lambda",
}
"""The present name of each old option of a built-in algorithm; a user's own may have any names."""


def rename_algorithm_options(config: NightConfig) -> None:
    """Put the options of built-in algorithms under their present names, with one warning."""
    for name, section in (("dreaming", config.dreaming), ("consolidation", config.consolidation)):
        old = [option for option in section.algorithm_options if option in ALGORITHM_OPTIONS]
        if not old or section.algorithm not in BUILTIN["algorithm"]:
            continue
        section.algorithm_options = {
            ALGORITHM_OPTIONS.get(option, option): value
            for option, value in section.algorithm_options.items()
        }
        pairs = ", ".join(f"{option} is now {ALGORITHM_OPTIONS[option]}" for option in old)
        _warn_once(f"old options of {name}.algorithm, read until the next release: {pairs}")


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def rename_old_keys(values: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """Move the values of old keys to the present ones.

    Args:
        values: Nested settings as plain data, for example a stored run's or a manifest's.

    Returns:
        A copy with the present keys only, and the old keys that were found. Where a present key is
        there as well, its value wins.
    """
    renamed, found = _copy(values), list[str]()
    for old, new in ALIASES.items():
        *path, leaf = old.split(".")
        section: Any = renamed
        for name in path:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section:
            continue
        value, target = section.pop(leaf), renamed
        *path, leaf = new.split(".")
        for name in path:
            target = target.setdefault(name, {})
        if isinstance(target, dict):  # else the schema names what is wrong there
            target.setdefault(leaf, value)
        found.append(old)
    return renamed, found


def describe_renames(old_keys: list[str]) -> str:
    """Name old keys and the present ones in one line."""
    pairs = ", ".join(f"{old} is now {ALIASES[old]}" for old in old_keys)
    return f"old settings, read until the next release: {pairs}"


def _copy(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}
