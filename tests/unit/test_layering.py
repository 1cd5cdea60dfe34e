"""Who may import whom, and how long a file may get (the architecture's rules)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "sleeprl"
MODULES = sorted(PACKAGE.rglob("*.py"))
LOOPS = ("night/orchestrator.py", "dreaming/pipeline.py", "consolidation/train_loop.py")
# Files over the limit, with what they may have; this list only shrinks.
TOO_LONG = {"dreaming/pipeline.py": 310, "rollout/engine.py": 520, "trainer/trainer.py": 545}

# From the ground up. A room imports from its own storey and those below.
STOREYS = [
    {"_version", "utils"},
    {"plugins", "pretrained", "text"},
    {"config", "data", "losses", "algorithms", "weight_sync"},
    {"cluster", "memory", "lineage"},
    {"rollout", "models"},
    {"trainer", "evaluation"},
    {"worlds", "wake", "self_study", "reporting"},
    {"consolidation", "dreaming"},
    {"night"},
    {"api"},
    {"__init__", "cli"},
    {"__main__"},
]
# Imports nothing of sleepRL, so that the configuration can ask the clock itself what it allows.
LEAVES = {"sleeprl.memory.levels"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as a dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(path: Path) -> set[str]:
    """The rooms of sleeprl that a file imports from, its own left out."""
    taken = {n for n in imports(path) if n.rpartition(".")[0] not in LEAVES} - LEAVES
    names = {n.split(".")[1] for n in taken if n.startswith("sleeprl.")}
    known = {room(p) for p in MODULES}
    return (names & known) - {room(path)}


def test_a_leaf_needs_nobody() -> None:
    for leaf in LEAVES:
        path = PACKAGE.parent / (leaf.replace(".", "/") + ".py")
        assert not [name for name in imports(path) if name.startswith("sleeprl")]


def storey(name: str) -> int:
    return next(level for level, rooms in enumerate(STOREYS) if name in rooms)


def test_every_room_has_a_storey() -> None:
    assert {room(path) for path in MODULES} <= set().union(*STOREYS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_downwards_only(path: Path) -> None:
    above = {name for name in rooms_of(path) if storey(name) > storey(room(path))}
    assert not above, f"{path.relative_to(PACKAGE)} imports from above: {sorted(above)}"


def test_no_two_rooms_know_each_other() -> None:
    edges: dict[str, set[str]] = {}
    for path in MODULES:
        edges.setdefault(room(path), set()).update(rooms_of(path))

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in edges.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return seen

    circular = sorted(name for name in edges if name in reachable(name))
    assert not circular, f"these rooms import each other in a circle: {circular}"


@pytest.mark.parametrize(
    "name",
    ["losses", "algorithms", "data", "weight_sync", "memory", "config", "plugins", "text"],
)
def test_these_never_import_ray(name: str) -> None:
    for path in MODULES:
        if room(path) == name:
            users = {n for n in imports(path) if n.split(".")[0] == "ray"}
            assert not users, f"{path.relative_to(PACKAGE)} imports {sorted(users)}"


def test_config_and_plugins_import_neither_torch_nor_ray() -> None:
    for path in MODULES:
        if room(path) in ("config", "plugins", "utils"):
            roots = {n.split(".")[0] for n in imports(path)}
            assert not roots & {"torch", "ray", "vllm", "deepspeed", "transformers"}


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (
            "sleeprl.config.loader, sleeprl.plugins, sleeprl.text.prompts",
            "torch ray numpy transformers",
        ),
        ("sleeprl, sleeprl.api", "torch ray numpy transformers pyarrow"),
        ("sleeprl.data, sleeprl.data.padding", "torch ray"),
        ("sleeprl.rollout, sleeprl.rollout.types", "torch ray"),
        ("sleeprl.dreaming.reward_process", "torch ray numpy pyarrow transformers"),
        (
            "sleeprl.losses.divergence, sleeprl.losses.off_policy, sleeprl.losses.combined, "
            "sleeprl.consolidation.imitation_reward",
            "ray vllm deepspeed",
        ),
        ("sleeprl.cli", "torch ray vllm deepspeed"),  # --help must not take seconds
        # Each actor of a phase imports these: a second here is a second for every one of them.
        (
            "sleeprl.dreaming.launch, sleeprl.evaluation.statistics",
            "scipy pandas transformers vllm",
        ),
    ],
)
def test_what_an_import_brings_with_it(modules: str, forbidden: str) -> None:
    code = f"import sys, {modules}; print(*(m for m in {forbidden.split()!r} if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_stays_readable(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    limit = TOO_LONG.get(name, 300 if name in LOOPS else 500)
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{path.relative_to(PACKAGE)} has {lines} lines, more than {limit}"


def test_the_loops_are_where_the_architecture_puts_them() -> None:
    assert [name for name in LOOPS if not (PACKAGE / name).is_file()] == []


def test_nobody_patches_a_library() -> None:
    """No assignment to an attribute of an imported module (no monkey patches)."""
    foreign = {"torch", "ray", "vllm", "deepspeed", "transformers"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Assign):
                continue
            for target in node.targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name):
                    assert root.id not in foreign, f"{path}:{node.lineno} patches {root.id}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_patches_an_object(path: Path) -> None:
    """No function is put in the place of another's method."""
    tree = ast.parse(path.read_text())
    functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        callable_ = isinstance(node.value, ast.Lambda) or (
            isinstance(node.value, ast.Name) and node.value.id in functions
        )
        for target in node.targets:
            if callable_ and isinstance(target, ast.Attribute):
                owner = ast.unparse(target.value)
                assert owner == "self", f"{path}:{node.lineno} patches {owner}.{target.attr}"
