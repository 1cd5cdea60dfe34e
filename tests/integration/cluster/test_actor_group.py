"""A group of tiny real actors: who gets work, as members come, go, die and fall silent."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from sleeprl.cluster import health_probe
from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.failures import ActorFailure, FailureKind
from sleeprl.cluster.health import HealthEvent, HealthState
from sleeprl.cluster.in_flight import Result
from sleeprl.cluster.remote_actor import AsyncRemoteActor
from sleeprl.cluster.runtime import ResourceError, create_placement_group, remove_placement_group
from sleeprl.weight_sync.verification import StaleWeights
from tests.support.paths import ROOT


class Worker(AsyncRemoteActor):
    def __init__(self) -> None:
        self.stale = False

    async def start(self) -> None:
        pass

    async def spoil(self) -> None:
        self.stale = True

    async def ping(self) -> str:  # type: ignore[override]
        if self.stale:
            raise StaleWeights("wrong weights")
        return "pong"

    async def work(self, seconds: float = 0.0) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )  # fmt: skip
    yield
    ray.shutdown()


def worker() -> Any:
    actor = ray.remote(Worker).options(num_cpus=0, max_concurrency=16).remote()
    ray.get(actor.pid.remote())
    return actor


@pytest.fixture
def two() -> Iterator[ActorGroup]:
    group = ActorGroup("engine", [worker(), worker()], in_flight=2)
    yield group
    group.kill()


def pid(group: ActorGroup, index: int) -> int:
    return ray.get(group.actors[index].pid.remote())  # type: ignore[no-any-return]


def all_of(group: ActorGroup) -> list[Result]:
    """What comes of all that is under way."""
    found: list[Result] = []
    deadline = time.monotonic() + 60
    while group.outstanding:
        assert time.monotonic() < deadline, found
        found += group.ready(0.2)
    return found + group.ready()


@contextmanager
def stopped(*processes: int) -> Iterator[None]:
    """They are there and do nothing."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def until(group: ActorGroup, right: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not right():
        assert time.monotonic() < deadline, str(group.health)
        group.poll_health()
        time.sleep(0.05)


def test_a_new_member_gets_work_when_it_is_verified(two: ActorGroup) -> None:
    assert all(two.submit("work", f"long-{n}", seconds=1.0) for n in range(2))
    index = two.add(worker())
    assert index == 2 and len(two) == 3
    for state in (HealthState.RESTARTING, HealthState.STALE):
        assert two.health[2] is state and two.health.working == [0, 1]
        assert two.submit("work", f"while-{state}")
        if state is HealthState.RESTARTING:
            assert two.probe_dead() == []
            with pytest.raises(ValueError, match="engine-2 is restarting; it cannot be verified"):
                two.health.note(2, HealthEvent.VERIFIED)
            two.start([2])
    assert not two.submit("work", "no room")  # the newcomer has, and may not be given it
    assert {result.actor for result in all_of(two)} == {0, 1}
    two.updated([0, 1])  # an update of which it was not told
    assert two.health[2] is HealthState.STALE
    two.updated([0, 1, 2])
    assert [two.submit("work", f"new-{n}", seconds=0.1) for n in range(7)] == [True] * 6 + [False]
    found = all_of(two)
    assert sorted(r.actor for r in found) == [0, 0, 1, 1, 2, 2]
    assert len({r.value for r in found}) == 3 and len(two.call("work")) == 3


def test_the_calls_of_a_removed_member_are_told_lost(two: ActorGroup) -> None:
    gone = pid(two, 0)
    for number in range(4):
        assert two.submit("work", f"call-{number}", seconds=2.0)
    two.remove(0)
    assert two.health[0] is HealthState.RETIRED and two.outstanding == 4 and len(two) == 1
    found = {result.tag: result for result in all_of(two)}
    assert sorted(found) == [f"call-{number}" for number in range(4)]
    lost = [r for r in found.values() if r.failure is not None]
    assert len(lost) == 2 and {r.actor for r in lost} == {0}
    assert all(
        r.failure.kind is FailureKind.RETRYABLE and "was removed" in r.failure.message for r in lost
    )
    kept = [r for r in found.values() if r.failure is None]
    assert {r.actor for r in kept} == {1} and gone not in {r.value for r in kept}
    # The others keep their numbers, and nobody asks the one that is gone.
    assert len(two.call("work")) == 1 and two.present == [1] and two.actors[0] is None
    assert two.probe_dead() == [] and two.add(worker()) == 2
    two.updated([0, 1])
    assert two.health[0] is HealthState.RETIRED and two.health.working == [1]
    with pytest.raises(ValueError, match="engine-0 was removed"):
        two.replace(0, None)
    others = ActorGroup("engine", two.actors)  # as a learner is told of them
    assert others.present == [1, 2] and others.health[0] is HealthState.RETIRED
    assert len(others.call("work")) == 2


def test_one_that_died_comes_back_through_a_restart_and_an_update(two: ActorGroup) -> None:
    assert two.submit("work", "first", seconds=30.0) and two.submit("work", "second", seconds=0.5)
    os.kill(pid(two, 0), signal.SIGKILL)
    found = {result.tag: result for result in all_of(two)}
    assert (
        found["first"].failure is not None and found["first"].failure.kind is FailureKind.RETRYABLE
    )
    assert found["second"].failure is None
    assert two.health[0] is HealthState.DEAD and two.probe_dead() == [0]
    with pytest.raises(ActorFailure, match=r"engine-0\.work"):
        two.call("work")
    two.replace(0, worker())
    assert two.health[0] is HealthState.RESTARTING and two.probe_dead() == []
    os.kill(pid(two, 0), signal.SIGKILL)  # once more, before it is up
    assert two.probe_dead(10.0) == [0] and two.health[0] is HealthState.DEAD
    two.replace(0, worker())
    two.started([0])
    assert two.health[0] is HealthState.STALE and two.health.working == [1]
    two.updated([0, 1])
    assert two.submit("work", "third") and all_of(two)[0].actor == 0


def test_one_that_says_that_it_cannot_work_gets_none(two: ActorGroup) -> None:
    ray.get(two.actors[1].spoil.remote())
    assert two.probe_dead() == [1] and two.health[1] is HealthState.STALE
    assert two.submit("work", "a") and two.submit("work", "b") and not two.submit("work", "c")
    assert {result.actor for result in all_of(two)} == {0}
    # What it answered before an update says nothing of it after that.
    two.probe.ping([1])
    time.sleep(0.5)  # it answers meanwhile
    two.updated([0, 1])
    two.poll_health()
    assert two.health[1] is HealthState.HEALTHY


def test_the_silent_get_no_work_until_they_answer(
    two: ActorGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_probe, "PING_TIMEOUT_S", 0.5)
    monkeypatch.setattr(health_probe, "PROBE_INTERVAL_S", 0.1)
    two.health.dead_after = 120.0
    two.poll_health()  # asks all
    silent = pid(two, 0)
    os.kill(silent, signal.SIGSTOP)
    try:
        until(two, lambda: two.health[0] is HealthState.SUSPECT)
        assert two.health.working == [1]
        assert two.submit("work", "other") and all_of(two)[0].actor == 1
        assert two.probe_dead(0.1) == []
    finally:
        os.kill(silent, signal.SIGCONT)
    until(two, lambda: two.health[0] is HealthState.HEALTHY)  # its late answer counts


def test_silence_for_too_long_is_death_and_its_calls_are_lost(
    two: ActorGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_probe, "PING_TIMEOUT_S", 0.2)
    monkeypatch.setattr(health_probe, "PROBE_INTERVAL_S", 0.1)
    two.health.dead_after = 1.0
    assert two.submit("work", "never", seconds=0.5)
    silent = pid(two, 0)
    os.kill(silent, signal.SIGSTOP)
    try:
        (lost,) = all_of(two)
        assert (lost.actor, lost.tag) == (0, "never") and lost.failure is not None
        assert (
            lost.failure.kind is FailureKind.RETRYABLE
            and "did not answer for 1 s" in lost.failure.message
        )
        assert 0 in two.probe_dead(0.1) and 0 not in two.health.working
    finally:
        os.kill(silent, signal.SIGCONT)
    time.sleep(1.0)
    two.poll_health()
    assert two.health[0] is HealthState.DEAD  # a late answer does not bring back the dead


def test_who_is_silent_for_too_long_is_not_waited_for_by_those_that_ask_all(
    two: ActorGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_probe, "PING_TIMEOUT_S", 0.2)
    monkeypatch.setattr(health_probe, "PROBE_INTERVAL_S", 0.1)
    assert len(two.call("work", seconds=1.0)) == 2  # in this group silence means nothing yet
    two.health.dead_after = 1.0
    with (
        stopped(pid(two, 1)),
        pytest.raises(ActorFailure, match=r"engine-1\.work.*did not answer for 1 s") as told,
    ):
        two.call("work")
    assert told.value.failure.kind is FailureKind.RETRYABLE and two.probe_dead(0.1) == [1]


def test_one_that_answers_too_late_is_no_less_dead_while_another_still_works(
    two: ActorGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_probe, "PROBE_INTERVAL_S", 0.1)
    two.health.dead_after = 1.0
    frozen, found = pid(two, 0), threading.Event()

    def thaw() -> None:
        while not found.wait(0.05) and two.health[0] is not HealthState.DEAD:
            pass
        os.kill(frozen, signal.SIGCONT)

    waits = threading.Thread(target=thaw)
    waits.start()
    try:
        os.kill(frozen, signal.SIGSTOP)
        with pytest.raises(ActorFailure, match=r"engine-0\.work.*did not answer"):
            two.scatter("work", [{"seconds": 0.0}, {"seconds": 30.0}])
    finally:
        found.set()
        waits.join()


@pytest.mark.parametrize(("verified", "silent"), [([1], [0]), ([], [1]), ([0, 1], [0, 1])])
def test_who_is_silent_and_in_the_way_is_dead(
    two: ActorGroup, verified: list[int], silent: list[int]
) -> None:
    two.updated(verified)
    with stopped(*(pid(two, index) for index in silent)):
        assert two.probe_dead(0.1) == []  # in this group silence means nothing yet
        two.health.dead_after = 1.0
        assert two.probe_dead(0.1) == silent == two.health.having(HealthState.DEAD)
    time.sleep(1.0)
    two.poll_health()
    assert two.health.having(HealthState.DEAD) == silent


def test_a_stale_member_that_answers_late_is_not_dead(two: ActorGroup) -> None:
    two.health.dead_after = 60.0
    two.updated([1])
    slow = pid(two, 0)
    with stopped(slow):
        threading.Timer(1.0, os.kill, (slow, signal.SIGCONT)).start()
        assert two.probe_dead(0.1) == []
    assert two.health[0] is HealthState.STALE and not two.probe.unanswered


def test_engines_are_placed_all_or_none() -> None:
    assert create_placement_group(3, 0, 0, "PACK") is None
    group = create_placement_group(2, 1, 0, "STRICT_PACK")
    assert group is not None and group.bundle_specs == [{"CPU": 1.0}] * 2
    with pytest.raises(ResourceError, match=r"no room within 1 s for 1 engine.*resources\.engines"):
        create_placement_group(1, 1, 0, "PACK", timeout=1.0)
    remove_placement_group(group)
    again = create_placement_group(2, 1, 0, "PACK")  # what was reserved is free again
    remove_placement_group(again)
