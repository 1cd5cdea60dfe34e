"""The question bank: questions that the model has asked itself, stored with its generation between nights.

Free sampling of questions drifts: a question rehearsed in one night becomes more frequent in the
next, and a question that is never sampled again is forgotten. So the questions of earlier nights
are asked again in turn, and the smaller self of the current night answers them. The bank has
neither texts of the day nor answers.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from pathlib import Path

from sleeprl.memory.checkpoint import QUESTIONS
from sleeprl.utils.files import read_record, write_json_atomic


def load(directory: Path) -> list[str]:
    """Read the questions, the next to ask first; an empty list for a model without a question bank."""
    path = directory / QUESTIONS
    return read_record(path, list) if path.is_file() else []


def save(questions: Sequence[str], directory: Path) -> None:
    """Write the questions to a model's directory."""
    write_json_atomic(directory / QUESTIONS, list(questions))


def rotate(
    bank: Sequence[str], new: Sequence[str], rehearsed: Collection[str], limit: int, seed: int
) -> list[str]:
    """Return the question bank after a night, the next question to ask first.

    Questions about the day come first, because they are the least consolidated. Then come those
    that have waited longest.

    Args:
        bank: Questions before the night.
        new: Questions about the day.
        rehearsed: Questions rehearsed in this night, from the bank or sampled freely.
        limit: Maximum number of questions. A random sample remains if there are more.
        seed: Seed of that sample.
    """
    waiting = [question for question in bank if question not in rehearsed]
    questions = list(dict.fromkeys([*new, *waiting, *rehearsed]))
    if len(questions) <= limit:
        return questions
    stay = sorted(random.Random(f"{seed}-notebook").sample(range(len(questions)), limit))
    return [questions[index] for index in stay]
