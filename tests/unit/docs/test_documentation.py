"""What the documentation shows works: Python blocks run, commands are accepted, figures are drawn."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sleeprl import __version__
from sleeprl.cli import app
from sleeprl.config.aliases import ALGORITHM_OPTIONS, ALIASES
from tests.support.paths import ROOT

TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster/README.md")
PAGES = sorted([*(ROOT / name for name in TOP), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^(?P<note><!-- \w+ -->\n)?```(?P<kind>\w+)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)
INCLUDE = re.compile(r'^--8<-- "([^"]+)"$', re.M)
OTHERS = ("cd", "git", "kubectl", "pip", "ray", "sbatch")
"""Commands of other programs: what they are given of ours is checked, they are not run."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    number: int
    kind: str
    text: str
    slow: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.number}"


def blocks(kind: str) -> Iterator[Block]:
    """Find the fenced blocks of one language on all pages; those included from a file are not among them."""
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if match["kind"] != kind or INCLUDE.search(match["text"]):
                continue
            line = text.count("\n", 0, match.start()) + 1
            name = str(page.relative_to(ROOT))
            yield Block(name, line, kind, match["text"], "slow" in (match["note"] or ""))


def python_blocks() -> list[object]:
    return [
        pytest.param(block, id=str(block), marks=[pytest.mark.slow] if block.slow else [])
        for block in blocks("python")
    ]


def console_lines() -> list[object]:
    lines = [
        (block, line[2:])
        for block in blocks("console")
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]
    return [pytest.param(block, line, id=f"{block} {line[:50]}") for block, line in lines]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like a clone in which the first night has run."""
    for name in ("examples", "cluster", "tuning"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("lake", "runs/night"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "notes.jsonl", tmp_path / "lake")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", python_blocks())
def test_a_python_block_runs(block: Block, workplace: Path) -> None:
    file = workplace / "block.py"
    file.write_text(block.text)
    # The others are imported, so that a guarded ``run_night`` is not called.
    program = f"import runpy; runpy.run_path({str(file)!r}, run_name='block')"
    command = [str(file)] if block.slow else ["-c", program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(workplace)])}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("block", "line"), console_lines())
def test_a_command_is_accepted(block: Block, line: str, workplace: Path) -> None:
    words = shlex.split(line)
    while "=" in words[0] or words[0] == "taskset":  # environment, or the cores it may use
        words = words[3:] if words[0] == "taskset" else words[1:]
    program, *arguments = words
    if program == "sleeprl":
        _accept_sleeprl(arguments)
    elif program == "make":
        done = subprocess.run(
            ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif program == "python" and arguments[0].startswith("examples/"):  # run by a test of its own
        assert (ROOT / arguments[0]).is_file()
        _accept_sleeprl(["night", *(word for word in arguments[1:] if "=" in word)])
    elif program == "python":
        done = subprocess.run(
            [sys.executable, str(ROOT / arguments[0]), "--help"],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    else:
        assert program in OTHERS, f"{block}: {program} is neither ours nor listed as another's"
        _accept_others(program, arguments)


def _accept_sleeprl(arguments: list[str]) -> None:
    """Dry-run a night; of another command parse all words, and stop at its help."""
    command, *rest = arguments
    if command == "night" and "--resume" not in rest:
        extra = [] if "--dry-run" in rest else ["--dry-run"]
    else:
        extra = ["--help"]
    done = CliRunner().invoke(app, [command, *rest, *extra])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"


def _accept_others(program: str, arguments: list[str]) -> None:
    """Files and extras that another program is given must be ours."""
    for word in arguments:
        if word.startswith(("cluster/", "requirements/", "examples/")):
            assert (ROOT / word).exists(), word
    if program == "pip":
        package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\.\[([\w,-]+)\]", " ".join(arguments)):
            assert {*extras.split(",")} <= {*package["optional-dependencies"]}


# --- figures and names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["readme_table", "night_output"])
def test_the_figures_of_the_readme_are_drawn_from_the_results(name: str) -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "hooks" / "results.py"))[name]()
    assert drawn in (ROOT / "README.md").read_text()


def test_the_readme_is_read_in_three_minutes() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[0] == "# sleepRL"
    assert len(lines) <= 150


def test_links_of_the_readme_lead_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_an_included_file_is_there(page: Path) -> None:
    included = [name.split(":")[0] for name in INCLUDE.findall(page.read_text())]
    assert [name for name in included if not (ROOT / name).is_file()] == []


def test_renamed_settings_are_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    renamed = {**ALIASES, **ALGORITHM_OPTIONS}
    assert [old for old, new in renamed.items() if f"| `{old}` | `{new}` |" not in text] == []


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
