"""The language of the code: words that name nothing are not names, and not in what is written about them.

A function is a verb and its object, a value is what it holds. Where the field has a word, it is used.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

FOLDERS = ("sleeprl", "benchmarks", "tuning", "examples", "tools", "docs/hooks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Whole names of functions, classes, attributes, parameters and variables.
NAMES = {
    "anew", "asked", "asks", "begun", "held", "holds", "judged", "kept", "meant", "mend", "mended", "mender",
    "mending", "outdated", "said", "says", "shown", "taught", "teaches", "tell", "tells", "told", "under_way",
    "whom", "wrote",
}  # fmt: skip
# Whole words of docstrings and comments.
WORDS = {"anew", "begun", "mend", "mendable", "mended", "mender", "mending", "told", "whom"}


def find_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a file gives: its line, and the name without leading underscores."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def find_texts(source: str) -> Iterator[tuple[int, str]]:
    """Every comment and every docstring of a file, also those under fields, with its line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{line}"


def test_a_name_says_what_it_is() -> None:
    found = [
        f"{place(path, line)} {name}"
        for path in FILES
        for line, name in find_names(ast.parse(path.read_text()))
        if name.strip("_").lower() in NAMES
    ]
    assert not found, "\n".join(found)


def test_comments_and_docstrings_are_in_plain_english() -> None:
    found = [
        f"{place(path, line)} {word}"
        for path in FILES
        for line, text in find_texts(path.read_text())
        for word in re.findall(r"[a-z]+", text.lower())
        if word in WORDS
    ]
    assert not found, "\n".join(found)
