"""The curriculum of the examples does what it says."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeprl.dreaming.tasks import Outcome, Task

ROOT = Path(__file__).parent.parent
RoundRobin: Any = runpy.run_path(str(ROOT / "examples" / "round_robin.py"))["RoundRobin"]
TASKS = [Task(f"t{i}", i, "dream", ()) for i in range(4)]
HARD, EASY = 2.0, 0.5

rounds = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.sampled_from([HARD, EASY]), min_size=9, max_size=9)),
    max_size=30,
)


def play(curriculum: Any, moves: list[Any]) -> list[str]:
    """Draw, and tell the gaps of what was drawn, as the moves say; what was drawn."""
    drawn: list[str] = []
    for n, gaps in moves:
        now = [task.id for task in curriculum.next(n)]
        assert len(now) == n
        curriculum.observe([Outcome(task, [0.5], gap) for task, gap in zip(now, gaps)])
        drawn += now
    return drawn


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1]])
@settings(deadline=None)
@given(moves=rounds)
def test_every_task_has_its_turn_in_each_pass(tasks: list[Task], moves: list[Any]) -> None:
    drawn = play(RoundRobin(tasks, 0), moves)
    times = [Counter(drawn)[task.id] for task in tasks]
    assert min(times) >= len(drawn) // (2 * len(tasks))  # a pass in which all were hard
    assert max(times) <= 2 * (min(times) + 1)


def test_a_hard_task_comes_twice_and_an_easy_one_once() -> None:
    curriculum = RoundRobin(TASKS, 0)
    moves = [(1, [HARD])] * 3 + [(1, [EASY])] * 4
    assert play(curriculum, moves) == ["t0", "t0", "t1", "t1", "t2", "t3", "t0"]


@settings(deadline=None)
@given(before=rounds, after=rounds)
def test_its_state_restores_the_exact_next_choices(before: list[Any], after: list[Any]) -> None:
    first, other = RoundRobin(TASKS, 0), RoundRobin(TASKS, 0)
    play(first, before)
    late = first.next(3)
    state = json.loads(json.dumps(first.state_dict()))  # it survives a file
    play(other, [(3, [HARD, EASY, HARD])])
    other.load_state_dict(state)
    for curriculum in (first, other):  # what was under way is heard of after the restart
        curriculum.observe([Outcome(task.id, [0.5], HARD) for task in late])
    assert play(other, after) == play(first, after)
    assert other.state_dict() == first.state_dict()
