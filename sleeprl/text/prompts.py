"""Every instruction that sleepRL ever gives to a model, in one place.

The self that reads has the experience in front of its question; the self that
must remember has the bare question. Both see the *same* question text, which
is what makes the first a teacher of the second (method: teacher and student
contexts). All templates are plain user messages: the model's own chat template
turns them into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

# --- with the experience in the prompt (the teacher, the dream writer) ------------
STUDY_QA = "Write a question about this text, then its answer."
STUDY_FACT = "Write one fact from this text."
STUDY_PARAPHRASE = "Say this in other words: {sentence}"

# --- with nothing in the prompt (what the smaller self writes freely) -------------
FREE_QA = "Write a question about something you know, then its answer."
FREE_FACT = "Write one fact that you know."

# --- the judge of an imitation (the smaller self, asked about two texts) --------------
SAME_MEANING = "First: {first}\nSecond: {second}\nDo both mean the same? Answer yes or no."
YES, NO = "yes", "no"

# --- how it is done, for a model that was not trained to write pairs -------------------
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
    """The user message of the self that has the experience in its context."""
    text = experience if isinstance(experience, str) else "\n\n".join(experience)
    return f"{text.strip()}\n\n{instruction}"


def examples(count: int, *, free: bool) -> list[tuple[str, str]]:
    """The first ``count`` worked examples of a pair, as (user, assistant) messages.

    free: with nothing to read, as the answer to ``FREE_QA``; else to ``STUDY_QA``.
    """
    if free:
        return [(FREE_QA, format_qa(*pair)) for pair in _KNOWN[:count]]
    return [
        (with_experience(text, STUDY_QA), format_qa(question, answer))
        for text, question, answer in _READ[:count]
    ]


def format_qa(question: str, answer: str) -> str:
    """The form in which a model writes a question-answer pair."""
    return f"{QUESTION_MARK} {question}\n{ANSWER_MARK} {answer}"


def parse_qa(text: str) -> tuple[str, str] | None:
    """Read back ``format_qa``, whole or from behind its first mark; None for anything else."""
    head, mark, answer = text.strip().removeprefix(QUESTION_MARK).partition(ANSWER_MARK)
    question, answer = head.strip(), answer.strip().split("\n")[0].strip()
    if not (mark and question and answer) or QUESTION_MARK in question:
        return None
    return question, answer
