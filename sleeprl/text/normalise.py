"""How two short answers are compared."""

from __future__ import annotations

import re


def normalise(text: str) -> str:
    """Lower case, words and digits only: how two short answers are compared."""
    return " ".join(re.findall(r"\w+", text.lower()))
