"""The wheel is whole: installed alone, it runs from any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import sleeprl
from tests.support.paths import ROOT

NOT_PACKAGED = ("__pycache__", ".pyc")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def pip(*words: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *words, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building writes beside them."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    shutil.copytree(ROOT / "sleeprl", source / "sleeprl", ignore=lambda _, names: {
        name for name in names if name.endswith(NOT_PACKAGED)
    })  # fmt: skip
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "-w", place, cwd=source)
    (found,) = place.glob("sleeprl-*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The wheel installed into a directory of its own, without what it needs."""
    target = wheel.parent / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=wheel.parent)
    return target


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sleeprl").rglob("*")
        if path.is_file() and not str(path).endswith(NOT_PACKAGED)
    }
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert not files - packed, sorted(files - packed)
    assert "sleeprl/py.typed" in packed


def test_its_entry_points_lead_to_what_is_there(site: Path) -> None:
    (info,) = site.glob("sleeprl-*.dist-info")
    points = {(p.group, p.name): p.value for p in PathDistribution(info).entry_points}
    assert points["console_scripts", "sleeprl"] == "sleeprl.cli:main"
    for value in points.values():
        assert (site / (value.partition(":")[0].replace(".", "/") + ".py")).is_file()


def test_it_runs_from_another_directory(site: Path, tmp_path: Path) -> None:
    """What it needs comes from this environment; the package itself from the wheel alone."""
    show = (
        "import sleeprl; print(sleeprl.__file__, sleeprl.__version__, sleeprl.load_config().seed)"
    )
    printed = run(sys.executable, "-c", show, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert printed == [str(site / "sleeprl" / "__init__.py"), sleeprl.__version__, "0"]
    words = ("night", "--dry-run", "resources.cpus=2")
    plan = run(site / "bin" / "sleeprl", *words, cwd=tmp_path, PYTHONPATH=str(site))
    assert "max_staleness: 1" in plan and "run directory" in plan
