"""The four figures of a model in one state, measured on the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sleeprl.actors.engine import Sampling
from sleeprl.actors.fleet import Fleet
from sleeprl.chat import Chat
from sleeprl.config import EvaluationConfig
from sleeprl.evaluation.probes import KINDS, Day, Probe, grade
from sleeprl.prompts import with_experience


def ask(
    fleet: Fleet, chat: Chat, probes: Sequence[Probe], *, with_context: bool, max_tokens: int
) -> list[str]:
    """Greedy answers. With context, the probe's document stands before its question."""
    prompts = [
        chat.prompt(
            with_experience(p.experience, p.question)
            if with_context and p.experience
            else p.question
        )
        for p in probes
    ]
    sampling = [Sampling(max_tokens, temperature=0.0)] * len(prompts)
    return [chat.decode(c.token_ids) for c in fleet.generate(prompts, sampling)]


def perplexity(
    fleet: Fleet, chat: Chat, texts: Sequence[str], longest: int
) -> tuple[float | None, int]:
    """Per token over all texts, each cut to ``longest`` tokens, and the number of tokens."""
    sequences = [ids[:longest] for ids in map(chat.text, texts) if len(ids) > 1]
    if not sequences:
        return None, 0
    logprobs = [value for values in fleet.logprobs(sequences) for value in values]
    return math.exp(-sum(logprobs) / len(logprobs)), len(logprobs)


def measure(
    fleet: Fleet, chat: Chat, day: Day, *, with_context: bool, max_tokens: int, max_length: int
) -> dict[str, Any]:
    """``recall``, ``two_hop``, ``retention`` (shares), ``perplexity``, and ``n`` of each."""
    probes = day.probes
    answers = ask(fleet, chat, probes, with_context=with_context, max_tokens=max_tokens)
    right = grade(answers, probes)
    figures: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for kind in KINDS:
        marks = [ok for ok, probe in zip(right, probes, strict=True) if probe.kind == kind]
        figures[kind] = sum(marks) / len(marks) if marks else None
        counts[kind] = len(marks)
    figures["perplexity"], counts["perplexity"] = perplexity(fleet, chat, day.texts, max_length - 1)
    return {**figures, "n": counts}


def own_retention(
    day: Day,
    questions: Sequence[str],
    texts: Sequence[str],
    fleet: Fleet,
    chat: Chat,
    config: EvaluationConfig,
) -> Day:
    """The day with a retention probe that needs no labels.

    questions, texts: what the smaller self asked and stated freely. It answers the
    questions again, greedily; the texts, where the day has none, are for the perplexity.
    """
    asked = [Probe(q, "", "retention") for q in dict.fromkeys(questions)][: config.retention]
    answers = ask(fleet, chat, asked, with_context=False, max_tokens=config.max_tokens)
    probes = [Probe(p.question, a, p.kind) for p, a in zip(asked, answers, strict=True) if a]
    return Day(day.documents, [*day.probes, *probes], day.texts or list(texts)[: config.texts])
