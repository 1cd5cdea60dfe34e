"""The benchmarks of the pipeline run, small, and write figures that hang together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


def quick(name: str, output: Path, *words: str) -> dict[str, Any]:
    return measure(name, output, "--quick", *words)


def measure(name: str, output: Path, *words: str, timeout: float = 500) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--output", output, *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = output.glob(f"{name}*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["command"] == " ".join(["python", f"benchmarks/{name}.py", *words])
    assert found["cores"] >= 1 and found["environment"]["torch"]
    return found


def test_learner(tmp_path: Path) -> None:
    (row,) = quick("learner", tmp_path)["rows"]
    steps = row["one_rank"]
    # It is the same training on both sides; that it moves shows that a step was taken.
    assert steps["ours_loss"] == pytest.approx(steps["theirs_loss"], rel=1e-2)
    assert len(set(steps["ours_loss"])) == row["pairs"]
    assert (
        row["speed_of_bare"]["low"] <= row["speed_of_bare"]["mean"] <= row["speed_of_bare"]["high"]
    )


def test_rollout(tmp_path: Path) -> None:
    (row,) = quick("rollout", tmp_path)["rows"]
    assert len(row["pairs"]) == 3
    for pair in row["pairs"]:
        assert pair["same"] == 1.0
        for side in ("dreams", "generate", "vllm"):
            assert pair[side]["tokens"] > 0 and pair[side]["cpu"] > 0


def test_grpo_vs_trl(tmp_path: Path) -> None:
    found = quick("grpo_vs_trl", tmp_path, "--full")
    (run,) = found["runs"]
    for name in ("decoupled", "synchronous"):
        assert len(run[name]) == 4
        assert all(0 < step["reward"] < 1 and step["cpu"] > 0 for step in run[name])
        assert [step["tokens"] for step in run[name]] == [64] * 4
        assert found["figures"]["per_step_wall"][name][0] > 0
    # The first answers are of the same weights and seeds, the second not any more.
    first, second = (
        [run[name][step]["reward"] for name in run if name != "trl"] for step in (0, 1)
    )
    assert first[0] == pytest.approx(first[1]) and second[0] != second[1]


def test_overlap(tmp_path: Path) -> None:
    (pair,) = quick("overlap", tmp_path)["pairs"]
    assert pair["synchronous"]["staleness"] == 0.0 < pair["decoupled"]["staleness"]
    for mode in pair.values():
        assert all(0.0 <= share <= 1.0 for share in mode["idle_share"].values())
        assert mode["idle"]["learner"]["data"] > 0


def test_sync(tmp_path: Path) -> None:
    found = quick("sync", tmp_path)
    (row,) = found["rows"]
    assert found["settings"]["dtype"] == "float32" and row["bytes"] == 4 * row["parameters"]
    assert row["into_vllm_seconds"] == {} and set(row["cpu_and_wall_seconds"]) > set(
        row["transports"]
    )
    for times in row["cpu_and_wall_seconds"].values():
        assert len(times) == found["settings"]["repeats"]
        assert all(cpu > 0 and wall > 0 for cpu, wall in times)
    for transport in row["transports"].values():
        assert transport["gb_per_s"][0] > 0 and transport["of_copy"][0] > 0


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("name", ["learner", "rollout", "grpo_vs_trl", "overlap", "sync"])
def test_in_full(name: str, tmp_path: Path) -> None:
    """As the figures of the documentation are made; what is measured stays in ``tmp_path``."""
    measure(name, tmp_path, timeout=6 * 3600)
