"""What a resumed job reports, so that its curves have no holes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sleeprl.consolidation import ray_job
from sleeprl.consolidation.messages import EarlierSteps, JobEnd, StepReport, TrainerReady
from sleeprl.consolidation.ray_job import TrainingProcesses

END = JobEnd(6, 60, 3, [0])


def report(step: int) -> StepReport:
    return StepReport(step, {"loss": float(step)})


@pytest.mark.parametrize(
    ("recorded", "passed"),
    [
        ({1, 2, 3, 4}, [5, 6]),
        ({1, 2}, [3, 4, 5, 6]),  # the driver was killed before it saw the last two
        ({1, 4}, [2, 3, 5, 6]),
        (set(), [1, 2, 3, 4, 5, 6]),
        (None, [5, 6]),
    ],
)
def test_steps_that_an_earlier_attempt_did_not_record_are_recorded(
    monkeypatch: pytest.MonkeyPatch, recorded: set[int] | None, passed: list[int]
) -> None:
    earlier = EarlierSteps([report(step) for step in (1, 2, 3, 4)])
    polls = iter([[earlier, TrainerReady()], [report(5)], [report(6), END]])
    monkeypatch.setattr(ray_job.ray, "get", lambda reports: reports)
    processes: Any = TrainingProcesses.__new__(TrainingProcesses)
    vars(processes).update(
        name="job",
        thread=SimpleNamespace(join=lambda _: None, is_alive=lambda: True),
        channel=SimpleNamespace(drain=SimpleNamespace(remote=lambda: next(polls))),
    )
    steps: list[int] = []
    assert processes._follow(lambda each: steps.append(each.step), recorded) == END
    assert steps == passed


def test_a_worker_that_is_restarted_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = EarlierSteps([report(1), report(2)])
    polls = iter([[report(1), report(2), report(3)], [earlier], [report(3), END]])
    monkeypatch.setattr(ray_job.ray, "get", lambda reports: reports)
    processes: Any = TrainingProcesses.__new__(TrainingProcesses)
    vars(processes).update(
        name="job",
        thread=SimpleNamespace(join=lambda _: None, is_alive=lambda: True),
        channel=SimpleNamespace(drain=SimpleNamespace(remote=lambda: next(polls))),
    )
    steps: list[int] = []
    processes._follow(lambda each: steps.append(each.step), set())
    assert steps == [1, 2, 3, 3]  # of a step that is done again the last counts
