"""What a model has asked itself goes with it from night to night."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sleeprl.self_study import question_bank
from sleeprl.self_study.question_bank import rotate

questions = st.lists(st.sampled_from("abcdefghij"), unique=True)


@given(questions, questions, questions, st.integers(0, 12))
def test_nothing_comes_twice_and_nothing_is_lost_below_the_limit(
    kept: list[str], new: list[str], rehearsed: list[str], limit: int
) -> None:
    found = rotate(kept, new, rehearsed, limit, 0)
    everything = {*kept, *new, *rehearsed}
    assert len(found) == len(set(found)) == min(limit, len(everything))
    assert set(found) <= everything
    assert found == rotate(kept, new, rehearsed, limit, 0)


def test_the_new_comes_first_and_what_was_just_asked_last() -> None:
    assert rotate(["a", "b", "c"], ["n", "b"], ["a", "f"], 9, 0) == ["n", "b", "c", "a", "f"]


def test_every_question_is_asked_in_its_turn() -> None:
    kept, asked = list("abcdefg"), set()
    for night in range(4):
        again = kept[:2]
        asked |= set(again)
        kept = rotate(kept, [], again, 100, night)
    assert asked == set("abcdefg") and kept == list("bcdefga")


def test_it_is_read_back_and_a_model_that_never_slept_has_none(tmp_path: Path) -> None:
    assert question_bank.load(tmp_path) == []
    question_bank.save(["Where does Ann live?"], tmp_path)
    assert question_bank.load(tmp_path) == ["Where does Ann live?"]
