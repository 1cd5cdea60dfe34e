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

QUESTION_MARK, ANSWER_MARK = "Question:", "Answer:"


def with_experience(experience: str | Sequence[str], instruction: str) -> str:
    """The user message of the self that has the experience in its context."""
    text = experience if isinstance(experience, str) else "\n\n".join(experience)
    return f"{text.strip()}\n\n{instruction}"


def format_qa(question: str, answer: str) -> str:
    """The form in which a model writes a question-answer pair."""
    return f"{QUESTION_MARK} {question}\n{ANSWER_MARK} {answer}"


def parse_qa(text: str) -> tuple[str, str] | None:
    """Read back ``format_qa``; None when the text is not one whole pair."""
    head, mark, answer = text.partition(ANSWER_MARK)
    before, qmark, question = head.partition(QUESTION_MARK)
    question, answer = question.strip(), answer.strip().split("\n")[0].strip()
    if not (mark and qmark and question and answer) or before.strip():
        return None
    return question, answer
