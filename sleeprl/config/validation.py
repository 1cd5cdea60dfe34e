"""What is refused before anything starts: values out of range, and settings that do not fit together.

Every message names the fields, their values and a fix. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sleeprl import plugins as registry
from sleeprl.config.schema import (
    METHODS,
    ConfigError,
    NightConfig,
    ResourcesConfig,
    keys,
)
from sleeprl.memory.levels import UNITS
from sleeprl.text.prompts import EXAMPLES
from sleeprl.utils.machine import available_cpus

_AT_LEAST_ZERO = {
    "seed", "consolidation.replay_ratio", "consolidation.warmup", "consolidation.weight_decay",
    "wake.learning_rate",
    "consolidation.beta", "consolidation.on_policy", "consolidation.distillation",
    "consolidation.ce", "consolidation.expert_gate", "consolidation.semantic", "consolidation.prefix_min",
    "consolidation.rollout_prompts", "consolidation.on_policy_warmup", "consolidation.seed_steps",
    "dreaming.max_staleness", "dreaming.loss.policy_gradient", "dreaming.loss.sft", "dreaming.loss.replay_kl",
    "dreaming.reference_kl", "dreaming.importance_weight.low", "gate.max_retention_drop",
    "resources.cpus", "resources.engine_gpus", "resources.learner_gpus", "resources.max_failures",
    "resources.teachers", "resources.teacher_gpus", "resources.scorer_gpus",
    "resources.learner_workers_max",
    "self_study.held_out_share", "self_study.replay_questions", "self_study.few_shot_examples",
    "self_study.full_document_share",
    "self_study.facts_per_document", "self_study.question_bank_size",
    "self_study.replay_conversations", "fixed_capacity.ewc",
}  # fmt: skip
_AT_MOST_ONE = {
    "consolidation.beta", "consolidation.on_policy", "consolidation.distillation",
    "consolidation.semantic", "consolidation.prefix_min", "consolidation.prefix_max",
    "gate.max_retention_drop", "self_study.held_out_share", "self_study.full_document_share",
    "resources.engine_gpu_memory_utilization",
}  # fmt: skip
_CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "memory.growth": ("gated_mlp", "low_rank"),
    "memory.unit": UNITS,
    "memory.when_full": ("distil", "merge", "stop"),
    "consolidation.support": ("teacher", "student", "full"),
    "consolidation.edit_mode": ("ratio", "abs"),
    "dreaming.reference_estimator": ("k1", "k2", "k3"),
    "dreaming.importance_weight.level": ("off", "token", "sequence", "geometric"),
    "dreaming.importance_weight.mode": ("truncate", "mask", "clip"),
    "resources.transport": ("shared_memory", "disk", "nccl", "ipc"),
    "resources.update_mode": ("keep", "drain", "abort"),
    "resources.layout": ("decoupled", "colocated"),
    "resources.offload": ("none", "optimizer", "parameters"),
}
_WITHOUT_RATIO = ("reinforce", "rest_em")
_WITHIN_GROUP = ("grpo", "dr_grpo", "dapo", "dapo_unscaled", "gspo", "cispo", "rloo")
"""Their advantage is over the others of a group."""


def check(config: NightConfig) -> None:
    """Raise ``ConfigError`` for what cannot work. Asks the machine for its cores, nothing else."""
    for key in keys():
        value = _get(config, key)
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int | float):
            if not math.isfinite(value):
                raise ConfigError(f"{key}={value} must be a finite number")
            low = 0 if key in _AT_LEAST_ZERO else None
            if low is None and value <= 0:
                raise ConfigError(f"{key}={value} must be greater than 0")
            if low is not None and value < low:
                raise ConfigError(f"{key}={value} must be at least {low}")
            if key in _AT_MOST_ONE and value > 1:
                raise ConfigError(f"{key}={value} must be at most 1")
            if key.endswith("_gpus") and value > 1 and value != int(value):
                raise ConfigError(
                    f"{key}={value} must be a share of one, such as 0.5, or whole ones"
                )
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(_CHOICES[key])}")
    for text in config.wake.inputs:
        if text != "-" and not Path(text).exists():
            raise ConfigError(f"wake.inputs: {text!r} does not exist; give a file or a directory")
    questions = config.evaluation.questions
    if questions is not None and not Path(questions).is_file():
        raise ConfigError(f"evaluation.questions={questions!r} does not exist; give a JSONL file")
    if questions is not None and not config.wake.inputs:
        raise ConfigError(
            f"evaluation.questions={questions!r} would not be asked: wake.inputs is empty, and the "
            "embedded world's day has questions of its own; give wake.inputs, or leave questions out"
        )
    config.memory.clock()
    study, seeding, dreaming = config.self_study, config.consolidation, config.dreaming
    if seeding.prefix_min > seeding.prefix_max:
        raise ConfigError(
            f"consolidation.prefix_min={seeding.prefix_min} is above "
            f"consolidation.prefix_max={seeding.prefix_max}; lower the first or raise the second"
        )
    if seeding.edit_mode == "ratio" and seeding.edit_threshold > 1:
        raise ConfigError(
            f"consolidation.edit_threshold={seeding.edit_threshold} is a share of a text and at "
            "most 1; set consolidation.edit_mode=abs for a number of edits"
        )
    if seeding.expert_gate and config.memory.growth != "gated_mlp":
        raise ConfigError(
            f"consolidation.expert_gate={seeding.expert_gate} closes the units of a gated MLP, but "
            f"memory.growth={config.memory.growth} has none; set one of them back"
        )
    if study.few_shot_examples > EXAMPLES:
        raise ConfigError(
            f"self_study.few_shot_examples={study.few_shot_examples} must be at most {EXAMPLES}"
        )
    if study.max_tokens >= config.model.max_length:
        raise ConfigError(
            f"self_study.max_tokens={study.max_tokens} leaves no room for a prompt in "
            f"model.max_length={config.model.max_length}; raise the latter"
        )
    for key, tokens in (
        ("dreaming.max_tokens", dreaming.max_tokens),
        ("evaluation.max_tokens", config.evaluation.max_tokens),
    ):
        if tokens >= config.model.max_length:
            raise ConfigError(
                f"{key}={tokens} leaves no room for a prompt in "
                f"model.max_length={config.model.max_length}; raise the latter"
            )
    if dreaming.importance_weight.low > dreaming.importance_weight.high:
        raise ConfigError(
            f"dreaming.importance_weight.low={dreaming.importance_weight.low} is above "
            f"dreaming.importance_weight.high={dreaming.importance_weight.high}; lower the first"
        )
    if dreaming.temperature != 1 and dreaming.importance_weight.level == "off":
        raise ConfigError(
            f"dreaming.temperature={dreaming.temperature} with dreaming.importance_weight.level=off trains "
            "on dreams of another distribution as if they were the policy's; set "
            "dreaming.importance_weight.level=token or dreaming.temperature=1"
        )
    without = dreaming.algorithm in _WITHOUT_RATIO and dreaming.importance_weight.level == "off"
    if dreaming.max_staleness > 0 and without:
        raise ConfigError(
            f"dreaming.max_staleness={dreaming.max_staleness} with dreaming.importance_weight.level=off and "
            f"dreaming.algorithm={dreaming.algorithm}, which has no ratio, trains on old policies as "
            "if they were new; set correction_level=token or staleness=0"
        )
    if seeding.algorithm == "ppo":
        raise ConfigError(
            "consolidation.algorithm=ppo needs a critic, and a consolidation has none; "
            "choose another, such as dapo (dreaming has a critic)"
        )
    _check_groups(config)
    _check_wake_learning(config)
    _check_baselines(config.baselines, config.fixed_capacity.learning_rates)
    _check_transport(config)
    _check_layout(config.resources)
    _check_tensor_parallel(config.resources)
    _check_resources(config.resources)


def _check_groups(config: NightConfig) -> None:
    """Where a group is compared, one alone in it teaches nothing."""
    seeding, dreaming = config.consolidation, config.dreaming
    imitates = seeding.rollout_prompts > 0 and seeding.distillation < 1
    for name, part, rewarded in (
        ("dreaming", dreaming, dreaming.enabled and dreaming.loss.policy_gradient > 0),
        ("consolidation", seeding, imitates or "grpo" in config.baselines),
    ):
        compares = part.algorithm in _WITHIN_GROUP or part.algorithm_options.get("group_baseline")
        if rewarded and compares and part.group_size == 1:
            raise ConfigError(
                f"{name}.group_size=1 leaves {name}.algorithm={part.algorithm} nothing to compare with, "
                f"and no gradient; set {name}.group_size=2 or more, or an algorithm such as reinforce"
            )


def _check_wake_learning(config: NightConfig) -> None:
    rate, memory = config.wake.learning_rate, config.memory
    if rate and len(memory.levels) < 2:
        raise ConfigError(
            f"wake.learning_rate={rate}, but memory.levels has one level, which is never handed on; "
            "set it to 0, or give a slower level"
        )
    if rate and memory.when_full == "merge":
        raise ConfigError(
            f"wake.learning_rate={rate} accumulates over nights for a base that "
            "memory.when_full=merge makes wider; set memory.when_full=distil"
        )


def _check_transport(config: NightConfig) -> None:
    resources = config.resources
    if resources.transport not in ("nccl", "ipc"):
        return
    for key in ("engine_gpus", "learner_gpus"):
        if not getattr(resources, key):
            raise ConfigError(
                f"resources.transport={resources.transport} goes from GPU to GPU, but "
                f"resources.{key}=0; set resources.transport=shared_memory, or give it a GPU"
            )
    if resources.engine != "vllm":
        raise ConfigError(
            f"resources.transport={resources.transport} is vLLM's, but "
            f"resources.engine={resources.engine}; set resources.transport=shared_memory"
        )


def _check_layout(resources: ResourcesConfig) -> None:
    """Engines and learner that take turns must have one device to share."""
    if resources.layout != "colocated":
        return
    engine, learner = resources.engine_gpus, resources.learner_gpus
    told = f"resources.engine_gpus={engine:g} and resources.learner_gpus={learner:g}"
    if (engine > 0) != (learner > 0):
        raise ConfigError(
            f"resources.layout=colocated shares one device, but {told} are a GPU and a CPU; give "
            "both a share of a GPU, such as 0.5, or set resources.layout=decoupled"
        )
    if engine + learner > 1:
        raise ConfigError(
            f"resources.layout=colocated shares one device, but {told} do not fit on one; lower "
            "them, for example to 0.5 each, or set resources.layout=decoupled"
        )
    if resources.transport == "nccl":
        raise ConfigError(
            "resources.layout=colocated shares one GPU, on which resources.transport=nccl cannot "
            "have two ranks; set resources.transport=ipc, or shared_memory"
        )


def _check_tensor_parallel(resources: ResourcesConfig) -> None:
    ranks = resources.engine_tensor_parallel
    if ranks == 1:
        return
    told = f"resources.engine_tensor_parallel={ranks}"
    if resources.engine == "torch":
        raise ConfigError(f"{told} is vLLM's, but resources.engine=torch; set one of them back")
    if resources.transport == "ipc":
        raise ConfigError(
            f"{told} spreads an engine over GPUs, but resources.transport=ipc stays within the "
            "learner's; set resources.transport=nccl or shared_memory"
        )
    gpus, cpus = resources.engine_gpus, resources.engine_cpus
    if gpus and gpus != ranks:
        raise ConfigError(
            f"{told} takes a whole GPU for each process, but resources.engine_gpus={gpus:g}; "
            f"set resources.engine_gpus={ranks}"
        )
    if not gpus and cpus < ranks:
        raise ConfigError(
            f"{told} takes a core for each process, but resources.engine_cpus={cpus}; "
            f"set resources.engine_cpus={ranks}, or engine_tensor_parallel=1"
        )


def check_plugins(config: NightConfig) -> None:
    """Raise ``PluginError`` for a name that leads nowhere, or cannot be called as the night will.

    Imports what is named, but for the defaults, which are known to work.
    """
    default = NightConfig()
    for key, given in (
        ("dreaming.reward", ()),
        ("dreaming.curriculum", ("tasks", "seed")),
        ("dreaming.algorithm", ()),
        ("consolidation.algorithm", ()),
        ("consolidation.judge", ("learner", "chat")),
        ("resources.engine", ("name", "options")),
    ):
        name, options = _plugin(config, key)
        if (name, options) == _plugin(default, key):
            continue
        try:
            registry.check(name, key.rpartition(".")[2], options, given)
        except registry.PluginError as error:
            raise registry.PluginError(f"{key}{'_options' if options else ''}: {error}") from None


def _plugin(config: NightConfig, key: str) -> tuple[str, dict[str, Any]]:
    """A plug-in's name and its options."""
    return _get(config, key), {} if key == "resources.engine" else _get(config, f"{key}_options")


def _check_baselines(baselines: Sequence[str], rates: Mapping[str, float]) -> None:
    for key, names in (("baselines", baselines), ("fixed_capacity.learning_rates", rates)):
        for name in names:
            if name not in METHODS:
                near = difflib.get_close_matches(name, METHODS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METHODS)}"
                raise ConfigError(f"{key}: unknown method {name!r}; {hint}")
    for name, rate in rates.items():
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"fixed_capacity.learning_rates.{name}={rate} must be greater than 0")


def _check_resources(resources: ResourcesConfig) -> None:
    if resources.offload != "none" and not resources.learner_gpus:
        raise ConfigError(
            f"resources.offload={resources.offload} moves what a GPU holds to the host, but "
            "resources.learner_gpus=0: there is nothing to move; set offload=none, or give a GPU"
        )
    _check_elastic(resources)
    if resources.address is not None:
        return
    have = resources.cpus or available_cpus()
    engines = resources.engines * resources.engine_cpus
    learners = resources.learner_workers * resources.learner_cpus
    teachers = resources.teachers * resources.teacher_cpus
    if engines + learners + teachers > have:
        apart = f" + {resources.teachers} teacher(s) x teacher_cpus={resources.teacher_cpus}"
        raise ConfigError(
            f"resources: {resources.engines} engine(s) x engine_cpus={resources.engine_cpus} + "
            f"{resources.learner_workers} learner worker(s) x learner_cpus={resources.learner_cpus}"
            f"{apart if teachers else ''} "
            f"= {engines + learners + teachers} cores, but there are {have}; "
            "lower these, or set resources.cpus to share cores on purpose"
        )


def _check_elastic(resources: ResourcesConfig) -> None:
    most, least = resources.learner_workers_max, resources.learner_workers
    named = f"resources.learner_workers_max={most}"
    if 0 < most < least:
        raise ConfigError(
            f"{named} is below learner_workers={least}, the fewest; raise it, or set 0"
        )
    if not resources.elastic:
        return
    if resources.address is None:
        raise ConfigError(
            f"{named}, but a Ray of this machine's own stays as large as it is; join a cluster with "
            "resources.address, or set learner_workers_max=0"
        )
    if resources.transport != "disk":
        raise ConfigError(
            f"{named}, but resources.transport={resources.transport} needs the learner's first worker "
            "on the engines' host, and an elastic one may be anywhere; set transport=disk"
        )


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
