"""Refuse what cannot work before anything starts: values out of bounds, and settings that contradict.

Every message names the settings, their values and a fix. Imports neither torch nor ray.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sleeprl import plugins
from sleeprl.config.algorithm_rules import check_algorithms
from sleeprl.config.bounds import LARGEST_COUNT, Bounds, bounds_of, plugin_kind_of
from sleeprl.config.methods import METHODS
from sleeprl.config.schema import (
    MOST,
    ConfigError,
    ConsolidationConfig,
    DreamingConfig,
    EvaluationConfig,
    NightConfig,
    ResourcesConfig,
    get_setting,
    iter_fields,
)
from sleeprl.config.texts import check_texts, path_exists
from sleeprl.utils.machine import available_cpus, available_memory

RATE = Bounds(gt=0, le=100)
"""Bounds of a learning rate."""
GROUPS_PER_ENGINE = 250
"""Groups of dreams that one engine can have at once and still answer whether it is alive."""
PROCESS_GB = 0.25
"""Memory in GiB that each process takes before it has loaded a model: Python, torch and Ray."""


def validate(config: NightConfig) -> None:
    """Check every setting by itself and against the others.

    Asks the machine for its cores and for the files that are named, nothing else.

    Raises:
        ConfigError: If a night could not run with this configuration.
    """
    _check_bounds(config)
    check_texts(config)
    _check_wake(config)
    _check_evaluation(config.evaluation, config.wake.inputs)
    _check_memory(config)
    _check_consolidation(config)
    _check_self_study(config)
    _check_dreaming(config.dreaming)
    _check_lengths(config)
    check_algorithms(config, builtin_only=True)
    _check_baselines(config.baselines, config.fixed_capacity.learning_rates)
    _check_resources(config.resources)
    _check_in_flight(config)


def _check_bounds(config: NightConfig) -> None:
    for key, entry, value in iter_fields(config):
        problem = None if value is None else bounds_of(entry).find_violation(value)
        if problem is not None:
            raise ConfigError(f"{key}={value!r} {problem}")


def _check_wake(config: NightConfig) -> None:
    for text in config.wake.inputs:
        if text != "-" and not path_exists("wake.inputs", text):
            raise ConfigError(f"wake.inputs: {text!r} does not exist; give a file or a directory")
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


def _check_evaluation(evaluation: EvaluationConfig, inputs: Sequence[str]) -> None:
    questions = evaluation.questions
    if questions is None:
        return
    if not path_exists("evaluation.questions", questions) or not Path(questions).is_file():
        raise ConfigError(f"evaluation.questions={questions!r} does not exist; give a JSONL file")
    if not inputs:
        raise ConfigError(
            f"evaluation.questions={questions!r} would not be asked: wake.inputs is empty, and the "
            "embedded world's day has questions of its own; give wake.inputs, or leave questions out"
        )


def _check_memory(config: NightConfig) -> None:
    for level in config.memory.levels:
        given = f"memory.levels: {{period: {level.period}, slots: {level.slots}}}"
        if level.slots > MOST or level.period > LARGEST_COUNT:
            raise ConfigError(
                f"{given} must have at most {MOST} slots and a period of at most {LARGEST_COUNT}"
            )
    config.memory.clock()
    if config.consolidation.expert_gate and config.memory.growth != "gated_mlp":
        raise ConfigError(
            f"consolidation.expert_gate={config.consolidation.expert_gate} closes the units of a "
            f"gated MLP, but memory.growth={config.memory.growth} has none; set one of them back"
        )


def _check_lengths(config: NightConfig) -> None:
    """Check that every text that is written leaves room for its prompt."""
    longest = config.model.max_length
    for key, tokens in (
        ("self_study.max_tokens", config.self_study.max_tokens),
        ("dreaming.max_tokens", config.dreaming.max_tokens),
        ("evaluation.max_tokens", config.evaluation.max_tokens),
    ):
        if tokens >= longest:
            raise ConfigError(
                f"{key}={tokens} leaves no room for a prompt in model.max_length={longest}; "
                "raise the latter"
            )


def _check_consolidation(config: NightConfig) -> None:
    seeding: ConsolidationConfig = config.consolidation
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


def _check_self_study(config: NightConfig) -> None:
    """Check that self-study leaves something to train on, and something to score dreams on."""
    study, held_out = config.self_study, config.self_study.held_out_share
    if config.dreaming.enabled and not held_out:
        raise ConfigError(
            "self_study.held_out_share=0 with dreaming.enabled=true leaves no question to score a dream "
            "on; raise the first, for example to 0.2, or set dreaming.enabled=false"
        )
    if held_out == 1 and not study.facts_per_document:
        raise ConfigError(
            "self_study.held_out_share=1 keeps every pair out of training, and "
            "self_study.facts_per_document=0 writes nothing else about the day; lower the first"
        )
    for name in config.baselines:
        if name in METHODS and METHODS[name].anchored and not study.replay_questions:
            raise ConfigError(
                f"baselines: {name!r} needs the smaller self's own texts, but "
                "self_study.replay_questions=0; raise it, for example to 100"
            )


def _check_dreaming(dreaming: DreamingConfig) -> None:
    weight = dreaming.importance_weight
    if weight.low > weight.high:
        raise ConfigError(
            f"dreaming.importance_weight.low={weight.low} is above "
            f"dreaming.importance_weight.high={weight.high}; lower the first"
        )
    if weight.level != "off":
        return
    if dreaming.temperature != 1:
        raise ConfigError(
            f"dreaming.temperature={dreaming.temperature} with dreaming.importance_weight.level=off "
            "trains on dreams of another distribution as if they were the policy's; set "
            "dreaming.importance_weight.level=token or dreaming.temperature=1"
        )


def _check_baselines(baselines: Sequence[str], rates: Mapping[str, float]) -> None:
    for name in baselines:
        if baselines.count(name) > 1:
            raise ConfigError(f"baselines={list(baselines)} names {name!r} twice; leave one out")
    for key, names in (("baselines", baselines), ("fixed_capacity.learning_rates", rates)):
        for name in names:
            if name not in METHODS:
                near = difflib.get_close_matches(name, METHODS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METHODS)}"
                raise ConfigError(f"{key}: unknown method {name!r}; {hint}")
    for name, rate in rates.items():
        if problem := RATE.find_violation(rate):
            raise ConfigError(f"fixed_capacity.learning_rates.{name}={rate} {problem}")


def _check_resources(resources: ResourcesConfig) -> None:
    _check_transport(resources)
    _check_layout(resources)
    _check_tensor_parallel(resources)
    if resources.offload != "none" and not resources.learner_gpus:
        raise ConfigError(
            f"resources.offload={resources.offload} moves what a GPU holds to the host, but "
            "resources.learner_gpus=0: there is nothing to move; set offload=none, or give a GPU"
        )
    _check_shares(resources)
    _check_elastic(resources)
    if resources.address is None:
        _check_cores(resources)
        _check_processes(resources)


def _check_cores(resources: ResourcesConfig) -> None:
    """Check that this machine has the cores of all that runs at the same time."""
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


def _check_processes(resources: ResourcesConfig) -> None:
    """Check that this machine has the memory for actors that reserve no core."""
    scorers, rewards = resources.scorers, resources.reward_workers
    need, have = (scorers + rewards) * PROCESS_GB, available_memory() / 2**30
    if need > have:
        raise ConfigError(
            f"resources.scorers={scorers} and resources.reward_workers={rewards} are "
            f"{scorers + rewards} processes, which take at least {need:,.0f} GiB without any model, but "
            f"this machine has {have:,.0f}; lower them"
        )


def _transport_class(resources: ResourcesConfig) -> Any:
    """Return the transport's class, for its capabilities; importing it takes torch."""
    try:
        return plugins.resolve(resources.transport, "transport")
    except plugins.PluginError as error:
        raise ConfigError(f"resources.transport: {error}") from None


def _check_transport(resources: ResourcesConfig) -> None:
    if resources.transport == ResourcesConfig().transport:
        return  # it asks for nothing
    transport = _transport_class(resources)
    for key in ("engine_gpus", "learner_gpus") if transport.needs_gpu else ():
        if not getattr(resources, key):
            raise ConfigError(
                f"resources.transport={resources.transport} goes from GPU to GPU, but "
                f"resources.{key}=0; set resources.transport=shared_memory, or give it a GPU"
            )
    if transport.vllm_backend is not None and resources.engine != "vllm":
        raise ConfigError(
            f"resources.transport={resources.transport} is vLLM's, but "
            f"resources.engine={resources.engine}; set resources.transport=shared_memory"
        )


def _check_layout(resources: ResourcesConfig) -> None:
    """Check that engines and learner that take turns have one device to share."""
    if resources.layout != "colocated":
        return
    engine, learner = resources.engine_gpus, resources.learner_gpus
    given = f"resources.engine_gpus={engine:g} and resources.learner_gpus={learner:g}"
    if (engine > 0) != (learner > 0):
        raise ConfigError(
            f"resources.layout=colocated shares one device, but {given} are a GPU and a CPU; give "
            "both a share of a GPU, such as 0.5, or set resources.layout=decoupled"
        )
    if engine + learner > 1:
        raise ConfigError(
            f"resources.layout=colocated shares one device, but {given} do not fit on one; lower "
            "them, for example to 0.5 each, or set resources.layout=decoupled"
        )
    if not _transport_class(resources).shares_gpu:
        raise ConfigError(
            "resources.layout=colocated shares one GPU, on which "
            f"resources.transport={resources.transport} cannot have two ranks; "
            "set resources.transport=ipc, or shared_memory"
        )


def _check_tensor_parallel(resources: ResourcesConfig) -> None:
    ranks = resources.engine_tensor_parallel
    if ranks == 1:
        return
    given = f"resources.engine_tensor_parallel={ranks}"
    if resources.engine == "torch":
        raise ConfigError(f"{given} is vLLM's, but resources.engine=torch; set one of them back")
    if not _transport_class(resources).spans_gpus:
        raise ConfigError(
            f"{given} spreads an engine over GPUs, but resources.transport={resources.transport} "
            "stays within the learner's; set resources.transport=nccl or shared_memory"
        )
    gpus, cpus = resources.engine_gpus, resources.engine_cpus
    if gpus and gpus != ranks:
        raise ConfigError(
            f"{given} takes a whole GPU for each process, but resources.engine_gpus={gpus:g}; "
            f"set resources.engine_gpus={ranks}"
        )
    if not gpus and cpus < ranks:
        raise ConfigError(
            f"{given} takes a core for each process, but resources.engine_cpus={cpus}; "
            f"set resources.engine_cpus={ranks}, or engine_tensor_parallel=1"
        )


def _check_shares(resources: ResourcesConfig) -> None:
    """Check that each process of the learner has one GPU of its own, or none."""
    gpus, workers = resources.learner_gpus, resources.learner_workers
    for key in ("learner_gpus", "teacher_gpus", "scorer_gpus"):
        if getattr(resources, key) > 1:
            raise ConfigError(
                f"resources.{key}={getattr(resources, key):g}, but a process computes on one GPU; set "
                "it to 1" + (", and raise learner_workers" if key == "learner_gpus" else "")
            )
    if 0 < gpus < 1 and workers > 1:
        raise ConfigError(
            f"resources.learner_gpus={gpus:g} with resources.learner_workers={workers}: two workers "
            "may come to share a GPU, which NCCL refuses; set learner_gpus=1 or learner_workers=1"
        )
    if resources.transport == "ipc" and (resources.engines > 1 or workers > 1):
        raise ConfigError(
            f"resources.transport=ipc stays within one GPU, but resources.engines={resources.engines} "
            f"and resources.learner_workers={workers} are on several; set resources.transport=nccl or "
            "shared_memory"
        )


def _check_in_flight(config: NightConfig) -> None:
    """Check that an engine can answer for all groups of dreams that it may have at once."""
    dreaming, engines = config.dreaming, config.resources.engines
    groups = (dreaming.max_staleness + 2) * dreaming.tasks_per_step
    if dreaming.enabled and groups > GROUPS_PER_ENGINE * engines:
        raise ConfigError(
            f"dreaming.tasks_per_step={dreaming.tasks_per_step} and dreaming.max_staleness="
            f"{dreaming.max_staleness} let {groups} groups be in flight, and {engines} engine(s) take "
            f"{GROUPS_PER_ENGINE * engines}; lower one of the two, or raise resources.engines"
        )


def _check_elastic(resources: ResourcesConfig) -> None:
    highest, lowest = resources.learner_workers_max, resources.learner_workers
    given = f"resources.learner_workers_max={highest}"
    if 0 < highest < lowest:
        raise ConfigError(
            f"{given} is below learner_workers={lowest}, the fewest; raise it, or set 0"
        )
    if not resources.elastic:
        return
    if resources.address is None:
        raise ConfigError(
            f"{given}, but a Ray of this machine's own stays as large as it is; join a cluster with "
            "resources.address, or set learner_workers_max=0"
        )
    transport = _transport_class(resources)
    if transport.same_host or transport.needs_gpu:
        raise ConfigError(
            f"{given}, but resources.transport={resources.transport} needs the learner's first worker "
            "on the engines' host, and an elastic one may be anywhere; set transport=disk"
        )


def validate_plugins(config: NightConfig) -> None:
    """Check that every plug-in that is named exists and can be called as the night will.

    Imports what is named, but for the defaults, which are known to work.

    Raises:
        PluginError: If a name leads nowhere, or its options do not fit.
    """
    default = NightConfig()
    for key, entry, value in iter_fields(config):
        kind, options = plugin_kind_of(entry), _options(config, key)
        same = value == get_setting(default, key) and options == _options(default, key)
        if kind is None or same:
            continue
        for name in _as_list(value):
            try:
                plugins.check(name, kind, options)
            except plugins.PluginError as error:
                where = f"{key}_options" if options else key
                raise plugins.PluginError(f"{where}: {error}") from None
    check_algorithms(config, builtin_only=False)


def name_plugins_by_path(config: NightConfig) -> NightConfig:
    """Replace names that only this process knows by dotted paths, which actors can import.

    A name that ``plugins.register`` added is known where the decorator ran. The actors of a night
    are other processes, and a resumed night is another one too.

    Returns:
        A copy of the configuration.
    """
    config = copy.deepcopy(config)
    for key, entry, value in list(iter_fields(config)):
        if (kind := plugin_kind_of(entry)) is None:
            continue
        names = [plugins.importable_name(n, kind) for n in _as_list(value)]
        section, _, leaf = key.rpartition(".")
        setattr(get_setting(config, section), leaf, names if isinstance(value, list) else names[0])
    return config


def _as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def _options(config: NightConfig, key: str) -> dict[str, Any]:
    """Get the options of the plug-in that a setting names."""
    section, _, leaf = key.rpartition(".")
    found: dict[str, Any] = getattr(get_setting(config, section), f"{leaf}_options", {})
    return found
