"""What the smaller self writes to teach its larger self: the two streams of seeding data.

*new*: the experience is in the teacher's prompt only. The teacher asks itself
questions about a document and answers them; the student will see the bare
question. *replay*: what both selves are to go on writing behind the same prompt. Nearly all of it the
smaller self writes with nothing in its prompt (``rehearsal``); a few of tonight's questions are
written with their document in sight, so that this skill stays, too (``STUDY``).

When a level hands its slots on, there is no experience to read: all is written freely
(``write_rehearsal``).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from operator import sub
from pathlib import Path

from sleeprl.config.schema import SelfStudyConfig
from sleeprl.data.trajectory import Trajectory
from sleeprl.self_study.question_bank import rotate
from sleeprl.self_study.rehearsal import (
    SURE,
    ask_freely,
    sample_conversations,
    sample_facts,
    sample_near_questions,
)
from sleeprl.self_study.sampler import GeneratedQuestion, TextSampler, build_qa_prompt, trajectory
from sleeprl.text.prompts import (
    FREE_FACT,
    FREE_QA,
    QUESTION_MARK,
    STUDY_FACT,
    STUDY_QA,
    with_experience,
)
from sleeprl.utils.files import write_json_atomic


@dataclass(frozen=True)
class Pair:
    """A question about document number ``document`` and what the self that reads answers."""

    document: int
    question: str
    answer: str


@dataclass
class Study:
    """What self-study wrote."""

    trajectories: list[Trajectory]
    """Texts to learn from."""
    probes: list[Pair] = field(default_factory=list)
    """Pairs kept out of training, to judge dreams on."""
    held_questions: list[str] = field(default_factory=list)
    held_facts: list[str] = field(default_factory=list)
    """What the smaller self asked and stated freely and is not trained on: for retention."""
    written: int = 0
    """Texts sampled in all."""
    malformed: int = 0
    """Texts that were not whole, or not of the form asked for."""
    coverage: float | None = None
    """Of the replay: how likely the next free question is one that is rehearsed."""
    question_bank: list[str] = field(default_factory=list)
    """The questions as the next night is to find them."""

    def save(self, path: Path) -> None:
        """Write what dreaming needs of it as JSON."""
        rows = [asdict(pair) for pair in self.probes]
        write_json_atomic(
            path, {"probes": rows, "written": self.written, "malformed": self.malformed}
        )


def describe_study(result: Mapping[str, int]) -> str:
    """Describe what came of it, for the progress display."""
    line = f"{result['new']} new, {result['replay']} replayed"
    if result["replay"]:
        return line
    return (
        f"{line} ({result['malformed']} of {result['written']} texts were not of the form asked for): "
        "what it knew is not rehearsed and may be lost; see self_study.replay_conversations, "
        "assistant_prefix and few_shot_examples"
    )


def load_probes(path: Path) -> list[Pair]:
    """Read the pairs that ``Study.save`` wrote."""
    return [Pair(**row) for row in json.loads(path.read_text())["probes"]]


def write_study(
    sampler: TextSampler,
    documents: Sequence[str],
    *,
    hold_out: float = 0.0,
    question_bank: Sequence[str] = (),
) -> Study:
    """Write both streams of a night.

    Args:
        sampler: Samples of the smaller self.
        documents: The day's.
        hold_out: Share of the free questions and facts that nothing is to be trained on.
        question_bank: What was asked on earlier nights, what is to be asked first in front.

    Raises:
        ValueError: A document is too long to be read and written about.
    """
    chat, config = sampler.chat, sampler.config
    # A dream is asked for with the whole document, and everything that helps a weak writer.
    whole = [build_qa_prompt(chat, config, with_experience(text, STUDY_QA)) for text in documents]
    sampler.require_room(whole)
    result = Study([])
    questions = _ask_about(sampler, documents)
    _answer(sampler, documents, questions, result)
    result.trajectories += _state(sampler, documents)
    quarter, tonight = (
        config.replay_questions // 4,
        dict.fromkeys(one.question for one in questions),
    )
    # What it would have answered before it read is not to be kept.
    again = [question for question in question_bank if question not in tonight]
    free = ask_freely(sampler, config.replay_questions, hold_out, again)
    stated = sample_facts(sampler, "replay", quarter, hold_out)
    beside = sample_near_questions(sampler, documents, questions, quarter)
    talk = sample_conversations(sampler, config.replay_conversations, hold_out)
    result.held_questions, result.held_facts = [*free.held_out, *talk.held_out], stated.held_out
    held_out = {tuple(chat.prompt(question)) for question in result.held_questions}
    rows = [*free.trajectories, *stated.trajectories, *beside, *talk.trajectories]
    result.trajectories += [row for row in rows if tuple(row.prompt_ids) not in held_out]
    result.coverage = free.coverage
    result.question_bank = rotate(
        question_bank, list(tonight), free.questions_asked, config.question_bank_size, sampler.seed
    )
    result.written, result.malformed = sampler.written, sampler.malformed
    return result


def write_rehearsal(sampler: TextSampler, question_bank: Sequence[str] = ()) -> Study:
    """Write both streams for a transfer between levels.

    *new*: facts that it states freely, a question about each, and its own answer to that
    question. What was learned recently is among them because consolidation taught it to
    be stated freely; pairs that are asked freely are of what was known long before.
    *replay*: what it asks itself. Every prompt is the same for both selves.

    Args:
        sampler: Samples of the smaller self of the transfer.
        question_bank: What was asked on earlier nights, what is to be asked first in front.
    """
    config = sampler.config
    recent = sample_facts(sampler, "self_study", config.replay_questions // 2)
    free = ask_freely(sampler, config.replay_questions, again=question_bank)
    talk = sample_conversations(sampler, config.replay_conversations)
    texts = [*recent.trajectories, *free.trajectories, *talk.trajectories]
    return Study(
        texts, written=sampler.written, malformed=sampler.malformed, coverage=free.coverage
    )


def passages(document: str, sentences: int) -> list[str]:
    """Cut a document into pieces of so many sentences."""
    found = re.split(r"(?<=[.!?])\s+", document.strip())
    return [" ".join(found[at : at + sentences]) for at in range(0, len(found), sentences)]


STUDY = "study-"
"""How the tasks of replayed texts begin that were written with a document in sight."""
ABOUT = 4.0
"""Nats of ``_gain``, at the least, of a question that is about its document. What is asked about
somebody who is known, or about nobody in particular, stays below."""
ROUNDS = 3
"""How often at most a document is asked about of which few questions came."""


def _ask_about(sampler: TextSampler, documents: Sequence[str]) -> list[GeneratedQuestion]:
    """Ask different questions about the documents."""
    config = sampler.config
    found: dict[tuple[int, str], GeneratedQuestion] = {}
    numbers = list(range(len(documents)))
    for _ in range(ROUNDS):
        documents_asked = [n for n in numbers for _ in range(config.pairs_per_document)]
        excerpts = [text for n in numbers for text in _in_sight(documents[n], config)]
        prompts = [
            build_qa_prompt(sampler.chat, config, with_experience(text, STUDY_QA))
            for text in excerpts
        ]
        fresh: dict[tuple[int, str], GeneratedQuestion] = {}
        for n, prompt, written in zip(
            documents_asked, prompts, sampler.generate(prompts), strict=True
        ):
            pair = sampler.parse_pair(written)
            if pair and (n, pair[0]) not in found and sampler.can_answer(documents[n], pair[0]):
                fresh.setdefault((n, pair[0]), GeneratedQuestion(n, pair[0], prompt, written))
        found |= _about(sampler, documents, list(fresh.values()))
        numbers = [
            n for n in numbers if 4 * sum(n == of for of, _ in found) < config.pairs_per_document
        ]
        if not numbers:
            break
    return list(found.values())


def _in_sight(document: str, config: SelfStudyConfig) -> list[str]:
    """Return what of the document each question is asked with."""
    whole = round(config.full_document_share * config.pairs_per_document)
    parts = cycle(passages(document, config.excerpt_sentences))
    return [document] * whole + list(islice(parts, config.pairs_per_document - whole))


def _about(
    sampler: TextSampler, documents: Sequence[str], drafts: Sequence[GeneratedQuestion]
) -> dict[tuple[int, str], GeneratedQuestion]:
    """Select the questions that are about their documents.

    A self that has slept often asks about a person it knows in place of the one it reads about; to
    answer that with the document in sight would spoil what it knows.
    """
    chat = sampler.chat
    ids = [chat.text(f"{QUESTION_MARK} {draft.question}") for draft in drafts]
    reading = [sampler.qa_prefix(with_experience(text, STUDY_QA)) for text in documents]
    freely = sampler.token_nll([sampler.qa_prefix(FREE_QA)] * len(drafts), ids)
    in_context = sampler.token_nll([reading[draft.document] for draft in drafts], ids)
    return {
        (draft.document, draft.question): replace(draft, ids=own, nll=alone)
        for draft, own, alone, seen in zip(drafts, ids, freely, in_context, strict=True)
        if _gain(documents[draft.document], chat.pieces(own), alone, seen) >= ABOUT
    }


def _gain(
    document: str, tokens: Iterable[str], freely: Sequence[float], in_context: Sequence[float]
) -> float:
    """Return the nats by which a document makes a question likelier through what stands in it.

    A token that it calls to mind and that does not stand in it counts against the question: a
    name that it only resembles, of somebody who is known.

    Args:
        document: What is read.
        tokens: The pieces of the question.
        freely, in_context: -log p of each, without the document and with it, in nats.
    """
    text = document.casefold()
    return sum(
        gain if token.strip().casefold() in text else -abs(gain)
        for token, gain in zip(tokens, map(sub, freely, in_context), strict=True)
    )


def _answer(
    sampler: TextSampler,
    documents: Sequence[str],
    questions: Sequence[GeneratedQuestion],
    result: Study,
) -> None:
    """Add answers with the document in sight, to learn from without it; and probes."""
    config, chat = sampler.config, sampler.chat
    prompts = [
        chat.prompt(with_experience(documents[one.document], one.question)) for one in questions
    ]
    count = len(questions)
    held_out = set(
        random.Random(sampler.seed).sample(range(count), int(config.held_out_share * count))
    )
    texts = result.trajectories
    for index, (one, prompt, answer) in enumerate(
        zip(questions, prompts, sampler.generate(prompts, SURE), strict=True)
    ):
        n, bare, whole = one.document, chat.prompt(one.question), answer.finish_reason == "stop"
        if index in held_out:
            if whole:
                result.probes.append(Pair(n, one.question, chat.decode(answer.token_ids)))
            continue
        if whole:
            texts.append(trajectory("self_study", f"answer-{n}", index, bare, answer, prompt))
        # To ask about what it reads is a skill to keep, too. Examples need no skill.
        if index % 4 == 0 and not config.few_shot_examples:
            texts.append(trajectory("replay", f"{STUDY}{n}", index, one.prompt, one.written, None))


def _state(sampler: TextSampler, documents: Sequence[str]) -> list[Trajectory]:
    """Sample facts of the documents, to be stated freely."""
    chat, count = sampler.chat, sampler.config.facts_per_document
    numbers = [n for n in range(len(documents)) for _ in range(count)]
    prompts = [chat.prompt(with_experience(documents[n], STUDY_FACT)) for n in numbers]
    bare = chat.prompt(FREE_FACT)
    return [
        trajectory("self_study", f"fact-{n}", index, bare, fact, prompt)
        for index, (n, prompt, fact) in enumerate(
            zip(numbers, prompts, sampler.generate(prompts), strict=True)
        )
        if fact.finish_reason == "stop"
    ]
