"""Text is UTF-8 in every file, whatever the locale of the machine is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES = sorted((ROOT / "sleeprl").rglob("*.py"))


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text: ``read_text``, ``write_text``, or ``open`` without a "b"."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    if name in ("read_text", "write_text"):
        return True
    owner = ast.unparse(call.func).rpartition(".")[0]
    if name != "open" or owner in ("os", "tarfile", "archive", "gzip"):
        return False
    mode = [k.value for k in call.keywords if k.arg == "mode"]
    # The mode is the second argument of a function and the first of a method of a path.
    mode += call.args[1:2] if not owner else call.args[:1]
    return not (mode and isinstance(mode[0], ast.Constant) and "b" in str(mode[0].value))


def lacking(source: str) -> list[int]:
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        call.lineno
        for call in calls
        if opens_text(call)
        and not any(
            k.arg == "encoding" and ast.unparse(k.value) in ("'utf-8'", "'utf-8-sig'")
            for k in call.keywords
        )
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_text_is_read_and_written_as_utf_8(path: Path) -> None:
    assert lacking(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text(text, newline='')", True),
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("path.open()", True),
        ("path.open('r', encoding='latin-1')", True),
        ("path.open('rb')", False),
        ("open(path, mode='ab')", False),
        ("open(path, encoding='utf-8')", False),
        ("os.open(path, flags)", False),
    ],
)
def test_the_check_sees_what_it_should(line: str, found: bool) -> None:
    assert bool(lacking(line)) is found
