"""Every instruction that sleepRL gives to a model.

The teacher has the experience in front of its question; the student has the bare question. Both get
the *same* question text, which is what makes the first a teacher of the second. All templates are plain user
messages: the model's own chat template turns them into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

# --- with the experience in the prompt (the teacher, the dream writer) ------------
STUDY_QA = "Write a question about this text, then its answer."
STUDY_FACT = "Write one fact from this text."
STUDY_PARAPHRASE = "Say this in other words: {sentence}"

# --- without context (what the smaller self writes freely) -------------
FREE_QA = "Write a question about something you know, then its answer."
FREE_FACT = "Write one fact that you know."

# --- the judge of an imitation (the smaller self compares two texts) --------------
SAME_MEANING = "First: {first}\nSecond: {second}\nDo both mean the same? Answer yes or no."
YES, NO = "yes", "no"

# --- worked examples, for a model that is not trained to write pairs -------------------
_READ = (
    ("Rosa Lind lives in Oslo. She is a nurse.", "Where does Rosa Lind live?", "Oslo."),
    ("Emil Hart has a parrot and plays chess.", "What pet does Emil Hart have?", "A parrot."),
    ("The mill was built in 1871 by Jan Brook.", "When was the mill built?", "In 1871."),
    ("Mira Sol works for Halden as a baker.", "Who is the employer of Mira Sol?", "Halden."),
)
_KNOWN = (
    ("What is the capital of France?", "Paris."),
    ("Who wrote Hamlet?", "William Shakespeare."),
    ("What do bees make?", "Honey."),
    ("How many days does a week have?", "Seven."),
)
EXAMPLES = len(_READ)

QUESTION_MARK, ANSWER_MARK = "Question:", "Answer:"


def with_experience(experience: str | Sequence[str], instruction: str) -> str:
    """Build the user message of the teacher: the experience, then an instruction.

    Args:
        experience: One text, or several.
        instruction: The instruction or question.
    """
    text = experience if isinstance(experience, str) else "\n\n".join(experience)
    return f"{text.strip()}\n\n{instruction}"


def examples(count: int, *, free: bool) -> list[tuple[str, str]]:
    """Return worked examples of a pair, as (user, assistant) messages.

    Args:
        count: How many, at most ``EXAMPLES``.
        free: Without a text to read, in answer to ``FREE_QA``; else in answer to ``STUDY_QA``.
    """
    if free:
        return [(FREE_QA, format_qa(*pair)) for pair in _KNOWN[:count]]
    return [
        (with_experience(text, STUDY_QA), format_qa(question, answer))
        for text, question, answer in _READ[:count]
    ]


def format_qa(question: str, answer: str) -> str:
    """Format a question-answer pair the way a model writes it."""
    return f"{QUESTION_MARK} {question}\n{ANSWER_MARK} {answer}"


def parse_qa(text: str) -> tuple[str, str] | None:
    """Parse a pair in the form of ``format_qa``, with or without its first mark.

    Returns:
        Question and answer; None for a malformed text.
    """
    head, mark, answer = text.strip().removeprefix(QUESTION_MARK).partition(ANSWER_MARK)
    question, answer = head.strip(), answer.strip().split("\n")[0].strip()
    if not (mark and question and answer) or QUESTION_MARK in question:
        return None
    return question, answer
