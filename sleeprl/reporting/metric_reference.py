"""Describes every key of ``metrics.jsonl`` and ``summary.json``: meaning, unit, healthy range.

The documentation renders ``METRIC_REFERENCE``, and a test holds it against the files of a real run.
Healthy ranges are rules of thumb. Where the embedded model is named, they are what its night writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

LEARNING = "consolidation, levels, baselines"
"""The phases that consist of one training job: their metrics are the same."""
DREAMING = "dreaming"
EVERY = "every phase"


@dataclass(frozen=True)
class Metric:
    """One key, or all keys of one pattern, of a file that a run writes."""

    file: Literal["metrics.jsonl", "summary.json"]
    group: str
    """Of ``metrics.jsonl`` the phases that write it, of ``summary.json`` what it belongs to."""
    key: str
    """Name; of ``summary.json`` a dotted path. ``*`` stands for one name, ``[]`` for every item of
    a list."""
    meaning: str
    unit: str = ""
    """Empty for text and for values without a unit."""
    healthy: str = ""
    """What to expect of a run that goes well; empty where every value is fine."""


def _step(group: str, key: str, meaning: str, unit: str = "", healthy: str = "") -> Metric:
    return Metric("metrics.jsonl", group, key, meaning, unit, healthy)


def _summary(group: str, key: str, meaning: str, unit: str = "", healthy: str = "") -> Metric:
    return Metric("summary.json", group, key, meaning, unit, healthy)


_LINES = (
    _step(EVERY, "time", "When the line was written, since the epoch.", "s"),
    _step(EVERY, "phase", "Phase of the night, or name of the baseline."),
    _step(EVERY, "step", "Optimizer step of the phase, from 1. A resumed run may write one again; "
          "the last counts."),
    _step(EVERY, "not_finite", "Names of the metrics of this line that were NaN or infinite; they "
          "are written as null.", "", "absent"),
)  # fmt: skip
_TRAINING = (
    _step(EVERY, "loss", "The loss of the step: all parts, each with its weight.", "nats",
          "falls; in consolidation of the embedded model from 3.5 to about 1"),
    _step(EVERY, "grad_norm", "Norm of the gradient before it is clipped.", "",
          "finite; mostly below `consolidation.grad_clip` or `dreaming.grad_clip`"),
    _step(EVERY, "learning_rate", "Learning rate of the step.", "",
          "rises over the warm-up, then falls along a cosine to 5 % of its highest value"),
    _step(EVERY, "tokens", "Response tokens that the step learned from.", "tokens"),
    _step(EVERY, "*/ce", "Mean negative log-likelihood of the part's tokens, also where it has no "
          "weight in the loss.", "nats/token",
          "new and passage: falls; replay: rises by less than 0.3"),
    _step(EVERY, "*/kl", "Divergence of the larger self from the smaller one, on the part's "
          "tokens.", "nats/token",
          "new: falls; replay and hold: below 0.1, because a rise is forgetting"),
    _step(EVERY, "*/pg", "Policy-gradient loss of the part. Its size says little.", "",
          "around 0, finite"),
    _step(EVERY, "*/value", "Squared error of the critic, of algorithms that have one.", "",
          "falls"),
    _step(EVERY, "*/mismatch_kl", "KL divergence of the policy that learns from the policy that "
          "wrote, estimated per token (k3).", "nats/token",
          "dreaming: below 0.05; roll-outs of consolidation: below 1 at first, then below 0.1"),
    _step(EVERY, "*/ratio", "Mean probability ratio of the policy that learns to the policy that "
          "wrote.", "", "0.8 to 1.25"),
    _step(EVERY, "*/weight_mean", "Mean importance weight after `importance_weight` limits it; 1 "
          "where it is off.", "", "0.9 to 1.1"),
    _step(EVERY, "*/outside", "Share of tokens whose ratio is outside `dreaming.importance_weight.low` and "
          "`high`.", "share", "below 0.2; above, lower `max_staleness` or the learning rate"),
    _step(EVERY, "*/reference_kl", "KL divergence from the smaller self, per token (k3); only "
          "where the reference was asked.", "nats/token", "rises slowly, stays below 1"),
    _step(EVERY, "sync_seconds", "How long generation stood still for a weight update; of the "
          "slowest engine.", "s", "below a second on one host"),
    _step(EVERY, "canary", "Largest difference between the trainer's and an engine's "
          "log-probability on the canary text after an update.", "nats",
          "below 0.002 in float32, below 1 in bfloat16"),
    _step(EVERY, "stale_engines", "Engines that did not verify an update and get no work.",
          "engines", "0"),
)  # fmt: skip
_CONSOLIDATION = (
    _step(LEARNING, "trained_tokens", "Tokens that went through the trained model so far, prompts "
          "included. Methods are compared at equal numbers.", "tokens"),
    _step(LEARNING, "workers", "Trainer processes at this step.", "processes",
          "`resources.learner_workers`, or up to its maximum where it is elastic"),
    _step(LEARNING, "imitation_reward", "Mean imitation reward of the student's roll-outs: how "
          "well they continue the teacher's texts.", "0 to 1", "rises"),
    _step(LEARNING, "imitation_reward_new", "The same of roll-outs on the new experience alone.",
          "0 to 1", "rises; of the embedded model from 0.1 to above 0.8"),
    _step(LEARNING, "quiet", "Mean activity of the new expert on replayed text, of an expert with "
          "a gate.", "", "falls"),
    _step(LEARNING, "ewc", "Penalty of elastic weight consolidation, of the baseline `ewc`.", "",
          "rises, then stays"),
)  # fmt: skip
_DREAMING = (
    _step(DREAMING, "reward", "Mean reward of the dreams of the update.", "", "rises"),
    _step(DREAMING, "reward_positive", "Share of scored dreams with a reward above 0.", "share",
          "rises; below 0.1 little is learned"),
    _step(DREAMING, "unscored", "Dreams without a reward, because they are malformed or their "
          "reward failed.", "dreams", "below a quarter of the dreams"),
    _step(DREAMING, "gap", "Mean negative log-likelihood of the probes of the dreamt documents, "
          "before the dream: what is left to learn.", "nats/token", "falls"),
    _step(DREAMING, "response_tokens", "Mean length of a dream.", "tokens",
          "steady, below `dreaming.max_tokens`"),
    _step(DREAMING, "tokens_too_old", "Tokens older than `max_staleness`. They are read and not "
          "learned from.", "tokens", "0 unless an engine or trainer was restarted"),
    _step(DREAMING, "staleness", "Mean age of the learned tokens, in weight updates.", "updates",
          "between 0 and `dreaming.max_staleness`"),
    _step(DREAMING, "staleness_max", "Highest age of a learned token.", "updates",
          "at most `dreaming.max_staleness`"),
    _step(DREAMING, "staleness_tokens", "Learned tokens by their age.", "tokens by updates"),
    _step(DREAMING, "logprob_difference", "Mean difference of the trainer's and the engines' "
          "log-probabilities, by the age of the oldest weights in a dream.", "nats by updates",
          "age 0: below 1e-4 in float32, below 0.05 in bfloat16"),
    _step(DREAMING, "logprob_difference_max", "The same, the largest of a token.",
          "nats by updates", "age 0: below 0.01 in float32"),
    _step(DREAMING, "step_seconds", "Duration of the trainer's step, without publishing.", "s"),
    _step(DREAMING, "publish_lag_seconds", "From the end of a step until all engines had its "
          "weights.", "s", "below a step"),
    _step(DREAMING, "groups", "Numbers of the groups that the update learned from, in the order "
          "of admission."),
    _step(DREAMING, "redrawn", "Groups set aside because their rewards were all equal.", "groups",
          "below `dreaming.tasks_per_step`; more, and the rewards do not tell dreams apart"),
    _step(DREAMING, "age_seconds", "For each group, the seconds from its writing to its update.",
          "s", "below a few steps"),
)  # fmt: skip
_RUN = (
    _summary("run", "name", "Name of the run."),
    _summary("run", "model", "The setting `model.name`."),
    _summary("run", "seed", "The setting `seed`."),
    _summary("run", "slept_on", "What the experience was, in words."),
    _summary("run", "generation", "Id of the committed generation, or null."),
    _summary("run", "trained_tokens", "Tokens that consolidation trained on, prompts included.",
             "tokens"),
    _summary("run", "metrics.*", "Names of the rates of the headline table, by key."),
    _summary("run", "environment.*", "Versions, commit and machine of the measurement."),
)  # fmt: skip
_STATES = ("before", "before_with_context", "fine_tuned", "after", "baselines.*")


def _figures(state: str) -> tuple[Metric, ...]:
    after = state == "after"
    return (
        _summary("figures", f"{state}.recall", "Right answers to questions on the new experience.",
                 "share", "far above `before.recall`" if after else ""),
        _summary("figures", f"{state}.two_hop", "Right answers to questions that join two facts of "
                 "it.", "share", "above `before.two_hop`" if after else ""),
        _summary("figures", f"{state}.retention", "Right answers to questions on what was known "
                 "before.", "share",
                 "at most `gate.max_retention_drop` below `before.retention`" if after else ""),
        _summary("figures", f"{state}.exact_match.*", "Answers that are a right answer and nothing "
                 "else, by the kind of question.", "share"),
        _summary("figures", f"{state}.f1.*", "Mean F1 of the words of an answer and of the nearest "
                 "right one, by the kind of question.", "share"),
        _summary("figures", f"{state}.perplexity", "Perplexity per token of the held-out texts.",
                 "", "at most `gate.max_perplexity_ratio` times that of `before`" if after else ""),
        _summary("figures", f"{state}.n.*", "What the figure rests on.",
                 "questions, or tokens for the perplexity", "at least 100 questions"),
    )  # fmt: skip


_COSTS = tuple(
    metric
    for state in ("fine_tuned", "baselines.*")
    for metric in (
        _summary("figures", f"{state}.title", "Name of the method for a reader."),
        _summary("figures", f"{state}.steps", "Optimizer steps of the method.", "steps"),
        _summary("figures", f"{state}.tokens", "Tokens that the method trained on.", "tokens",
                 "about `trained_tokens`"),
        _summary("figures", f"{state}.seconds", "Duration of training and measuring.", "s"),
    )
)  # fmt: skip
_GATE = (
    _summary("gate", "gate.passed", "Whether the generation was committed."),
    _summary("gate", "gate.refused", "Why it was not; empty where it passed.", "", "empty"),
    _summary("gate", "gate.lost", "Retention before, less retention after.", "share",
             "at most `gate.max_retention_drop`"),
    _summary("gate", "gate.retention_before", "Retention before the night.", "share"),
    _summary("gate", "gate.retention_after", "Retention after the night.", "share"),
    _summary("gate", "gate.tolerance", "The setting; null where there were too few questions, and "
             "the perplexity decides alone.", "share"),
    _summary("gate", "gate.rise", "Perplexity after, divided by perplexity before.", "",
             "at most `gate.max_perplexity_ratio`"),
    _summary("gate", "gate.perplexity_tolerance", "The setting `gate.max_perplexity_ratio`."),
    _summary("gate", "gate.forgotten[].*", "Questions on what was known before that are answered "
             "right before and wrong after, with both answers.", "", "a few"),
)  # fmt: skip
_TIME = (
    _summary("time", "seconds.starting", "Time in which processes only started, within the phases "
             "below.", "s", "at most a fifth of `wall_seconds`"),
    _summary("time", "seconds.*", "Duration of each phase, over all attempts.", "s"),
    _summary("time", "wall_seconds", "Duration of the night, over all attempts, with what is "
             "between the phases.", "s"),
    _summary("time", "idle.*.*", "Seconds in which an actor of dreaming waited, by the kind of "
             "wait.", "s", "`learner.data` a small share: the engines keep up"),
)  # fmt: skip
_TEXTS = (
    _summary("texts", "samples[].*", "The best and the worst dreams: title, prompt, text, reward."),
    _summary("texts", "self_study.new", "Texts about the new experience to learn from.", "texts"),
    _summary("texts", "self_study.replay", "Texts of the smaller self about what it knew.",
             "texts"),
    _summary("texts", "self_study.probes", "Pairs kept out of training, to judge dreams.", "pairs"),
    _summary("texts", "self_study.written", "Texts that the smaller self wrote in all.", "texts"),
    _summary("texts", "self_study.malformed", "Of those, texts that are no question and answer.",
             "texts", "below a tenth of `self_study.written`"),
    _summary("texts", "self_study.replay_coverage", "Estimated share of what the smaller self says "
             "freely that replay covers; null where replay is off.", "share", "the higher the better"),
)  # fmt: skip
_MEMORY = (
    _summary("memory", "memory.parent", "Generation that the night started from, or null."),
    _summary("memory", "memory.clock.*", "State of the memory's clock after the night."),
    _summary("memory", "memory.steps[].*", "What each step of the night's plan moves from which "
             "level into which slot."),
    _summary("memory", "memory.told[]", "The same in words."),
)  # fmt: skip

METRIC_REFERENCE: tuple[Metric, ...] = (
    *_LINES,
    *_TRAINING,
    *_CONSOLIDATION,
    *_DREAMING,
    *_RUN,
    *(metric for state in _STATES for metric in _figures(state)),
    *_COSTS,
    *_GATE,
    *_TIME,
    *_TEXTS,
    *_MEMORY,
)
"""Every key that a run writes."""


def undocumented_keys(
    rows: Iterable[Mapping[str, Any]] = (), summary: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the keys that the reference does not describe, each once.

    Args:
        rows: Lines of ``metrics.jsonl``.
        summary: A ``summary.json``.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    paths = dict.fromkeys(_paths(summary or {}))
    missing = [name for name in names if not _is_documented("metrics.jsonl", name)]
    return missing + [path for path in paths if not _is_documented("summary.json", path)]


def _is_documented(file: str, key: str) -> bool:
    known = [metric.key for metric in METRIC_REFERENCE if metric.file == file]
    if file == "metrics.jsonl":
        return any(fnmatchcase(key, pattern) for pattern in known)
    return any(_matches(key.split("."), pattern.split(".")) for pattern in known)


def _matches(key: list[str], pattern: list[str]) -> bool:
    return len(key) == len(pattern) and all(
        part in ("*", name) for name, part in zip(key, pattern, strict=True)
    )


def _paths(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of every leaf; the items of a list share one path."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _paths(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value:
        for part in value:
            yield from _paths(part, f"{path}[]")
    elif not isinstance(value, (Mapping, list)):
        yield path
