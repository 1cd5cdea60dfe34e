"""A search of hyper-parameters with Ray Tune over real consolidations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.cluster.test_launch_files import another_ray
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_tune_searches_a_consolidation(count: int, tmp_path: Path) -> None:
    spec = yaml.safe_load((ROOT / "tuning" / "consolidation.yaml").read_text())
    spec["trials"], spec["report_every"] = count, 16
    rates = 0.003, 1e-6
    spec["space"] = {"consolidation.learning_rate": {"choice": rates}}
    spec["night"]["consolidation"]["steps"] = 32
    spec["night"]["wake"]["people"] = 4
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(spec))
    with another_ray():
        done = subprocess.run(
            [sys.executable, str(ROOT / "tuning" / "search.py"), "search.yaml", "seed=1"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=1100,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    trials = json.loads((tmp_path / "runs" / "search" / "trials.json").read_text())
    # With this seed the first has the better rate. The others are stopped, and what they held is freed.
    found = [(t["config"]["consolidation.learning_rate"], t["step"]) for t in trials]
    assert found == [(rates[0], 32), (rates[1], 16), (rates[1], 16)][:count]
    assert all(0 <= t["recall"] <= 1 for t in trials)
    best = yaml.safe_load((tmp_path / "runs" / "search" / "best.yaml").read_text())
    assert best["consolidation"]["learning_rate"] == rates[0]
