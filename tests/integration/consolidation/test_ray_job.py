"""A consolidation job on the real Ray Train, ZeRO-3 and vLLM, broken off in every way.

Run as a script this file is the driver: ``test_job.py DIRECTORY NAME`` trains a job and
prints each step; started again with the same name it goes on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import ROOT

STEPS = 120
ELASTIC = "elastic"


def drive(directory: Path, name: str) -> None:
    """The driver: one engine, and a job of two workers."""
    from sleeprl.cluster.runtime import cluster
    from sleeprl.config.schema import ResourcesConfig
    from sleeprl.consolidation.messages import StepReport
    from sleeprl.consolidation.ray_job import TrainingProcesses
    from sleeprl.rollout.engine import EngineOptions
    from sleeprl.rollout.engine_pool import EnginePool

    resources = ResourcesConfig(cpus=3, learner_workers=2, engine_kv_cache_gb=0.2, stall_seconds=1)
    with ExitStack() as stack:
        lose = None
        if name == ELASTIC:
            resources, lose = stack.enter_context(two_nodes())
        stack.enter_context(cluster(resources))
        options = EngineOptions(
            model=str(directory / "wide"), dtype="float32", max_length=128, threads=1,
            memory_gb=0.2, gpu=False, gpu_utilization=0.4, seed=0,
        )  # fmt: skip
        pool = EnginePool.launch(1, options, 1, 0)

        def tell(report: StepReport) -> None:
            metrics = report.metrics
            print("step", report.step, metrics["loss"], int(metrics["workers"]), flush=True)
            if lose is not None and report.step >= 40:
                lose()

        work = job(directory, name)
        processes = TrainingProcesses(work.learner, resources, directory / "train", name)
        end = processes.run(work, pool, tell)
        processes.close()
        print("end", end.steps, end.tokens, flush=True)
        pool.shutdown()


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Callable[[], None]]]:
    """A cluster whose second node, with room for one worker, is lost when it is told so."""
    from ray.cluster_utils import Cluster

    from sleeprl.cluster.runtime import LEARNER_RESOURCE
    from sleeprl.config.schema import ResourcesConfig

    head = {"num_cpus": 2, "resources": {LEARNER_RESOURCE: 1}, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    second = [nodes.add_node(num_cpus=1, resources={LEARNER_RESOURCE: 1})]

    def lose() -> None:
        while second:
            nodes.remove_node(second.pop(), allow_graceful=False)

    try:
        yield ResourcesConfig(
            address=nodes.address, learner_workers=1, learner_workers_max=2,
            engine_kv_cache_gb=0.2, transport="disk", stall_seconds=20,
        ), lose  # fmt: skip
    finally:
        nodes.shutdown()


def job(directory: Path, name: str) -> Any:
    from sleeprl.config.schema import ConsolidationConfig, FixedCapacityConfig
    from sleeprl.consolidation.train_loop import Job
    from sleeprl.trainer.options import TrainerOptions

    return Job(
        method="seeding",
        learner=TrainerOptions(
            checkpoint=str(directory / "wide"), slot=0, dtype="float32", seed=3,
            learning_rate=1e-2, total_steps=STEPS, warmup=2,
        ),
        config=ConsolidationConfig(
            steps=STEPS, batch_size=4, replay_ratio=1.0, rollout_every=8, rollout_prompts=4,
            group_size=2, checkpoint_every=24,
        ),
        fixed=FixedCapacityConfig(),
        seed=3,
        lake=str(directory / "lake"),
        output=str(directory / name),
        canary=list(range(20, 40)),
        first_version=1,
    )  # fmt: skip


# --- the scenes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a free slot, some texts to learn, and an unbroken run of two workers."""
    from sleeprl.data.lake import Lake
    from sleeprl.data.trajectory import Trajectory, to_batch
    from sleeprl.memory.checkpoint import widen
    from tests.support.models import make_tiny_model

    place = tmp_path_factory.mktemp("job")
    make_tiny_model(place / "plain", seed=1)
    widen(place / "plain", place / "wide", 1, 8, "float32")
    generator = torch.Generator().manual_seed(0)
    texts = [
        Trajectory(
            uid=f"{purpose}-{number}", task_id="answer", attempt=number, purpose=purpose,
            prompt_ids=[5, 6, 7 + number], response_ids=said, logprobs=[-1.0] * len(said),
            versions=[0] * len(said), finish_reason="stop",
            teacher_prompt_ids=[9] * 12 if purpose == "self_study" else None,
        )
        for purpose in ("self_study", "replay")
        for number in range(12)
        for said in [torch.randint(3, 250, (6 + number % 5,), generator=generator).tolist()]
    ]  # fmt: skip
    Lake(place / "lake").append(to_batch(texts), "trajectories")
    steps = run(place, "whole")
    assert [number for number, *_ in steps] == list(range(1, STEPS + 1))
    stalls = re.findall("whole has waited .*\n.*", (place / "whole.err").read_text())
    # No worker starts within a second; two wait for two cores, of which they hold none yet.
    assert stalls and "the start of the learner: its next step\n  each worker wants" in stalls[0]
    return place


def run(
    place: Path, name: str, disturb: Callable[[int, int], bool] = lambda *_: False
) -> list[tuple[int, float, int]]:
    """Drive a job; the steps it told, each with its loss and workers.

    disturb: called with pid and step, True once it is done.
    """
    words = [sys.executable, str(Path(__file__)), str(place), name]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=(place / f"{name}.err").open("a"),
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TRAIN_ENABLE_V2": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    told: list[tuple[int, float, int]] = []
    done, ended = False, False
    try:
        for line in process.stdout:
            word, *values = line.split() or [""]  # a lost node is told of in lines of its own
            if word == "step":
                told.append((int(values[0]), float(values[1]), int(values[2])))
                done = done or disturb(process.pid, told[-1][0])
            ended = ended or word == "end"
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        assert ended, (place / f"{name}.err").read_text()[-3000:]
    return told


def expert(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / name / "expert.safetensors")


def same(place: Path, name: str) -> None:
    """To the rounding of a log-probability, which in vLLM depends on what else is in the batch.

    Without roll-outs it is the same to the bit: ``test_killed_night``.
    """
    whole, other = expert(place, "whole"), expert(place, name)
    assert whole.keys() == other.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(other[key], tensor, atol=1e-5, rtol=0)
    steps = [*range(9, STEPS + 1, 8), STEPS + 1]  # the last were asked for, and not learnt from
    uids = [f"{step}-{number}-{n}" for step in steps for number in range(4) for n in range(2)]
    assert rolled_out(place, "whole") == rolled_out(place, name) == sorted(uids)


def rolled_out(place: Path, name: str) -> list[str]:
    """The job's roll-outs in the lake, which it shares with the others."""
    from sleeprl.data.lake import Lake

    prefix = f"rollout-{name}-"
    uids = Lake(place / "lake").read("trajectories", []).column("uid").to_pylist()
    return sorted(uid.removeprefix(prefix) for uid in uids if uid.startswith(prefix))


def kill_a_worker(pid: int, step: int) -> bool:
    """SIGKILL to one of the job's workers, once step 40 was told."""
    import psutil

    if step < 40:
        return False
    family = psutil.Process(pid).children(recursive=True)
    workers = [p for p in family if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2, [p.cmdline() for p in family]
    workers[1].kill()
    return True


def kill_a_worker_then_the_driver() -> Callable[[int, int], bool]:
    killed = False

    def disturb(pid: int, step: int) -> bool:
        nonlocal killed
        if not killed:
            killed = kill_a_worker(pid, step)
            return False
        if step < 60:
            return False
        os.killpg(pid, signal.SIGKILL)
        return True

    return disturb


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_and_a_killed_process_change_nothing(place: Path) -> None:
    numbers = [number for number, *_ in run(place, "killed", kill_a_worker_then_the_driver())]
    assert sorted(set(numbers)) == list(range(1, numbers[-1] + 1))
    assert len(numbers) > numbers[-1], "no step was done again, so no worker was missed"
    assert 60 <= numbers[-1] < STEPS and not (place / "killed").exists()
    rest = run(place, "killed")
    # The workers may have gone on for some steps after the last that the driver was told.
    assert 24 < rest[0][0] < STEPS, "it did not go on from a checkpoint"
    assert rest[-1][0] == STEPS
    same(place, "killed")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_an_elastic_job_goes_on_with_the_workers_that_are_left(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")  # it asks for two first
    told = run(place, ELASTIC)
    assert told[-1][0] == STEPS and sorted({number for number, *_ in told}) == [
        *range(1, STEPS + 1)
    ]
    assert [workers for *_, workers in told[:40]] == [2] * 40
    assert told[-1][2] == 1, "the lost node was not noticed"
    same(place, ELASTIC)
    lost = re.findall(f"{ELASTIC} has waited .*\n.*", (place / f"{ELASTIC}.err").read_text())
    assert any("'sleeprl_learner'" in text for text in lost), lost


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2])
