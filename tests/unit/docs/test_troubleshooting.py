"""Every message on the page of troubles is one that the program can give."""

from __future__ import annotations

import ast
import os
import re
from functools import cache

import pytest

from sleeprl.cluster.failures import _WAYS_OUT
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/how-to/troubleshooting.md").read_text(encoding="utf-8")
FROM_OTHERS = {"InvalidAuthToken"}
ENTRIES = [
    quoted
    for heading in re.findall(r"^(\*\*`.*)\n:", PAGE, re.MULTILINE)
    for quoted in re.findall(r"`([^`]+)`\*\*|\*\*`([^`]+)`|/ `([^`]+)`", heading)
]
MESSAGES = sorted({text for groups in ENTRIES for text in groups if text} - FROM_OTHERS)


@cache
def program() -> str:
    """All texts of the program, one per line; where a value is put in there is a …."""
    texts = [os.strerror(number) for number in _WAYS_OUT]
    for path in (ROOT / "sleeprl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    files = [ROOT / "Makefile", *(ROOT / "tools").rglob("*")]
    texts += [path.read_text(errors="replace") for path in files if path.is_file()]
    return "\n".join(text.replace("\n", " ").replace("`", "") for text in texts)


def occurs(message: str) -> bool:
    """Return whether the program has a text with the message's words, whatever values are in them."""
    words = re.split(r"…|[\d.,]+(?= cores)|(?<== )\d+|(?<=are )\d+|'[^']*'|(?<==)\d+", message)
    wanted = [re.escape(part.strip()) for part in words if len(part.strip()) > 3]
    return bool(wanted) and re.search(r"[^\n]*".join(wanted), program()) is not None


def test_the_page_has_entries() -> None:
    assert len(MESSAGES) > 35
    assert not occurs("… a message that nobody gives …")


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_has_the_message(message: str) -> None:
    assert occurs(message)
