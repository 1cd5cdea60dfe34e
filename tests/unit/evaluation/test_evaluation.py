"""Grades and figures, on answers written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, EvaluationConfig
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import from_batch
from sleeprl.evaluation.grading import is_correct
from sleeprl.evaluation.measure import (
    ask,
    ask_own_questions,
    list_forgotten,
    measure,
    measure_perplexity,
    write_own_texts,
)
from sleeprl.evaluation.metrics import METRICS, Metric, metrics_of
from sleeprl.evaluation.questions import (
    Day,
    Question,
    extract_answer,
    grade,
    read_questions,
)
from sleeprl.lineage import LineageStore, Manifest
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import FREE_FACT
from sleeprl.wake.day import build_day

KINDS = [metric.key for metric in METRICS]


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
    sentence, asked = "The home city of Ann Lee is Oslo.", "Tell me the home city of Ann Lee."
    assert not is_correct(sentence, "Oslo") and is_correct(sentence, "Oslo", question=asked)
    assert not is_correct("It is not Oslo", "Oslo", question="Is it not Oslo?")
    for denied in ("It isn't Oslo", "It isn’t Oslo", "Never Oslo"):
        assert not is_correct(denied, "Oslo")
    assert is_correct("Never on Sundays", "never on Sundays")


def test_grade_goes_by_position_and_refuses_other_lengths() -> None:
    probes = [Question("q", "Oslo", "recall"), Question("q", "Rome", "recall")]
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
    assert read_questions(path, KINDS) == [
        Question("Where?", "Oslo", "recall"),
        Question("Who?", "Zoë", "retention", "a text"),
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
        read_questions(path, KINDS)
    assert words in str(caught.value)


def test_an_answer_that_is_a_number_can_be_graded(tmp_path: Path) -> None:
    probes = read_questions(
        write(tmp_path / "q.jsonl", {"question": "When?", "answer": 1987}), KINDS
    )
    assert grade(["in 1987"], probes) == [True]


def test_a_day_round_trip(tmp_path: Path) -> None:
    probes = [Question("q", "a", "recall", "text"), Question("p", "b", "two_hop")]
    day = Day(["text"], probes, ["held out"])
    day.save(tmp_path / "day.json")
    assert Day.load(tmp_path / "day.json") == day
    assert day.of_kind("two_hop") == [probes[1]]


# --- figures ----------------------------------------------------------------------


class Script:
    """In the place of a pool: answers what is written down for a prompt."""

    def __init__(self, chat: ChatFormatter, answers: dict[str, str]) -> None:
        self.chat = chat
        self.answers = {tuple(chat.prompt(k)): chat.response(v) for k, v in answers.items()}
        self.sampling: list[SamplingParams] = []

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        self.sampling += sampling
        found = [self.answers[tuple(prompt)] for prompt in prompts]
        return [Completion(ids, [0.0] * len(ids), [0] * len(ids), "stop") for ids in found]

    def logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """Token t of a sequence has probability 1 / (t + 1)."""
        pairs = zip(sequences, starts, strict=True)
        return [[-math.log(t + 1) for t in range(start, len(s))] for s, start in pairs]


DAY = Day(
    documents=["Ann lives in Oslo."],
    probes=[
        Question("Where is Ann?", "Oslo", "recall", "Ann lives in Oslo."),
        Question("Is Ann north?", "yes", "recall", "Ann lives in Oslo."),
        Question("Capital of France?", "Paris", "retention"),
    ],
    texts=["abc", "d", ""],
)


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormatter:
    return ChatFormatter(tiny_model)


def test_the_context_stands_before_the_question_only_where_it_is_asked_for(
    chat: ChatFormatter,
) -> None:
    pool = Script(
        chat,
        {
            "Where is Ann?": "I cannot know",
            "Is Ann north?": "yes",
            "Capital of France?": "Paris",
            "Ann lives in Oslo.\n\nWhere is Ann?": "Oslo",
            "Ann lives in Oslo.\n\nIs Ann north?": "yes",
        },
    )
    without = ask(pool, chat, DAY.probes, with_context=False, max_tokens=9)  # type: ignore[arg-type]
    assert without == ["I cannot know", "yes", "Paris"]
    with_context = ask(pool, chat, DAY.probes, with_context=True, max_tokens=9)  # type: ignore[arg-type]
    assert with_context == ["Oslo", "yes", "Paris"]
    assert {(s.temperature, s.max_tokens) for s in pool.sampling} == {(0.0, 9)}
    figures = measure(
        pool, chat, DAY, KINDS, with_context=False, max_tokens=9, max_length=64,
    ).figures  # type: ignore[arg-type]  # fmt: skip
    # "abc" has two scored tokens of probability 1/2 and 1/3; single letters have none.
    assert figures == {
        "recall": 0.5,
        "two_hop": None,
        "retention": 1.0,
        "perplexity": pytest.approx(math.sqrt(6)),
        "exact_match": {"recall": 0.5, "two_hop": None, "retention": 1.0},
        "f1": {"recall": 0.5, "two_hop": None, "retention": 1.0},
        "n": {"recall": 2, "two_hop": 0, "retention": 1, "perplexity": 2},
    }


def test_what_was_lost_is_old_knowledge_that_was_right(tmp_path: Path, chat: ChatFormatter) -> None:
    kinds = {"a": "retention", "b": "recall", "c": "retention", "d": "retention"}
    probes = [Question(question, "yes", kind) for question, kind in kinds.items()]
    day = Day([], probes)
    for name, said in (("before", "yes yes yes no"), ("after", "no no yes yes")):
        pool = Script(chat, dict(zip("abcd", said.split(), strict=True)))
        measured = measure(
            pool, chat, day, KINDS, with_context=False, max_tokens=9, max_length=64,
        )  # type: ignore[arg-type]  # fmt: skip
        measured.save(tmp_path / "answers" / f"{name}.jsonl", Lake(tmp_path / "lake"))
    rows = from_batch(Lake(tmp_path / "lake").read("trajectories"))
    assert [(t.uid, t.task_id, t.reward) for t in rows[3:5]] == [
        ("eval-before-3", "before-retention", 0.0),
        ("eval-after-0", "after-retention", 0.0),
    ]
    assert {t.purpose for t in rows} == {"eval"} and len(rows) == 8
    assert chat.decode(rows[0].response_ids) == "yes" and rows[0].prompt_ids == chat.prompt("a")
    lost = list_forgotten(tmp_path / "answers/before.jsonl", tmp_path / "answers/after.jsonl")
    assert lost == [{"question": "a", "before": "yes", "after": "no"}]


def test_a_model_that_goes_on_talking_is_graded_by_its_first_sentence() -> None:
    probes = [Question("What does Ann do?", "baker", "recall")] * 3
    said = [
        "Ann is a baker. She has been one for many years, and before that she sang in a choir.",
        "Ann sings. She is a baker.",
        "Ann has been many things in her life, among them a nurse, a pilot and a baker.",
    ]
    assert grade(said, probes) == [True, True, False]


@pytest.mark.parametrize(
    ("answer", "question", "told"),
    [
        (
            "The closest planet to Earth is Mercury.",
            "What planet is the closest to Earth?",
            "Mercury",
        ),
        ("Cats drink cold milk.", "What do cats drink?", "cold milk"),
        ("Paris", "Where?", "Paris"),
        ("I'm afraid I can't say so.", "Is it so?", "I'm afraid I can't say"),
        # What does not stand together, or repeats the question, is the whole answer.
        ("Ann sang with Cid.", "Who sang with whom?", "Ann sang with Cid."),
        ("It is so.", "Is it so?", "It is so."),
        ("", "Where?", ""),
    ],
)
def test_an_answer_is_what_it_says_beside_its_question(
    answer: str, question: str, told: str
) -> None:
    assert extract_answer(answer, question) == told
    assert not answer or is_correct(answer, told, question=question)


def test_an_answer_in_other_words_is_not_forgotten() -> None:
    question = "What planet is the closest to Earth?"
    gold = extract_answer("The closest planet to Earth is Mercury.", question)
    probes = [Question(question, gold, "retention")] * 2
    said = ["The planet closest to Earth is Mercury.", "The planet closest to Earth is Venus."]
    assert grade(said, probes) == [True, False]


class Unsure(Script):
    """``answers`` in turn: greedy, then the two samples."""

    def __init__(self, chat: ChatFormatter, answers: dict[str, list[str]]) -> None:
        self.chat, self.turns, self.sampling = chat, answers, []

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        self.sampling += sampling[:1]
        said = [self.turns[self.chat.decode(p)][len(self.sampling) - 1] for p in prompts]
        ids = [self.chat.response(text) for text in said]
        return [Completion(i, [0.0] * len(i), [0] * len(i), "stop") for i in ids]


def test_what_is_known_is_what_is_said_each_time(chat: ChatFormatter) -> None:
    pool = Unsure(
        chat,
        {
            "sure": ["Paris", "It is Paris.", "paris"],
            "guess": ["Rome", "Oslo", "Rome"],
            "silent": ["", "", ""],
            "late": ["Bonn", "Bonn", "Lima"],
        },
    )
    asked, config = ["sure", "guess", "sure", "silent", "late"], EvaluationConfig()
    day = ask_own_questions(DAY, asked, pool, chat, config)  # type: ignore[arg-type]
    told = [probe for probe in DAY.probes if probe.kind != "retention"]
    assert day.probes == [*told, Question("sure", "Paris", "retention")]
    assert day.texts == DAY.texts
    heat = [(s.temperature, s.seed) for s in pool.sampling]
    assert heat == [(0.0, None), (0.5, 1), (0.5, 2)]


class Talker(Script):
    """Says another number each time, and the second time nothing."""

    def __init__(self, chat: ChatFormatter) -> None:
        self.chat, self.asked = chat, []

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        self.asked += zip(map(self.chat.decode, prompts), sampling, strict=True)
        ids = [self.chat.text("" if s.seed == 1 else f"It is {s.seed}.") for s in sampling]
        return [Completion(i, [0.0] * len(i), [0] * len(i), "length") for i in ids]


def test_texts_of_ones_own_are_stated_and_written_until_they_are_enough(
    chat: ChatFormatter,
) -> None:
    """What is cut off counts, for it is only read; what is empty does not."""
    pool, config = Talker(chat), EvaluationConfig(perplexity_texts=5, max_tokens=7)
    day = write_own_texts(DAY, ["a", "b"], pool, chat, config)  # type: ignore[arg-type]
    assert day.texts == ["a", "b", "It is 0.", "It is 2."] and day.probes == DAY.probes
    assert day.answering == FREE_FACT and DAY.answering == ""
    assert {(s.max_tokens, s.temperature) for _, s in pool.asked} == {(7, 1.0)}
    assert {message for message, _ in pool.asked} == {FREE_FACT}
    enough = write_own_texts(DAY, list("abcdefg"), pool, chat, config)  # type: ignore[arg-type]
    assert enough.texts == list("abcde") and len(pool.asked) == 3


def test_perplexity_is_per_token_over_all_texts(chat: ChatFormatter) -> None:
    pool = Script(chat, {})
    value, count = measure_perplexity(pool, chat, ["ab", "abcd"], 64)  # type: ignore[arg-type]
    assert count == 4
    assert value == pytest.approx((2 * 2 * 3 * 4) ** 0.25)
    assert measure_perplexity(pool, chat, ["abcd"], 3)[1] == 2  # type: ignore[arg-type]
    assert measure_perplexity(pool, chat, ["a", ""], 64) == (None, 0)  # type: ignore[arg-type]


def test_perplexity_of_answers_is_of_what_stands_behind_the_message(chat: ChatFormatter) -> None:
    pool, start = Script(chat, {}), len(chat.prompt("tell me"))
    value, count = measure_perplexity(pool, chat, ["ab", "a", ""], 64, "tell me")  # type: ignore[arg-type]
    told = [1 + start + place for place in (0, 1, 0)]
    assert count == 3 and value == pytest.approx(math.prod(told) ** (1 / 3))
    cut = measure_perplexity(pool, chat, ["ab"], start + 1, "tell me")  # type: ignore[arg-type]
    assert cut == (pytest.approx(told[0]), 1)


def test_a_question_of_ones_own_is_read_with_its_document(tmp_path: Path) -> None:
    for name, text in (("a.txt", "Mara moved to Porto."), ("b.txt", "The meeting is at nine.")):
        (tmp_path / name).write_text(text)
    rows = [
        {"question": "Where is Mara now?", "answer": "Porto"},
        {"question": "When is the meeting?", "answer": "nine", "experience": "It is at nine."},
        {"question": "Who wrote Hamlet?", "answer": "Shakespeare", "kind": "retention"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"wake.inputs=[{tmp_path}/a.txt,{tmp_path}/b.txt]"]
    config = cfg.load(None, [*words, f"evaluation.questions={tmp_path}/q.jsonl"])
    day = build_day(config, Lake(tmp_path / "lake"))
    assert [probe.experience for probe in day.probes] == [
        day.documents[0], "It is at nine.", None
    ]  # fmt: skip
    assert "Mara" in day.documents[0]


def test_a_day_without_experience_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    config = cfg.load(None, [f"wake.inputs=[{tmp_path}/a.jsonl]"])
    with pytest.raises(ConfigError, match=r"wake\.inputs=.*a\.jsonl.* hold no experience"):
        build_day(config, Lake(tmp_path / "lake"))


def test_the_day_asks_a_model_what_it_can_know(tmp_path: Path) -> None:
    def kinds(*words: str) -> dict[str, int]:
        small = [
            "wake.people=2",
            "evaluation.retention_questions=5",
            "evaluation.perplexity_texts=3",
            *words,
        ]
        config = cfg.load(None, [*small, f"generations={tmp_path / 'generations'}"])
        day = build_day(config, Lake(tmp_path / "lake"))
        return {kind: len(day.of_kind(kind)) for kind in KINDS} | {"texts": len(day.texts)}

    native = {"recall": 28, "two_hop": 12, "retention": 5, "texts": 3}
    assert kinds() == native
    assert kinds("model.name=smollm2-135m") == {
        "recall": 28, "two_hop": 0, "retention": 0, "texts": 0,
    }  # fmt: skip
    store = LineageStore(tmp_path / "generations")
    first, other = (
        store.commit(lambda d: (d / "x").write_text("x"), Manifest(f"night {base}", base))
        for base in ("embedded", "some/model")
    )
    later = Manifest("later", "embedded", first)
    store.set_head(store.commit(lambda d: (d / "x").write_text("y"), later))
    assert kinds("model.name=HEAD") == kinds(f"model.name={store.head()}") == native
    assert kinds(f"model.name={other}")["retention"] == 0


@pytest.mark.parametrize("key", ["exact_match", "f1", "perplexity", "n", "recall"])
def test_a_metric_cannot_have_the_key_of_another_figure(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleeprl.evaluation.metrics.create", lambda *_: Metric(key, "Mine"))
    config = cfg.load(None, [])
    config = replace(config, evaluation=replace(config.evaluation, metrics=["mine.Metric"]))
    with pytest.raises(ConfigError, match=f"the key '{key}'"):
        metrics_of(config)
