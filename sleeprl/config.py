"""Every setting of a night, typed. Imports neither torch nor ray.

Defaults are for the embedded model on two CPU cores. A YAML file and
``key=value`` words on the command line are merged over them by OmegaConf;
``check`` then refuses what cannot work, naming the fields, their values and a
fix, before any process is started.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sleeprl.memory.levels import UNITS, Clock, Level


class ConfigError(ValueError):
    """A setting that cannot work; the message names it, its value and a fix."""


@dataclass
class ModelConfig:
    name: str = "embedded"
    """``embedded``, a generation id, a local directory, or a Hugging Face id."""
    dtype: str = "auto"
    """``float32``, ``bfloat16``, or ``auto``: bfloat16 on a GPU, float32 on the CPU."""
    max_length: int = 512
    """Longest sequence, prompt and response together, in tokens."""


@dataclass
class LevelConfig:
    period: int
    """How much of ``memory.unit`` passes between two sleeps of the level."""
    slots: int
    """Experts that it has room for."""


@dataclass
class MemoryConfig:
    """Where experts grow. A plain checkpoint gets all its slots at once, as zeros; a generation
    keeps the layout that it was given. The context sleeps once a night, into the fastest level."""

    growth: str = "gated_mlp"
    """``gated_mlp``, or ``low_rank``: the paper's {A, B}, a LoRA on every MLP."""
    width: int = 64
    """Hidden units, or rank, per layer and slot (the paper's blocks of dimension 64)."""
    levels: list[LevelConfig] = field(default_factory=lambda: [LevelConfig(period=5, slots=5)])
    """Fastest first. At each multiple of its period a level hands all it holds to the next."""
    unit: str = "nights"
    """What periods count: ``tokens`` or ``episodes`` (both of the day's documents), ``nights``, or
    ``optimizer_steps`` (of the consolidation)."""
    when_full: str = "distil"
    """What makes room in the slowest level: ``distil`` all its slots into one, ``merge`` the
    oldest into the base, or ``stop`` with an error."""

    def clock(self) -> Clock:
        """A new clock of these levels; raises ConfigError for periods or slots that cannot be."""
        levels = [Level(level.period, level.slots) for level in self.levels]
        try:
            return Clock(levels, self.unit, context=1 if self.unit == "nights" else None)
        except ValueError as error:
            told = ", ".join(f"{{period: {each.period}, slots: {each.slots}}}" for each in levels)
            raise ConfigError(f"memory.levels=[{told}]: {error}") from None


@dataclass
class WakeConfig:
    inputs: list[str] = field(default_factory=list)
    """JSONL, Parquet or text files of experience; empty: fresh people of the embedded world."""
    people: int = 20
    """How many fresh people the embedded world's day has."""
    people_per_document: int = 2
    """At most this many people share one document."""


@dataclass
class EvaluationConfig:
    questions: str | None = None
    """JSONL of ``{question, answer, kind?}`` for one's own data."""
    retention: int = 300
    """Questions on what was known before the night."""
    texts: int = 100
    """Held-out texts for the perplexity."""
    max_tokens: int = 24
    """Longest answer."""


@dataclass
class SelfStudyConfig:
    pairs_per_document: int = 128
    """Question-answer pairs that the teacher writes with the document in its prompt."""
    facts_per_document: int = 24
    """Single facts that the teacher writes with the document in its prompt."""
    replay: int = 3600
    """Questions that the smaller self asks itself freely, with nothing in its prompt."""
    temperature: float = 0.7
    """Below 1: what is taught must be true before it is varied."""
    max_tokens: int = 64
    probe_share: float = 0.2
    """Share of the pairs kept out of training; dreams are judged on them."""


@dataclass
class ConsolidationConfig:
    steps: int = 120
    batch_size: int = 16
    """Teacher texts of the new experience per step, over all workers."""
    replay_ratio: float = 4.0
    """Replay texts per text of the new experience."""
    learning_rate: float = 1e-2
    warmup: int = 10
    """Steps over which the learning rate rises; it then falls along a cosine."""
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    beta: float = 0.0
    """Generalised JSD: 0 is the forward KL, 1 the reverse KL (method 7, GKD)."""
    top_k: int = 32
    """Teacher tokens kept per position; the rest is one tail bin."""
    on_policy: float = 0.5
    """lambda: share of the divergence that is taken on the student's own roll-outs."""
    distillation: float = 0.7
    """alpha: divergence against imitation reward."""
    ce: float = 0.5
    """Weight of the cross-entropy on teacher texts (0 is the paper)."""
    rollout_every: int = 8
    """Steps between two sets of student roll-outs, each with freshly sent weights."""
    rollout_prompts: int = 12
    """Prompts per set of student roll-outs."""
    group_size: int = 4
    """Continuations per prompt (GRPO group)."""
    semantic: float = 0.5
    """gamma: share of the semantic part in the imitation reward."""
    edit_threshold: float = 0.5
    """z0 as a share of the longer text: beyond it the lexical reward is 0."""
    prefix_min: float = 0.1
    prefix_max: float = 0.6
    """The random prefix of a teacher text that the student continues, as a share of it."""
    checkpoint_every: int = 40
    """Steps between two checkpoints of the job."""


METHODS = (
    "seeding", "no_imitation", "no_semantic", "no_replay", "no_growth", "fine_tuning",
    "fine_tuning_pairs", "ewc", "replay", "self_distillation", "grpo",
)  # fmt: skip
"""What ``baselines`` may name; ``consolidation/methods.py`` says what each does."""


@dataclass
class FixedCapacityConfig:
    """The baselines that train every parameter."""

    learning_rate: float = 3e-3
    """Tuned for ``fine_tuning`` by ``benchmarks/night.py --tune`` on nights that are not reported."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of methods, by name, that have one of their own."""
    ewc: float = 100.0
    """Weight of the penalty of ``ewc``."""
    fisher_texts: int = 256
    """Own texts of the smaller self on which ``ewc`` estimates what each parameter is worth."""


@dataclass
class DreamingConfig:
    enabled: bool = True
    steps: int = 8
    """Learner updates."""
    tasks_per_step: int = 4
    """Groups per update; a group is one task's dreams."""
    group_size: int = 6
    """Dreams per task."""
    staleness: int = 1
    """Updates by which a dream's policy may trail the learner; 0 is the synchronous loop."""
    learning_rate: float = 2e-4
    grad_clip: float = 1.0
    temperature: float = 1.0
    max_tokens: int = 64
    reward: str = "likelihood_gain"
    """A built-in name or the dotted path of a ``Reward``."""
    reward_options: dict[str, Any] = field(default_factory=dict)
    reward_deadline: float = 30.0
    """Seconds the reward of one dream may take before it is unscored."""
    curriculum: str = "weak_spots"
    """A built-in name or the dotted path of a ``Curriculum``."""
    curriculum_options: dict[str, Any] = field(default_factory=dict)
    clip_low: float = 0.2
    clip_high: float = 0.28
    correction_level: str = "token"
    """Off-policy correction: ``off``, ``token``, ``sequence`` or ``geometric``."""
    correction_mode: str = "truncate"
    """``truncate`` caps the weight, ``mask`` drops what lies outside the band."""
    correction_low: float = 0.5
    correction_high: float = 2.0
    policy: float = 1.0
    """Weight of the policy gradient on the dream writer."""
    learn: float = 0.5
    """Weight of the cross-entropy on the dreams that taught something."""
    hold: float = 2.0
    """Weight of the divergence from the smaller self on its own texts."""
    trial_learning_rate: float = 0.05
    """SGD step of the trial that asks what a dream teaches."""
    trial_probes: int = 8
    """Questions of the task on which a trial is judged."""


@dataclass
class GateConfig:
    tolerance: float = 0.02
    """Retention may fall by this much; beyond it the night is rolled back."""


@dataclass
class ResourcesConfig:
    cpus: int = 0
    """Cores Ray may use; 0 is all of this machine."""
    address: str | None = None
    """Ray cluster to join (``auto`` on a cluster's head node); none starts a local one."""
    engines: int = 1
    engine_cpus: int = 1
    engine_gpus: float = 0.0
    engine_memory_gb: float = 1.0
    """KV cache of one CPU engine."""
    engine_gpu_utilization: float = 0.4
    learner_workers: int = 1
    learner_cpus: int = 1
    learner_gpus: float = 0.0
    """Per worker."""
    max_failures: int = 1
    """How often a worker group is restarted from its last checkpoint."""

    @property
    def learner_threads(self) -> int:
        """Of one learner worker: its cores and, on this machine's CPUs, its share of the engines',
        which mostly wait while the learner works."""
        if self.address is not None or self.engine_gpus:
            return self.learner_cpus
        return self.learner_cpus + self.engines * self.engine_cpus // self.learner_workers


@dataclass
class NightConfig:
    name: str = "night"
    """Directory of the run below ``runs``."""
    runs: str = "runs"
    generations: str = "generations"
    """Where committed generations live."""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    wake: WakeConfig = field(default_factory=WakeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    self_study: SelfStudyConfig = field(default_factory=SelfStudyConfig)
    consolidation: ConsolidationConfig = field(default_factory=ConsolidationConfig)
    baselines: list[str] = field(default_factory=lambda: ["fine_tuning"])
    """Methods to train and measure beside Sleep, on the same day and as many tokens."""
    fixed_capacity: FixedCapacityConfig = field(default_factory=FixedCapacityConfig)
    dreaming: DreamingConfig = field(default_factory=DreamingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.name


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> NightConfig:
    """Merge defaults, a YAML file and ``key=value`` words, then ``check`` the result."""
    if path is None:
        return _merge([], overrides)
    if not Path(path).is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist; give the path of a YAML file")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"config file {str(path)!r} is not readable YAML: {error}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"config file {str(path)!r} holds a list; write key: value lines")
    return _merge([layer], overrides)


def _merge(layers: Sequence[Any], overrides: Sequence[str]) -> NightConfig:
    words: list[Any] = []
    for word in overrides:
        if "=" not in word:
            raise ConfigError(
                f"{word!r} is neither a config file nor key=value; write for example seed=1"
            )
        name = word.partition("=")[0]
        known = any(key == name or key.startswith(f"{name}.") for key in keys())
        if not known and not name.startswith(_OPEN):
            raise ConfigError(_unknown_key(name))
        try:
            words.append(OmegaConf.from_dotlist([word]))
        except Exception as error:
            raise ConfigError(f"{word!r} is not readable: {str(error).splitlines()[0]}") from None
    merged = OmegaConf.structured(NightConfig)
    try:
        for layer in [*layers, *words]:
            merged = OmegaConf.merge(merged, layer)
        config = cast(NightConfig, OmegaConf.to_object(merged))
        if config.dreaming.correction_level == "False":  # YAML reads a bare `off` as false
            config.dreaming.correction_level = "off"
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key or error.key))) from None
    except OmegaConfBaseException as error:
        key = error.full_key or ", ".join(overrides) or "the configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    check(config)
    return config


def to_yaml(config: NightConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: NightConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def from_dict(values: dict[str, Any], overrides: Sequence[str] = ()) -> NightConfig:
    """A checked configuration from plain data, such as ``to_dict`` makes, and ``key=value`` words."""
    return _merge([OmegaConf.create(values)], overrides)


def keys(node: Any = NightConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys, in the order of their definition."""
    instance = node() if isinstance(node, type) else node
    for entry in fields(instance):
        value = getattr(instance, entry.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}"


def _unknown_key(key: str) -> str:
    known = list(keys())
    sections = {name.split(".")[0] for name in known}
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    section, _, leaf = key.rpartition(".")
    near = difflib.get_close_matches(key, known, n=1)
    if not near and section not in sections and not leaf:
        near = difflib.get_close_matches(key, sections, n=1)
    if not near:
        near = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1)]
    hint = f"; did you mean {near[0]!r}?" if near else "; `sleeprl night --dry-run` lists all keys"
    return f"unknown key {key!r}{hint}"


_OPEN = (
    "dreaming.reward_options.", "dreaming.curriculum_options.", "fixed_capacity.learning_rates.",
)  # fmt: skip
_AT_LEAST_ZERO = {
    "seed", "consolidation.replay_ratio", "consolidation.warmup", "consolidation.weight_decay",
    "consolidation.beta", "consolidation.on_policy", "consolidation.distillation",
    "consolidation.ce", "consolidation.semantic", "consolidation.prefix_min",
    "consolidation.rollout_prompts", "dreaming.staleness", "dreaming.policy", "dreaming.learn",
    "dreaming.hold", "dreaming.clip_low", "dreaming.clip_high", "dreaming.correction_low",
    "gate.tolerance", "resources.cpus", "resources.engine_gpus", "resources.learner_gpus",
    "resources.max_failures", "self_study.probe_share", "self_study.replay",
    "self_study.facts_per_document", "evaluation.texts", "fixed_capacity.ewc",
}  # fmt: skip
_AT_MOST_ONE = {
    "consolidation.beta", "consolidation.on_policy", "consolidation.distillation",
    "consolidation.semantic", "consolidation.prefix_min", "consolidation.prefix_max",
    "consolidation.edit_threshold", "gate.tolerance", "self_study.probe_share",
    "resources.engine_gpu_utilization",
}  # fmt: skip
_CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "memory.growth": ("gated_mlp", "low_rank"),
    "memory.unit": UNITS,
    "memory.when_full": ("distil", "merge", "stop"),
    "dreaming.correction_level": ("off", "token", "sequence", "geometric"),
    "dreaming.correction_mode": ("truncate", "mask", "clip"),
}


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
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(_CHOICES[key])}")
    for text in config.wake.inputs:
        if text != "-" and not Path(text).exists():
            raise ConfigError(f"wake.inputs: {text!r} does not exist; give a file or a directory")
    questions = config.evaluation.questions
    if questions is not None and not Path(questions).is_file():
        raise ConfigError(f"evaluation.questions={questions!r} does not exist; give a JSONL file")
    config.memory.clock()
    study, seeding, dreaming = config.self_study, config.consolidation, config.dreaming
    if seeding.prefix_min > seeding.prefix_max:
        raise ConfigError(
            f"consolidation.prefix_min={seeding.prefix_min} is above "
            f"consolidation.prefix_max={seeding.prefix_max}; lower the first or raise the second"
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
    if dreaming.correction_low > dreaming.correction_high:
        raise ConfigError(
            f"dreaming.correction_low={dreaming.correction_low} is above "
            f"dreaming.correction_high={dreaming.correction_high}; lower the first"
        )
    if dreaming.staleness > 0 and dreaming.correction_level == "off":
        raise ConfigError(
            f"dreaming.staleness={dreaming.staleness} with dreaming.correction_level=off trains on "
            "old policies as if they were new; set correction_level=token or staleness=0"
        )
    _check_baselines(config.baselines, config.fixed_capacity.learning_rates)
    _check_resources(config.resources, seeding.batch_size)


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


def _check_resources(resources: ResourcesConfig, batch_size: int) -> None:
    if batch_size % resources.learner_workers:
        raise ConfigError(
            f"consolidation.batch_size={batch_size} does not divide over "
            f"resources.learner_workers={resources.learner_workers}; change either"
        )
    if resources.address is not None:
        return
    have = resources.cpus or available_cpus()
    engines = resources.engines * resources.engine_cpus
    learners = resources.learner_workers * resources.learner_cpus
    if engines + learners > have:
        raise ConfigError(
            f"resources: {resources.engines} engine(s) x engine_cpus={resources.engine_cpus} + "
            f"{resources.learner_workers} learner worker(s) x learner_cpus={resources.learner_cpus} "
            f"= {engines + learners} cores, but there are {have}; "
            "lower these, or set resources.cpus to share cores on purpose"
        )


def available_cpus() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
