"""No file in ``cluster/`` starts a Ray that strangers can use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

SCRIPT = ROOT / "cluster" / "slurm.sh"


def write_stub(directory: Path, name: str, text: str) -> None:
    stub = directory / name
    stub.write_text(f"#!/bin/sh\n{text}\n")
    stub.chmod(0o755)


def submit(
    tmp_path: Path, *, umask: int = 0o022, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the script over two nodes, with stand-ins for SLURM and Ray that record what they see."""
    record = (
        f'echo "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") ${{RAY_AUTH_TOKEN:-none}} '
        f'$(cat "$RAY_AUTH_TOKEN_PATH") $*" >>{tmp_path}/seen'
    )
    write_stub(tmp_path, "scontrol", "printf 'first\\nsecond\\n'")
    write_stub(tmp_path, "ray", record)
    # The night ends when the nodes have been recorded.
    write_stub(
        tmp_path,
        "srun",
        f"{record}\ncase $* in *sleeprl*) n=0; "
        f"until [ $(grep -c 'ray start' {tmp_path}/seen) = 2 ] || [ $n = 100 ]; "
        "do sleep 0.05; n=$((n+1)); done ;; *) exec sleep 9 >/dev/null 2>&1 ;; esac",
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RAY_"))}
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "first,second"}
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [SCRIPT, "some.yaml"],
        cwd=tmp_path,
        env={**kept, **job, "PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        umask=umask,
        check=False,
    )


@pytest.mark.parametrize("umask", [0o022, 0o000, 0o077])
def test_every_ray_of_a_job_has_one_token_that_only_its_owner_can_read(
    tmp_path: Path, umask: int
) -> None:
    (tmp_path / "runs").mkdir()
    stale = tmp_path / "runs" / ".slurm-12.token"
    stale.write_text("of the job before it was put back into the queue")
    stale.chmod(0o644)
    done = submit(tmp_path, umask=umask, RAY_AUTH_TOKEN="of-another-cluster")
    assert done.returncode == 0, done.stderr
    seen = [line.split(maxsplit=4) for line in (tmp_path / "seen").read_text().splitlines()]
    whole = " ".join(words for *_, words in seen)
    assert "ray start --head" in whole and "--address=first:6379" in whole and "sleeprl" in whole
    assert {tuple(each[:3]) for each in seen} == {("token", "600", "none")}
    (token,) = {each[3] for each in seen}
    assert len(bytes.fromhex(token)) == 32
    assert token not in done.stdout + done.stderr
    deadline = time.monotonic() + 5
    while stale.exists():
        assert time.monotonic() < deadline, "the token outlives the job"
        time.sleep(0.05)


def test_two_jobs_have_two_tokens(tmp_path: Path) -> None:
    tokens = set()
    for number in ("a", "b"):
        (tmp_path / number).mkdir()
        submit(tmp_path / number)
        tokens.add((tmp_path / number / "seen").read_text().split()[3])
    assert len(tokens) == 2


def test_the_ray_job_has_token_authentication() -> None:
    job = yaml.safe_load((ROOT / "cluster" / "kuberay.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
