"""A plug-in that a script registers works in an actor, which is another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

SCRIPT = """
import ray

from sleeprl import NightConfig, register
from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import ResourcesConfig
from sleeprl.config.validation import name_plugins_by_path
from sleeprl.plugins import create


@register("reward", "brief")
class Brief:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale


class Judge:
    def judge(self, name: str) -> str:
        made = create(name, "reward", {"scale": 2.0})
        return f"{type(made).__module__} {made.scale}"


if __name__ == "__main__":
    config = NightConfig()
    config.dreaming.reward = "brief"
    name = name_plugins_by_path(config).dreaming.reward
    with cluster(ResourcesConfig(cpus=1)):
        judge = ray.remote(Judge).options(num_cpus=0).remote()
        print(name, ray.get(judge.judge.remote(name)))
"""


def test_what_a_script_registers_is_found_in_an_actor(tmp_path: Path) -> None:
    (tmp_path / "my_night.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "my_night.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["my_night.Brief", "my_night", "2.0"], done.stderr[-3000:]
