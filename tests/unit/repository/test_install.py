"""tools/install.sh: what stops it says what to do, and what is installed is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script reads, and no .venv."""
    for name in ("pyproject.toml", "requirements", "tools/install.sh"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return tmp_path


def install(checkout: Path, accelerator: str = "cpu", **variables: str) -> tuple[int, str, str]:
    """Exit status, output, errors."""
    done = subprocess.run(
        [checkout / "tools" / "install.sh", accelerator],
        env={**os.environ, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def put_stamp(checkout: Path) -> None:
    """A .venv with the Python of these tests, which says that it is up to date."""
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    sums = "echo cpu $(cat pyproject.toml requirements/*.txt tools/install.sh | cksum)"
    with (checkout / ".venv" / ".installed").open("w") as stamp:
        subprocess.run(["bash", "-c", sums], cwd=checkout, stdout=stamp, check=True)


def contents(checkout: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("accelerator", "variables", "wrong", "advice"),
    [
        ("foo", {}, "ACCELERATOR is 'foo'", "it is cpu or cuda"),
        ("cpu", {"PYTHON": "nope"}, "no 'nope' here", "name another one: PYTHON=python3.12"),
        ("cpu", {"CXX": "nope"}, "no C++ compiler ('nope')", "name yours: CXX=clang++ make night"),
    ],
    ids=["accelerator", "python", "compiler"],
)
def test_what_is_missing_is_told_before_anything_is_installed(
    checkout: Path, accelerator: str, variables: dict[str, str], wrong: str, advice: str
) -> None:
    before = contents(checkout)
    status, out, errors = install(checkout, accelerator, **variables)
    assert (status, out) == (1, "")
    assert f"install: {wrong}" in errors and advice in errors
    assert contents(checkout) == before


def test_a_second_call_installs_nothing_and_is_silent(checkout: Path) -> None:
    put_stamp(checkout)
    before = contents(checkout)
    # With a compiler that is not there: it does not even look for one.
    assert install(checkout, CXX="nope") == (0, "", "")
    assert contents(checkout) == before


@pytest.mark.parametrize("damage", ["requirements/cpu.txt", ".venv/.installed", ".venv/bin/python"])
def test_a_changed_pin_or_a_damaged_venv_is_seen(checkout: Path, damage: str) -> None:
    put_stamp(checkout)
    (checkout / damage).write_text("another\n")
    status, _, errors = install(checkout, CXX="nope")
    assert status == 1 and "no C++ compiler" in errors


@pytest.mark.parametrize(
    "module", ["transformers/models/llama/modeling_llama", "vllm/v1/engine/core"]
)
def test_what_a_night_imports_is_compiled(module: str) -> None:
    """Where Python may not write bytecode, each process would compile it again."""
    if not (Path(sys.prefix) / ".installed").is_file():
        pytest.skip("this environment is not of tools/install.sh")
    source = Path(sysconfig.get_path("purelib")) / f"{module}.py"
    assert source.is_file() and Path(cache_from_source(str(source))).is_file()
