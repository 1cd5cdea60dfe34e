"""Reinforcement learning without nights: the example's loop over an engine pool and a trainer."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.support.paths import ROOT


def test_the_minimal_loop_trains() -> None:
    command = [sys.executable, "examples/grpo_minimal.py", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rewards = [float(value) for value in re.findall(r"step \d+: reward (-?[\d.]+)", done.stdout)]
    assert len(rewards) == 4
    assert rewards[-1] > rewards[0], "the answers get shorter"
