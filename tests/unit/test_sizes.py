"""How large a class and a function may get, where attributes come from, and no circle between files.

A function that has to be longer says why on its ``def`` line, ``# long: ...``; one with more
parameters says ``# parameters: ...``.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "sleeprl"
FILES = sorted(PACKAGE.rglob("*.py"))
CLASS_LINES, FUNCTION_LINES, PARAMETERS = 250, 60, 6

Function = ast.FunctionDef | ast.AsyncFunctionDef
EVERY_FILE = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix()
)


def find(path: Path, *kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Definitions of a file, each as ``room/file.py::Class.function``."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = f"{name}.{child.name}" if name else child.name
                if isinstance(child, kinds):
                    yield f"{path.relative_to(PACKAGE).as_posix()}::{inner}", child
            yield from walk(child, inner)

    return walk(ast.parse(path.read_text()), "")


def has_reason(path: Path, node: Function, word: str) -> bool:
    """Whether a comment between ``def`` and the body gives a reason."""
    lines = path.read_text().splitlines()[node.lineno - 1 : node.body[0].lineno]
    return any(re.search(rf"# (?:\S.* )?{word}: \w+", line) for line in lines)


def count_lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined, no-any-return]


@EVERY_FILE
def test_a_class_is_read_in_one_sitting(path: Path) -> None:
    for name, node in find(path, ast.ClassDef):
        lines = count_lines(node)
        assert lines <= CLASS_LINES, f"{name} has {lines} lines, more than {CLASS_LINES}"


@EVERY_FILE
def test_a_function_is_short(path: Path) -> None:
    for name, node in find(path, ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, Function)
        lines = count_lines(node)
        if not has_reason(path, node, "long"):
            assert lines <= FUNCTION_LINES, f"{name} has {lines} lines; or '# long: why'"


@EVERY_FILE
def test_a_function_has_few_parameters(path: Path) -> None:
    for name, node in find(path, ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, Function)
        given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([a for a in given if a not in ("self", "cls")])
        if not has_reason(path, node, "parameters"):
            assert count <= PARAMETERS, f"{name} has {count} parameters; or '# parameters: why'"


def find_late_attributes(node: ast.ClassDef) -> set[str]:
    """Attributes of ``self`` that a method other than the constructor is the first to assign."""
    declared = {
        target.id
        for statement in node.body
        for target in (
            statement.targets
            if isinstance(statement, ast.Assign)
            else [statement.target]
            if isinstance(statement, ast.AnnAssign)
            else []
        )
        if isinstance(target, ast.Name)
    }
    properties = {
        child.name
        for child in node.body
        if isinstance(child, Function)
        and any(ast.unparse(d).endswith(".setter") for d in child.decorator_list)
    }
    first: dict[str, set[str]] = {}
    for child in node.body:
        if not isinstance(child, Function):
            continue
        for inner in ast.walk(child):
            if (
                isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            ):
                first.setdefault(inner.attr, set()).add(child.name)
    constructors = {"__init__", "__post_init__", "__new__", "__setstate__"}
    return {
        name for name, where in first.items() if not where & constructors
    } - declared - properties  # fmt: skip


def inherited(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Attributes that a constructor of a base class in the package assigns."""
    names: set[str] = set()
    for base in node.bases:
        parent = classes.get(ast.unparse(base).partition("[")[0].rpartition(".")[2])
        if parent is None:
            continue
        names |= inherited(parent, classes)
        for child in parent.body:
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                names.add(child.target.id)
            if isinstance(child, Function) and child.name in ("__init__", "__post_init__"):
                names |= {
                    inner.attr
                    for inner in ast.walk(child)
                    if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
                }
    return names


def test_an_object_is_complete_once_it_is_built() -> None:
    """No attribute is first assigned outside the constructor."""
    found = {
        name: node
        for path in FILES
        for name, node in find(path, ast.ClassDef)
        if isinstance(node, ast.ClassDef)
    }
    classes = {node.name: node for node in found.values()}
    late = {name: find_late_attributes(node) - inherited(node, classes)
            for name, node in found.items()}  # fmt: skip
    over = {name: sorted(names) for name, names in late.items() if names}
    assert not over, f"assigned outside the constructor: {over}"


def modules_imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            each = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= each & known.keys() or {node.module}
    return names & known.keys()


def test_no_file_imports_itself_by_way_of_others() -> None:
    known = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }
    edges = {name: modules_imported(path, known) - {name} for name, path in known.items()}

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in edges[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    reach = {name: reachable(name) for name in edges}
    circles = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in edges
        if name in reach[name]
    }
    found = [sorted(circle) for circle in circles]
    assert not found, f"these files import each other in a circle: {found}"


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, sleeprl; print(*(m for m in ('torch', 'ray', 'numpy') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
