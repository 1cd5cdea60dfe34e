"""Questions with known answers: the user's file, and the answers to them graded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sleeprl.data.records import RecordError, read_records
from sleeprl.evaluation.grading import is_correct
from sleeprl.text.normalise import has_word, normalise
from sleeprl.utils.files import read_record, write_json_atomic

_WORD = re.compile(r"\w+")
_FIRST = re.compile(r"(?<=[.!?])\s|(?<=[。！？])")
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
    alternatives: tuple[str, ...] = ()
    """Other answers that are right too."""

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer, *self.alternatives)


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
        return read_record(path, _day_from_json)


def _day_from_json(values: dict[str, Any]) -> Day:
    probes = [
        Question(**{**each, "alternatives": tuple(each.get("alternatives", ()))})
        for each in values["probes"]
    ]
    return Day(**{**values, "probes": probes})


# --- a file of questions ----------------------------------------------------------
_FIELDS = ("question", "answer", "answers", "kind", "experience")
_OTHERS = ("context", "id", "title", "metadata")
"""SQuAD's fields, of which the first is the experience, and a place for notes; these are not used."""


def read_questions(path: Path, kinds: Collection[str]) -> list[Question]:
    """Read a user's questions: JSONL of ``{question, answer, kind?, experience?}``.

    Several right answers are a list, in ``answer`` or in ``answers`` (also in SQuAD's form).

    Args:
        path: The file.
        kinds: Keys of the metrics that a question may count for; without a kind it is ``recall``.

    Raises:
        ValueError: A line is no question, or there is none; the message names it and a fix.
    """
    try:
        if not path.is_file():
            raise RecordError(
                f"evaluation.questions={str(path)!r} is no file; give a JSONL file of questions"
            )
    except OSError as error:
        raise RecordError(
            f"evaluation.questions={str(path)!r:.80}: {error.strerror}; give a JSONL file"
        ) from None
    found = []
    for place, row in read_records(path, ".json" if path.suffix.lower() == ".json" else ".jsonl"):
        try:
            found.append(_question(row, kinds))
        except ValueError as error:
            raise RecordError(f"{place}: {error}") from None
    if not found:
        raise RecordError(
            f"{path}: no question in it; write lines like "
            '{"question": "...", "answer": "..."}, or leave out evaluation.questions'
        )
    return found


def _question(row: Any, kinds: Collection[str]) -> Question:
    """Make a question of one record.

    Raises:
        ValueError: A field is missing, unknown, or of another kind than it has to be.
    """
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(
            f'not a question but a {type(row).__name__}; write {{"question": ..., "answer": ...}}'
        )
    row = {key: value for key, value in row.items() if value is not None}
    for key in row:
        if key not in _FIELDS and key not in _OTHERS:
            near = difflib.get_close_matches(key.lower(), _FIELDS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown field {key!r:.40}; {hint}Known are {', '.join(_FIELDS)}; notes of your "
                "own go into 'metadata'"
            )
    if "question" not in row:
        raise ValueError("the field 'question' is missing or null; add it")
    kind = row.get("kind", "recall")
    if kind not in kinds:
        raise ValueError(f"kind={kind!r:.40} must be one of {', '.join(kinds)}")
    experience = row.get("experience", row.get("context"))
    if experience is not None:
        experience = _checked_text(experience, "experience")
    answer, *others = dict.fromkeys(_answers(row))
    text = _checked_text(row["question"], "question")
    return Question(text, answer, kind, experience, tuple(others))


def _answers(row: dict[str, Any]) -> list[str]:
    """Return all right answers of a record."""
    given: list[Any] = []
    for key in ("answer", "answers"):
        value = row.get(key, [])
        if isinstance(value, dict) and "text" in value:  # SQuAD's form
            value = value["text"]
        given += value if isinstance(value, list) else [value]
    if not given:
        raise ValueError(
            "the field 'answer' is missing or null, so nothing can be right; add it, or remove the question"
        )
    texts = [_number(value) for value in given]
    found = [_checked_text(text, "answer") for text in texts]
    for text in found:
        if not has_word(text):
            raise ValueError(
                f"answer={text!r:.40} has neither a letter nor a digit, so nothing can be right; mend it"
            )
    return found


def _number(value: Any) -> Any:
    """Return a number as text; another value as it is."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _checked_text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field}={value!r:.40} must be text that is not empty; mend it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} has half a surrogate pair at character {error.start}; remove it"
        ) from None
    return value


# --- answers ----------------------------------------------------------------------


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
        any(is_correct(text, q.answers, question=q.question) for text in (a, first_sentence(a)))
        for a, q in zip(answers, questions, strict=True)
    ]
