"""Questions with known answers, and how an answer is graded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sleeprl.text.normalise import normalise
from sleeprl.utils.files import write_json_atomic

_WORD = re.compile(r"\w+")
_FIRST = re.compile(r"(?<=[.!?])\s")
_DENIAL = re.compile(r"\b(?:not|never)\b|n['’]t\b", re.IGNORECASE)
_WHOLE = re.compile(r"[.!?][\"')]*$")
KINDS = ("recall", "two_hop", "retention")


@dataclass(frozen=True)
class Question:
    """One question. experience: the document that answers it, for the self that may read it."""

    question: str
    answer: str
    kind: str
    experience: str | None = None


@dataclass(frozen=True)
class Day:
    """What a night is about: the documents met, the questions asked, and held-out texts.

    answering: the message that the texts are answers to; they stand alone where it is empty.
    """

    documents: list[str]
    probes: list[Question]
    texts: list[str] = field(default_factory=list)
    answering: str = ""

    def of_kind(self, kind: str) -> list[Question]:
        return [probe for probe in self.probes if probe.kind == kind]

    def counts(self) -> dict[str, int]:
        """How many documents, old questions, and held-out texts there are."""
        old = len(self.of_kind("retention"))
        return {"documents": len(self.documents), "retention": old, "texts": len(self.texts)}

    def save(self, path: Path) -> None:
        write_json_atomic(path, asdict(self))

    @staticmethod
    def load(path: Path) -> Day:
        values = json.loads(path.read_text())
        return Day(**{**values, "probes": [Question(**p) for p in values["probes"]]})


def is_correct(answer: str, gold: str, rivals: Collection[str] = (), question: str = "") -> bool:
    """Whether the gold words stand in the answer as they are, and it says little else.

    At most four more words that are not the question's, no denial that the gold words have not, and
    none of ``rivals`` (single words that would be another answer): what lists everything is a guess.
    """
    words, wanted = normalise(answer).split(), normalise(gold).split()
    others = set(words) - set(wanted)
    repeated = set(normalise(question).split()) - set(wanted)
    said = [word for word in words if word not in repeated]
    if not wanted or len(said) > len(wanted) + 4 or others & {*rivals}:
        return False
    if _DENIAL.search(answer) and not _DENIAL.search(gold):
        return False
    spans = range(len(words) - len(wanted) + 1)
    return any(words[i : i + len(wanted)] == wanted for i in spans)


def read_questions(path: Path) -> list[Question]:
    """Questions of one's own: JSONL of ``{question, answer, kind?, experience?}``."""
    probes = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row["question"], row["answer"]
            if isinstance(answer, int | float) and not isinstance(answer, bool):
                answer = str(answer)
            if not (isinstance(question, str) and isinstance(answer, str)):
                raise TypeError("question and answer must be text")
            probe = Question(question, answer, row.get("kind", "recall"), row.get("experience"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: not a question; write {{"question": ..., "answer": ...}} ({error!r})'
            ) from None
        if probe.kind not in KINDS:
            raise ValueError(
                f"{path}:{number}: kind={probe.kind!r} must be one of {', '.join(KINDS)}"
            )
        probes.append(probe)
    return probes


def first_sentence(text: str) -> str:
    """What a chat model answers, before it goes on talking."""
    return _FIRST.split(text)[0]


def told_by(answer: str, question: str) -> str:
    """What an answer says beside its question, where that stands together; else all of it.

    "Mercury" of "The closest planet to Earth is Mercury", however the rest may be put.
    """
    asked = {*normalise(question).split()}
    words = list(_WORD.finditer(answer))
    own = [place for place, word in enumerate(words) if word[0].lower() not in asked]
    together = own and own[-1] - own[0] + 1 == len(own)
    return answer[words[own[0]].start() : words[own[-1]].end()] if together else answer


def is_whole(sentence: str) -> bool:
    """Whether it ends as a sentence does."""
    return bool(_WHOLE.search(sentence))


def grade(answers: Sequence[str], probes: Sequence[Question]) -> list[bool]:
    """Of each answer as a whole, or of its first sentence: a chat model goes on talking."""
    return [
        any(is_correct(said, p.answer, question=p.question) for said in (a, first_sentence(a)))
        for a, p in zip(answers, probes, strict=True)
    ]
