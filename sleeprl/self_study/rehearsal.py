"""Rehearsal texts: what the smaller self writes without a document, to retain what it knows.

Without these texts, growth forgets as fast as fine-tuning. There are five kinds:

- free questions with answers,
- questions of earlier nights (``question_bank``),
- free statements, which mostly concern what was learned last (free questions concern older
  knowledge),
- neighbours of the questions of tonight,
- conversations.

Questions and statements are sampled at temperature 1, to cover as much as possible. Answers
are greedy, because a sampling error would be learned too.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Literal

from sleeprl.data.trajectory import Trajectory
from sleeprl.evaluation.questions import Question, grade
from sleeprl.evaluation.statistics import coverage
from sleeprl.self_study.sampler import GeneratedQuestion, TextSampler, build_qa_prompt, trajectory
from sleeprl.text.prompts import (
    FREE_FACT,
    FREE_QA,
    QUESTION_MARK,
    STUDY_QA,
    parse_qa,
    with_experience,
)

SURE, WIDE = 0.0, 1.0
"""Temperatures: of answers, and of questions and statements."""
Purpose = Literal["self_study", "replay"]


@dataclass(frozen=True)
class RehearsalSet:
    """Rehearsal texts, and the items excluded from training."""

    trajectories: list[Trajectory]
    """Texts to train on."""
    held_out: list[str]
    """Questions, facts or messages excluded from training."""
    coverage: float | None = None
    """Estimated probability that the next free question is one already asked."""
    questions_asked: list[str] = field(default_factory=list)
    """The questions that were rehearsed, in order."""


def ask_freely(
    sampler: TextSampler, count: int, hold_out: float = 0.0, again: Sequence[str] = ()
) -> RehearsalSet:
    """Sample free questions and answer each of them separately; rehearse every fourth pair as it was written.

    Knowledge is queried with questions, so most rehearsal texts are answers. The few pairs retain
    the skill of asking itself, which the next night needs.

    Args:
        sampler: Samples from the smaller self.
        count: Number of questions.
        hold_out: Share of the questions to exclude from training.
        again: Questions of earlier nights. At most ``2 * count`` of them are answered. They replace
            at most half of ``count``, and of all answers only one per fact is rehearsed.
    """
    prompt, again = build_qa_prompt(sampler.chat, sampler.config, FREE_QA), again[: 2 * count]
    drafts = sampler.generate([prompt] * max(count // 2, count - len(again)), WIDE)
    pairs = [(n, draft, p[0]) for n, draft in enumerate(drafts) if (p := sampler.parse_pair(draft))]
    # A repeated question adds nothing; a different one retains more of the old knowledge.
    questions = list(dict.fromkeys(question for _, _, question in pairs))
    held_out = sampler.hold_out(questions, hold_out)
    rows = [
        trajectory("replay", "pair", n, prompt, draft, None)
        for n, draft, question in pairs
        # A model that needs few-shot examples has no skill to retain, and its prompts are long.
        if n % 4 == 0 and question not in held_out and not sampler.config.few_shot_examples
    ]
    questions_asked = [q for q in dict.fromkeys([*questions, *again]) if q not in held_out]
    answered = _answered(sampler, "replay", "answer", questions_asked)
    if again:
        decode = sampler.chat.decode
        pairs_again = [(decode(text.prompt_ids), decode(text.response_ids)) for text in answered]
        answered = [answered[place] for place in one_of_each_fact(pairs_again)]
    kept_out = [question for question in questions if question in held_out]
    drawn = [question for _, _, question in pairs]
    return RehearsalSet([*rows, *answered], kept_out, coverage(drawn, again), questions_asked)


def one_of_each_fact(pairs: Sequence[tuple[str, str]]) -> list[int]:
    """Return the index of the first pair of each fact.

    Two pairs concern the same fact if their answers are equal and their questions have the same two
    rarest words. A word's frequency is the number of questions it occurs in.

    Args:
        pairs: Questions and answers.
    """
    words = [sorted(set(re.findall(r"\w+", question.casefold()))) for question, _ in pairs]
    count = Counter(word for those in words for word in those)
    found: dict[tuple[str, ...], int] = {}
    for place, ((_, answer), those) in enumerate(zip(pairs, words, strict=True)):
        rarest = sorted(those, key=lambda word: (count[word], word))[:2]
        found.setdefault((answer.casefold().strip(), *sorted(rarest)), place)
    return list(found.values())


def sample_facts(
    sampler: TextSampler, purpose: Purpose, count: int, hold_out: float = 0.0
) -> RehearsalSet:
    """Sample freely stated facts, a question about each, and the model's own answer to it.

    A statement that the answer does not confirm is treated as an error and not rehearsed.

    Args:
        sampler: Samples from the smaller self.
        purpose: Purpose of the trajectories.
        count: Number of statements.
        hold_out: Share of the facts to exclude from training.
    """
    chat, prompt = sampler.chat, sampler.chat.prompt(FREE_FACT)
    stated = {
        chat.decode(fact.token_ids): fact
        for fact in reversed(sampler.generate([prompt] * count, WIDE))
        if fact.finish_reason == "stop"
    }
    held_out = sampler.hold_out(list(stated), hold_out)
    facts = [fact for fact in stated if fact not in held_out]
    drafts = sampler.generate(
        [build_qa_prompt(chat, sampler.config, with_experience(fact, STUDY_QA)) for fact in facts]
    )
    about = {fact: p for fact, d in zip(facts, drafts, strict=True) if (p := sampler.parse_pair(d))}
    rows = _answered(
        sampler, purpose, "recalled-answer", [question for question, _ in about.values()]
    )
    answers = {tuple(row.prompt_ids): chat.decode(row.response_ids) for row in rows}
    for index, (fact, (question, answer)) in enumerate(about.items()):
        given = answers.get(tuple(chat.prompt(question)), "")
        if grade([given], [Question(question, answer, "")])[0]:
            rows.append(trajectory(purpose, "recalled", index, prompt, stated[fact], None))
    return RehearsalSet(rows, sorted(held_out))


def sample_conversations(sampler: TextSampler, count: int, hold_out: float = 0.0) -> RehearsalSet:
    """Sample user messages from the model itself, with its answers (Magpie, 2406.08464).

    A message is the first line of a sample. Truncated answers are used too, because the smaller
    self is the teacher at every token.

    Args:
        sampler: Samples from the smaller self.
        count: Number of messages.
        hold_out: Share of the messages to exclude from training.
    """
    if not count:
        return RehearsalSet([], [])
    chat = sampler.chat
    drafts = sampler.generate([chat.turn()] * count, WIDE)
    lines = [chat.decode(draft.token_ids).partition("\n")[0].strip() for draft in drafts]
    messages = [line for line in dict.fromkeys(lines) if line and sampler.has_room(line)]
    held_out = sampler.hold_out(messages, hold_out)
    prompts = [chat.prompt(message) for message in messages if message not in held_out]
    rows = [
        trajectory("replay", "conversation", index, prompt, answer, None)
        for index, (prompt, answer) in enumerate(
            zip(prompts, sampler.generate(prompts, SURE), strict=True)
        )
        if answer.token_ids
    ]
    return RehearsalSet(rows, sorted(held_out))


def sample_near_questions(
    sampler: TextSampler,
    documents: Sequence[str],
    questions_asked: Sequence[GeneratedQuestion],
    count: int,
) -> list[Trajectory]:
    """Sample neighbours: questions that begin like those of tonight and continue differently.

    Their answers are the first to be damaged by tonight's training. Each question of tonight is cut
    at a token, more probably at one that surprises the smaller self, and continued freely. A
    question whose answer changes with the document in the prompt is about the document, so it is
    dropped: its answer is supposed to change.

    Args:
        sampler: Samples from the smaller self.
        documents: Documents of the day.
        questions_asked: The questions of tonight.
        count: Number of beginnings to continue.
    """
    if not (questions_asked and count):
        return []
    chat = sampler.chat
    start, mark = sampler.qa_prefix(FREE_QA), len(chat.text(QUESTION_MARK))
    rng = random.Random(f"{sampler.seed}-neighbours")
    beginnings: list[tuple[int, list[int]]] = []
    for one in islice(cycle(rng.sample(questions_asked, len(questions_asked))), count):
        own = [1e-6 + nats for nats in one.nll[mark:]]
        cut = rng.choices(range(len(own)), own)[0]
        beginnings.append((one.document, one.ids[: mark + cut]))
    drafts = sampler.generate([[*start, *beginning] for _, beginning in beginnings], WIDE)
    mine = {one.question for one in questions_asked}
    found: dict[str, int] = {}
    for (n, beginning), draft in zip(beginnings, drafts, strict=True):
        pair = parse_qa(chat.decode([*beginning, *draft.token_ids]))
        if draft.finish_reason != "stop" or pair is None or pair[0] in mine:
            continue
        if sampler.can_answer(documents[n], pair[0]):
            found.setdefault(pair[0], n)
    rows = _answered(sampler, "replay", "neighbour", list(found))
    answers = {tuple(row.prompt_ids): row for row in rows}
    readings = sampler.generate(
        [chat.prompt(with_experience(documents[n], question)) for question, n in found.items()],
        SURE,
    )
    return [
        row
        for question, reading in zip(found, readings, strict=True)
        if (row := answers.get(tuple(chat.prompt(question))))
        and row.response_ids == reading.token_ids
    ]


def _answered(
    sampler: TextSampler, purpose: Purpose, task: str, questions: Sequence[str]
) -> list[Trajectory]:
    """Answer each distinct question greedily; truncated answers are dropped."""
    prompts = [sampler.chat.prompt(question) for question in dict.fromkeys(questions)]
    return [
        trajectory(purpose, task, index, prompt, answer, None)
        for index, (prompt, answer) in enumerate(
            zip(prompts, sampler.generate(prompts, SURE), strict=True)
        )
        if answer.finish_reason == "stop"
    ]
