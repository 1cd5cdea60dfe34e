"""The curriculum of the examples does what it says; the README is short, and names what there is."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sleeprl.dreaming.types import Outcome, Task
from tests.support.paths import ROOT

HardestFirst: Any = runpy.run_path(str(ROOT / "examples" / "hardest_first.py"))["HardestFirst"]
TASKS = [Task(f"t{i}", i, "dream", ()) for i in range(4)]
GAPS = st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=9, max_size=9)
MOVES = st.lists(st.tuples(st.integers(1, 9), GAPS), max_size=20)


def drawn(curriculum: Any, n: int = 1) -> list[str]:
    return [task.id for task in curriculum.next(n)]


def tell(curriculum: Any, **gaps: float) -> None:
    curriculum.observe([Outcome(task, [0.5], gap) for task, gap in gaps.items()])


def play(curriculum: Any, moves: list[Any]) -> list[str]:
    """Draw, and tell the gaps of what was drawn, as the moves say; what was drawn."""
    told: list[str] = []
    for n, gaps in moves:
        now = drawn(curriculum, n)
        assert len(now) == n
        tell(curriculum, **dict(zip(now, gaps)))
        told += now
    return told


def test_what_is_unheard_of_comes_first_and_then_the_hardest() -> None:
    curriculum = HardestFirst(TASKS, 0)
    assert drawn(curriculum) == ["t0"]
    tell(curriculum, t0=5.0)
    assert drawn(curriculum, 3) == ["t1", "t2", "t3"]
    tell(curriculum, t1=0.5, t2=3.0, t3=6.0)
    assert drawn(curriculum, 4) == ["t3", "t0", "t2", "t1"]


def test_what_is_under_way_waits_until_it_is_heard_of() -> None:
    curriculum = HardestFirst(TASKS, 0)
    drawn(curriculum, 4)
    tell(curriculum, t0=5.0, t1=1.0)
    assert [drawn(curriculum) for _ in range(2)] == [["t0"], ["t1"]]
    tell(curriculum, t0=4.0)
    assert drawn(curriculum) == ["t0"]


def test_more_are_drawn_than_there_are() -> None:
    whole, single = HardestFirst(TASKS, 0), HardestFirst(TASKS, 0)
    told = drawn(whole, 10)
    assert sorted(Counter(told).values()) == [2, 2, 3, 3]
    assert [drawn(single)[0] for _ in range(10)] == told


@settings(deadline=None)
@given(before=MOVES, after=MOVES)
def test_its_state_restores_the_exact_next_choices(before: list[Any], after: list[Any]) -> None:
    first, other = HardestFirst(TASKS, 0), HardestFirst(TASKS, 0)
    play(first, before)
    late = drawn(first, 3)
    state = json.loads(json.dumps(first.state_dict()))  # it survives a file
    play(other, [(3, [0.5, 2.0, 0.5])])
    other.load_state_dict(state)
    for curriculum in (first, other):  # what was under way is heard of after the restart
        tell(curriculum, **dict.fromkeys(late, 2.0))
    assert play(other, after) == play(first, after)
    assert other.state_dict() == first.state_dict()


def test_the_readme_says_in_five_lines_what_this_is() -> None:
    opening = (ROOT / "README.md").read_text().partition("\n## ")[0].splitlines()
    assert opening[0] == "# sleepRL"
    told = [line for line in opening[1:] if line]
    assert len(told) <= 5 and all(len(line) <= 130 for line in told)


def test_the_readme_names_files_that_exist() -> None:
    folders = "benchmarks|cluster|docs|examples|requirements|tuning"
    named = re.findall(rf"(?:{folders})/[\w./-]+\.\w+", (ROOT / "README.md").read_text())
    assert {"examples/brief_reward.py", "examples/hardest_first.py"} <= {*named}
    assert [name for name in named if "NAME" not in name and not (ROOT / name).is_file()] == []
