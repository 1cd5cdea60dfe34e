"""Grades and figures, on answers written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from sleeprl.actors.engine import Completion, Sampling
from sleeprl.chat import Chat
from sleeprl.evaluation.figures import ask, measure, perplexity
from sleeprl.evaluation.probes import Day, Probe, grade, is_correct, read_questions


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("Oslo", "Oslo", True),
        ("oslo.", "Oslo", True),
        ("She lives in Oslo.", "Oslo", True),
        ("In the city of Oslo", "Oslo", True),
        ("New York", "new  york", True),
        ("York New", "New York", False),
        ("New", "New York", False),
        ("Newark", "New", False),  # words, not letters
        ("Bergen", "Oslo", False),
        ("", "Oslo", False),
        ("Oslo", "", False),
        ("Oslo Bergen Rome Paris Lima", "Oslo", True),  # four more words are still an answer
        ("Oslo Bergen Rome Paris Lima Bonn", "Oslo", False),  # five are a list
        ("born in 1987", "1987", True),
        ("born in 19870", "1987", False),
        ("Zoë O'Neil", "zoë o'neil", True),
        ("not Oslo", "Oslo", False),
        ("Love Me Not", "love me not", True),  # a denial only where the gold has none
    ],
)
def test_is_correct(answer: str, gold: str, correct: bool) -> None:
    assert is_correct(answer, gold) is correct


def test_a_rival_beside_the_answer_is_a_guess() -> None:
    assert is_correct("Oslo, in Norway", "Oslo", rivals={"bergen"})
    assert not is_correct("Oslo or Bergen", "Oslo", rivals={"bergen"})


def test_grade_goes_by_position_and_refuses_other_lengths() -> None:
    probes = [Probe("q", "Oslo", "recall"), Probe("q", "Rome", "recall")]
    assert grade(["Oslo", "Oslo"], probes) == [True, False]
    with pytest.raises(ValueError):
        grade(["Oslo"], probes)


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_read_questions(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question": "Where?", "answer": "Oslo"},
        "",
        {"question": "Who?", "answer": "Zoë", "kind": "retention", "experience": "a text"},
    )
    assert read_questions(path) == [
        Probe("Where?", "Oslo", "recall"),
        Probe("Who?", "Zoë", "retention", "a text"),
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"question": "Where?"', "q.jsonl:2"),
        ({"question": "Where?"}, "answer"),
        (["Where?", "Oslo"], "q.jsonl:2"),
        ({"question": "Where?", "answer": "Oslo", "kind": "memory"}, "kind='memory'"),
        ({"question": "Where?", "answer": None}, "q.jsonl:2"),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(tmp_path: Path, row: object, words: str) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "Where?", "answer": "Oslo"}, row)
    with pytest.raises(ValueError, match=r"q\.jsonl:2") as caught:
        read_questions(path)
    assert words in str(caught.value)


def test_an_answer_that_is_a_number_can_be_graded(tmp_path: Path) -> None:
    probes = read_questions(write(tmp_path / "q.jsonl", {"question": "When?", "answer": 1987}))
    assert grade(["in 1987"], probes) == [True]


def test_a_day_round_trip(tmp_path: Path) -> None:
    probes = [Probe("q", "a", "recall", "text"), Probe("p", "b", "two_hop")]
    day = Day(["text"], probes, ["held out"])
    day.save(tmp_path / "day.json")
    assert Day.load(tmp_path / "day.json") == day
    assert day.of_kind("two_hop") == [probes[1]]


# --- figures ----------------------------------------------------------------------


class Script:
    """In the place of a fleet: answers what is written down for a prompt."""

    def __init__(self, chat: Chat, answers: dict[str, str]) -> None:
        self.chat = chat
        self.answers = {tuple(chat.prompt(k)): chat.response(v) for k, v in answers.items()}
        self.sampling: list[Sampling] = []

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[Sampling]
    ) -> list[Completion]:
        self.sampling += sampling
        found = [self.answers[tuple(prompt)] for prompt in prompts]
        return [Completion(ids, [0.0] * len(ids), [0] * len(ids), "stop") for ids in found]

    def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Token t of a sequence has probability 1 / (t + 1)."""
        return [[-math.log(t + 1) for t in range(1, len(s))] for s in sequences]


DAY = Day(
    documents=["Ann lives in Oslo."],
    probes=[
        Probe("Where is Ann?", "Oslo", "recall", "Ann lives in Oslo."),
        Probe("Is Ann north?", "yes", "recall", "Ann lives in Oslo."),
        Probe("Capital of France?", "Paris", "retention"),
    ],
    texts=["abc", "d", ""],
)


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(tiny_model)


def test_the_context_stands_before_the_question_only_where_it_is_asked_for(chat: Chat) -> None:
    fleet = Script(
        chat,
        {
            "Where is Ann?": "I cannot know",
            "Is Ann north?": "yes",
            "Capital of France?": "Paris",
            "Ann lives in Oslo.\n\nWhere is Ann?": "Oslo",
            "Ann lives in Oslo.\n\nIs Ann north?": "yes",
        },
    )
    without = ask(fleet, chat, DAY.probes, with_context=False, max_tokens=9)  # type: ignore[arg-type]
    assert without == ["I cannot know", "yes", "Paris"]
    with_context = ask(fleet, chat, DAY.probes, with_context=True, max_tokens=9)  # type: ignore[arg-type]
    assert with_context == ["Oslo", "yes", "Paris"]
    assert {(s.temperature, s.max_tokens) for s in fleet.sampling} == {(0.0, 9)}
    figures = measure(fleet, chat, DAY, with_context=False, max_tokens=9, max_length=64)  # type: ignore[arg-type]
    # "abc" has two scored tokens of probability 1/2 and 1/3; single letters have none.
    assert figures == {
        "recall": 0.5,
        "two_hop": None,
        "retention": 1.0,
        "perplexity": pytest.approx(math.sqrt(6)),
        "n": {"recall": 2, "two_hop": 0, "retention": 1, "perplexity": 2},
    }


def test_perplexity_is_per_token_over_all_texts(chat: Chat) -> None:
    fleet = Script(chat, {})
    value, count = perplexity(fleet, chat, ["ab", "abcd"], 64)  # type: ignore[arg-type]
    assert count == 4
    assert value == pytest.approx((2 * 2 * 3 * 4) ** 0.25)
    assert perplexity(fleet, chat, ["abcd"], 3)[1] == 2  # type: ignore[arg-type]
    assert perplexity(fleet, chat, ["a", ""], 64) == (None, 0)  # type: ignore[arg-type]
