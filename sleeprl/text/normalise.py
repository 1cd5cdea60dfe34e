"""Normalises short answers for comparison."""

from __future__ import annotations

import re


def normalise(text: str) -> str:
    """Reduce a text to its words and digits in lower case, for comparison."""
    return " ".join(re.findall(r"\w+", text.lower()))
