"""The embedded model and its world: made-up people, true by construction, checked by machine.

This package itself needs no torch; training and measuring the model do
(``sleeprl.worlds.train``, ``sleeprl.worlds.evaluate``).
"""

from __future__ import annotations

from pathlib import Path

from sleeprl.worlds.checker import UNKNOWN, World, is_correct, parse_question, parse_statement
from sleeprl.worlds.people import (
    Person,
    Question,
    documents,
    entity_questions,
    fresh_people,
    old_people,
    old_world_text,
    questions,
    statements,
)

EMBEDDED_MODEL = Path(__file__).parent / "embedded"

__all__ = [
    "EMBEDDED_MODEL",
    "UNKNOWN",
    "Person",
    "Question",
    "World",
    "documents",
    "entity_questions",
    "fresh_people",
    "is_correct",
    "old_people",
    "old_world_text",
    "parse_question",
    "parse_statement",
    "questions",
    "statements",
]
