"""Measures what a model knows, through the engines that serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sleeprl.config.schema import EvaluationConfig
from sleeprl.data.lake import TRAJECTORIES, Lake
from sleeprl.data.trajectory import Trajectory, to_batch
from sleeprl.evaluation.grading import exact_match, f1
from sleeprl.evaluation.questions import (
    RETENTION,
    Day,
    Question,
    extract_answer,
    first_sentence,
    grade,
    is_whole,
)
from sleeprl.evaluation.statistics import perplexity
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import FREE_FACT, with_experience
from sleeprl.utils.files import write_text_atomic

if TYPE_CHECKING:
    from sleeprl.rollout.engine_pool import EnginePool

SAMPLED = 0.5
"""Temperature of the sampled answers that test whether the model is consistent."""


@dataclass(frozen=True)
class Measurement:
    """The figures of one state of the model, and the answers behind them."""

    figures: dict[str, Any]
    """The share of right answers by metric (containment), None without questions; ``perplexity`` of
    the held-out texts; under ``exact_match`` and ``f1`` these figures by metric; and under ``n`` the
    number of questions by metric, and of tokens."""
    questions: list[Question]
    prompts: list[list[int]]
    """Token ids of each prompt."""
    completions: list[Completion]
    answers: list[str]
    right: list[bool]
    """Whether each answer is right."""

    def save(self, path: Path, lake: Lake) -> None:
        """Write the answers as JSON lines, and append them to the lake as trajectories.

        The reward of a trajectory is 1 for a right answer, else 0.

        Args:
            path: The JSONL file; its stem names the state.
            lake: The run's lake.
        """
        if self.completions:
            lake.append(to_batch(self._trajectories(path.stem)), TRAJECTORIES)
        rows = [
            {
                "kind": q.kind,
                "question": q.question,
                "gold": q.answer,
                "alternatives": q.alternatives,
                "answer": a,
                "right": ok,
                "exact": bool(exact_match(a, q.answers)),
                "f1": f1(a, q.answers),
            }
            for q, a, ok in zip(self.questions, self.answers, self.right, strict=True)
        ]
        path.parent.mkdir(exist_ok=True)
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

    def _trajectories(self, state: str) -> list[Trajectory]:
        whole = zip(self.questions, self.prompts, self.completions, self.right, strict=True)
        return [
            Trajectory(
                uid=f"eval-{state}-{number}",
                task_id=f"{state}-{question.kind}",
                attempt=0,
                purpose="eval",
                prompt_ids=prompt,
                response_ids=completion.token_ids,
                logprobs=completion.logprobs,
                versions=completion.versions,
                finish_reason=completion.finish_reason,
                reward=float(right),
                meta=json.dumps({"gold": question.answer}),
            )
            for number, (question, prompt, completion, right) in enumerate(whole)
        ]


def measure(
    engines: EnginePool,
    chat: ChatFormatter,
    day: Day,
    metrics: Sequence[str],
    *,
    with_context: bool,
    max_tokens: int,
    max_length: int,  # parameters: four say what to measure, three how
) -> Measurement:
    """Ask all questions of the day, and measure the perplexity of its held-out texts.

    Args:
        engines: Engines that serve the model.
        chat: The model's chat format.
        day: The questions and the texts.
        metrics: Keys of the metrics, in the order of the figures.
        with_context: Whether the prompt contains the question's document.
        max_tokens: The longest answer, in tokens.
        max_length: The longest sequence that the engines take, in tokens.

    Returns:
        The figures and the answers.
    """
    prompts = build_prompts(chat, day.probes, with_context)
    completions = engines.generate(prompts, [SamplingParams(max_tokens, 0.0)] * len(prompts))
    answers = [chat.decode(completion.token_ids) for completion in completions]
    right = grade(answers, day.probes)
    figures: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for key in metrics:
        marks = [ok for ok, q in zip(right, day.probes, strict=True) if q.kind == key]
        figures[key] = sum(marks) / len(marks) if marks else None
        counts[key] = len(marks)
    for name, score in (("exact_match", exact_match), ("f1", f1)):
        figures[name] = {}
        for key in metrics:
            pairs = zip(answers, day.probes, strict=True)
            values = [score(a, q.answers) for a, q in pairs if q.kind == key]
            figures[name][key] = fmean(values) if values else None
    figures["perplexity"], counts["perplexity"] = measure_perplexity(
        engines, chat, day.texts, max_length - 1, day.answering
    )
    figures["n"] = counts
    return Measurement(figures, day.probes, prompts, completions, answers, right)


def ask(
    engines: EnginePool,
    chat: ChatFormatter,
    questions: Sequence[Question],
    *,
    with_context: bool,
    max_tokens: int,
    seed: int | None = None,
) -> list[str]:
    """Answer each question, greedily or sampled at temperature ``SAMPLED``.

    Args:
        engines: Engines that serve the model.
        chat: The model's chat format.
        questions: The questions.
        with_context: Whether the prompt contains the question's document.
        max_tokens: The longest answer, in tokens.
        seed: Seed of sampled answers; None decodes greedily.

    Returns:
        One answer per question.
    """
    prompts = build_prompts(chat, questions, with_context)
    sampling = SamplingParams(max_tokens, 0.0 if seed is None else SAMPLED, seed)
    completions = engines.generate(prompts, [sampling] * len(prompts))
    return [chat.decode(completion.token_ids) for completion in completions]


def build_prompts(
    chat: ChatFormatter, questions: Sequence[Question], with_context: bool
) -> list[list[int]]:
    """Build the prompt of each question, as token ids.

    Args:
        chat: The model's chat format.
        questions: The questions.
        with_context: Whether the prompt contains the question's document.
    """
    return [
        chat.prompt(
            with_experience(q.experience, q.question)
            if with_context and q.experience
            else q.question
        )
        for q in questions
    ]


def measure_perplexity(
    engines: EnginePool,
    chat: ChatFormatter,
    texts: Sequence[str],
    longest: int,
    answering: str = "",
) -> tuple[float | None, int]:
    """Measure the perplexity per token over all texts.

    Args:
        engines: Engines that serve the model.
        chat: The model's chat format.
        texts: The texts.
        longest: Limit of a sequence in tokens, including the message before the text; longer ones
            are truncated.
        answering: User message that each text answers; its own tokens are not scored. Chat models
            have hardly seen texts without a turn before them.

    Returns:
        The perplexity, None where no token can be scored; and the number of scored tokens.
    """
    prompt = chat.prompt(answering) if answering else []
    start = max(1, len(prompt))  # the first token of a sequence has no context
    sequences = [[*prompt, *chat.text(text)][:longest] for text in texts]
    sequences = [ids for ids in sequences if len(ids) > start]
    if not sequences:
        return None, 0
    scores = engines.logprobs(sequences, [start] * len(sequences))
    logprobs = [value for values in scores for value in values]
    return perplexity(-sum(logprobs), len(logprobs)), len(logprobs)


def list_forgotten(before: Path, after: Path) -> list[dict[str, str]]:
    """List forgotten knowledge: retention questions that ``before`` answers right and ``after`` wrong.

    Args:
        before: JSONL file of ``Measurement.save``.
        after: Another one, of the same questions.

    Returns:
        ``question``, and the answers ``before`` and ``after``, in the order of the files.
    """
    rows = [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (before, after)
    ]
    return [
        {"question": old["question"], "before": old["answer"], "after": new["answer"]}
        for old, new in zip(*rows, strict=True)
        if old["kind"] == RETENTION and old["right"] and not new["right"]
    ]


def ask_own_questions(
    day: Day,
    questions: Sequence[str],
    engines: EnginePool,
    chat: ChatFormatter,
    config: EvaluationConfig,
) -> Day:
    """Replace the retention questions of a day by questions that need no labels.

    The smaller self answers its own questions once greedily and twice sampled. An answer counts as
    knowledge, and becomes the label, if all three agree; compared is the first sentence, without
    the words of the question.

    Args:
        day: The day; its other questions stay.
        questions: Questions that the smaller self wrote freely; nothing is trained on them.
        engines: Engines that serve the smaller self.
        chat: Its chat format.
        config: Limits the number of questions and the length of an answer.

    Returns:
        The day with the new questions.
    """
    drafts = [Question(q, "", RETENTION) for q in dict.fromkeys(questions)][
        : config.retention_questions
    ]
    greedy, *sampled = (
        ask(engines, chat, drafts, with_context=False, max_tokens=config.max_tokens, seed=seed)
        for seed in (None, 1, 2)
    )
    golds = [first_sentence(answer) for answer in greedy]
    # An answer that is truncated within its first sentence is no label.
    cut = [len(chat.text(gold)) >= config.max_tokens - 1 and not is_whole(gold) for gold in golds]
    labelled = [
        replace(q, answer="" if ends else extract_answer(gold, q.question))
        for q, gold, ends in zip(drafts, golds, cut, strict=True)
    ]
    sure = [all(marks) for marks in zip(*(grade(each, labelled) for each in sampled), strict=True)]
    known = [question for question, same in zip(labelled, sure, strict=True) if same]
    others = [question for question in day.probes if question.kind != RETENTION]
    return replace(day, probes=[*others, *known])


def write_own_texts(
    day: Day,
    stated: Sequence[str],
    engines: EnginePool,
    chat: ChatFormatter,
    config: EvaluationConfig,
) -> Day:
    """Replace the held-out texts of a day by texts that the smaller self wrote.

    Where the stated facts are too few, the smaller self writes more, at temperature 1 and up to the
    length of an answer. Truncated texts count too, since a weak writer completes few. At
    temperature 1 the rise of log perplexity over the night estimates the divergence of the larger
    self from the smaller one (forward KL) in nats per token.

    Args:
        day: The day; its questions stay.
        stated: Facts that the smaller self stated freely; nothing is trained on them.
        engines: Engines that serve the smaller self.
        chat: Its chat format.
        config: Number of texts, and length of an answer.

    Returns:
        The day with the new texts.
    """
    missing = max(0, config.perplexity_texts - len(stated))
    sampling = [SamplingParams(config.max_tokens, 1.0, seed) for seed in range(missing)]
    written = engines.generate([chat.prompt(FREE_FACT)] * missing, sampling)
    more = [text for c in written if (text := chat.decode(c.token_ids))]
    return replace(day, texts=[*stated, *more][: config.perplexity_texts], answering=FREE_FACT)


def describe_figures(result: Mapping[str, Any]) -> str:
    """Describe recall and retention of each state in a result, for the progress display."""
    states = []
    for state, figures in result.items():
        if isinstance(figures, dict):
            shares = [
                f"{key} {figures[key]:.0%}"
                for key in ("recall", RETENTION)
                if figures.get(key) is not None
            ]
            states.append("with the text: " * state.endswith("with_context") + ", ".join(shares))
    return "; ".join(states)
