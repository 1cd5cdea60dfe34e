"""Self-study: the two streams of texts with which the smaller self trains the larger self.

*new*: only the teacher's prompt has the experience. The teacher asks questions about a document and
answers them; the student trains on the bare question. *replay*: texts that both selves should
continue to write after the same prompt. The smaller self writes most of them without a document
(``rehearsal``). A few of tonight's questions are written with their document in the prompt, to
retain this skill too (``STUDY``).

When a level hands its slots on, there is no experience to read, so everything is written without a
document (``write_rehearsal``).
"""

from __future__ import annotations

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
from sleeprl.utils.files import read_record, write_json_atomic


@dataclass(frozen=True)
class Pair:
    """A question about a document, with the answer of the teacher, which has the document in its prompt."""

    document: int
    """Index of the document."""
    question: str
    answer: str


@dataclass
class Study:
    """The result of self-study."""

    trajectories: list[Trajectory]
    """Texts to train on."""
    probes: list[Pair] = field(default_factory=list)
    """Pairs excluded from training, which evaluate the dreams."""
    held_questions: list[str] = field(default_factory=list)
    """Free questions and messages excluded from training, to measure retention."""
    held_facts: list[str] = field(default_factory=list)
    """Free statements excluded from training, to measure retention."""
    written: int = 0
    """Total number of sampled texts."""
    malformed: int = 0
    """Number of texts that are truncated or not of the requested form."""
    coverage: float | None = None
    """Estimated probability that the next free question is one that is rehearsed."""
    question_bank: list[str] = field(default_factory=list)
    """Question bank for the next night."""

    def save(self, path: Path) -> None:
        """Write the probes and the counts as JSON, for the dreaming phase."""
        rows = [asdict(pair) for pair in self.probes]
        write_json_atomic(
            path, {"probes": rows, "written": self.written, "malformed": self.malformed}
        )


def describe_study(result: Mapping[str, int]) -> str:
    """Summarise the counts of a study for the progress display.

    Args:
        result: Counts ``new``, ``replay``, ``written`` and ``malformed``.
    """
    line = f"{result['new']} new, {result['replay']} replayed"
    if result["replay"]:
        return line
    return (
        f"{line} ({result['malformed']} of {result['written']} texts were not of the form asked for): "
        "what it knew is not rehearsed and may be lost; see self_study.replay_conversations, "
        "assistant_prefix and few_shot_examples"
    )


def load_probes(path: Path) -> list[Pair]:
    """Read the probes that ``Study.save`` wrote."""
    return read_record(path, lambda values: [Pair(**row) for row in values["probes"]])


def write_study(
    sampler: TextSampler,
    documents: Sequence[str],
    *,
    hold_out: float = 0.0,
    question_bank: Sequence[str] = (),
) -> Study:
    """Write both streams of a night.

    Args:
        sampler: Samples from the smaller self.
        documents: Documents of the day.
        hold_out: Share of the free questions and facts to exclude from training.
        question_bank: Questions of earlier nights, the next to ask first.

    Raises:
        ValueError: A document is too long to fit into a prompt with a response.
    """
    chat, config = sampler.chat, sampler.config
    # A dream prompt has the whole document, few-shot examples and prefix; these have to fit.
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
    # Old answers to tonight's questions, given without the document, must not be rehearsed.
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

    *new*: freely stated facts, a question about each, and the model's own answer to it. Recent
    knowledge is among them, because consolidation trains the model to state it freely; free
    questions concern older knowledge. *replay*: free questions and answers. Every prompt is the
    same for both selves.

    Args:
        sampler: Samples from the smaller self of the transfer.
        question_bank: Questions of earlier nights, the next to ask first.
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
    """Split a document into passages of ``sentences`` sentences."""
    found = re.split(r"(?<=[.!?])\s+", document.strip())
    return [" ".join(found[at : at + sentences]) for at in range(0, len(found), sentences)]


STUDY = "study-"
"""Prefix of the task ids of replay texts that were written with a document in the prompt."""
ABOUT = 4.0
"""Minimum ``_gain``, in nats, of a question about its document. Questions about a person that the
model already knows, or about nobody in particular, have less."""
ROUNDS = 3
"""Maximum number of sampling rounds for a document with few questions."""


def _ask_about(sampler: TextSampler, documents: Sequence[str]) -> list[GeneratedQuestion]:
    """Sample distinct questions about the documents."""
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
    """Return the texts to ask about, one per question: the whole document, or an excerpt of it."""
    whole = round(config.full_document_share * config.pairs_per_document)
    parts = cycle(passages(document, config.excerpt_sentences))
    return [document] * whole + list(islice(parts, config.pairs_per_document - whole))


def _about(
    sampler: TextSampler, documents: Sequence[str], drafts: Sequence[GeneratedQuestion]
) -> dict[tuple[int, str], GeneratedQuestion]:
    """Select the questions that are about their documents.

    A model that has consolidated before often asks about a person it knows instead of the one in
    the document. Answering that question with the document in the prompt would damage what it
    knows.
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
    """Compute by how many nats the content of a document makes a question more probable.

    A token that does not occur in the document counts against the question, by its absolute change:
    it may be the name of a similar person that the model already knows.

    Args:
        document: The document.
        tokens: Text of each token of the question.
        freely: -log p of each token without the document, in nats.
        in_context: -log p of each token with the document, in nats.
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
    """Add answers written with the document in the teacher's prompt, and probes, to ``result``."""
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
        # Asking about a document is a skill to retain too, unless few-shot examples provide it.
        if index % 4 == 0 and not config.few_shot_examples:
            texts.append(trajectory("replay", f"{STUDY}{n}", index, one.prompt, one.written, None))


def _state(sampler: TextSampler, documents: Sequence[str]) -> list[Trajectory]:
    """Sample facts of the documents, for the student to state without them."""
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
