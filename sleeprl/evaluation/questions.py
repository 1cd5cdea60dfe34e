"""Questions with known answers, and how answers are graded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sleeprl.text.normalise import normalise
from sleeprl.utils.files import read_record, write_json_atomic

_WORD = re.compile(r"\w+")
_FIRST = re.compile(r"(?<=[.!?])\s")
_DENIAL = re.compile(r"\b(?:not|never)\b|n['’]t\b", re.IGNORECASE)
_WHOLE = re.compile(r"[.!?][\"')]*$")
RETENTION = "retention"
"""Kind of the questions about what the model knew before the night."""


@dataclass(frozen=True)
class Question:
    """A question with a known answer."""

    question: str
    answer: str
    kind: str
    """Key of its metric."""
    experience: str | None = None
    """The document that answers it, for the prompt with context."""


@dataclass(frozen=True)
class Day:
    """The subject of a night."""

    documents: list[str]
    """The documents of the day."""
    probes: list[Question]
    """The questions."""
    texts: list[str] = field(default_factory=list)
    """Held-out texts for the perplexity."""
    answering: str = ""
    """User message that the texts answer; empty where they have no turn before them."""

    def of_kind(self, kind: str) -> list[Question]:
        """Select the questions of one metric."""
        return [probe for probe in self.probes if probe.kind == kind]

    def counts(self) -> dict[str, int]:
        """Count the documents, the retention questions and the held-out texts."""
        old = len(self.of_kind(RETENTION))
        return {"documents": len(self.documents), "retention": old, "texts": len(self.texts)}

    def save(self, path: Path) -> None:
        """Write the day as JSON."""
        write_json_atomic(path, asdict(self))

    @staticmethod
    def load(path: Path) -> Day:
        """Read what ``save`` wrote."""
        return read_record(
            path,
            lambda values: Day(
                **{**values, "probes": [Question(**each) for each in values["probes"]]}
            ),
        )


def is_correct(answer: str, gold: str, rivals: Collection[str] = (), question: str = "") -> bool:
    """Decide whether an answer contains the gold words and says little else.

    The gold words must occur as they are, in one piece. Allowed are at most four more words that
    are not the question's, no negation unless the gold answer has one, and no rival: an answer that
    lists everything is a guess.

    Args:
        answer: What the model answered.
        gold: The right answer.
        rivals: Single words that would be another answer.
        question: The question; an answer may repeat its words.
    """
    words, wanted = normalise(answer).split(), normalise(gold).split()
    others = set(words) - set(wanted)
    repeated = set(normalise(question).split()) - set(wanted)
    own = [word for word in words if word not in repeated]
    if not wanted or len(own) > len(wanted) + 4 or others & {*rivals}:
        return False
    if _DENIAL.search(answer) and not _DENIAL.search(gold):
        return False
    spans = range(len(words) - len(wanted) + 1)
    return any(words[i : i + len(wanted)] == wanted for i in spans)


def read_questions(path: Path, kinds: Collection[str]) -> list[Question]:
    """Read a user's questions: JSONL of ``{question, answer, kind?, experience?}``.

    Args:
        path: The file.
        kinds: Keys of the metrics that a question may count for; without a kind it is ``recall``.

    Raises:
        ValueError: A line is no question; the message names it and a fix.
    """
    questions = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, answer = row["question"], row["answer"]
            if isinstance(answer, int | float) and not isinstance(answer, bool):
                answer = str(answer)
            if not (isinstance(text, str) and isinstance(answer, str)):
                raise TypeError("question and answer must be text")
            question = Question(text, answer, row.get("kind", "recall"), row.get("experience"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: not a question; write {{"question": ..., "answer": ...}} ({error!r})'
            ) from None
        if question.kind not in kinds:
            raise ValueError(
                f"{path}:{number}: kind={question.kind!r} must be one of {', '.join(kinds)}"
            )
        questions.append(question)
    return questions


def first_sentence(text: str) -> str:
    """Return the first sentence; chat models tend to continue after the answer."""
    return _FIRST.split(text)[0]


def extract_answer(answer: str, question: str) -> str:
    """Return the words of an answer that are not the question's, if they form one piece; else all of it.

    For example "Mercury" from "The closest planet to Earth is Mercury".

    Args:
        answer: What the model answered.
        question: The question.
    """
    repeated = {*normalise(question).split()}
    words = list(_WORD.finditer(answer))
    own = [place for place, word in enumerate(words) if word[0].lower() not in repeated]
    together = own and own[-1] - own[0] + 1 == len(own)
    return answer[words[own[0]].start() : words[own[-1]].end()] if together else answer


def is_whole(sentence: str) -> bool:
    """Decide whether a text ends like a sentence."""
    return bool(_WHOLE.search(sentence))


def grade(answers: Sequence[str], questions: Sequence[Question]) -> list[bool]:
    """Decide which answers are right, as a whole or in their first sentence.

    Args:
        answers: One answer per question.
        questions: The questions.

    Returns:
        A verdict per question.
    """
    return [
        any(is_correct(text, q.answer, question=q.question) for text in (a, first_sentence(a)))
        for a, q in zip(answers, questions, strict=True)
    ]
