"""Every setting of a night, typed. Imports neither torch nor ray.

Defaults are for the embedded model on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from sleeprl.config.bounds import bounds, choices, plugin
from sleeprl.memory.levels import UNITS, Clock, Level
from sleeprl.text.prompts import EXAMPLES

MOST = 4096
"""The most processes of a kind, or cores of one process, that a night can be meant to have."""


class ConfigError(ValueError):
    """Raised for a setting that cannot work; the message names it, its value and a fix."""


@dataclass
class ModelConfig:
    name: str = "embedded"
    """``embedded``, a name that ``sleeprl models`` lists, a generation (its id, a unique beginning of
    it, or ``HEAD``, the present one), a local directory, or a Hugging Face id."""
    dtype: str = field(default="auto", metadata=choices(("auto", "float32", "bfloat16")))
    """``float32``, ``bfloat16``, or ``auto``: bfloat16 on a GPU, float32 on the CPU."""
    max_length: int = field(default=512, metadata=bounds(gt=0))
    """Length of the longest sequence, prompt and response together, in tokens."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the model's chat template, such as ``{enable_thinking: true}``. Thinking is off where
    the template can switch it. A generation keeps them."""


@dataclass
class LevelConfig:
    period: int
    """How many of ``memory.unit`` pass between two sleeps of the level."""
    slots: int
    """How many experts it has room for."""


@dataclass
class MemoryConfig:
    """Where experts grow. A plain checkpoint gets all its slots at once, as zeros. A generation keeps
    its layout. The context sleeps once a night, into the fastest level."""

    growth: str = field(default="gated_mlp", metadata=choices(("gated_mlp", "low_rank")))
    """``gated_mlp``, or ``low_rank``: the paper's {A, B}, a LoRA on every MLP."""
    width: int = field(default=64, metadata=bounds(gt=0))
    """Hidden units, or rank, per layer and slot (the paper's blocks of dimension 64)."""
    levels: list[LevelConfig] = field(default_factory=lambda: [LevelConfig(period=5, slots=5)])
    """The levels, fastest first. At each multiple of its period a level is distilled into the next."""
    unit: str = field(default="nights", metadata=choices(UNITS))
    """What periods count: ``tokens`` or ``episodes`` of the day's documents, ``nights``, or
    ``optimizer_steps`` of the consolidation."""
    when_full: str = field(default="distil", metadata=choices(("distil", "merge", "stop")))
    """What makes room in the slowest level: ``distil`` all its slots into one, ``merge`` the
    oldest into the base, or ``stop`` with an error."""
    reset: bool = True
    """Whether the slots of a level are emptied once they were distilled into the next level. Without
    (the paper's ablation) they stay active beside the slot that learned from them, and take up room."""

    def clock(self) -> Clock:
        """Make a new clock of these levels.

        Raises:
            ConfigError: For periods or slots that are impossible.
        """
        levels = [Level(level.period, level.slots) for level in self.levels]
        try:
            return Clock(levels, self.unit, context=1 if self.unit == "nights" else None)
        except ValueError as error:
            given = ", ".join(f"{{period: {each.period}, slots: {each.slots}}}" for each in levels)
            raise ConfigError(f"memory.levels=[{given}]: {error}") from None


@dataclass
class WakeConfig:
    inputs: list[str] = field(default_factory=list)
    """JSONL, JSON, CSV, Parquet, Arrow or text files of experience, or directories of them. Without any,
    the day is about fresh people of the embedded world. A document that is longer than the model can
    read is split at sentences."""
    people: int = field(default=20, metadata=bounds(gt=0))
    """How many fresh people the embedded world's day has."""
    people_per_document: int = field(default=2, metadata=bounds(gt=0))
    """How many people share one document at most."""
    learning_rate: float = field(default=0.0, metadata=bounds(ge=0, le=100))
    """Learning rate of wake learning (method, eq. 2). The gradients of the day's documents add up and
    are applied in the night in which level 1 is distilled into the next. With 0 the base does not
    learn in wake."""


@dataclass
class EvaluationConfig:
    questions: str | None = None
    """JSONL file of ``{question, answer, kind?, experience?}`` about ``wake.inputs``. ``kind`` is
    ``recall`` (the default), ``two_hop``, or ``retention`` of what was known before. ``experience`` is
    the document that answers the question, for measurements with the text in the prompt. Several
    right answers are a list, in ``answer`` or ``answers``."""
    metrics: list[str] = field(default_factory=list, metadata=plugin("metric"))
    """Metrics of the headline table beside the built-in ones: dotted paths of functions that return a
    ``Metric``."""
    retention_questions: int = field(default=300, metadata=bounds(gt=0))
    """How many questions on what was known before the night are asked."""
    perplexity_texts: int = field(default=100, metadata=bounds(gt=0))
    """How many held-out texts the perplexity is measured on. Where a world has none, the smaller
    self writes them."""
    max_tokens: int = field(default=24, metadata=bounds(gt=0))
    """Length of the longest answer, in tokens."""


@dataclass
class SelfStudyConfig:
    pairs_per_document: int = field(default=128, metadata=bounds(gt=0))
    """How many question-answer pairs the teacher writes with the document in its prompt."""
    full_document_share: float = field(default=0.5, metadata=bounds(ge=0, le=1))
    """Share of the questions that are written with the whole document in the prompt."""
    excerpt_sentences: int = field(default=3, metadata=bounds(gt=0))
    """The other questions are written from an excerpt of this many sentences. The excerpts take
    turns, so that every sentence is asked about. Answers always see the whole document."""
    facts_per_document: int = field(default=24, metadata=bounds(ge=0))
    """How many single facts the teacher writes with the document in its prompt."""
    replay_questions: int = field(default=3600, metadata=bounds(ge=0))
    """Questions that the smaller self asks itself with nothing in its prompt. Questions of earlier
    nights, at most twice as many, replace up to half of them. One question per fact is rehearsed."""
    replay_conversations: int = field(default=0, metadata=bounds(ge=0))
    """Messages that the smaller self writes in the user's place and answers. They are rehearsed
    too. For a chat model that rarely writes a question when it is asked for one."""
    question_bank_size: int = field(default=20_000, metadata=bounds(ge=0))
    """How many of its own questions are stored from night to night; 0 stores none."""
    temperature: float = field(default=0.7, metadata=bounds(ge=0.01, le=100))
    """Sampling temperature. It is below 1, since what is taught must be true before it is varied."""
    max_tokens: int = field(default=64, metadata=bounds(gt=0))
    """Length of the longest text that is written, in tokens."""
    assistant_prefix: str = ""
    """Text that every question-answer pair begins with, such as ``Question:``. For a model that
    does not begin so by itself."""
    few_shot_examples: int = field(default=0, metadata=bounds(ge=0, le=EXAMPLES))
    """Worked examples, at most 4, before an instruction to write a question and its answer. For a
    model that was not trained to follow one."""
    held_out_share: float = field(default=0.2, metadata=bounds(ge=0, le=1))
    """Share of the pairs that are kept out of training. Dreams are scored on them."""


@dataclass
class ConsolidationConfig:
    steps: int = field(default=150, metadata=bounds(gt=0))
    """Number of optimizer steps."""
    batch_size: int = field(default=24, metadata=bounds(gt=0))
    """Teacher texts about the new experience per step, over all workers."""
    replay_ratio: float = field(default=2.5, metadata=bounds(ge=0))
    """Replay texts per text of the new experience."""
    learning_rate: float = field(default=1.5e-2, metadata=bounds(gt=0, le=100))
    """Highest learning rate, after the warm-up."""
    warmup: int = field(default=10, metadata=bounds(ge=0))
    """Steps over which the learning rate rises; it then falls along a cosine."""
    weight_decay: float = field(default=0.0, metadata=bounds(ge=0))
    """Weight decay of AdamW: per step a weight loses this share of itself, times the learning rate."""
    grad_clip: float = field(default=1.0, metadata=bounds(gt=0))
    """Largest norm of the gradient; a larger one is scaled down to it."""
    beta: float = field(default=0.0, metadata=bounds(ge=0, le=1))
    """Mixture of the generalised JSD: 0 is the forward KL, 1 the reverse KL (GKD, 2306.13649)."""
    support: str = field(default="teacher", metadata=choices(("teacher", "student", "full")))
    """The tokens that a divergence compares: the ``top_k`` of the ``teacher`` or of the ``student``,
    with all others as one tail bin, or the ``full`` vocabulary."""
    top_k: int = field(default=32, metadata=bounds(gt=0))
    """Number of tokens in the support, unless that is ``full``."""
    pointwise_clip: float | None = field(default=None, metadata=bounds(gt=0))
    """The most that one token of the support may add to a divergence (OPSD: 0.05); null: no limit."""
    on_policy: float = field(default=0.5, metadata=bounds(ge=0, le=1))
    """Share of the divergence that is computed on the student's own roll-outs (lambda)."""
    on_policy_warmup: int = field(default=0, metadata=bounds(ge=0))
    """Steps over which the share rises linearly from ``on_policy`` to 1; 0 keeps it constant."""
    seed_steps: int = field(default=0, metadata=bounds(ge=0))
    """Steps of divergence alone before the imitation reward joins (seed, then imitate)."""
    distillation: float = field(default=0.7, metadata=bounds(ge=0, le=1))
    """Weight of the divergence against the imitation reward (alpha): 1 is the divergence alone."""
    ce: float = field(default=0.5, metadata=bounds(ge=0))
    """Weight of the cross-entropy on teacher texts; 0 in the paper."""
    expert_gate: float = field(default=0.0, metadata=bounds(ge=0))
    """Above 0 the new expert gets a gate of its own. This is the weight of the penalty that closes it:
    the expert's activity on replayed texts, relative to the MLP beside it."""
    rollout_every: int = field(default=8, metadata=bounds(gt=0))
    """Steps between two sets of student roll-outs, each with freshly sent weights."""
    rollout_prompts: int = field(default=12, metadata=bounds(ge=0))
    """Prompts per set of student roll-outs."""
    group_size: int = field(default=4, metadata=bounds(gt=0))
    """Continuations per prompt (GRPO group)."""
    algorithm: str = field(default="dapo_unscaled", metadata=plugin("algorithm"))
    """Of the policy gradient: a built-in name (``sleeprl.algorithms``) or the dotted path of an
    ``Algorithm``."""
    algorithm_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the algorithm."""
    semantic: float = field(default=0.5, metadata=bounds(ge=0, le=1))
    """Share of the semantic part in the imitation reward (gamma)."""
    judge: str = field(default="exact", metadata=plugin("judge"))
    """What decides whether two texts mean the same: ``exact``, ``embedding``, ``teacher``, or the
    dotted path of a ``Judge``."""
    judge_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the judge."""
    edit_threshold: float = field(default=0.5, metadata=bounds(gt=0))
    """Number or share of edits beyond which the lexical reward is 0 (z0)."""
    edit_mode: str = field(default="ratio", metadata=choices(("ratio", "abs")))
    """What the threshold is: a ``ratio`` of the longer text's length, or ``abs``, a number of edits (as
    in the paper)."""
    prefix_min: float = field(default=0.1, metadata=bounds(ge=0, le=1))
    """Shortest prefix of a teacher text that the student continues, as a share of the text."""
    prefix_max: float = field(default=0.6, metadata=bounds(gt=0, le=1))
    """Longest prefix, as a share of the text; each is drawn between the two."""
    checkpoint_every: int = field(default=40, metadata=bounds(gt=0))
    """Steps between two checkpoints of the job. Each waits until no roll-outs are in flight."""


@dataclass
class FixedCapacityConfig:
    """The baselines that train every parameter."""

    learning_rate: float = field(default=3e-3, metadata=bounds(gt=0, le=100))
    """Learning rate, tuned for ``fine_tuning`` by ``benchmarks/night.py --tune`` on nights that are not
    reported."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of methods that have one of their own, by name."""
    ewc: float = field(default=100.0, metadata=bounds(ge=0))
    """Weight of the penalty of ``ewc``."""
    fisher_texts: int = field(default=256, metadata=bounds(gt=0))
    """Number of the smaller self's own texts from which ``ewc`` estimates the Fisher information."""


@dataclass
class DreamingLossConfig:
    """Weights of the three terms of the dreaming loss."""

    policy_gradient: float = field(default=1.0, metadata=bounds(ge=0))
    """Weight of the policy gradient on the dream writer."""
    sft: float = field(default=0.5, metadata=bounds(ge=0))
    """Weight of the cross-entropy on the dreams that taught something."""
    replay_kl: float = field(default=2.0, metadata=bounds(ge=0))
    """Weight of the divergence from the smaller self on the smaller self's own texts."""


@dataclass
class ImportanceWeightConfig:
    """The off-policy correction of the dreaming loss: a weight from the ratio of two policies."""

    level: str = field(default="token", metadata=choices(("off", "token", "sequence", "geometric")))
    """What has a ratio: each ``token``, the ``sequence``, or its ``geometric`` mean. ``off`` leaves
    the correction to the algorithm, whose ratio is then to the policy that wrote the dream."""
    mode: str = field(default="truncate", metadata=choices(("truncate", "mask", "clip")))
    """``truncate`` caps the weight at ``high``, ``clip`` keeps it between ``low`` and ``high``,
    ``mask`` drops what lies outside of that band."""
    low: float = field(default=0.5, metadata=bounds(ge=0))
    """Lower end of the band, as a ratio of two policies' probabilities."""
    high: float = field(default=2.0, metadata=bounds(gt=0))
    """Upper end of the band, as a ratio of two policies' probabilities."""


@dataclass
class DreamingConfig:
    enabled: bool = True
    """Whether the night dreams at all."""
    steps: int = field(default=8, metadata=bounds(gt=0))
    """Number of optimizer steps."""
    tasks_per_step: int = field(default=4, metadata=bounds(gt=0))
    """Groups per step; a group is the dreams of one task."""
    group_size: int = field(default=6, metadata=bounds(gt=0))
    """Dreams per task."""
    max_staleness: int = field(default=1, metadata=bounds(ge=0))
    """Updates by which the policy that wrote a dream may trail the learner; 0 is the synchronous
    loop."""
    learning_rate: float = field(default=2e-4, metadata=bounds(gt=0, le=100))
    """Highest learning rate; it rises and falls as that of the consolidation."""
    grad_clip: float = field(default=1.0, metadata=bounds(gt=0))
    """Largest norm of the gradient; a larger one is scaled down to it."""
    temperature: float = field(default=1.0, metadata=bounds(ge=0.01, le=100))
    """Sampling temperature of dreams."""
    max_tokens: int = field(default=64, metadata=bounds(gt=0))
    """Length of the longest dream, in tokens."""
    reward: str = field(default="likelihood_gain", metadata=plugin("reward"))
    """A built-in name or the dotted path of a ``Reward``."""
    reward_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward."""
    reward_timeout_s: float = field(default=30.0, metadata=bounds(gt=0, le=1_000_000))
    """Seconds that the reward of one dream may take. Then its process is killed, and the dream stays
    unscored."""
    format: str = field(default="qa", metadata=plugin("dream_format"))
    """What a dream looks like and what is learned from it: ``qa``, a question and its answer, or the
    dotted path of a ``DreamFormat``."""
    format_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the format."""
    curriculum: str = field(default="weak_spots", metadata=plugin("curriculum"))
    """A built-in name or the dotted path of a ``Curriculum``."""
    curriculum_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the curriculum."""
    algorithm: str = field(default="dapo", metadata=plugin("algorithm"))
    """Of the policy gradient: a built-in name (``sleeprl.algorithms``) or the dotted path of an
    ``Algorithm``. ``dapo`` draws other groups for those whose rewards are all equal;
    ``algorithm_options.max_resample_rounds`` bounds that, and 0 ends it."""
    algorithm_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the algorithm."""
    reference_kl: float = field(default=0.0, metadata=bounds(ge=0))
    """Weight of the KL divergence from the smaller self, on the dreams."""
    reference_estimator: str = field(default="k3", metadata=choices(("k1", "k2", "k3")))
    """Estimator of that KL divergence: ``k1``, ``k2`` or ``k3``."""
    importance_weight: ImportanceWeightConfig = field(default_factory=ImportanceWeightConfig)
    loss: DreamingLossConfig = field(default_factory=DreamingLossConfig)
    trial_learning_rate: float = field(default=0.05, metadata=bounds(gt=0, le=100))
    """Learning rate of the trial step of SGD that measures what a dream teaches."""
    trial_questions: int = field(default=8, metadata=bounds(gt=0))
    """Questions of the task on which that trial step is measured."""


@dataclass
class GateConfig:
    max_retention_drop: float = field(default=0.02, metadata=bounds(ge=0, le=1))
    """How far retention may fall, as a share of all questions. Beyond it the night is rolled back."""
    max_perplexity_ratio: float = field(default=1.25, metadata=bounds(ge=1))
    """How many times its old value the perplexity of held-out texts may reach. It guards a model
    that hardly answers questions."""


@dataclass
class ResourcesConfig:
    cpus: int = field(default=0, metadata=bounds(ge=0, le=MOST))
    """Cores Ray may use; 0 is all of this machine."""
    address: str | None = None
    """Address of the Ray cluster to join (``auto`` on its head node); null starts a local one."""
    engine: str = field(default="vllm", metadata=plugin("engine"))
    """``vllm``, or ``torch``: small, slow and the same to the bit each time; or the dotted path of a
    ``TokenEngine``."""
    engines: int = field(default=1, metadata=bounds(gt=0, le=MOST))
    """Number of rollout engines, which generate at the same time."""
    engine_cpus: int = field(default=1, metadata=bounds(gt=0, le=MOST))
    """Cores of one engine."""
    engine_gpus: float = field(default=0.0, metadata=bounds(ge=0, whole_above_one=True))
    """GPUs of one engine: a share of one, such as 0.5, or whole ones; 0 is the CPU."""
    engine_tensor_parallel: int = field(default=1, metadata=bounds(gt=0, le=MOST))
    """Processes of one engine that share every layer (vLLM's tensor parallelism). ``engine_cpus`` and
    ``engine_gpus`` count for all of them together, a GPU each."""
    engine_kv_cache_gb: float = field(default=1.0, metadata=bounds(gt=0))
    """KV cache of one CPU engine, in GiB."""
    engine_gpu_memory_utilization: float = field(default=0.4, metadata=bounds(gt=0, le=1))
    """Share of a GPU's memory that vLLM takes."""
    transport: str = field(default="shared_memory", metadata=plugin("transport"))
    """How new weights reach the engines: ``shared_memory`` on the learner's host, ``disk`` below
    ``runs`` on any host, vLLM's ``nccl`` between GPUs or ``ipc`` within one GPU, or a
    ``WeightTransport`` of your own by dotted path."""
    update_mode: str = field(default="keep", metadata=choices(("keep", "drain", "abort")))
    """What happens to running requests when new weights arrive: ``keep`` freezes them, ``drain`` waits
    for their end, ``abort`` continues from their tokens without the old weights' KV cache."""
    layout: str = field(default="decoupled", metadata=choices(("decoupled", "colocated")))
    """``decoupled``: engines generate while the learner steps. ``colocated``: they share a device and
    take turns, and engines sleep while the learner steps. A vLLM engine on a GPU then gives back its
    memory; the learner's weights and optimiser stay, so ``engine_gpu_memory_utilization`` must leave
    room for them."""
    learner_workers: int = field(default=1, metadata=bounds(gt=0, le=MOST))
    """Processes that share the learner's state and batches (ZeRO-3)."""
    learner_workers_max: int = field(default=0, metadata=bounds(ge=0, le=MOST))
    """Above ``learner_workers``, consolidation is elastic: its workers number between the two, as many
    as the present nodes offer of Ray's custom resource ``sleeprl_learner`` (``cluster/README.md``)."""
    learner_cpus: int = field(default=1, metadata=bounds(gt=0, le=MOST))
    """Cores of one worker."""
    learner_gpus: float = field(default=0.0, metadata=bounds(ge=0, whole_above_one=True))
    """GPUs of one worker, or a share of one; 0 is the CPU."""
    offload: str = field(default="none", metadata=choices(("none", "optimizer", "parameters")))
    """What a learner worker keeps in the host's memory instead of its GPU's: ``optimizer``: its share
    of the optimiser, which then steps there; ``parameters``: its share of the parameters as well;
    ``none``: nothing."""
    micro_batch_tokens: int = field(default=8192, metadata=bounds(gt=0))
    """Padded tokens in one forward pass of a learner worker. Fewer take less memory and more time; the
    result is the same."""
    teachers: int = field(default=0, metadata=bounds(ge=0, le=MOST))
    """Number of actors with the teacher, a second copy of the model. With 0 the learner's own module
    teaches, with its new expert off."""
    teacher_cpus: int = field(default=1, metadata=bounds(gt=0, le=MOST))
    """Cores of one teacher."""
    teacher_gpus: float = field(default=0.0, metadata=bounds(ge=0, whole_above_one=True))
    """GPUs of one teacher, or a share of one; 0 is the CPU."""
    scorers: int = field(default=1, metadata=bounds(gt=0, le=MOST))
    """Number of actors that score dreams: the smaller self's log-probabilities, and what learning from a
    dream would change. Each has a copy of the model in single precision; no core is reserved for it."""
    scorer_gpus: float = field(default=0.0, metadata=bounds(ge=0, whole_above_one=True))
    """GPUs of one scorer, or a share of one; 0 is the CPU."""
    reward_workers: int = field(default=1, metadata=bounds(gt=0, le=MOST))
    """Number of actors that compute rewards, each in a process of its own and for one dream at a time.
    A slow reward needs more of them, and cores."""
    max_failures: int = field(default=1, metadata=bounds(ge=0, le=MOST))
    """How often in a phase a dead worker group is restarted from its last checkpoint, or a dead engine
    while dreaming."""
    stall_seconds: float = field(default=120.0, metadata=bounds(gt=0, le=1_000_000))
    """Seconds after which a wait is reported, with what waits for what."""

    @property
    def elastic(self) -> bool:
        """Whether consolidation may change its number of workers."""
        return self.learner_workers_max > self.learner_workers

    @property
    def gpus(self) -> float:
        """Count the GPUs that are used at the same time: by engines, learner workers, and teachers
        (consolidation) or scorers (dreaming)."""
        learners = self.learner_workers * self.learner_gpus
        apart = max(self.teachers * self.teacher_gpus, self.scorers * self.scorer_gpus)
        return round(self.engines * self.engine_gpus + learners + apart, 4)

    @property
    def learner_threads(self) -> int:
        """Count the threads of one learner worker: its cores and, on this machine's CPUs, its share of
        the engines' cores, which mostly idle while the learner steps."""
        if self.address is not None or self.engine_gpus:
            return self.learner_cpus
        return self.learner_cpus + self.engines * self.engine_cpus // self.learner_workers


@dataclass
class ReportingConfig:
    sinks: list[str] = field(default_factory=list, metadata=plugin("metrics_sink"))
    """Where metrics go beside ``metrics.jsonl``: ``tensorboard``, ``wandb`` or ``mlflow``, each installed
    with ``pip install 'sleeprl[NAME]'`` and set up by its own environment variables; or the dotted path
    of a ``MetricsSink``."""


@dataclass
class NightConfig:
    name: str = "night"
    """Directory of the run below ``runs``."""
    runs: str = "runs"
    """Directory of all runs."""
    generations: str = "generations"
    """Directory of the committed generations."""
    seed: int = field(default=0, metadata=bounds(ge=0, le=2**32 - 1))
    """Seed of all that is drawn: people, texts, batches, the new expert."""
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    wake: WakeConfig = field(default_factory=WakeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    self_study: SelfStudyConfig = field(default_factory=SelfStudyConfig)
    consolidation: ConsolidationConfig = field(default_factory=ConsolidationConfig)
    baselines: list[str] = field(default_factory=lambda: ["fine_tuning"])
    """Methods to train and measure beside Sleep, on the same day and with as many tokens."""
    phases: list[str] = field(default_factory=list, metadata=plugin("phase"))
    """Phases of the night beside the built-in ones: dotted paths of functions that return a ``Phase``."""
    fixed_capacity: FixedCapacityConfig = field(default_factory=FixedCapacityConfig)
    dreaming: DreamingConfig = field(default_factory=DreamingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    reporting: ReportingConfig = field(default_factory=ReportingConfig)

    @property
    def run_dir(self) -> Path:
        """Directory of this run."""
        return Path(self.runs) / self.name


def iter_fields(node: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Walk over all settings of a configuration or of a section, in the order of their definition.

    Yields:
        The dotted key, the dataclass field and the value of each setting.
    """
    for entry in fields(node):
        value = getattr(node, entry.name)
        if is_dataclass(value):
            yield from iter_fields(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", entry, value


def keys() -> Iterator[str]:
    """List all dotted keys, in the order of their definition."""
    return (key for key, _, _ in iter_fields(NightConfig()))


def get_setting(config: NightConfig, key: str) -> Any:
    """Get a setting or a section by its dotted key; the whole configuration by an empty one."""
    node: Any = config
    for name in key.split(".") if key else ():
        node = getattr(node, name)
    return node
