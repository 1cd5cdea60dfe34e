"""Consolidation's roll-outs in the lake: the real worker loop, one rank, and the engine on torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from sleeprl.algorithms.base import RewardBatch
from sleeprl.config.schema import ConsolidationConfig, FixedCapacityConfig
from sleeprl.consolidation import student_rollouts
from sleeprl.consolidation.messages import Report, StepReport
from sleeprl.consolidation.train_loop import Job, load_data_mix
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, from_batch, to_batch
from sleeprl.plugins import create
from sleeprl.text.chat import ChatFormatter
from tests.integration.consolidation.test_colocated import Worker
from tests.integration.dreaming.test_staleness import engines, learner, local_ray, place  # noqa: F401

EVERY, STEPS = 3, 9


class Dies(Worker):
    """Before its first checkpoint is kept."""

    def save_checkpoint(self, step: int, directory: Path) -> None:
        raise RuntimeError(f"died at {step}")


class Telling(Worker):
    """Returns what it reported."""

    def learn(self, job: Job, engines: list[Any], address: str) -> list[Report]:  # type: ignore[override]
        self.records: list[Report] = []
        super().learn(job, engines, address)
        return self.records

    def report(self, report: Report) -> None:
        super().report(report)
        self.records.append(report)


@contextmanager
def working(kind: type[Worker], job: Job, directory: Path) -> Iterator[Any]:
    pool = engines(directory)
    worker = ray.remote(kind).options(num_cpus=0).remote()
    meet = f"file://{job.output}-{kind.__name__}"
    try:
        yield worker.learn.remote(job, pool.group.actors, meet)
    finally:
        ray.kill(worker)
        pool.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_every_roll_out_is_in_the_lake_once(place: Path, tmp_path: Path) -> None:  # noqa: F811
    chat = ChatFormatter(place / "wide")
    said = chat.response("Ann lives in Oslo.")
    texts = [
        Trajectory(
            uid=f"{purpose}-{n}", task_id="answer", attempt=n, purpose=purpose,
            prompt_ids=chat.prompt(f"{n}?"), response_ids=said, logprobs=[-1.0] * len(said),
            versions=[0] * len(said), finish_reason="stop",
            teacher_prompt_ids=chat.prompt(f"Ann. {n}?") if purpose == "self_study" else None,
        )
        for purpose in ("self_study", "replay")
        for n in range(6)
    ]  # fmt: skip
    lake = Lake(tmp_path / "lake")
    lake.append(to_batch(texts), "trajectories")
    config = ConsolidationConfig(
        steps=STEPS, batch_size=2, rollout_every=EVERY, rollout_prompts=4, group_size=3,
        checkpoint_every=2 * EVERY,
    )  # fmt: skip
    job = Job(
        method="seeding",
        learner=replace(learner(place), total_steps=STEPS),
        config=config,
        fixed=FixedCapacityConfig(),
        seed=3,
        lake=str(lake.directory),
        output=str(tmp_path / "out"),
        canary=chat.prompt("Ann lives in Oslo."),
        first_version=1,
    )
    before = load_data_mix(job)
    with working(Dies, job, place) as lost, pytest.raises(RuntimeError, match="died at 6"):
        ray.get(lost)
    assert len(rolled_out(lake)) == 2 * 12, "they are there before the checkpoint is"
    with working(Telling, job, place) as done:
        reports = ray.get(done)
    found = rolled_out(lake)
    steps = [EVERY + 1, 2 * EVERY + 1, STEPS + 1]
    assert [t.uid for t in found] == [
        f"rollout-out-{step}-{n}-{attempt}"
        for step in steps for n in range(4) for attempt in range(3)
    ]  # fmt: skip
    source = {text.uid: text for text in texts}
    for t in found:
        text = source[t.task_id]
        prefix = t.prompt_ids[len(text.prompt_ids) :]
        assert t.prompt_ids == text.prompt_ids + text.response_ids[: len(prefix)]
        teacher = text.teacher_prompt_ids
        assert t.teacher_prompt_ids == (None if teacher is None else teacher + prefix)
        assert t.response_ids and set(t.versions) <= {1, 2, 3}
    assert {source[t.task_id].purpose for t in found} == {"self_study", "replay"}
    # Each batch as the step learnt from it that told its reward; the last ended with the job.
    algorithm = create(config.algorithm, "algorithm", config.algorithm_options)
    for batch, step in ((found[:12], steps[0]), (found[12:24], steps[1])):
        (metrics,) = (r.metrics for r in reports if isinstance(r, StepReport) and r.step == step)
        rewards = [t.reward for t in batch]
        assert metrics["imitation_reward"] == pytest.approx(sum(r or 0.0 for r in rewards) / 12)
        scores = RewardBatch(
            rewards, [t.task_id + str(i // 3) for i, t in enumerate(batch)],
            [len(t.response_ids) for t in batch], student_rollouts.longest_rollout(texts),
        )  # fmt: skip
        assert [t.advantage for t in batch] == pytest.approx(algorithm.advantages(scores))
    assert {(t.reward, t.unscored, t.advantage) for t in found[24:]} == {
        (None, "the job ended", None)
    }
    # Who reads the lake by purpose gets what it got.
    after = load_data_mix(job)
    assert (after.new, after.replay, after.free_texts) == (
        before.new,
        before.replay,
        before.free_texts,
    )
    # A baseline has no output, and writes beside it.
    assert replace(job, method="grpo", output="").name == "grpo" != job.name == "out"


def rolled_out(lake: Lake) -> list[Trajectory]:
    return [t for t in from_batch(lake.read("trajectories")) if t.purpose == "rollout"]
