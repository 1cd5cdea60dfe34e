"""Small nights of the command line, in processes of their own, and killing them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

SMALL = [
    "wake.people=4",
    "self_study.pairs_per_document=32",
    "self_study.facts_per_document=8",
    "self_study.replay_questions=300",
    "consolidation.steps=40",
    "consolidation.batch_size=16",
    "consolidation.checkpoint_every=16",
    "dreaming.steps=2",
    "dreaming.tasks_per_step=2",
    "dreaming.group_size=4",
    "evaluation.retention_questions=60",
    "evaluation.perplexity_texts=10",
    # 40 steps are for the plumbing; what a whole night keeps is measured in benchmarks/night.py.
    "gate.max_retention_drop=0.5",
    "gate.max_perplexity_ratio=5",
]


def sleeprl(*words: str, cwd: Path, timeout: float = 1100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sleeprl.cli", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def summary(place: Path, name: str = "first") -> dict[str, Any]:
    return json.loads((place / "runs" / name / "summary.json").read_text())  # type: ignore[no-any-return]


def steps(run: Path, phase: str = "consolidation") -> list[int]:
    """Steps of a phase that were told, over all attempts."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = text.rpartition("\n")[0].splitlines()  # the last may be half written
    return [row["step"] for row in map(json.loads, lines) if row["phase"] == phase]


def done(run: Path, phase: str) -> bool:
    path = run / "state.json"
    return path.is_file() and phase in json.loads(path.read_text())["results"]


def night(place: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sleeprl.cli", "night", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(moment: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not moment():
        assert process.poll() is None, "the night was over before its moment came"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_when(moment: Callable[[], bool], place: Path, *words: str) -> None:
    """Run a night and SIGKILL it, with all its family, at that moment."""
    process = night(place, *words)
    wait_until(moment, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
