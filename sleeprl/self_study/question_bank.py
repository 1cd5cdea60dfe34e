"""The questions that a model has asked itself, kept with its generation from night to night.

Free questions drift: a question that was rehearsed in one night comes up more often in the next, and
what is never asked again is forgotten. So the questions of earlier nights are asked again, in turn, and
the smaller self of the night answers them. No text of the day is kept, and no answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path

from sleeprl.memory.checkpoint import QUESTIONS
from sleeprl.utils.files import write_json_atomic


def load(directory: Path) -> list[str]:
    """Return the questions, those to ask first in front; none of a model that has not slept."""
    path = directory / QUESTIONS
    return list(json.loads(path.read_text())) if path.is_file() else []


def save(questions: Sequence[str], directory: Path) -> None:
    """Write the questions beside a model."""
    write_json_atomic(directory / QUESTIONS, list(questions))


def rotate(
    bank: Sequence[str], new: Sequence[str], rehearsed: Collection[str], limit: int, seed: int
) -> list[str]:
    """Return the question bank after a night.

    What was learned in it comes first, being the least settled, then what has not been asked for longest.

    Args:
        bank: The questions before the night.
        new: What was asked about the day.
        rehearsed: What was asked of the bank, and freely.
        limit: How many there may be; chance decides what is dropped.
        seed: Of that choice.
    """
    waiting = [question for question in bank if question not in rehearsed]
    questions = list(dict.fromkeys([*new, *waiting, *rehearsed]))
    if len(questions) <= limit:
        return questions
    stay = sorted(random.Random(f"{seed}-notebook").sample(range(len(questions)), limit))
    return [questions[index] for index in stay]
