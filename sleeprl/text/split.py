"""Splits long texts at sentences, with overlap."""

from __future__ import annotations

import re
from collections.abc import Callable

_ENDS = re.compile(
    r"(?<=[.!?…]\s)|(?<=[.!?…][\"')\]”’»]\s)|(?<=[。！？।\n])",
)
"""Behind a sentence, with the white space after it, and behind a line."""
_OVERLAP, _LONGEST_OVERLAP = 8, 3
"""Parts share an eighth of the room, or one sentence that is at most a third of it."""


def split_text(text: str, room: int, length: Callable[[str], int]) -> list[str]:
    """Split a text into parts that fit, in their order.

    A part ends at the end of a sentence, and the next one begins some sentences before that. A
    sentence that does not fit by itself is split at words, and a word at characters.

    Args:
        text: The text.
        room: The longest part.
        length: Measures a text, in the unit of ``room``, for example in tokens.
    """
    pieces = [short for piece in _ENDS.split(text) for short in _shorten(piece, room, length)]
    sizes = [length(piece) for piece in pieces]
    parts: list[str] = []
    start = 0
    while start < len(pieces):
        end, used = start, 0
        while end < len(pieces) and (end == start or used + sizes[end] <= room):
            used += sizes[end]
            end += 1
        if part := "".join(pieces[start:end]).strip():
            parts.append(part)
        if end == len(pieces):
            break
        start = _step_back(sizes, start, end, room)
    return parts


def _step_back(sizes: list[int], start: int, end: int, room: int) -> int:
    """Return where the part after ``start:end`` begins, so that it shares sentences with it."""
    wanted = max(room // _OVERLAP, min(sizes[end - 1], room // _LONGEST_OVERLAP))
    most = min(wanted, room - sizes[end])
    begin, shared = end, 0
    while begin - 1 > start and shared + sizes[begin - 1] <= most:
        begin -= 1
        shared += sizes[begin]
    return begin


def _shorten(piece: str, room: int, length: Callable[[str], int]) -> list[str]:
    """Cut a sentence that does not fit in the middle, at a space if there is one, until it fits."""
    if len(piece) < 2 or length(piece) <= room:
        return [piece] if piece else []
    middle = len(piece) // 2
    spaces = [found.end() for found in re.finditer(r"\s+", piece) if 0 < found.end() < len(piece)]
    cut = min(spaces, key=lambda place: abs(place - middle)) if spaces else middle
    return [*_shorten(piece[:cut], room, length), *_shorten(piece[cut:], room, length)]
