"""Levels, their clock and the plan of a transfer: all pure."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeprl.memory.levels import CONTEXT, UNITS, Clock, Due, Level
from sleeprl.memory.slots import FILE, LOW_RANK, PoolFull, Slots
from sleeprl.memory.transfer import Merge, Transfer, WhenFull, plan
from sleeprl.memory.wake_learning import accumulate, prospective


@st.composite
def ladders(draw: st.DrawFn) -> tuple[list[Level], int | None]:
    """Levels whose periods divide each other, each with room enough; and the context's period."""
    context = draw(st.none() | st.integers(1, 3))
    period = context or draw(st.integers(1, 4))
    levels = []
    for number in range(draw(st.integers(1, 4))):
        ratio = draw(st.integers(1, 4)) if number or context else 1
        period *= ratio
        levels.append(Level(period, ratio + draw(st.integers(0, 2))))
    return levels, context


# --- the clock --------------------------------------------------------------------


def test_the_ladder_of_the_paper() -> None:
    clock = Clock([Level(1000, 1), Level(5000, 5), Level(10000, 2)], unit="tokens")
    assert clock.pools == (1, 5, 2)
    assert clock.advance(999) == []
    assert clock.advance(1) == [Due(1000, (1,))]
    assert clock.advance(3999) == [Due(2000, (1,)), Due(3000, (1,)), Due(4000, (1,))]
    assert clock.advance(1) == [Due(5000, (1, 2))]
    assert clock.advance(5000)[-1] == Due(10000, (1, 2, 3))
    assert clock.now == 10000


def test_two_levels_the_context_and_one_pool() -> None:
    """The OpenReview version's two blocks: attention, and the MLPs with five times its period."""
    clock = Clock([Level(5, 5)], context=1)
    assert clock.advance(1) == [Due(1, (CONTEXT,))]
    assert clock.advance(4)[-1] == Due(5, (CONTEXT, 1))


@settings(max_examples=200)
@given(ladders(), st.lists(st.integers(0, 60), max_size=6))
def test_it_fires_at_every_multiple_once_however_time_passes(
    ladder: tuple[list[Level], int | None], amounts: list[int]
) -> None:
    levels, context = ladder
    clock = Clock(levels, context=context)
    told = [due for amount in amounts for due in clock.advance(amount)]
    periods = ([] if context is None else [(CONTEXT, context)]) + [
        (number, level.period) for number, level in enumerate(levels, start=1)
    ]
    expected = []
    for now in range(1, sum(amounts) + 1):
        if senders := tuple(number for number, period in periods if now % period == 0):
            expected.append(Due(now, senders))
    assert told == expected
    assert all(list(due.senders) == sorted(due.senders) for due in told)  # fastest first


@given(ladders(), st.integers(0, 80), st.integers(0, 80), st.sampled_from(UNITS))
def test_a_restored_clock_goes_on_where_the_saved_one_was(
    ladder: tuple[list[Level], int | None], before: int, after: int, unit: str
) -> None:
    levels, context = ladder
    first, second = Clock(levels, unit, context), Clock(levels, unit, context)
    first.advance(before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.advance(after) == second.advance(after)
    assert first.state_dict() == second.state_dict()


def test_a_clock_of_another_unit_is_refused() -> None:
    saved = Clock([Level(1, 1)], "tokens").state_dict()
    with pytest.raises(ValueError, match=r"'tokens'.*'nights'"):
        Clock([Level(1, 1)], "nights").load_state_dict(saved)


@given(st.integers(2, 30), st.integers(2, 90), st.booleans())
def test_periods_that_do_not_divide_are_both_named(fast: int, slow: int, context: bool) -> None:
    def build() -> Clock:
        if context:
            return Clock([Level(slow, 99)], context=fast)
        return Clock([Level(fast, 99), Level(slow, 99)])

    if slow % fast:
        with pytest.raises(ValueError, match=f"period {slow} of .* period {fast} of"):
            build()
    else:
        build()


def test_a_pool_smaller_than_the_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match=r"level 2 has slots=4.*at least 5 slots"):
        Clock([Level(2, 1), Level(10, 4)])
    with pytest.raises(ValueError, match=r"level 1 has slots=4.*at least 5 slots"):
        Clock([Level(5, 4)], context=1)
    Clock([Level(5, 5), Level(10, 2)], context=1)


@pytest.mark.parametrize(
    ("levels", "options", "told"),
    [
        ([], {}, "levels is empty"),
        ([Level(0, 1)], {}, "level 1 has period=0"),
        ([Level(3, 3)], {"context": 0}, "the context has period=0"),
        ([Level(3, 0)], {}, "slots=0"),
        ([Level(3, 1)], {"unit": "days"}, "unit='days'.*optimizer_steps"),
    ],
)
def test_what_is_no_clock(levels: list[Level], options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Clock(levels, **options)


def test_time_does_not_run_backwards() -> None:
    with pytest.raises(ValueError, match="amount=-1"):
        Clock([Level(1, 1)]).advance(-1)


# --- pools of levels --------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 9), st.integers(1, 3))
def test_levels_share_the_columns_out(pools: list[int], base: int, width: int) -> None:
    slots = Slots(base, width, sum(pools), (), tuple(pools))
    owned = [list(slots.of_level(level)) for level in range(1, slots.levels + 1)]
    assert [*chain(*owned)] == list(range(slots.count))
    columns = range(slots.total_width)
    parts = [list(columns[slots.level_columns(level)]) for level in range(1, slots.levels + 1)]
    assert [*chain(range(base), *parts)] == list(columns)
    for level, own in enumerate(owned, start=1):
        filled = slots
        for slot in own:
            assert filled.next_free(level) == slot
            filled = filled.filled(slot)
            assert set(columns[slots.columns(slot)]) <= set(parts[level - 1])
        assert filled.used_in(level) == tuple(own)
        with pytest.raises(PoolFull, match=f"level {level} "):
            filled.next_free(level)
        assert filled.freed(own) == slots


def test_levels_that_are_not_there() -> None:
    slots = Slots(4, 1, 3, (2, 0), (1, 2))
    for level in (0, 3):
        with pytest.raises(ValueError, match="levels are 1 to 2"):
            slots.of_level(level)
    with pytest.raises(ValueError, match=r"pools=\[1, 1\].*count=3"):
        Slots(4, 1, 3, (), (1, 1))
    with pytest.raises(ValueError, match=r"\[1\] are not all in use"):
        slots.freed([1])


def test_a_layout_from_before_there_were_levels(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"base_width": 96, "width": 8, "count": 5, "used": [3, 0]}')
    slots = Slots.load(tmp_path)
    assert slots == Slots(96, 8, 5, (3, 0), (5,), "gated_mlp")
    assert slots.next_free() == 1 and slots.levels == 1


def test_a_layout_with_levels_on_disk(tmp_path: Path) -> None:
    slots = Slots(0, 8, 5, (4, 0), (2, 3), LOW_RANK)
    slots.save(tmp_path)
    assert Slots.load(tmp_path) == slots


# --- the plan ---------------------------------------------------------------------

THREE = Slots(96, 8, 6, (), (2, 2, 2))


def test_mode_a_brings_the_context_into_the_fastest_level() -> None:
    slots = THREE.filled(4).filled(0)
    (step,) = plan(slots, CONTEXT)
    assert step == Transfer(CONTEXT, 1, (4, 0), (4, 0, 1), slot=1, reset=())
    assert isinstance(step, Transfer) and step.teacher_has_context
    assert step.after(slots).used == (4, 0, 1)


def test_mode_b_brings_all_slots_of_a_level_into_one_of_the_next() -> None:
    slots = THREE.filled(1).filled(4).filled(2).filled(0)
    (step,) = plan(slots, 1)
    assert step == Transfer(1, 2, (1, 4, 2, 0), (4, 2, 3), slot=3, reset=(1, 0))
    assert isinstance(step, Transfer) and not step.teacher_has_context
    assert step.after(slots).used == (4, 2, 3)


def test_without_a_reset_a_level_keeps_what_it_handed_on() -> None:
    slots = THREE.filled(1).filled(4).filled(2).filled(0)
    (step,) = plan(slots, 1, reset=False)
    assert step == Transfer(1, 2, (1, 4, 2, 0), (4, 2, 3), slot=3, reset=())
    assert isinstance(step, Transfer) and step.teacher_only == (
        1,
        0,
    )  # taught by them, without them
    assert step.after(slots).used == (1, 4, 2, 0, 3)
    full = THREE.filled(2).filled(5).filled(4)
    room, step = plan(full, 2, reset=False)
    assert isinstance(room, Transfer) and room.reset == room.teacher_only == (
        5,
        4,
    )  # or there is no room
    assert isinstance(step, Transfer) and step.reset == () and step.teacher_only == (2,)


def test_an_empty_sender_has_nothing_to_hand_on() -> None:
    assert plan(THREE.filled(4), 1) == plan(THREE.filled(4), 2) == ()
    assert plan(THREE.filled(4), 3) == ()  # the slowest keeps what it has while there is room


def test_the_full_slowest_level_is_distilled_into_one_slot_first() -> None:
    slots = THREE.filled(2).filled(5).filled(4)
    room, step = plan(slots, 2)
    assert room == Transfer(3, 3, (2, 5, 4), (2, 4), slot=4, reset=(5, 4))
    assert step == Transfer(2, 3, (2, 4), (4, 5), slot=5, reset=(2,))
    assert step.after(room.after(slots)).used == (4, 5)
    assert plan(slots, 3) == (room,)  # its own boundary


def test_or_its_oldest_slot_becomes_base() -> None:
    slots = THREE.filled(2).filled(5).filled(4)
    room, step = plan(slots, 2, WhenFull.MERGE)
    assert room == Merge(5) and isinstance(step, Transfer) and step.slot == 5
    assert room.after(slots) == Slots(96 + 8, 8, 6, (2, 4), (2, 2, 2))
    assert plan(slots, 3, "merge") == (Merge(5),)


def test_or_it_is_an_error() -> None:
    slots = THREE.filled(2).filled(5).filled(4)
    with pytest.raises(PoolFull, match=r"level 3, the slowest.*when_full='stop'.*'distil'"):
        plan(slots, 2, "stop")
    assert plan(slots, 3, "stop") == ()
    with pytest.raises(PoolFull, match="needs two slots"):
        plan(Slots(96, 8, 1, (0,)), CONTEXT)
    with pytest.raises(ValueError, match="forget"):
        plan(slots, 2, "forget")


def test_a_middle_level_that_is_full_is_never_emptied_out_of_turn() -> None:
    with pytest.raises(PoolFull, match="level 2"):
        plan(THREE.filled(0).filled(2).filled(3), 1)


@settings(max_examples=150)
@given(ladders(), st.integers(1, 120), st.sampled_from(["distil", "merge"]))
def test_a_ladder_with_room_for_its_ratios_never_overflows(
    ladder: tuple[list[Level], int | None], amount: int, when_full: str
) -> None:
    levels, _ = ladder
    last = levels[-1]
    levels = [*levels[:-1], Level(last.period, max(2, last.slots))]
    context = 1
    if levels[0].slots < levels[0].period:
        levels[0] = Level(levels[0].period, levels[0].period)
    clock = Clock(levels, context=context)
    slots = Slots(16, 2, sum(clock.pools), (), clock.pools)
    for due in clock.advance(amount):
        for sender in due.senders:
            for step in plan(slots, sender, when_full):
                before, slots = slots, step.after(slots)
                if isinstance(step, Merge):
                    assert step.slot in before.used_in(slots.levels)
                    continue
                assert set(step.teacher_on) == set(before.used)
                assert set(step.student_on) == set(slots.used)
                assert step.slot in before.of_level(step.receiver)
                assert step.slot not in before.used or step.slot in step.reset
                assert step.teacher_only == step.reset
                if step.sender != CONTEXT:
                    assert step.reset == before.used_in(step.sender)
        for level in due.senders:
            if level not in (CONTEXT, slots.levels):
                assert slots.used_in(level) == ()  # plastic again
    assert slots.used or slots.base_width > 16  # nothing was lost: it is in a slot or in the base


# --- wake learning ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=17))
def test_equation_2(period: int, errors: list[float]) -> None:
    """theta moves at multiples of the period only, then by all that was accumulated in it."""
    eta = 0.5
    clock = Clock([Level(period, period)], unit="optimizer_steps")
    theta, total = {"w": torch.tensor([1.0])}, {}
    for step, error in enumerate(errors, start=1):
        total = accumulate(total, {"w": torch.tensor([error])}, eta)
        before = theta["w"].clone()
        if clock.advance(1):
            theta, total = prospective(theta, total), {}
        else:
            assert torch.equal(theta["w"], before)
        applied = errors[: step // period * period]
        assert theta["w"].item() == pytest.approx(1.0 - eta * sum(applied), abs=1e-4)


def test_accumulating_is_pure_and_does_not_round_small_steps_away() -> None:
    start = {"w": torch.ones(2, dtype=torch.bfloat16)}
    total: dict[str, torch.Tensor] = {}
    for _ in range(1000):
        previous, total = total, accumulate(total, {"w": torch.full((2,), 0.5)}, 1e-3)
        assert total["w"] is not previous.get("w")
    assert total["w"].tolist() == pytest.approx([0.5, 0.5], rel=1e-4)
    moved = prospective(start, total)
    assert moved["w"].dtype == torch.bfloat16 and moved["w"].tolist() == [0.5, 0.5]
    assert start["w"].tolist() == [1.0, 1.0]  # computed, not applied
    with pytest.raises(ValueError, match=r"\['x'\]"):
        prospective(start, {"x": total["w"]})
