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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sleeprl.actors.engine import Completion, Sampling
from sleeprl.actors.fleet import Fleet
from sleeprl.chat import Chat
from sleeprl.config import SelfStudyConfig
from sleeprl.files import write_json_atomic
from sleeprl.prompts import FREE_FACT, FREE_QA, STUDY_FACT, STUDY_QA, parse_qa, with_experience
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
    own_knowledge: list[Pair] = field(default_factory=list)
    """What the smaller self asks and answers freely (document -1)."""
    written: int = 0
    """Texts sampled in all."""
    malformed: int = 0
    """Texts that were not whole, or not of the form asked for."""

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
) -> Study:
    """Sample both streams from the engines, which must hold the smaller self's weights."""
    writer = _Writer(fleet, chat, config, seed, max_length)
    result = Study([])
    _new(writer, documents, result)
    _replay(writer, result)
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
    _recollect(writer, result)
    _replay(writer, result)
    result.written, result.malformed = writer.written, writer.malformed
    return result


def _recollect(writer: _Writer, result: Study) -> None:
    chat = writer.chat
    prompt = chat.prompt(FREE_FACT)
    # At temperature 1, as free questions are: the wider they spread, the more is handed on.
    stated = writer.write([prompt] * (writer.config.replay // 2), temperature=1.0)
    facts: dict[str, Completion] = {}
    for fact in stated:
        if fact.finish_reason == "stop":
            facts.setdefault(chat.decode(fact.token_ids), fact)
    for index, fact in enumerate(facts.values()):
        result.trajectories.append(_trajectory("self_study", "fact", index, prompt, fact, None))
    asked = writer.write([chat.prompt(with_experience(fact, STUDY_QA)) for fact in facts])
    pairs = [pair for completion in asked if (pair := writer.parsed(completion))]
    prompts = [
        chat.prompt(question) for question in dict.fromkeys(question for question, _ in pairs)
    ]
    for index, (bare, answer) in enumerate(zip(prompts, writer.write(prompts), strict=True)):
        if answer.finish_reason == "stop":
            result.trajectories.append(
                _trajectory("self_study", "answer", index, bare, answer, None)
            )


def _new(writer: _Writer, documents: Sequence[str], result: Study) -> None:
    config, chat = writer.config, writer.chat
    numbers = range(len(documents))
    asked = [n for n in numbers for _ in range(config.pairs_per_document)]
    texts = writer.write([chat.prompt(with_experience(documents[n], STUDY_QA)) for n in asked])
    seen: set[tuple[int, str]] = set()
    questions: list[tuple[int, str]] = []
    for n, completion in zip(asked, texts, strict=True):
        pair = writer.parsed(completion)
        if pair and (n, pair[0]) not in seen:
            seen.add((n, pair[0]))
            questions.append((n, pair[0]))
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
    stated = [n for n in numbers for _ in range(config.facts_per_document)]
    teacher_prompts = [chat.prompt(with_experience(documents[n], STUDY_FACT)) for n in stated]
    facts = writer.write(teacher_prompts)
    student_prompt = chat.prompt(FREE_FACT)
    for index, (n, prompt, fact) in enumerate(zip(stated, teacher_prompts, facts, strict=True)):
        if fact.finish_reason == "stop":
            result.trajectories.append(
                _trajectory("self_study", f"fact-{n}", index, student_prompt, fact, prompt)
            )


def _replay(writer: _Writer, result: Study) -> None:
    """Free questions, each answered again on its own; for every four of them a free fact, and
    one pair as it was written.

    What was known is asked in questions, so answers are what is rehearsed most. Of the pairs, a
    few keep the skill of asking itself, which the next night needs.
    """
    chat, count = writer.chat, writer.config.replay
    asked, stated = chat.prompt(FREE_QA), chat.prompt(FREE_FACT)
    questions = []
    # Asked at temperature 1: the wider the questions spread, the more of the old is kept.
    for index, completion in enumerate(writer.write([asked] * count, temperature=1.0)):
        pair = writer.parsed(completion)
        if pair:
            questions.append(pair[0])
            if index % 4 == 0:
                result.trajectories.append(
                    _trajectory("replay", "pair", index, asked, completion, None)
                )
    # The same question twice would teach nothing more; another one keeps more of the old.
    questions = list(dict.fromkeys(questions))
    prompts = [chat.prompt(question) for question in questions]
    answers = writer.write(prompts)
    for index, (question, prompt, answer) in enumerate(
        zip(questions, prompts, answers, strict=True)
    ):
        if answer.finish_reason == "stop":
            result.own_knowledge.append(Pair(-1, question, chat.decode(answer.token_ids)))
            result.trajectories.append(_trajectory("replay", "answer", index, prompt, answer, None))
    for index, fact in enumerate(writer.write([stated] * (count // 4))):
        if fact.finish_reason == "stop":
            result.trajectories.append(_trajectory("replay", "fact", index, stated, fact, None))


class _Writer:
    """Samples with a seed of its own for every text, so a study repeats."""

    def __init__(
        self, fleet: Fleet, chat: Chat, config: SelfStudyConfig, seed: int, max_length: int
    ) -> None:
        self.fleet, self.chat, self.config, self.seed = fleet, chat, config, seed
        self.max_length = max_length
        self.written = self.malformed = 0

    def write(
        self, prompts: Sequence[list[int]], temperature: float | None = None
    ) -> list[Completion]:
        room = self.max_length - self.config.max_tokens
        longest = max(map(len, prompts), default=0)
        if longest > room:
            raise ValueError(
                f"a document makes a prompt of {longest} tokens, but model.max_length={self.max_length} "
                f"leaves {room} beside self_study.max_tokens={self.config.max_tokens}; "
                "raise model.max_length or split the document"
            )
        heat = self.config.temperature if temperature is None else temperature
        sampling = [
            Sampling(self.config.max_tokens, heat, _mix(self.seed, self.written + i))
            for i in range(len(prompts))
        ]
        completions = self.fleet.generate(prompts, sampling)
        self.written += len(prompts)
        self.malformed += sum(c.finish_reason != "stop" for c in completions)
        return completions

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
