"""What the smaller self writes to teach its larger self: the two streams of seeding data.

*new*: the experience is in the teacher's prompt only. The teacher asks itself
questions about a document and answers them; the student will see the bare
question. *replay*: what the smaller self writes with nothing in its prompt, the
same prompt for both. Without the second stream growth forgets as fast as
fine-tuning does.

When a level hands its slots on, there is no experience to read: all is written freely
(``rehearse``).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

from sleeprl.actors.engine import Completion, Sampling
from sleeprl.actors.fleet import Fleet
from sleeprl.chat import Chat
from sleeprl.evaluation.statistics import coverage
from sleeprl.files import write_json_atomic
from sleeprl.prompts import (
    FREE_FACT,
    FREE_QA,
    STUDY_FACT,
    STUDY_QA,
    examples,
    parse_qa,
    with_experience,
)
from sleeprl.settings import SelfStudyConfig
from sleeprl.trajectories.schema import Trajectory


@dataclass(frozen=True)
class Pair:
    """A question about document number ``document`` and what the self that reads answers."""

    document: int
    question: str
    answer: str


@dataclass
class Study:
    """trajectories: to learn from. probes: pairs kept out of training, to judge dreams on."""

    trajectories: list[Trajectory]
    probes: list[Pair] = field(default_factory=list)
    held_questions: list[str] = field(default_factory=list)
    held_facts: list[str] = field(default_factory=list)
    """What the smaller self asked and stated freely and is not trained on: for retention."""
    written: int = 0
    """Texts sampled in all."""
    malformed: int = 0
    """Texts that were not whole, or not of the form asked for."""
    coverage: float | None = None
    """Of the replay: how likely the next free question is one that is rehearsed."""

    def save(self, path: Path) -> None:
        rows = [asdict(pair) for pair in self.probes]
        write_json_atomic(
            path, {"probes": rows, "written": self.written, "malformed": self.malformed}
        )


def load_probes(path: Path) -> list[Pair]:
    return [Pair(**row) for row in json.loads(path.read_text())["probes"]]


def study(
    fleet: Fleet,
    chat: Chat,
    documents: Sequence[str],
    config: SelfStudyConfig,
    seed: int,
    max_length: int,
    *,
    grown: bool = False,
    hold_out: float = 0.0,
) -> Study:
    """Sample both streams from the engines, which must hold the smaller self's weights.

    grown: whether it has slept before; then what it learned so is replayed, too.
    hold_out: share of the free questions and facts that nothing is to be trained on.
    """
    writer = _Writer(fleet, chat, config, seed, max_length)
    # A dream is asked for with the whole document, and everything that helps a weak writer.
    whole = [asks(chat, config, with_experience(text, STUDY_QA)) for text in documents]
    writer.require_room(whole)
    result = Study([])
    _new(writer, documents, result, grown)
    _replay(writer, result, grown, hold_out)
    result.written, result.malformed = writer.written, writer.malformed
    return result


def rehearse(
    fleet: Fleet, chat: Chat, config: SelfStudyConfig, seed: int, max_length: int
) -> Study:
    """Both streams for a transfer between levels; the engines hold the smaller self's weights.

    *new*: facts that it states freely, a question about each, and its own answer to that
    question. What was learned recently is among them because consolidation taught it to
    be stated freely; pairs that are asked freely are of what was known long before.
    *replay*: as in ``study``. Every prompt is the same for both selves.
    """
    writer = _Writer(fleet, chat, config, seed, max_length)
    result = Study([])
    _recollect(writer, result, "self_study", config.replay // 2)
    _replay(writer, result, grown=False, hold_out=0.0)
    result.written, result.malformed = writer.written, writer.malformed
    return result


def asks(chat: Chat, config: SelfStudyConfig, message: str) -> list[int]:
    """A prompt that is answered with a question and its answer.

    message: ``FREE_QA``, or an instruction to write them about a text.
    """
    shown = examples(config.examples, free=message == FREE_QA)
    return chat.prompt(message, config.opening, shown)


def passages(document: str, sentences: int) -> list[str]:
    """A document in pieces of so many sentences; 0 leaves it whole."""
    if not sentences:
        return [document]
    found = re.split(r"(?<=[.!?])\s+", document.strip())
    return [" ".join(found[at : at + sentences]) for at in range(0, len(found), sentences)]


def _recollect(
    writer: _Writer, result: Study, purpose: Literal["self_study", "replay"], count: int
) -> None:
    chat = writer.chat
    prompt = chat.prompt(FREE_FACT)
    # At temperature 1, as free questions are: the wider they spread, the more is handed on.
    stated = writer.write([prompt] * count, temperature=1.0)
    facts: dict[str, Completion] = {}
    for fact in stated:
        if fact.finish_reason == "stop":
            facts.setdefault(chat.decode(fact.token_ids), fact)
    for index, fact in enumerate(facts.values()):
        result.trajectories.append(_trajectory(purpose, "recalled", index, prompt, fact, None))
    asked = writer.write(
        [asks(chat, writer.config, with_experience(fact, STUDY_QA)) for fact in facts]
    )
    pairs = [pair for completion in asked if (pair := writer.parsed(completion))]
    prompts = [
        chat.prompt(question) for question in dict.fromkeys(question for question, _ in pairs)
    ]
    for index, (bare, answer) in enumerate(zip(prompts, writer.write(prompts), strict=True)):
        if answer.finish_reason == "stop":
            result.trajectories.append(
                _trajectory(purpose, "recalled-answer", index, bare, answer, None)
            )


def _new(writer: _Writer, documents: Sequence[str], result: Study, grown: bool) -> None:
    config, chat = writer.config, writer.chat
    numbers = range(len(documents))
    asked = [n for n in numbers for _ in range(config.pairs_per_document)]
    shown = [
        part
        for document in documents
        for part in islice(cycle(passages(document, config.sentences)), config.pairs_per_document)
    ]
    studying = [asks(chat, config, with_experience(text, STUDY_QA)) for text in shown]
    texts = writer.write(studying)
    seen: set[tuple[int, str]] = set()
    questions: list[tuple[int, str]] = []
    drafts: list[tuple[list[int], Completion]] = []
    for n, prompt, completion in zip(asked, studying, texts, strict=True):
        pair = writer.parsed(completion)
        if pair and (n, pair[0]) not in seen:
            seen.add((n, pair[0]))
            questions.append((n, pair[0]))
            drafts.append((prompt, completion))
    teacher_prompts = [
        chat.prompt(with_experience(documents[n], question)) for n, question in questions
    ]
    answers = writer.write(teacher_prompts)
    held = set(
        random.Random(writer.seed).sample(
            range(len(questions)), int(config.probe_share * len(questions))
        )
    )
    for index, ((n, question), prompt, answer) in enumerate(
        zip(questions, teacher_prompts, answers, strict=True)
    ):
        if answer.finish_reason != "stop":
            continue
        if index in held:
            result.probes.append(Pair(n, question, chat.decode(answer.token_ids)))
        else:
            result.trajectories.append(
                _trajectory(
                    "self_study", f"answer-{n}", index, chat.prompt(question), answer, prompt
                )
            )
    # To ask about what it reads is a skill to keep, too: a self that has slept often asks about whom
    # it knows in place of whom it reads of. Examples need no skill.
    for index, (prompt, draft) in enumerate(drafts if grown and not config.examples else ()):
        if index not in held and index % 4 == 0:
            n = questions[index][0]
            result.trajectories.append(
                _trajectory("replay", f"study-{n}", index, prompt, draft, None)
            )
    stated = [n for n in numbers for _ in range(config.facts_per_document)]
    teacher_prompts = [chat.prompt(with_experience(documents[n], STUDY_FACT)) for n in stated]
    facts = writer.write(teacher_prompts)
    student_prompt = chat.prompt(FREE_FACT)
    for index, (n, prompt, fact) in enumerate(zip(stated, teacher_prompts, facts, strict=True)):
        if fact.finish_reason == "stop":
            result.trajectories.append(
                _trajectory("self_study", f"fact-{n}", index, student_prompt, fact, prompt)
            )


def _replay(writer: _Writer, result: Study, grown: bool, hold_out: float) -> None:
    """Free questions, each answered again on its own; for every four of them a free fact, and
    one pair as it was written. Of a self that has slept before, recollections beside them: of its
    own accord it asks about what it has known for long.

    What was known is asked in questions, so answers are what is rehearsed most. Of the pairs, a
    few keep the skill of asking itself, which the next night needs.
    """
    chat, count = writer.chat, writer.config.replay
    if grown:
        _recollect(writer, result, "replay", count // 4)
    asked, stated = asks(chat, writer.config, FREE_QA), chat.prompt(FREE_FACT)
    # Asked at temperature 1: the wider the questions spread, the more of the old is kept.
    drafts = writer.write([asked] * count, temperature=1.0)
    pairs = [(n, draft, p[0]) for n, draft in enumerate(drafts) if (p := writer.parsed(draft))]
    result.coverage = coverage([question for _, _, question in pairs])
    # The same question twice would teach nothing more; another one keeps more of the old.
    questions = list(dict.fromkeys(question for _, _, question in pairs))
    held = writer.hold_out(questions, hold_out)
    result.held_questions = [question for question in questions if question in held]
    for index, draft, question in pairs:
        # Whom examples help has no skill to keep, and its prompts are long.
        if index % 4 == 0 and question not in held and not writer.config.examples:
            result.trajectories.append(_trajectory("replay", "pair", index, asked, draft, None))
    prompts = [chat.prompt(question) for question in questions if question not in held]
    for index, (prompt, answer) in enumerate(zip(prompts, writer.write(prompts), strict=True)):
        if answer.finish_reason == "stop":
            result.trajectories.append(_trajectory("replay", "answer", index, prompt, answer, None))
    facts = writer.write([stated] * (count // 4))
    texts = [chat.decode(fact.token_ids) for fact in facts]
    held = writer.hold_out(list(dict.fromkeys(texts)), hold_out)
    result.held_facts = [text for text in dict.fromkeys(texts) if text in held]
    for index, (fact, text) in enumerate(zip(facts, texts, strict=True)):
        if fact.finish_reason == "stop" and text not in held:
            result.trajectories.append(_trajectory("replay", "fact", index, stated, fact, None))


class _Writer:
    """Samples with a seed of its own for every text, so a study repeats."""

    def __init__(
        self, fleet: Fleet, chat: Chat, config: SelfStudyConfig, seed: int, max_length: int
    ) -> None:
        self.fleet, self.chat, self.config, self.seed = fleet, chat, config, seed
        self.max_length = max_length
        self.written = self.malformed = 0

    def require_room(self, prompts: Sequence[list[int]]) -> None:
        """Raises ValueError for a prompt that leaves no room for what is to be written."""
        room = self.max_length - self.config.max_tokens
        longest = max(map(len, prompts), default=0)
        if longest > room:
            raise ValueError(
                f"a document makes a prompt of {longest} tokens, but model.max_length={self.max_length} "
                f"leaves {room} beside self_study.max_tokens={self.config.max_tokens}; "
                "raise model.max_length or split the document"
            )

    def write(
        self, prompts: Sequence[list[int]], temperature: float | None = None
    ) -> list[Completion]:
        self.require_room(prompts)
        heat = self.config.temperature if temperature is None else temperature
        sampling = [
            Sampling(self.config.max_tokens, heat, _mix(self.seed, self.written + i))
            for i in range(len(prompts))
        ]
        completions = self.fleet.generate(prompts, sampling)
        self.written += len(prompts)
        self.malformed += sum(c.finish_reason != "stop" for c in completions)
        return completions

    def hold_out(self, texts: Sequence[str], share: float) -> set[str]:
        return set(random.Random(f"{self.seed}-held").sample(texts, int(share * len(texts))))

    def parsed(self, completion: Completion) -> tuple[str, str] | None:
        if completion.finish_reason != "stop":
            return None
        pair = parse_qa(self.chat.decode(completion.token_ids))
        self.malformed += pair is None
        return pair


def _trajectory(
    purpose: Literal["self_study", "replay"],
    task: str,
    attempt: int,
    prompt: list[int],
    completion: Completion,
    teacher_prompt: list[int] | None,
) -> Trajectory:
    return Trajectory(
        uid=f"{purpose}-{task}-{attempt}",
        task_id=task,
        attempt=attempt,
        purpose=purpose,
        prompt_ids=prompt,
        response_ids=completion.token_ids,
        logprobs=completion.logprobs,
        versions=completion.versions,
        finish_reason=completion.finish_reason,
        teacher_prompt_ids=teacher_prompt,
    )


def _mix(seed: int, number: int) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed}-{number}".encode(), digest_size=4).digest(), "big"
    )
