"""The questions that a model has asked itself, kept with its generation from night to night.

What is asked freely drifts: what was rehearsed in one night is asked more often in the next, and
what is asked no more is forgotten. So what an earlier self asked is asked again, in turn, and
answered by the smaller self of the night. No text of the day is kept, and no answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path

from sleeprl.memory.checkpoint import QUESTIONS
from sleeprl.utils.files import write_json_atomic


def load(directory: Path) -> list[str]:
    """Those to ask first come first; none of a model that has not slept."""
    path = directory / QUESTIONS
    return list(json.loads(path.read_text())) if path.is_file() else []


def save(questions: Sequence[str], directory: Path) -> None:
    write_json_atomic(directory / QUESTIONS, list(questions))


def rotate(
    kept: Sequence[str], new: Sequence[str], rehearsed: Collection[str], limit: int, seed: int
) -> list[str]:
    """The notebook after a night: what was learned in it comes first, being the least settled, then
    what has not been asked for longest. Of more than ``limit``, chance decides what is dropped.

    kept: the notebook before. new: what was asked about the day. rehearsed: of ``kept``, and freely.
    """
    waiting = [question for question in kept if question not in rehearsed]
    found = list(dict.fromkeys([*new, *waiting, *rehearsed]))
    if len(found) <= limit:
        return found
    stay = sorted(random.Random(f"{seed}-notebook").sample(range(len(found)), limit))
    return [found[index] for index in stay]
