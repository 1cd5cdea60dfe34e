"""What a night costs, before it starts: texts, tokens, computation, minutes and memory of each phase.

Counts follow from the settings and the day. Minutes come from a few measured nights on two cores and
are a range: another machine, or longer answers, may lie outside of it. Imports neither torch nor ray.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.night.preview import DayInTokens
from sleeprl.utils.machine import available_memory

_MEASURED = (
    # benchmarks/results: night.json, night-minimind2-small.json, night-smollm2-135m.json,
    # night-gemma-3-270m.json, night-qwen2.5-coder-1.5b.json
    (2.95e6, 0.35e-3, 2830.0, 0.14),
    (26e6, 9.2e-3, 700.0, 1.9),
    (135e6, 16e-3, 285.0, 3.8),
    (268e6, 38e-3, 145.0, 5.4),
    (1544e6, 89e-3, 72.0, 30.0),
)
"""By parameters: seconds per written token of an engine with one core, trained tokens per second of
two cores, seconds per dream. The last of the largest model is in proportion to the one before."""
_READ = 0.1
"""Cost of a token that is read, in tokens that are written."""
_RESPONSE = 0.25
"""Mean length of a response, as a share of the longest."""
_QUESTION = 30
"""Tokens of a prompt without a document, where no questions tell."""
_EXAMPLE = 45
"""Tokens of a worked example."""
_USABLE = 0.6
"""Share of the drafted pairs that are distinct, well-formed and about their document."""
_SPREAD = 2.0
"""A night takes between the estimate divided and multiplied by this."""
_START = 40.0
"""Seconds in which processes start, on two cores."""
_PROCESS = 0.5
"""GiB of a process without a model."""
_ACTIVATIONS = 20
"""Values per token, layer and hidden unit that the backward pass keeps."""
_GIB = 2**30


@dataclass(frozen=True)
class ModelSize:
    """What a model's size says about its cost."""

    parameters: int
    layers: int
    hidden: int

    @classmethod
    def read(cls, directory: Path) -> ModelSize | None:
        """Read the size of a checkpoint from its files' headers; None if they do not tell."""
        from safetensors import safe_open

        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            config = config.get("text_config", config)
            count = 0
            for file in directory.glob("*.safetensors"):
                with safe_open(file, "numpy") as tensors:
                    shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
                count += sum(map(math.prod, shapes))
            return cls(count, config["num_hidden_layers"], config["hidden_size"]) if count else None
        except Exception:  # only an estimate is lost; the check of the model says what is wrong
            return None


@dataclass(frozen=True)
class PhaseCost:
    """What one phase costs."""

    title: str
    what: str
    """The texts that it writes, asks or learns, in words."""
    tokens: float
    """Tokens that the model reads, writes or is trained on."""
    flops: float
    """Floating-point operations; 0 where the model's size is not known."""
    seconds: float | None
    """Estimated duration; None where no measured night is like it."""
    memory: float
    """GiB of all its processes together; 0 where the model's size is not known."""

    def describe(self) -> str:
        """Describe the phase in one line."""
        parts = [self.what, f"about {_si(self.tokens)} tokens"]
        if self.flops:
            parts.append(f"{_si(self.flops)}FLOP")
        if self.seconds is not None:
            parts.append(_minutes(self.seconds))
        if self.memory:
            parts.append(f"{self.memory:.1f} GiB")
        return ", ".join(parts)


class NightEstimate:
    """The cost of a night, phase by phase."""

    def __init__(
        self, config: NightConfig, day: DayInTokens, size: ModelSize | None, dtype: str
    ) -> None:
        """Take what is known before the night.

        Args:
            config: The settings.
            day: The day in tokens.
            size: Size of the model; None if it is not known.
            dtype: Number format of the weights.
        """
        self.config, self.day, self.size = config, day, size
        self.bytes = 4 if dtype == "float32" else 2
        self.parameters = size.parameters if size else 0
        have = config.resources
        self.timed = bool(size) and not have.gpus
        """Whether a measured night is like this one: all of it on CPUs."""
        self.rates = _rates(self.parameters) if self.timed else (0.0, 1.0, 0.0)

    @property
    def drafted(self) -> int:
        """Number of pairs about the day's documents that are drafted."""
        return len(self.day.documents) * self.config.self_study.pairs_per_document

    @property
    def new_texts(self) -> int:
        """Estimated number of texts about the day to train on."""
        study = self.config.self_study
        pairs = _USABLE * self.drafted * (1 - study.held_out_share)
        return round(pairs + len(self.day.documents) * study.facts_per_document)

    @property
    def learned(self) -> int:
        """Number of texts about the day that consolidation draws."""
        return self.config.consolidation.steps * self.config.consolidation.batch_size

    def phases(self) -> list[PhaseCost]:
        """List the costs in the order of the phases."""
        found = [self._self_study(), self._measurements(), self._consolidation()]
        if self.config.dreaming.enabled:
            found.append(self._dreaming())
        return [*found, *map(self._baseline, self.config.baselines)]

    def describe(self) -> list[tuple[str, str]]:
        """Describe the day, each phase and the whole, as names and texts of the plan."""
        day, phases = self.day, self.phases()
        about = "" if day.exact else "about "
        lines = [
            (
                "the day",
                f"{len(day.documents):,} documents of {about}{sum(day.documents):,} tokens, "
                f"{len(day.questions):,} questions{self._tell_split()}",
            )
        ]
        lines += [(phase.title, phase.describe()) for phase in phases]
        highest = max(phase.memory for phase in phases)
        memory = f"{highest:.1f} GiB at most" if highest else "memory not known without the model"
        if self.timed:
            seconds = _START + sum(phase.seconds or 0.0 for phase in phases)
            cost = f"{_minutes(seconds)} and {memory}: estimates from nights on two cores"
        else:
            cost = f"{memory}, an estimate; minutes are not estimated for GPUs or an unknown model"
        return [*lines, ("in all", cost)]

    def _tell_split(self) -> str:
        longer = self.day.split
        if not longer:
            return ""
        were = "1 document was" if longer == 1 else f"{longer:,} documents were"
        longest = self.config.model.max_length
        return f"; {were} longer than model.max_length={longest} leaves room for, and split at sentences"

    def warnings(self) -> list[str]:
        """Say what a person may not want.

        Raises:
            ConfigError: The model does not fit into this machine's memory.
        """
        return [*self._warn_of_day(), *self._warn_of_memory(), *self._warn_of_scorer()]

    # --- phases -------------------------------------------------------------------

    def _self_study(self) -> PhaseCost:
        study, day = self.config.self_study, self.day
        reading = 2 * self.drafted + len(day.documents) * study.facts_per_document
        quarter = study.replay_questions // 4
        free = 2 * study.replay_questions + 6 * quarter + 2 * study.replay_conversations
        prompt = _QUESTION + _EXAMPLE * study.few_shot_examples
        read = reading * (_mean(day.documents) + prompt) + free * prompt
        written = (reading + free) * study.max_tokens * _RESPONSE
        what = f"writes up to {reading + free:,} texts"
        return self._inference("self-study", what, read, written)

    def _measurements(self) -> PhaseCost:
        day, config = self.day, self.config.evaluation
        own = 0 if day.texts else config.retention_questions
        num_asked = len(day.questions) + own
        states = 3 + len(self.config.baselines)
        read = (states - 1) * sum(day.questions) + sum(day.with_context)
        read += states * (own * _QUESTION + config.perplexity_texts * config.max_tokens)
        written = states * num_asked * config.max_tokens * _RESPONSE
        return self._inference("measurements", f"{states} x {num_asked:,} questions", read, written)

    def _inference(self, title: str, what: str, read: float, written: float) -> PhaseCost:
        have = self.config.resources
        cores = have.engines * have.engine_cpus
        seconds = (written + _READ * read) * self.rates[0] / cores if self.timed else None
        tokens = read + written
        flops = 2.0 * self.parameters * tokens
        return PhaseCost(title, what, tokens, flops, seconds, self._memory(engines=True))

    def _consolidation(self) -> PhaseCost:
        config = self.config.consolidation
        what = f"learns {self.learned:,} texts of about {self.new_texts:,} new ones"
        if self.new_texts:
            what = f"{self.learned / self.new_texts:.1f} passes over about {self.new_texts:,} new texts"
        learner = self._trained(self._slot_parameters)
        tokens = config.steps * self._tokens_per_step()
        return self._training("consolidation", what, tokens, learner)

    def _baseline(self, name: str) -> PhaseCost:
        tokens = self.config.consolidation.steps * self._tokens_per_step()
        learner = self._trained(self.parameters)
        return self._training(name, "as many tokens", tokens, learner)

    def _training(self, title: str, what: str, tokens: float, learner: float) -> PhaseCost:
        have = self.config.resources
        cores = have.learner_workers * have.learner_threads
        seconds = tokens / self.rates[1] * 2 / cores if self.timed else None
        memory = self._memory(engines=True, learner=learner, teachers=have.teachers)
        return PhaseCost(title, what, tokens, 6.0 * self.parameters * tokens, seconds, memory)

    def _tokens_per_step(self) -> float:
        """Estimate the tokens of the texts and roll-outs of one step."""
        config = self.config.consolidation
        rows = config.batch_size + round(config.batch_size * config.replay_ratio)
        rows_of_rollouts = config.rollout_prompts * config.group_size / config.rollout_every
        question = _mean(self.day.questions) or _QUESTION
        row = question + self.config.self_study.max_tokens * _RESPONSE
        return (rows + rows_of_rollouts) * row

    def _dreaming(self) -> PhaseCost:
        config, have = self.config.dreaming, self.config.resources
        groups = config.steps * config.tasks_per_step
        dreams, documents = groups * config.group_size, len(self.day.documents)
        prompt = _mean(self.day.documents) + _QUESTION
        answer = config.max_tokens * _RESPONSE
        scored = (config.trial_questions + 3) * (_QUESTION + answer)
        tokens = dreams * (prompt + answer + scored)
        what = f"{dreams:,} dreams in {groups:,} groups on {documents:,} documents"
        seconds = dreams * self.rates[2] if self.timed else None
        learner = self._trained(self._slot_parameters)
        memory = self._memory(engines=True, learner=learner, scorers=have.scorers)
        return PhaseCost("dreaming", what, tokens, 6.0 * self.parameters * tokens, seconds, memory)

    # --- memory -------------------------------------------------------------------

    @property
    def _slot_parameters(self) -> int:
        size = self.size
        return 3 * size.hidden * size.layers * self.config.memory.width if size else 0

    @property
    def _weights(self) -> float:
        """GiB of one copy of the weights."""
        return self.parameters * self.bytes / _GIB

    def _trained(self, parameters: int) -> float:
        """GiB of all learner workers: each loads the whole model; they share the optimiser."""
        have, size = self.config.resources, self.size
        if size is None:
            return 0.0
        activations = (
            have.micro_batch_tokens * size.layers * size.hidden * _ACTIVATIONS * self.bytes
        )
        each = self._weights + _PROCESS + activations / _GIB
        return have.learner_workers * each + 16 * parameters / _GIB

    def _memory(
        self, *, engines: bool, learner: float = 0.0, teachers: int = 0, scorers: int = 0
    ) -> float:
        have = self.config.resources
        if self.size is None:
            return 0.0
        cache = 0.0 if have.engine_gpus else have.engine_kv_cache_gb
        engine = have.engines * (self._weights + cache + _PROCESS) if engines else 0.0
        scorer = scorers * (4 * self.parameters / _GIB + _PROCESS)
        return engine + learner + teachers * (self._weights + _PROCESS) + scorer

    # --- warnings -----------------------------------------------------------------

    def _warn_of_day(self) -> list[str]:
        config, share = self.config.consolidation, self.learned / max(1, self.new_texts)
        if share >= 0.8:
            return []
        steps = math.ceil(self.new_texts / config.batch_size)
        return [
            f"consolidation.steps={config.steps} x batch_size={config.batch_size} learn {self.learned:,} "
            f"texts of about {self.new_texts:,} that self-study writes about the day: "
            f"{1 - share:.0%} of it would not be learned. Set consolidation.steps={steps}, or write fewer "
            "with self_study.pairs_per_document and facts_per_document, or give fewer documents"
        ]

    def _warn_of_memory(self) -> list[str]:
        have = self.config.resources
        if have.address is not None or have.gpus or not self.size:
            return []
        machine = available_memory() / _GIB
        weights = (have.engines + have.learner_workers) * self._weights
        name = f"model.name={self.config.model.name!r}"
        if weights > machine:
            raise ConfigError(
                f"{name} takes {weights:,.0f} GiB for its weights in {have.engines} engine(s) and "
                f"{have.learner_workers} learner worker(s), but this machine has {machine:,.0f}; choose a "
                "smaller model, model.dtype=bfloat16 or another machine"
            )
        worst = max(self.phases(), key=lambda phase: phase.memory)
        if worst.memory <= machine:
            return []
        return [
            f"{worst.title} takes about {worst.memory:,.0f} GiB, and this machine has {machine:,.0f}; "
            + (
                "leave the baseline out"
                if worst.title in self.config.baselines
                else "lower resources.engine_kv_cache_gb, scorers or micro_batch_tokens"
            )
        ]

    def _warn_of_scorer(self) -> list[str]:
        have = self.config.resources
        if not self.config.dreaming.enabled or have.scorer_gpus or self.parameters < 1e9:
            return []
        return [
            f"resources.scorer_gpus=0: a scorer computes {_si(self.parameters)} parameters in float32 on "
            "one core, minutes for each dream; give it a GPU, or set dreaming.enabled=false"
        ]


def _rates(parameters: int) -> tuple[float, float, float]:
    """Interpolate the measured rates between models, evenly in logarithms; in proportion beyond."""
    if parameters <= _MEASURED[0][0]:
        return _MEASURED[0][1:]
    for low, high in pairwise(_MEASURED):
        if parameters <= high[0]:
            at = math.log(parameters / low[0]) / math.log(high[0] / low[0])
            between = [a * (b / a) ** at for a, b in zip(low[1:], high[1:], strict=True)]
            return between[0], between[1], between[2]
    largest = _MEASURED[-1]
    times = parameters / largest[0]
    return largest[1] * times, largest[2] / times, largest[3] * times


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _minutes(seconds: float) -> str:
    """Write a duration as a range of minutes or hours."""
    low, high = seconds / 60 / _SPREAD, seconds / 60 * _SPREAD
    if high >= 180:
        return f"{low / 60:.0f} to {high / 60:,.0f} hours"
    if high < 1:
        return "under 1 minute"
    return f"{low:.0f} to {high:.0f} minutes"


def _si(value: float) -> str:
    """Write a number with two digits and a prefix, such as ``1.2 M``."""
    for factor, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.0f} "
