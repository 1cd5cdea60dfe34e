"""Consolidation where engines and learner share a device: the real worker loop, one rank, and the
engine on torch, which notes when it makes a token."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
import torch.distributed as dist

from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.config.schema import ConsolidationConfig, FixedCapacityConfig
from sleeprl.consolidation.messages import Report, StepReport
from sleeprl.consolidation.train_loop import Job, learn
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, to_batch
from sleeprl.text.chat import ChatFormatter
from tests.integration.dreaming.test_staleness import engines, learner, local_ray, noted, place  # noqa: F401

EVERY = 4


class Worker(RemoteActor):
    """The only rank of a consolidation; its own shell."""

    def learn(self, job: Job, engines: list[Any], address: str) -> list[tuple[int, float]]:
        """Steps, and when each had ended."""
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
        self.told: list[tuple[int, float]] = []
        learn(job, engines, self)
        return self.told

    def latest_checkpoint(self) -> Any:
        return nullcontext()

    def save_checkpoint(self, step: int, directory: Path) -> None:
        pass

    def report(self, report: Report) -> None:
        if isinstance(report, StepReport):
            self.told.append((report.step, time.monotonic()))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("colocated", [True, False])
def test_no_token_is_made_while_a_consolidation_steps(
    place: Path,  # noqa: F811
    tmp_path: Path,
    colocated: bool,
) -> None:
    """And decoupled there are."""
    chat = ChatFormatter(place / "wide")
    texts = [
        Trajectory(
            uid=f"{purpose}-{n}", task_id="answer", attempt=n, purpose=purpose,
            prompt_ids=chat.prompt(f"{n}?"), response_ids=chat.response("Ann lives in Oslo."),
            logprobs=[-1.0] * len(chat.response("Ann lives in Oslo.")),
            versions=[0] * len(chat.response("Ann lives in Oslo.")), finish_reason="stop",
            teacher_prompt_ids=chat.prompt(f"Ann lives in Oslo. {n}?"),
        )
        for purpose in ("self_study", "replay")
        for n in range(6)
    ]  # fmt: skip
    Lake(tmp_path / "lake").append(to_batch(texts), "trajectories")
    job = Job(
        method="seeding",
        learner=replace(learner(place), total_steps=2 * EVERY, colocated=colocated),
        config=ConsolidationConfig(
            steps=2 * EVERY, batch_size=4, rollout_every=EVERY, rollout_prompts=8, group_size=4,
        ),
        fixed=FixedCapacityConfig(),
        seed=3,
        lake=str(tmp_path / "lake"),
        output=str(tmp_path / "out"),
        canary=chat.prompt("Ann lives in Oslo."),
        first_version=1,
    )  # fmt: skip
    pool = engines(place, "tests.integration.dreaming.test_staleness.Noted")
    worker = ray.remote(Worker).options(num_cpus=0).remote()
    ended = ray.get(worker.learn.remote(job, pool.group.actors, f"file://{tmp_path}/meet"))
    (awake,) = pool.logprobs([chat.prompt("Eve sings.")])
    pool.shutdown()
    ray.kill(worker)
    assert len(awake) > 0 and [step for step, _ in ended] == list(range(1, 2 * EVERY + 1))
    # Between the ends of these two steps there is nothing but the second.
    alone = [(before, after) for (step, before), (_, after) in pairwise(ended) if step % EVERY]
    tokens = [moment for (moment,) in noted(place, "tokens")]
    assert len(tokens) > 50
    during = [m for m in tokens for before, after in alone if before <= m <= after]
    assert (during == []) == colocated
