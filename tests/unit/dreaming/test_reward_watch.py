"""A reward that fails on every dream is noticed: a warning, then the end."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sleeprl.config.schema import ConfigError, DreamingConfig
from sleeprl.data.trajectory import Trajectory
from sleeprl.dreaming.messages import StepResult
from sleeprl.dreaming.metrics import describe_unscored, reward_metrics
from sleeprl.dreaming.pipeline import Pipeline
from sleeprl.dreaming.reward_watch import LIMIT, RewardWatch

FAILURE = "reward './mine.py:judge' raised KeyError: 'answer'"


def dream(uid: str, reward: float | None) -> Trajectory:
    return Trajectory(
        uid, "t", 0, "dream", [1], [2], [-1.0], [0], "stop",
        reward=reward, unscored=None if reward is not None else FAILURE, gap=1.0,
    )  # fmt: skip


def test_no_reward_is_not_a_reward_of_zero() -> None:
    failed = [dream("a", None), dream("b", None)]
    metrics = reward_metrics(failed)
    assert math.isnan(metrics["reward"]) and math.isnan(metrics["reward_positive"])
    assert metrics["unscored"] == 2
    assert describe_unscored(failed) == FAILURE
    some = [*failed, dream("c", 0.0)]
    assert reward_metrics(some)["reward"] == 0
    assert describe_unscored(some) == describe_unscored([]) == ""


@pytest.mark.parametrize(
    ("steps", "first", "failures", "warned", "stops"),
    [
        (8, 1, [1, 1, 1, 1], 2, 3),
        (8, 1, [0, 1, 1, 0, 1, 1, 0], 4, None),
        (8, 1, [0, 1, 1, 1], 2, 4),
        (2, 1, [1, 1], 1, 2),
        (1, 1, [1], 0, 1),
        (4, 3, [1, 1], 1, 2),  # resumed, with the count begun again
        (8, 1, [0] * 8, 0, None),
        (8, 1, [0] * 7 + [1], 1, None),
    ],
)
def test_it_warns_then_stops(
    steps: int, first: int, failures: list[int], warned: int, stops: int | None
) -> None:
    warnings: list[str] = []
    watch, config = RewardWatch(), replace(DreamingConfig(), reward="mine", steps=steps)
    stopped, message = None, ""
    for update, failed in enumerate(failures, start=1):
        try:
            watch.check(config, first + update - 1, FAILURE if failed else "", warnings.append)
        except ConfigError as error:
            stopped, message = update, str(error)
            break
    assert stopped == stops
    assert stops is None or all(
        part in message for part in ("dreaming.reward='mine'", FAILURE, "resume")
    )
    assert len(warnings) == warned
    assert all(f"could be scored: {FAILURE}" in text for text in warnings)


def test_the_pipeline_records_an_update_before_its_checkpoint_and_watches_the_rewards() -> None:
    """A kill between the two repeats a line of metrics.jsonl; the other order would lose one."""
    done: list[str] = []

    class Checkpoint(SimpleNamespace):
        def save(self) -> None:
            done.append(f"saved {self.version}")

        def version_path(self, version: int) -> str:
            return ""

    checkpoint = Checkpoint(version=0, num_finished=0, curriculum_state=None)
    nothing: Any = SimpleNamespace(call=lambda *_, **__: [None])
    pipeline: Any = Pipeline.__new__(Pipeline)
    vars(pipeline).update(
        queue=SimpleNamespace(checkpoint=checkpoint),
        store=SimpleNamespace(
            latency=SimpleNamespace(end_step=lambda: 0, publish_lag=lambda: 0.0, last_ages=[]),
            counts=SimpleNamespace(learning=1),
            finish_step=lambda _: [],
        ),
        learner=SimpleNamespace(
            collect=lambda *_: [StepResult({"reward": math.nan}, [], FAILURE)],
            call=lambda *_, **__: [None],
        ),
        curriculum=nothing,
        step=[],
        step_groups=[],
        stale=[],
        _publish=dict,
        _snapshot=dict,
        reward_watch=RewardWatch(),
        config=DreamingConfig(),
        recovery=SimpleNamespace(on_restart=lambda text: done.append("warned")),
    )
    for _ in range(LIMIT - 1):
        pipeline._finish_step(lambda step, metrics: done.append(f"recorded {step}"))
    assert done == ["recorded 1", "warned", "saved 1", "recorded 2", "warned", "saved 2"]
    with pytest.raises(ConfigError, match="nothing is learned like this"):
        pipeline._finish_step(lambda step, metrics: done.append(f"recorded {step}"))
    assert done[-1] == "recorded 3"
