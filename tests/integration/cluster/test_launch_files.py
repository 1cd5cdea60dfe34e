"""What is in cluster/ parses, uses only keys that exist, and its commands run with --dry-run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml

from sleeprl import cli
from sleeprl.cluster.runtime import LEARNER_RESOURCE, ResourceError, cluster, require_learners
from sleeprl.config import loader as cfg
from sleeprl.config.schema import ResourcesConfig
from tests.support.paths import ROOT

CLUSTER = ROOT / "cluster"
YAMLS = sorted(CLUSTER.glob("*.yaml"))
CONFIGS = [path for path in YAMLS if "apiVersion" not in yaml.safe_load(path.read_text())]
RAY_JOB = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())
SCRIPT = str(CLUSTER / "slurm.sh")


def run(
    *command: str, cwd: Path = ROOT, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RAY_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**kept, "PATH": path, "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def dry_run(*words: str, cwd: Path, **variables: str) -> list[str]:
    """The commands that ``slurm.sh`` would run; the plan must follow them."""
    out = run(SCRIPT, *words, cwd=cwd, DRY_RUN="1", **variables).stdout
    assert "run directory" in out
    return [line.removeprefix("+ ") for line in out.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_load_and_set_resources_only(path: Path) -> None:
    assert set(yaml.safe_load(path.read_text())) == {"name", "resources"}
    config = cfg.load(path)
    assert config.name == path.stem
    done = run("sleeprl", "night", str(path), "--dry-run", CUDA_VISIBLE_DEVICES="")
    assert f"{config.resources.engines} x ({config.resources.engine_cpus} cores" in done.stdout
    lacks = f"= {config.resources.gpus:g} GPUs, but this machine has 0"
    assert (lacks in done.stderr) == (config.resources.address is None)


def test_engines_and_learner_fit_into_the_eight_gpus_of_one_node() -> None:
    for name, gpus in (("one-gpu", 1), ("one-node", 8), ("two-nodes", 8)):
        have = cfg.load(CLUSTER / f"{name}.yaml").resources
        engines = have.engines * have.engine_gpus
        assert engines + have.learner_workers * have.learner_gpus == gpus
        assert have.engine_gpu_memory_utilization <= have.engine_gpus


def test_a_ray_of_its_own_that_lacks_gpus_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    two = ResourcesConfig(engine_gpus=1, learner_workers=2, learner_gpus=0.5)
    with pytest.raises(
        ResourceError, match=r"resources\.engine_gpus=1 \+ 2 learner.*= 2 GPUs.*has 1"
    ):
        with cluster(two):
            pass
    # Teachers are there by consolidation, scorers by dreaming: never at the same time.
    apart = ResourcesConfig(teachers=1, teacher_gpus=0.5, scorers=4, scorer_gpus=0.5)
    with pytest.raises(ResourceError, match=r"4 scorer\(s\) x resources.scorer_gpus=0.5 = 2 GPUs"):
        with cluster(apart):
            pass
    for fits in (ResourcesConfig(engine_gpus=0.5, learner_gpus=0.5), ResourcesConfig(),
                 ResourcesConfig(teachers=1, teacher_gpus=1, scorers=2, scorer_gpus=0.5),
                 ResourcesConfig(engine_gpus=8, address="auto")):  # fmt: skip
        with cluster(fits):
            pass


def test_an_elastic_learner_without_nodes_for_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ResourcesConfig(address="auto", learner_workers=2, learner_workers_max=4)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, LEARNER_RESOURCE: 1.0})
    with pytest.raises(
        ResourceError, match=rf"learner_workers=2.*{LEARNER_RESOURCE} for 1;.*--resources"
    ):
        require_learners(some)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, LEARNER_RESOURCE: 2.0})
    require_learners(some)


def test_a_night_that_lacks_gpus_is_told_in_a_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["resources.engine_gpus=1", "resources.cpus=2", f"runs={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["sleeprl", "night", *words])
    with pytest.raises(SystemExit):
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert "resources.engine_gpus=1 = 1 GPUs, but this machine has 0" in line
    assert not (tmp_path / "runs").exists()


# --- KubeRay ----------------------------------------------------------------------


def test_the_ray_jobs_entrypoint_runs(tmp_path: Path) -> None:
    words = shlex.split(RAY_JOB["spec"]["entrypoint"].replace("/app", str(ROOT)))
    out = run(*words, f"runs={tmp_path}", "--dry-run").stdout
    assert re.search(r"\bray +auto\b", out)


def test_the_ray_jobs_pod_holds_what_the_entrypoint_asks_for() -> None:
    assert (RAY_JOB["apiVersion"], RAY_JOB["kind"]) == ("ray.io/v1", "RayJob")
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    pinned = (ROOT / "requirements" / "gpu.txt").read_text()
    assert f"\nray=={cluster['rayVersion']}\n" in pinned
    assert f"rayproject/ray:{cluster['rayVersion']}-" in (CLUSTER / "README.md").read_text()
    assert not cluster.get("workerGroupSpecs"), "engines and learner share one host"
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    have = cfg.load(CLUSTER / "one-node.yaml").resources
    gpus = have.engines * have.engine_gpus + have.learner_workers * have.learner_gpus
    assert float(container["resources"]["limits"]["nvidia.com/gpu"]) == gpus
    assert float(container["resources"]["limits"]["cpu"]) >= have.cpus
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    shared = {m["mountPath"] for m in container["volumeMounts"]}
    for key in ("runs", "generations"):
        (where,) = re.findall(rf"\b{key}=(\S+)", RAY_JOB["spec"]["entrypoint"])
        assert str(Path(where).parent) in shared


# --- SLURM ------------------------------------------------------------------------


def test_the_script_parses_and_asks_for_a_config(tmp_path: Path) -> None:
    run("bash", "-n", SCRIPT)
    assert os.access(SCRIPT, os.X_OK)
    assert "usage" in run(SCRIPT, cwd=tmp_path, code=2).stderr


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_tells_the_usage_and_runs_nothing(tmp_path: Path, word: str) -> None:
    stub = tmp_path / "srun"
    stub.write_text("#!/bin/sh\ntouch srun-was-run\n")
    stub.chmod(0o755)
    told = run(SCRIPT, word, cwd=tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert told.stdout.startswith("usage: sbatch cluster/slurm.sh CONFIG.yaml")
    assert "DRY_RUN=1" in told.stdout and "#SBATCH" not in told.stdout and not told.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["srun"]


def test_one_node_starts_the_night_alone(tmp_path: Path) -> None:
    commands = dry_run(str(CLUSTER / "one-node.yaml"), "wake.people=5", cwd=tmp_path)
    (only,) = commands
    assert only.startswith("srun ") and " sleeprl night " in only and "wake.people=5" in only
    assert f"runs={tmp_path}/runs" in only and "address" not in only


def test_further_nodes_join_without_cpus_and_gpus(tmp_path: Path) -> None:
    config = str(CLUSTER / "two-nodes.yaml")
    token, head, *others, night = dry_run(config, cwd=tmp_path, NODES="3")
    assert "RAY_AUTH_MODE=token" in token and str(tmp_path / "runs") in token
    assert "-w node1 ray start --head" in head and "--num-gpus=8" in head
    assert [re.search(r"-w (\S+)", other)[1] for other in others] == ["node2", "node3"]
    assert all("--address=node1:" in o and "--num-cpus=0 --num-gpus=0" in o for o in others)
    assert "-w node1 sleeprl night" in night and "resources.address=auto" in night


def test_an_array_is_one_night_per_seed(tmp_path: Path) -> None:
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "4"}
    (night,) = dry_run(str(CLUSTER / "one-node.yaml"), cwd=tmp_path, **array)
    assert "name=slurm-11-4" in night and "seed=4" in night


def test_a_requeued_job_resumes(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "slurm-12"
    run_dir.mkdir(parents=True)
    config = cfg.load(CLUSTER / "one-node.yaml", [f"runs={tmp_path}/runs", "name=slurm-12"])
    (run_dir / "config.yaml").write_text(cfg.to_yaml(config))
    (night,) = dry_run(str(CLUSTER / "one-node.yaml"), cwd=tmp_path, SLURM_JOB_ID="12")
    assert night.endswith(f"sleeprl night --resume {run_dir}")


def test_a_real_job_waits_for_the_head_and_passes_the_nights_status_on(tmp_path: Path) -> None:
    """Every line of the script but the dry run's, with stand-ins for SLURM and Ray."""
    stubs = {
        "scontrol": "printf 'first\\nsecond\\n'",
        "ray": f"echo ray $* >>{tmp_path}/log",
        "srun": f"echo srun $* >>{tmp_path}/log\ncase $* in *sleeprl*) exit 7 ;; *) sleep 9 ;; esac",
    }
    for name, text in stubs.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/sh\n{text}\n")
        stub.chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "first,second"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run(SCRIPT, "some.yaml", cwd=tmp_path, code=7, PATH=path, **job)
    parts = ("-w first ray start --head", "ray health-check --address first:6379",
             "-w second ray start --address=first:6379", "-w first sleeprl night some.yaml")  # fmt: skip
    deadline = time.monotonic() + 20  # lines of background jobs may come after the script's end
    while not all(part in (tmp_path / "log").read_text() for part in parts):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)


def test_a_mistyped_word_fails_the_dry_run(tmp_path: Path) -> None:
    config = str(CLUSTER / "one-node.yaml")
    done = run(SCRIPT, config, "wake.peple=5", cwd=tmp_path, code=2, DRY_RUN="1")
    assert "wake.people" in done.stderr


# --- README -----------------------------------------------------------------------


def test_the_readme_names_files_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    named = set(re.findall(r"(?:cluster|examples|requirements)/[\w.-]+\.\w+", text))
    assert {f"cluster/{path.name}" for path in YAMLS} | {"cluster/slurm.sh"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


# --- another Ray on the same machine ------------------------------------------------------------------


@contextmanager
def another_ray() -> Iterator[None]:
    """Someone else's, on this machine, for the time being."""
    program = (
        "import ray, sys; ray.init('local', num_cpus=1, include_dashboard=False); "
        "print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        assert process.poll() is None
        yield
        process.stdin.close()
        process.wait(60)


def test_workers_ask_their_own_ray_where_there_is_another() -> None:
    """As Ray Train does when it frees the cores of a trial that was stopped."""

    class Asks:
        def found(self, actor_id: str) -> str | None:
            from ray.util.state import get_actor

            state: Any = get_actor(actor_id, timeout=30)
            return state and state.state

    with another_ray(), cluster(ResourcesConfig(cpus=1), state_api=True):
        actor: Any = ray.remote(Asks).remote()
        assert ray.get(actor.found.remote(actor._actor_id.hex()), timeout=60) == "ALIVE"
