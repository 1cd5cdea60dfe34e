"""Documents that are longer than the model can read, in parts; all others as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from sleeprl import worlds
from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError
from sleeprl.evaluation.questions import Day, Question
from sleeprl.night.parts import prompts_about, response_length, split_day
from sleeprl.night.preview import preview_night
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import with_experience
from sleeprl.text.split import split_text
from sleeprl.wake.day import most_similar, preview_day

NAMES = [f"Ann{n} Berg{n}" for n in range(90)]
LONG = " ".join(
    f"{name} lives in Oslo with {n} cats. She works as a nurse." for n, name in enumerate(NAMES)
)


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("room", [4, 7, 20, 60, 500])
def test_parts_fit_overlap_and_lose_nothing(room: int) -> None:
    parts = split_text(LONG, room, words)
    assert all(0 < words(part) <= room for part in parts)
    at = 0
    covered = 0
    for part in parts:  # each begins in the one before it or right behind it, and goes on after it
        at = LONG.index(part, at)
        assert at <= covered + 1 and at + len(part) > covered
        covered = at + len(part)
    assert covered == len(LONG)
    if room >= 20:
        assert all(part.endswith(".") for part in parts)
        assert sum(map(words, parts)) > words(LONG)


@pytest.mark.parametrize(
    "text",
    [
        "波尔图在葡萄牙。" * 60,
        "no end of it " * 90,
        "x" * 900,
        "user: hi\nassistant: hello\n" * 40,
        "a.\n\n" * 300,
    ],
)
def test_any_text_can_be_split(text: str) -> None:
    parts = split_text(text, 50, len)
    assert all(0 < len(part) <= 50 and part in text for part in parts)
    assert set(text.split()) <= set(" ".join(parts).split()) or " " not in text.strip()
    assert len("".join(parts)) >= len(text.strip()) * 0.9


def test_nothing_of_a_short_text_is_split() -> None:
    assert split_text("One. Two. ", 50, len) == ["One. Two."]


@pytest.fixture(scope="module")
def chat() -> ChatFormatter:
    return ChatFormatter(worlds.EMBEDDED_MODEL)


def own_day(tmp_path: Path, question: str, *more: str) -> tuple[Path, Path]:
    texts = ["Before.", LONG, "After."]
    notes, asked = tmp_path / "notes.jsonl", tmp_path / "q.jsonl"
    notes.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    rows = [{"question": question, "answer": "70"}, *({"question": q, "answer": "a"} for q in more)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return notes, asked


def test_a_long_document_is_read_in_parts_in_their_order(
    tmp_path: Path, chat: ChatFormatter
) -> None:
    notes, asked = own_day(tmp_path, "How many cats has Ann70 Berg70?")
    config = cfg.load(None, [f"wake.inputs=[{notes}]", f"evaluation.questions={asked}"])
    before, _ = preview_day(config)
    day, counts = split_day(before, config, chat)
    assert counts[0] == counts[2] == 1 < counts[1] == len(day.documents) - 2
    assert (day.documents[0], day.documents[-1]) == ("Before.", "After.")
    firsts = [LONG.index(part) for part in day.documents[1:-1]]
    assert firsts == sorted(firsts)
    for document in day.documents:
        for setting, prompt in prompts_about(config, chat, document):
            assert len(prompt) + response_length(config, setting) <= config.model.max_length
        message = with_experience(document, " he" * config.self_study.max_tokens)
        assert len(chat.prompt(message)) + config.self_study.max_tokens <= config.model.max_length
    (probe,) = day.probes
    assert probe.experience in day.documents and "Ann70 Berg70 lives" in (probe.experience or "")
    seen = preview_night(config, worlds.EMBEDDED_MODEL)
    assert seen is not None and seen.split == 1 and len(seen.documents) == len(day.documents)


def test_the_questions_about_a_document_are_matched_at_once(
    tmp_path: Path, chat: ChatFormatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def count(questions: Sequence[Question], documents: Sequence[str]) -> list[str]:
        asked.append(len(questions))
        return most_similar(questions, documents)

    monkeypatch.setattr("sleeprl.night.parts.most_similar", count)
    probes = [Question(f"How many cats has {NAMES[n]}?", str(n), "recall", LONG) for n in (80, 3)]
    probes.insert(1, Question("Where?", "Oslo", "recall", "Ann lives in Oslo."))
    probes.append(Question("What is it?", "a cat", "retention"))
    config = cfg.load(None, [f"wake.inputs=[{tmp_path}]"])
    day, _ = split_day(Day([LONG, "Ann lives in Oslo."], probes, []), config, chat)
    assert asked == [2]
    assert [probe.question for probe in day.probes] == [probe.question for probe in probes]
    assert f"{NAMES[80]} lives" in (day.probes[0].experience or "")
    assert f"{NAMES[3]} lives" in (day.probes[2].experience or "")
    assert day.probes[1] == probes[1] and day.probes[3] == probes[3]


def test_what_the_model_can_read_stays_as_it_is(tmp_path: Path, chat: ChatFormatter) -> None:
    config = cfg.load(None, [f"wake.inputs=[{tmp_path}]"])
    probes = [Question("Where?", "Oslo", "recall", "Ann lives in Oslo.")]
    day = Day(["Ann lives in Oslo.", "A. " * 60], probes, ["held out"])
    assert split_day(day, config, chat) == (day, [1, 1])
    embedded = cfg.load(None, [])
    day, _ = preview_day(embedded)
    assert split_day(day, embedded, chat)[0] is day


def test_a_question_that_is_too_long_is_refused(tmp_path: Path) -> None:
    notes, asked = own_day(tmp_path, "How many cats?", "Where is " + "that house " * 1_500)
    config = cfg.load(None, [f"wake.inputs=[{notes}]", f"evaluation.questions={asked}"])
    with pytest.raises(ConfigError, match=r"the question 'Where is that house"):
        preview_night(config, worlds.EMBEDDED_MODEL)
