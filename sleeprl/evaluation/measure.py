"""The four figures of a model in one state, measured on the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sleeprl.config.schema import EvaluationConfig
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, to_batch
from sleeprl.evaluation.questions import (
    KINDS,
    Day,
    Question,
    first_sentence,
    grade,
    is_whole,
    told_by,
)
from sleeprl.rollout.engine import Completion, SamplingParams
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import FREE_FACT, with_experience
from sleeprl.utils.files import write_text_atomic


def ask(
    fleet: EnginePool,
    chat: ChatFormatter,
    probes: Sequence[Question],
    *,
    with_context: bool,
    max_tokens: int,
    seed: int | None = None,
) -> list[str]:
    """Greedy answers, or with a seed those of temperature 0.5. With context, the probe's document
    stands before its question."""
    prompts, heat = prompts_of(chat, probes, with_context), 0.0 if seed is None else 0.5
    sampling = [SamplingParams(max_tokens, heat, seed)] * len(prompts)
    return [chat.decode(c.token_ids) for c in fleet.generate(prompts, sampling)]


def prompts_of(
    chat: ChatFormatter, probes: Sequence[Question], with_context: bool
) -> list[list[int]]:
    return [
        chat.prompt(
            with_experience(p.experience, p.question)
            if with_context and p.experience
            else p.question
        )
        for p in probes
    ]


def perplexity(
    fleet: EnginePool, chat: ChatFormatter, texts: Sequence[str], longest: int, answering: str = ""
) -> tuple[float | None, int]:
    """Per token over all texts, and the number of tokens.

    answering: the message that they are answers to, which is no part of it. With it a text is cut
    to ``longest`` tokens; a chat model has hardly seen a text that stands alone.
    """
    prompt = chat.prompt(answering) if answering else []
    start = max(0, len(prompt) - 1)  # the first token of all is given nothing to go by
    sequences = [[*prompt, *chat.text(text)][:longest] for text in texts]
    sequences = [ids for ids in sequences if len(ids) > start + 1]
    if not sequences:
        return None, 0
    logprobs = [value for values in fleet.logprobs(sequences) for value in values[start:]]
    return math.exp(-sum(logprobs) / len(logprobs)), len(logprobs)


def measure(
    fleet: EnginePool, chat: ChatFormatter, day: Day, *, with_context: bool, max_tokens: int, max_length: int,
    record: Path | None = None, lake: Lake | None = None,
) -> dict[str, Any]:  # fmt: skip
    """``recall``, ``two_hop``, ``retention`` (shares), ``perplexity``, and ``n`` of each.

    record: where every answer is written, one JSON line for each probe, in their order. lake: to
    which they are then appended, as trajectories with its name; a right one has the reward 1.
    """
    probes = day.probes
    prompts = prompts_of(chat, probes, with_context)
    wrote = fleet.generate(prompts, [SamplingParams(max_tokens, 0.0)] * len(prompts))
    answers = [chat.decode(completion.token_ids) for completion in wrote]
    right = grade(answers, probes)
    if record is not None:
        if lake is not None and wrote:
            whole = enumerate(zip(probes, prompts, wrote, right, strict=True))
            answered = [_trajectory(record.stem, number, *each) for number, each in whole]
            lake.append(to_batch(answered), "trajectories")
        rows = [
            {"kind": p.kind, "question": p.question, "gold": p.answer, "answer": a, "right": ok}
            for p, a, ok in zip(probes, answers, right, strict=True)
        ]
        record.parent.mkdir(exist_ok=True)
        write_text_atomic(record, "".join(json.dumps(row) + "\n" for row in rows))
    figures: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for kind in KINDS:
        marks = [ok for ok, probe in zip(right, probes, strict=True) if probe.kind == kind]
        figures[kind] = sum(marks) / len(marks) if marks else None
        counts[kind] = len(marks)
    figures["perplexity"], counts["perplexity"] = perplexity(
        fleet, chat, day.texts, max_length - 1, day.answering
    )
    return {**figures, "n": counts}


def _trajectory(
    state: str, number: int, probe: Question, prompt: list[int], wrote: Completion, right: bool
) -> Trajectory:
    return Trajectory(
        uid=f"eval-{state}-{number}",
        task_id=f"{state}-{probe.kind}",
        attempt=0,
        purpose="eval",
        prompt_ids=prompt,
        response_ids=wrote.token_ids,
        logprobs=wrote.logprobs,
        versions=wrote.versions,
        finish_reason=wrote.finish_reason,
        reward=float(right),
        meta=json.dumps({"gold": probe.answer}),
    )


def forgotten(before: Path, after: Path) -> list[dict[str, str]]:
    """Old knowledge that is lost: what ``before`` has right and ``after`` does not.

    Both are records of ``measure``. Returns question, before and after, in their order.
    """
    told = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in (before, after)
    ]
    return [
        {"question": old["question"], "before": old["answer"], "after": new["answer"]}
        for old, new in zip(*told, strict=True)
        if old["kind"] == "retention" and old["right"] and not new["right"]
    ]


def own_retention(
    day: Day,
    questions: Sequence[str],
    fleet: EnginePool,
    chat: ChatFormatter,
    config: EvaluationConfig,
) -> Day:
    """The day with a retention probe that needs no labels, in the place of one that it had.

    questions: what the smaller self asked freely, none of it trained on. It answers them again,
    greedily, and twice with chance; what it says each time, in its first sentence and beside what
    the question says, is what it knows, and is asked in the morning.
    """
    asked = [Question(q, "", "retention") for q in dict.fromkeys(questions)][
        : config.retention_questions
    ]
    greedy, *others = (
        ask(fleet, chat, asked, with_context=False, max_tokens=config.max_tokens, seed=seed)
        for seed in (None, 1, 2)
    )
    golds = [first_sentence(answer) for answer in greedy]
    # Cut off in the middle of its sentence an answer is none.
    cut = [len(chat.text(gold)) >= config.max_tokens - 1 and not is_whole(gold) for gold in golds]
    probes = [
        Question(p.question, "" if ends else told_by(gold, p.question), p.kind)
        for p, gold, ends in zip(asked, golds, cut, strict=True)
    ]
    sure = [all(marks) for marks in zip(*(grade(other, probes) for other in others), strict=True)]
    probes = [probe for probe, kept in zip(probes, sure, strict=True) if kept]
    told = [probe for probe in day.probes if probe.kind != "retention"]
    return replace(day, probes=[*told, *probes])


def own_texts(
    day: Day,
    stated: Sequence[str],
    fleet: EnginePool,
    chat: ChatFormatter,
    config: EvaluationConfig,
) -> Day:
    """The day with texts for the perplexity, in the place of those that it had.

    stated: facts that the smaller self stated freely, none of them trained on. Where they are too
    few it writes more, as long as an answer and as they come, for of a weak writer little is
    whole. At temperature 1 the rise of log perplexity over the night estimates how many nats per
    token the larger self is away from the smaller one (forward KL).
    """
    missing = max(0, config.perplexity_texts - len(stated))
    sampling = [SamplingParams(config.max_tokens, 1.0, seed) for seed in range(missing)]
    written = fleet.generate([chat.prompt(FREE_FACT)] * missing, sampling)
    more = [text for c in written if (text := chat.decode(c.token_ids))]
    return replace(day, texts=[*stated, *more][: config.perplexity_texts], answering=FREE_FACT)
