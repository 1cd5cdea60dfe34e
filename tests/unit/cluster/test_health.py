"""What may become of an engine: the transitions, over random histories."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleeprl.cluster.health import TRANSITIONS, GroupHealth, HealthEvent, HealthState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


histories = st.lists(
    st.one_of(st.sampled_from(list(HealthEvent)), st.floats(0.0, 40.0)), max_size=40
)


def play(
    history: list[HealthEvent | float],
) -> tuple[GroupHealth, list[tuple[HealthState, HealthEvent, HealthState]]]:
    """An engine's history, without what cannot happen in its state; floats are seconds."""
    clock = Clock()
    health = GroupHealth(2, dead_after=60.0, clock=clock)
    steps = []
    for item in history:
        if not isinstance(item, HealthEvent):
            clock.now += item
            continue
        before = health[1]
        if item in TRANSITIONS[before]:
            steps.append((before, item, health.note(1, item)))
        else:
            with pytest.raises(ValueError, match=f"engine-1 is {before}; it cannot be {item}"):
                health.note(1, item)
            assert health[1] is before
    assert health[0] is HealthState.HEALTHY  # the other one has nothing to do with it
    return health, steps


@given(histories)
def test_only_a_verified_update_brings_an_engine_back(history: list[HealthEvent | float]) -> None:
    _, steps = play(history)
    for before, event, after in steps:
        if after is HealthState.HEALTHY and before not in (
            HealthState.HEALTHY,
            HealthState.SUSPECT,
        ):
            assert event is HealthEvent.VERIFIED and before is HealthState.STALE


@given(histories)
def test_the_dead_come_back_through_a_restart_and_an_update(
    history: list[HealthEvent | float],
) -> None:
    _, steps = play(history)
    states = [after for _, _, after in steps]
    for number, state in enumerate(states):
        if state is HealthState.HEALTHY and HealthState.DEAD in states[:number]:
            last = number - 1 - states[:number][::-1].index(HealthState.DEAD)
            since = states[last:number]
            assert HealthState.RESTARTING in since and HealthState.STALE in since


@given(histories)
def test_work_goes_to_the_healthy_and_weights_to_whoever_is_there(
    history: list[HealthEvent | float],
) -> None:
    health, _ = play(history)
    assert (1 in health.working) == (health[1] is HealthState.HEALTHY)
    there = (HealthState.HEALTHY, HealthState.SUSPECT, HealthState.STALE)
    assert (1 in health.updatable) == (health[1] in there)


@given(histories)
def test_a_retired_engine_stays_retired(history: list[HealthEvent | float]) -> None:
    _, steps = play([HealthEvent.RETIRE, *history])
    assert {after for _, _, after in steps} == {HealthState.RETIRED}


def test_every_state_says_what_a_loss_means() -> None:
    assert TRANSITIONS.keys() == set(HealthState)
    for state, events in TRANSITIONS.items():
        lost = events[HealthEvent.LOST]
        assert lost is (HealthState.RETIRED if state is HealthState.RETIRED else HealthState.DEAD)


def test_who_is_suspect_for_too_long_is_dead() -> None:
    clock = Clock()
    health = GroupHealth(1, dead_after=60.0, clock=clock)
    health.note(0, HealthEvent.MISSED)
    clock.now += 50.0
    assert (
        health.note(0, HealthEvent.MISSED) is HealthState.SUSPECT
    )  # not anew: it is still the same silence
    clock.now += 9.0
    assert health[0] is HealthState.SUSPECT
    assert health.note(0, HealthEvent.ANSWERED) is HealthState.HEALTHY
    health.note(0, HealthEvent.MISSED)
    clock.now += 61.0
    assert (
        health.note(0, HealthEvent.ANSWERED) is HealthState.HEALTHY
    )  # it did, and was not heard for so long
    health.note(0, HealthEvent.MISSED)
    clock.now += 61.0
    assert health.note(0, HealthEvent.MISSED) is HealthState.DEAD and health.updatable == []
    assert health.note(0, HealthEvent.ANSWERED) is HealthState.DEAD


def test_a_stale_engine_is_not_dead_for_being_so_for_long() -> None:
    clock = Clock()
    health = GroupHealth(1, clock=clock)
    health.note(0, HealthEvent.UNVERIFIED)
    clock.now += 10_000.0
    assert health[0] is HealthState.STALE
    assert health.note(0, HealthEvent.VERIFIED) is HealthState.HEALTHY


def test_a_stale_engine_that_is_silent_for_too_long_is_dead() -> None:
    clock = Clock()
    health = GroupHealth(1, dead_after=60.0, clock=clock)
    health.note(0, HealthEvent.UNVERIFIED)
    clock.now += 61.0
    assert (
        health.note(0, HealthEvent.MISSED) is HealthState.STALE
    )  # that is when its silence begins
    clock.now += 61.0
    assert health.note(0, HealthEvent.ANSWERED) is HealthState.STALE
    assert health.note(0, HealthEvent.MISSED) is HealthState.STALE
    clock.now += 59.0
    assert health.note(0, HealthEvent.MISSED) is HealthState.STALE
    clock.now += 2.0
    assert health.note(0, HealthEvent.MISSED) is HealthState.DEAD and health.updatable == []
    assert health.note(0, HealthEvent.RESTART) is HealthState.RESTARTING
    clock.now += 61.0
    assert (
        health.note(0, HealthEvent.MISSED) is HealthState.RESTARTING
    )  # it comes up for as long as it takes
    assert health.note(0, HealthEvent.STARTED) is HealthState.STALE
    assert health.note(0, HealthEvent.MISSED) is HealthState.STALE
