"""Grades in many scripts, of many right answers, and of answers that are guesses."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from sleeprl.evaluation.grading import exact_match, f1, is_correct
from sleeprl.evaluation.measure import Measurement
from sleeprl.evaluation.metrics import METRICS
from sleeprl.evaluation.questions import Day, Question, grade, read_questions
from sleeprl.reporting.summary_table import BeforeAfterTable
from sleeprl.text.normalise import normalise

KINDS = [metric.key for metric in METRICS]
NFD = unicodedata.normalize("NFD", "Köln")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("她住在波尔图。", "波尔图"),
        ("彼女はポルトに住んでいます", "ポルト"),
        ("彼女はﾎﾟﾙﾄに住んでいます", "ポルト"),
        ("เธออาศัยอยู่ในเมืองลิสบอน", "ลิสบอน"),
        ("वह दिल्ली में रहती है", "दिल्ली"),
        ("Она живёт в Москве", "москве"),
        ("1987年です", "1987"),
        ("1,200", "1200"),
        ("about 1,200,000 people", "1200000"),
        ("1’200", "1,200"),
        ("1\u202f200", "1200"),
        ("１２３４", "1234"),
        ("١٢٣", "123"),
        (NFD, "Köln"),
        ("Köln", NFD),
        ("KÖLN", "köln"),
        ("STRASSE", "Straße"),
        ("ﬁsh", "fish"),
        ("Por\u00adto\u200b", "Porto"),
        ("−5 °C", "-5"),
        ("(-5)", "-5"),
        ("It is written in C++.", "C++"),
        ("F# minor", "f#"),
        ("an A-.", "A-"),
        ("5 percent", "5%"),
        ("50 %", "50%"),
        ("€5", "€ 5"),
        ("3.50", "3.50"),
        (".5", "0.5"),
        ("2019-2020", "2020"),
        ("H₂O", "H2O"),
        ("10⁶", "10^6"),
        ("Porto, Portugal", "Porto"),
        ("rock and roll", "rock and roll"),
        ("red, green and blue", "red, green, and blue"),
        ("AC/DC", "AC/DC"),
        ("Trick or treat", "trick or treat"),
    ],
)
def test_what_is_the_same_is_right(answer: str, gold: str) -> None:
    assert is_correct(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("C#", "C++"),
        ("C", "C++"),
        ("C++", "C"),
        ("5", "-5"),
        ("-5", "5"),
        ("−5", "5"),
        ("3.5", "5"),
        ("1.5", "15"),
        ("A", "A-"),
        ("A+", "A"),
        ("€5", "$5"),
        ("5", "5%"),
        ("<5", ">5"),
        ("½", "2"),
        ("10⁶", "106"),
        ("12,000", "1200"),
        ("彼女はポルトガルに住んでいます", "ポルト"),
        ("她住在里斯本", "波尔图"),
        ("दल्ला", "दिल्ली"),
        ("Koln", "Köln"),
        ("Porto or Lisbon or Braga", "Porto"),
        ("Porto or Lisbon", "Porto"),
        ("either Porto or Lisbon", "Lisbon"),
        ("Porto, Lisbon, Braga", "Porto"),
        ("Lisbon, Porto and Braga", "Porto"),
        ("Porto; Lisbon; Braga", "Braga"),
        ("1. Porto\n2. Lisbon\n3. Braga", "Lisbon"),
        ("Porto/Lisbon", "Porto"),
        ("Porto oder Lissabon", "Porto"),
        ("Порту или Лиссабон", "Порту"),
        ("波尔图或里斯本", "波尔图"),
        ("波尔图、里斯本、布拉加", "波尔图"),
        ("ポルトまたはリスボン", "ポルト"),
    ],
)
def test_what_differs_and_what_guesses_is_wrong(answer: str, gold: str) -> None:
    assert not is_correct(answer, gold)
    assert grade([answer], [Question("q", gold, "recall")]) == [False]


@pytest.mark.parametrize(
    ("answer", "gold", "question", "right"),
    [
        ("He drives 50 km/h", "50", "How fast does he drive?", True),
        ("50 km/h", "50", "How fast does he drive?", True),
        ("He/she lives in Porto", "Porto", "Where?", True),
        ("War or Peace was written by Tolstoy", "Tolstoy", "Who wrote War or Peace?", True),
        ("War or Peace is by Tolstoy or Gogol", "Tolstoy", "Who wrote War or Peace?", False),
        ("AC/DC was led by Young", "Young", "Who led AC/DC?", True),
        ("Porto or Lisbon", "Porto", "Does she live in Porto or Lisbon?", False),
        ("in Porto or in Lisbon", "Porto", "Does she live in Porto or in Lisbon?", False),
        ("Porto or Lisbon or Braga", "Porto", "Where?", False),
        ("She lives in Porto/Lisbon", "Porto", "Where?", False),
        ("Lisbon/Braga/Porto", "Porto", "Where?", False),
        ("Lisbon / in Porto", "Porto", "Where?", False),
        ("Porto and/or Lisbon", "Porto", "Where?", False),
    ],
)
def test_not_every_or_and_slash_stands_between_alternatives(
    answer: str, gold: str, question: str, right: bool
) -> None:
    assert is_correct(answer, gold, question=question) is right


def test_any_of_several_right_answers_will_do() -> None:
    probe = Question("Where?", "Porto", "recall", alternatives=("Oporto", "Invicta"))
    said = ["Oporto", "In Invicta.", "Porto or Oporto", "Porto, Oporto, Invicta", "Porto or Braga"]
    assert grade(said, [probe] * 5) == [True, True, True, True, False]
    assert exact_match("the Oporto.", probe.answers) == 1.0
    assert exact_match("In Porto", probe.answers) == 0.0
    assert f1("In Porto", probe.answers) == pytest.approx(2 / 3)
    assert f1("Braga", probe.answers) == 0.0


def test_plain_words_are_normalised_as_ever() -> None:
    assert normalise("She's 42, at\t“foo_bar”; OK?") == "she s 42 at foo_bar ok"


# --- the file ---------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answers": {"text": ["Porto", "Oporto"], "answer_start": [3, 9]}}, ("Porto", "Oporto")),
        ({"answers": ["Porto", "Porto", 7]}, ("Porto", "7")),
        ({"answer": ["Porto", "Oporto"]}, ("Porto", "Oporto")),
        ({"answer": "Porto", "answers": ["Oporto"]}, ("Porto", "Oporto")),
        ({"answer": 1200.0, "answers": None}, ("1200",)),
        ({"answer": "Porto", "kind": None, "experience": None}, ("Porto",)),
        ({"id": "5", "title": "t", "context": "Ann.", "answers": {"text": ["Porto"]}}, ("Porto",)),
    ],
)  # fmt: skip
def test_right_answers_in_every_form(
    tmp_path: Path, row: dict[str, object], answers: object
) -> None:
    path = write(tmp_path / "q.jsonl", json.dumps({"question": "Where?", **row}))
    (question,) = read_questions(path, KINDS)
    assert question.answers == answers and question.kind == "recall"
    assert question.experience == row.get("context")
    Day(["a"], [question]).save(tmp_path / "day.json")
    assert Day.load(tmp_path / "day.json").probes == [question]


def test_a_line_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    text = '\ufeff{"question": "a\u2028b", "answer": "x"}\r\n\n{"question": "c", "answer": "y"}'
    path = write(tmp_path / "q.jsonl", text)
    assert [q.question for q in read_questions(path, KINDS)] == ["a\u2028b", "c"]
    listed = write(tmp_path / "q.json", '[{"question": "a", "answer": "x"}]')
    assert len(read_questions(listed, KINDS)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": ""}', "answer='' must be text"),
        ('{"question": "q", "answer": "?!"}', "neither a letter nor a digit"),
        ('{"question": "q", "answer": ["a", "+"]}', "neither a letter nor a digit"),
        ('{"question": "q", "answer": true}', "answer=True must be text"),
        ('{"question": "q", "answers": []}', "'answer' is missing or null"),
        ('{"question": "q", "answers": {"text": []}}', "'answer' is missing or null"),
        ('{"question": "q", "answers": {"a": 1}}', "answer={'a': 1} must be text"),
        ('{"question": " ", "answer": "a"}', "question=' ' must be text"),
        ('{"answer": "a"}', "'question' is missing"),
        ('{"question": "q", "answer": "a", "knid": "two_hop"}', "'knid'; did you mean 'kind'"),
        ('{"question": "q", "answer": "a", "Experience": ""}', "did you mean 'experience'"),
        ('{"question": "q", "answer": "a", "zzz": 1}', "unknown field 'zzz'; Known are"),
        ('{"question": "q", "answer": "a", "experience": 3}', "experience=3 must be text"),
        ('{"question": "q", "answer": "a", "experience": ["x"]}', "must be text"),
        ('{"question": "q", "answer": "a", "kind": 3}', "kind=3 must be one of"),
        ('{"question": "q", "answer": "a", "kind": []}', "must be one of"),
        (r'{"question": "\ud800", "answer": "a"}', "question has half a surrogate"),
        (r'{"question": "q", "answer": "a\udfff"}', "answer has half a surrogate"),
        (r'{"question": "q", "answer": "a", "experience": "\ud800"}', "experience has half"),
        ('{"question": "q", "answer": "a", "answer": "b"}', "'answer' occurs twice"),
        ('{"question": "q", "answer": NaN}', "NaN is not JSON"),
        (b'{"question": "J\xf6rg?", "answer": "a"}', "is not UTF-8; convert it"),
        ('{"question": "q", "answer": ' + "9" * 5_000 + "}", "a number of 5,000 digits"),
        ("[" * 3_000 + "]" * 3_000, "nested more than 100 deep"),
        ("3", "not a question but a int"),
    ],
)  # fmt: skip
def test_what_cannot_be_graded_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "q.jsonl", b'{"question": "q", "answer": "a"}\n' + raw)
    with pytest.raises(ValueError, match=r"q\.jsonl:2: ") as caught:
        read_questions(path, KINDS)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_file_without_questions_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="no question in it"):
        read_questions(write(tmp_path / "q.jsonl", content), KINDS)
    for path in (tmp_path, tmp_path / "none.jsonl", Path("")):
        with pytest.raises(ValueError, match="is no file"):
            read_questions(path, KINDS)


# --- the summary ------------------------------------------------------------------


def show(view: BeforeAfterTable) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def test_containment_exact_match_and_f1_are_told_apart(tmp_path: Path) -> None:
    block = {"recall": 0.8, "n": {"recall": 20}, "exact_match": {"recall": 0.4, "two_hop": None},
             "f1": {"recall": 0.55, "two_hop": None}}  # fmt: skip
    shown = " ".join(show(BeforeAfterTable({"after": block})).split())
    assert "answers that contain the right one" in shown
    assert "exact match and F1: recall 40.0 % and 55.0 %" in shown
    assert "exact match" not in show(BeforeAfterTable({"after": {"recall": 0.8}}))


def test_answers_are_saved_with_their_scores(tmp_path: Path) -> None:
    probe = Question("Where?", "Porto", "recall", alternatives=("Oporto",))
    measured = Measurement({}, [probe], [], [], ["In Oporto"], [True])
    measured.save(tmp_path / "answers" / "after.jsonl", None)  # type: ignore[arg-type]
    row = json.loads((tmp_path / "answers" / "after.jsonl").read_text(encoding="utf-8"))
    assert (row["right"], row["exact"], row["alternatives"]) == (True, False, ["Oporto"])
    assert row["f1"] == pytest.approx(2 / 3)
