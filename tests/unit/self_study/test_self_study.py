"""Splitting and parsing what the smaller self writes, with its texts written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, SelfStudyConfig
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.self_study.rehearsal import one_of_each_fact, sample_near_questions
from sleeprl.self_study.sampler import GeneratedQuestion, TextSampler, build_qa_prompt
from sleeprl.self_study.study import (
    Pair,
    Study,
    _about,
    _gain,
    describe_study,
    load_probes,
    passages,
    write_rehearsal,
    write_study,
)
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import (
    FREE_FACT,
    FREE_QA,
    STUDY_FACT,
    STUDY_QA,
    examples,
    format_qa,
    parse_qa,
    with_experience,
)

DOCUMENTS = ["Ann lives in Oslo.", "Bob has a cat."]
ANN = GeneratedQuestion(0, "Where does Ann live?", [], Completion([], [], [], "stop"))


# --- pairs ------------------------------------------------------------------------

line = st.text(st.characters(categories=["L", "N"], include_characters=" ?'"), min_size=1).filter(
    lambda s: s.strip()
)


@given(line, line)
def test_a_pair_is_read_back(question: str, answer: str) -> None:
    assert parse_qa(format_qa(question, answer)) == (question.strip(), answer.strip())


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("Question: Who?\nAnswer: Ann\nand more", ("Who?", "Ann")),
        ("  Question:Who? Answer:Ann", ("Who?", "Ann")),
        ("Question: Who?", None),
        ("Answer: Ann", None),
        ("Question: \nAnswer: Ann", None),
        ("Question: Who?\nAnswer:  ", None),
        ("Here you are. Question: Who?\nAnswer: Ann", None),
        ("Answer: Ann\nQuestion: Who?", None),
        (" Who?\nAnswer: Ann", ("Who?", "Ann")),
        ("Question: Question: Who?\nAnswer: Ann", None),
        ("", None),
    ],
)
def test_what_is_a_pair(text: str, pair: tuple[str, str] | None) -> None:
    assert parse_qa(text) == pair


@pytest.mark.parametrize("message", [FREE_QA, f"{DOCUMENTS[0]}\n\n{STUDY_QA}"])
def test_examples_go_before_what_is_asked(tiny_model: Path, message: str) -> None:
    chat = ChatFormatter(tiny_model)
    assert build_qa_prompt(chat, SelfStudyConfig(), message) == chat.prompt(message)
    said = chat.decode(
        build_qa_prompt(
            chat, SelfStudyConfig(few_shot_examples=2, assistant_prefix="Question:"), message
        )
    )
    shown, hidden = (
        examples(3, free=message == FREE_QA)[:2],
        examples(3, free=message == FREE_QA)[2],
    )
    places = [said.index(text) for turn in shown for text in turn]
    assert said.endswith("Question:") and places[1] < places[3] < said.rindex(message)
    assert hidden[1] not in said
    assert all(parse_qa(answer) for _, answer in shown)


def test_there_are_only_so_many_examples() -> None:
    with pytest.raises(ConfigError, match=r"self_study\.few_shot_examples=5 must be at most 4"):
        cfg.load(None, ["self_study.few_shot_examples=5"])


# --- a study ----------------------------------------------------------------------

Author = Callable[[str, int], tuple[str, str]]


class Script:
    """In the place of a pool: ``author(message, how often it was asked)`` writes each text."""

    version = 3

    def __init__(self, chat: ChatFormatter, author: Author) -> None:
        self.chat, self.author = chat, author
        self.asked: dict[str, int] = {}
        self.prompts: list[list[int]] = []
        self.sampling: list[SamplingParams] = []

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        self.prompts += prompts
        self.sampling += sampling
        return [self._one(prompt) for prompt in prompts]

    def logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """With a document in sight its own words are likely, unless ``elsewhere`` is said."""
        found = []
        for ids, start in zip(sequences, starts, strict=True):
            text = self.chat.decode(ids)
            seen = next((d for d in DOCUMENTS if text.startswith(d)), "")
            likely = "" if "elsewhere" in text else seen
            found.append([-self._nats(likely, self.chat.decode([token])) for token in ids[start:]])
        return found

    @staticmethod
    def _nats(likely: str, token: str) -> float:
        return 0.1 if likely and token.strip() in likely else 4.0

    def _one(self, prompt: list[int]) -> Completion:
        message = self.chat.decode(prompt)
        number = self.asked.get(message, 0)
        self.asked[message] = number + 1
        text, reason = self.author(message, number)
        ids = self.chat.response(text) if reason == "stop" else self.chat.text(text)
        return Completion(ids, [-0.5] * len(ids), [self.version] * len(ids), reason)


def author(message: str, number: int) -> tuple[str, str]:
    """Every third question is a repetition, every fifth malformed, every seventh too long. Every
    second statement is a slip."""
    if FREE_QA in message and not message.endswith(FREE_QA):  # a question was begun
        return f" next {number}?\nAnswer: guess", "stop"
    if message.startswith("fact"):
        said = message.split("\n")[0].replace("fact ", "")
        return format_qa(f"which {said}?", f"number {said}"), "stop"
    if message.startswith("which"):
        number = int(message.removeprefix("which ").removesuffix("?"))
        return f"number {number if number % 2 else 99}", "stop"
    if message.endswith(STUDY_QA) or message == FREE_QA:
        if number % 7 == 6:
            return "Question: a very long", "length"
        if number % 5 == 4:
            return "I have no question", "stop"
        kind = 0 if number % 3 == 2 else number
        where = "own" if message == FREE_QA else message[:3]
        return format_qa(f"{where} {kind}?", f"guess {kind}"), "stop"
    if message.endswith(STUDY_FACT) or message == FREE_FACT:
        return f"fact {number}", "length" if number % 4 == 3 else "stop"
    return f"answer to {message[-9:]}", "stop"


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormatter:
    return ChatFormatter(tiny_model)


CONFIG = SelfStudyConfig(
    pairs_per_document=30,
    facts_per_document=8,
    replay_questions=60,
    max_tokens=32,
    held_out_share=0.25,
)


def study(
    pool: Any,
    chat: ChatFormatter,
    documents: Sequence[str],
    config: SelfStudyConfig,
    seed: int,
    longest: int,
    on_written: Callable[[int], None] = lambda _: None,
    **settings: Any,
) -> Study:
    sampler = TextSampler(pool, chat, config, seed, longest, on_written)
    return write_study(sampler, documents, **settings)


def written(
    chat: ChatFormatter, seed: int = 0, config: SelfStudyConfig = CONFIG, who: Author = author
):  # type: ignore[no-untyped-def]
    pool = Script(chat, who)
    return pool, study(pool, chat, DOCUMENTS, config, seed, 512)  # type: ignore[arg-type]


def test_every_second_question_is_asked_with_a_few_sentences_in_sight(chat: ChatFormatter) -> None:
    long = "Ann lives in Oslo. She sings! Has she a cat? No."
    assert passages(long, 1) == ["Ann lives in Oslo.", "She sings!", "Has she a cat?", "No."]
    assert passages(long, 3) == ["Ann lives in Oslo. She sings! Has she a cat?", "No."]
    config = replace(CONFIG, excerpt_sentences=1, pairs_per_document=12)
    pool = Script(chat, author)
    result = study(pool, chat, [long, DOCUMENTS[1]], config, 0, 512)  # type: ignore[arg-type]
    asked = [said for said in map(chat.decode, pool.prompts) if said.endswith(STUDY_QA)]
    asked = [said for said in asked if not said.startswith("fact")]
    seen = [said.removesuffix(STUDY_QA).strip() for said in asked]
    four = passages(long, 1)
    assert seen[:24] == [*[long] * 6, *four, *four[:2], *[DOCUMENTS[1]] * 12]
    answers = [text for text in result.trajectories if text.task_id == "answer-0"]
    for text in answers:  # with all of it in sight
        assert text.teacher_prompt_ids is not None
        assert chat.decode(text.teacher_prompt_ids).startswith(long)
    assert answers


def test_what_is_not_about_the_document_is_dropped_and_it_is_asked_about_again(
    chat: ChatFormatter,
) -> None:
    def wanders(message: str, number: int) -> tuple[str, str]:
        if message.endswith(STUDY_QA) and message.startswith("Bob"):
            return format_qa(f"elsewhere {number}?", "no"), "stop"
        return author(message, number)

    pool, result = written(chat, config=replace(CONFIG, full_document_share=1.0), who=wanders)
    asked = {d: pool.asked[f"{d}\n\n{STUDY_QA}"] for d in DOCUMENTS}
    assert asked == {DOCUMENTS[0]: 30, DOCUMENTS[1]: 3 * 30}
    new = [t for t in result.trajectories if t.task_id.startswith(("answer-", "study-"))]
    assert new and {t.task_id.split("-")[1] for t in new} == {"0"}
    everything = [chat.decode(t.prompt_ids + t.response_ids) for t in result.trajectories]
    assert not any("elsewhere" in text for text in everything)


def test_a_question_gains_by_what_stands_in_its_document_and_loses_by_what_only_came_to_mind() -> (
    None
):
    read = ["Where", " does", " Hana", " Engel", " live", "?"]
    freely, seen = [3.0, 1.0, 6.0, 5.0, 1.0, 0.0], [3.0, 1.0, 0.5, 1.5, 0.5, 0.0]
    document = "Hana Engel has a cat."
    # "live" does not stand in it: what it gains counts against it.
    assert _gain(document, read, freely, seen) == pytest.approx(5.5 + 3.5 - 0.5)
    # Somebody known, whose name begins alike, came to mind: as likely as the one who is told of.
    known = [" Pace" if token == " Engel" else token for token in read]
    assert _gain(document, known, freely, seen) == pytest.approx(5.5 - 3.5 - 0.5)
    # As likely without the document.
    assert _gain(document, read, freely, freely) == 0.0


def test_tokens_that_share_a_character_stand_in_a_document_together(chat: ChatFormatter) -> None:
    ids = chat.text("Who is Jiří?")
    assert "ř" not in [chat.decode([token]) for token in ids]
    pieces = chat.pieces(ids)
    assert len(pieces) == len(ids) and "ř" in pieces
    nats = [1.0] * len(ids)
    assert _gain("Who is Jiří?", pieces, nats, [0.0] * len(ids)) == len(ids)
    assert chat.pieces(ids[: pieces.index("ř") + 1])[-1] == "\ufffd"


def test_what_leaves_no_room_for_an_answer_is_not_asked(chat: ChatFormatter) -> None:
    long = " Ann" * 40

    def rambles(message: str, number: int) -> tuple[str, str]:
        if number % 2 and message.endswith(STUDY_QA) and message[:3] in ("Ann", "Bob"):
            return format_qa(f"{message[:3]}{long} {number}?", "no"), "stop"
        if number % 2 and FREE_QA in message and not message.endswith(FREE_QA):
            return f"{long} {number}?\nAnswer: guess", "stop"
        return author(message, number)

    pool = Script(chat, rambles)
    whole = [chat.prompt(with_experience(text, STUDY_QA)) for text in DOCUMENTS]
    length = max(map(len, whole)) + CONFIG.max_tokens + 20
    result = study(pool, chat, DOCUMENTS, CONFIG, 0, length)  # type: ignore[arg-type]
    assert any(text.task_id == "neighbour" for text in result.trajectories)
    assert any(text.task_id == "answer-0" for text in result.trajectories)
    read = [text.teacher_prompt_ids or text.prompt_ids for text in result.trajectories]
    assert not any(long in chat.decode(ids) for ids in read)
    assert max(map(len, pool.prompts)) <= length - CONFIG.max_tokens


def test_neighbours_are_of_every_document(chat: ChatFormatter) -> None:
    pool = Script(chat, author)
    sampler = TextSampler(pool, chat, CONFIG, 0, 512)  # type: ignore[arg-type]
    drafts = [replace(ANN, document=n, question=f"{w} {i}?")
              for n, w in enumerate(("Ann", "Bob")) for i in range(20)]  # fmt: skip
    ids = [chat.text(f"Question: {draft.question}") for draft in drafts]
    asked = [replace(d, ids=own, nll=[1.0] * len(own)) for d, own in zip(drafts, ids)]
    sample_near_questions(
        sampler, DOCUMENTS, asked, 10
    )  # fewer than the first document has questions
    for document in DOCUMENTS:
        assert any(chat.decode(prompt).startswith(document) for prompt in pool.prompts)


def test_probes_are_kept_out_of_training(chat: ChatFormatter) -> None:
    _, result = written(chat)
    trained = [t for t in result.trajectories if t.task_id.startswith("answer-")]
    questions = {chat.decode(t.prompt_ids) for t in trained}
    held = {p.question for p in result.probes}
    assert held and questions and not held & questions
    whole = len(held) + len(trained)
    assert len(held) == int(0.25 * whole)
    assert len(questions) == len(trained)  # a repeated question was asked once
    # Nothing the student is taught mentions a probe, not even as a first draft of it.
    everything = [chat.decode(t.prompt_ids + t.response_ids) for t in result.trajectories]
    assert not [text for text in everything for question in held if question in text]


def test_the_teacher_has_the_experience_and_the_student_has_not(chat: ChatFormatter) -> None:
    _, result = written(chat)
    new = [t for t in result.trajectories if t.purpose == "self_study"]
    assert {t.task_id.split("-")[0] for t in new} == {"answer", "fact"}
    for text in new:
        document = DOCUMENTS[int(text.task_id.split("-")[1])]
        assert text.teacher_prompt_ids is not None
        teacher, student = chat.decode(text.teacher_prompt_ids), chat.decode(text.prompt_ids)
        assert document in teacher and document not in student
        if text.task_id.startswith("answer"):
            assert teacher == f"{document}\n\n{student}"
            assert student.startswith(document[:3])  # its own document's question
            assert chat.decode(text.response_ids) == f"answer to {teacher[-9:]}"
        else:
            assert student == FREE_FACT and teacher.endswith(STUDY_FACT)
    for probe in result.probes:
        assert probe.question.startswith(DOCUMENTS[probe.document][:3])
        assert probe.answer.startswith("answer to")  # the reader's, not the draft's


def test_replay_has_one_prompt_for_both(chat: ChatFormatter) -> None:
    _, result = written(chat)
    replay = [t for t in result.trajectories if t.purpose == "replay"]
    kinds = {t.task_id.split("-")[0] for t in replay}
    assert kinds == {"pair", "answer", "recalled", "neighbour", "study"}
    # Mostly the answers are rehearsed: of the pairs, the whole ones among every fourth.
    pairs = [t.attempt for t in replay if t.task_id == "pair"]
    assert 0 < len(pairs) <= 15 and {number % 4 for number in pairs} == {0}
    assert all(t.teacher_prompt_ids is None for t in replay)
    free = [t for t in replay if not t.task_id.startswith("study")]
    assert not any(d in chat.decode(t.prompt_ids) for t in free for d in DOCUMENTS)
    assert result.held_questions == result.held_facts == []


def test_what_was_asked_on_earlier_nights_is_asked_again(chat: ChatFormatter) -> None:
    _, first = written(chat)
    tonight = {pair.question for pair in first.probes} | {
        chat.decode(t.prompt_ids) for t in first.trajectories if t.task_id.startswith("answer-")
    }
    free = {chat.decode(t.prompt_ids) for t in first.trajectories if t.task_id == "answer"}
    assert set(first.question_bank[: len(tonight)]) == tonight  # the least settled before the rest
    assert set(first.question_bank[len(tonight) :]) == free
    known = [*sorted(tonight)[:3], *(f"long ago {n}?" for n in range(150))]
    pool = Script(chat, author)
    second = study(pool, chat, DOCUMENTS, CONFIG, 0, 512, question_bank=known)  # type: ignore[arg-type]
    assert pool.asked[FREE_QA] == CONFIG.replay_questions // 2
    rehearsed = [chat.decode(t.prompt_ids) for t in second.trajectories if t.task_id == "answer"]
    assert len(set(rehearsed)) == len(rehearsed)
    asked, waits = (
        known[3 : 3 + 2 * CONFIG.replay_questions],
        known[3 + 2 * CONFIG.replay_questions :],
    )
    assert {q for q in rehearsed if "long ago" in q} == set(asked)
    # Of what is asked about the day, the answer before it was read is not to be kept.
    assert not set(known[:3]) & set(rehearsed)
    mine = len(second.question_bank) - len(waits) - len(rehearsed)
    assert second.question_bank[mine : mine + len(waits)] == waits
    assert second.question_bank[mine + len(waits) :] == rehearsed
    none = study(
        Script(chat, author),
        chat,
        DOCUMENTS,
        replace(CONFIG, question_bank_size=0),
        0,
        512,  # type: ignore[arg-type]
    )
    assert none.question_bank == []
    pool = Script(chat, author)  # a few in the notebook stand in for a few
    study(pool, chat, DOCUMENTS, CONFIG, 0, 512, question_bank=known[-9:])  # type: ignore[arg-type]
    assert pool.asked[FREE_QA] == CONFIG.replay_questions - 9


HOMES = {  # names are rarer than what is asked about them
    f"{first} {last}": city
    for first in ("Ann", "Bo", "Cy", "Di", "Ed", "Flo")
    for last, city in zip(
        ("Lee", "Fox", "Day", "Kay", "Orr", "Roe"), ("Oslo", "Rome", "Lima") * 2, strict=True
    )
}
WAYS = ["Where does {} live?", "In which city does {} live?", "Which city is home to {}?"]


def test_of_each_fact_one_question_is_rehearsed() -> None:
    homes = [(way.format(name), city) for way in WAYS for name, city in HOMES.items()]
    jobs = [(f"What does {name} do?", "chef") for name in HOMES]
    kept = [(homes + jobs)[place] for place in one_of_each_fact(homes + jobs)]
    assert kept == homes[: len(HOMES)] + jobs
    # What was answered otherwise is another fact, and how an answer is written is not.
    again = [*homes, ("Where does Ann Lee live?", "Bern"), ("Where does Bo Fox live?", " rome")]
    assert one_of_each_fact(again) == [*range(len(HOMES)), len(homes)]
    assert one_of_each_fact([]) == []


def test_the_same_fact_of_earlier_nights_is_not_rehearsed_twice(chat: ChatFormatter) -> None:
    known = [way.format(name) for way in WAYS for name in HOMES]

    def lives(message: str, number: int) -> tuple[str, str]:
        return ("Oslo", "stop") if message in known else author(message, number)

    pool = Script(chat, lives)
    found = study(pool, chat, DOCUMENTS, CONFIG, 0, 512, question_bank=known)  # type: ignore[arg-type]
    asked = [chat.decode(t.prompt_ids) for t in found.trajectories if t.task_id == "answer"]
    assert [q for q in asked if q in known] == known[: len(HOMES)]
    assert set(known) <= set(found.question_bank)  # they had their turn


def test_answers_are_sure_and_questions_are_not(chat: ChatFormatter) -> None:
    pool, result = written(chat)
    heat = {tuple(p): s.temperature for p, s in zip(pool.prompts, pool.sampling, strict=True)}
    for text in result.trajectories:
        answers = text.task_id.split("-")[0] in {"answer", "neighbour"} or "answer" in text.task_id
        asked = heat[tuple(text.teacher_prompt_ids or text.prompt_ids)]
        assert (asked == 0.0) == answers
    assert heat[tuple(chat.prompt(FREE_QA))] == heat[tuple(chat.prompt(FREE_FACT))] == 1.0


def test_asking_about_what_it_reads_is_rehearsed(chat: ChatFormatter) -> None:
    """Drafts of questions that are trained on, with the document before both selves."""
    result = written(chat)[1]
    drafts = [t for t in result.trajectories if t.task_id.startswith("study")]
    answers = {
        t.attempt: chat.decode(t.prompt_ids)
        for t in result.trajectories
        if t.task_id.startswith("answer-")
    }
    assert 2 < len(drafts) == sum(number % 4 == 0 for number in answers)
    for draft in drafts:
        document = DOCUMENTS[int(draft.task_id.split("-")[1])]
        assert draft.teacher_prompt_ids is None
        assert chat.decode(draft.prompt_ids) == f"{document}\n\n{STUDY_QA}"
        question = parse_qa(chat.decode(draft.response_ids))[0]  # type: ignore[index]
        assert question == answers[draft.attempt]


def test_what_retention_asks_is_not_trained_on(chat: ChatFormatter) -> None:
    whole = written(chat)[1]
    pool = Script(chat, author)
    result = study(pool, chat, DOCUMENTS, CONFIG, 0, 512, hold_out=0.25)  # type: ignore[arg-type]

    def asked(of: Study) -> list[str]:
        return [chat.decode(t.prompt_ids) for t in of.trajectories if t.task_id == "answer"]

    assert len(result.held_questions) == len(asked(whole)) // 4 > 2
    assert sorted([*result.held_questions, *asked(result)]) == sorted(asked(whole))
    stated = {f"fact {n}" for n in range(15) if n % 4 != 3}
    assert len(result.held_facts) == len(stated) // 4 and set(result.held_facts) < stated
    replay = [t for t in result.trajectories if t.purpose == "replay"]
    said = [chat.decode(t.prompt_ids + t.response_ids) for t in replay]
    held = [*result.held_questions, *result.held_facts]
    assert not [text for text in said for words in held if words in text.splitlines()]
    assert not [text for text in said for question in result.held_questions if question in text]


def talker(message: str, number: int) -> tuple[str, str]:
    """In the user's place it writes a message twice each, sometimes none, and goes on in other lines."""
    if not message:
        return ("" if number % 5 == 4 else f"hello {number // 2}\nand then"), "length"
    if message.startswith("hello"):
        return f"answer to {message[-1]}", "length" if message.endswith("1") else "stop"
    return author(message, number)


def test_a_chat_model_talks_to_itself(chat: ChatFormatter) -> None:
    config = replace(CONFIG, replay_conversations=8)
    result = study(Script(chat, talker), chat, DOCUMENTS, config, 0, 512)  # type: ignore[arg-type]
    rows = [t for t in result.trajectories if t.task_id == "conversation"]
    seen = [(chat.decode(t.prompt_ids), chat.decode(t.response_ids)) for t in rows]
    assert seen == [(f"hello {n}", f"answer to {n}") for n in range(4)]
    assert all(t.purpose == "replay" and t.teacher_prompt_ids is None for t in rows)
    assert rows[1].finish_reason == "length", "what is cut off is rehearsed as far as it goes"
    # Some are asked about in the morning, and not rehearsed.
    held = study(
        Script(chat, talker), chat, DOCUMENTS, config, 0, 512, hold_out=0.5,  # type: ignore[arg-type]
    )  # fmt: skip
    kept = [chat.decode(t.prompt_ids) for t in held.trajectories if t.task_id == "conversation"]
    asked = [question for question in held.held_questions if question.startswith("hello")]
    assert len(kept) == len(asked) == 2
    assert sorted([*kept, *asked]) == [f"hello {n}" for n in range(4)]
    between = write_rehearsal(TextSampler(Script(chat, talker), chat, config, 0, 512))  # type: ignore[arg-type]
    assert sum(t.task_id == "conversation" for t in between.trajectories) == 4


def test_a_turn_is_what_comes_before_any_message(chat: ChatFormatter) -> None:
    start = chat.turn()
    assert start and chat.decode(start) == ""
    for message in ("hello", "Where is Ann?"):
        assert chat.prompt(message)[: len(start)] == start and len(chat.prompt(message)) > len(
            start
        )


def test_it_says_how_much_is_written(chat: ChatFormatter) -> None:
    seen: list[int] = []
    result = study(
        Script(chat, author), chat, DOCUMENTS, CONFIG, 0, 512,  # type: ignore[arg-type]
        on_written=seen.append,
    )  # fmt: skip
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == result.written


def test_what_is_stated_is_rehearsed_where_its_own_answer_bears_it_out(chat: ChatFormatter) -> None:
    pool, result = written(chat)
    count = CONFIG.replay_questions // 4
    assert pool.asked[FREE_FACT] == count
    stated = {n for n in range(count) if n % 4 != 3}  # the others were not whole
    facts = [t for t in result.trajectories if t.task_id == "recalled"]
    assert {chat.decode(t.response_ids) for t in facts} == {f"fact {n}" for n in stated if n % 2}
    assert all(chat.decode(t.prompt_ids) == FREE_FACT for t in facts)
    # The answers are what it knows in any case; the fact is not in sight.
    answers = [t for t in result.trajectories if t.task_id == "recalled-answer"]
    assert {chat.decode(t.prompt_ids) for t in answers} == {f"which {n}?" for n in stated}


def test_neighbours_begin_as_tonights_questions_do_and_need_no_document(
    chat: ChatFormatter,
) -> None:
    def wanders(message: str, number: int) -> tuple[str, str]:
        if message.endswith("Where does Ann live?"):  # with the document, and without
            return "Oslo" if DOCUMENTS[0] in message else "I do not know", "stop"
        if message.endswith("?"):
            return "as ever", "stop"
        begun = message.split("Question:")[1]
        assert "Where does Ann live?".startswith(begun.strip())
        ways = ["Where does Ann live?", "Where does Anna live?", "Where is Ann?", "Where to?"]
        way = (
            ways[number % 4] if ways[number % 4].startswith(begun.strip()) else f"{begun.strip()}?"
        )
        return way.removeprefix(begun.strip()) + "\nAnswer: Bergen", "stop"

    pool = Script(chat, wanders)
    config = replace(CONFIG, assistant_prefix="Question:")
    for settings in (CONFIG, config):
        sampler = TextSampler(pool, chat, settings, 0, 512)  # type: ignore[arg-type]
        asked = _about(sampler, DOCUMENTS, [ANN]).values()
        rows = sample_near_questions(sampler, DOCUMENTS, list(asked), 40)
        found = {chat.decode(row.prompt_ids) for row in rows}
        assert found and "Where does Ann live?" not in found
        assert all(row.teacher_prompt_ids is None for row in rows)
        assert {chat.decode(row.response_ids) for row in rows} == {"as ever"}
        assert sample_near_questions(sampler, DOCUMENTS, [], 40) == []


def test_a_question_is_cut_off_where_it_would_have_gone_on_otherwise(chat: ChatFormatter) -> None:
    class Sudden(Script):
        """All of a question is expected but for one token."""

        def logprobs(
            self, sequences: Sequence[list[int]], starts: Sequence[int]
        ) -> list[list[float]]:
            nats = [[-1e-9] * (len(ids) - 1) for ids in sequences]
            for found, ids in zip(nats, sequences, strict=True):
                place = len(ids) - len(chat.text("nn live?")) - 1  # the n behind the A
                found[place] = -50.0 if ids[place + 1] == chat.text("n")[0] else 0.0
            return [found[start - 1 :] for found, start in zip(nats, starts, strict=True)]

    begun: list[str] = []

    def wanders(message: str, number: int) -> tuple[str, str]:
        if not message.endswith("?"):
            begun.append(message.split("Question:")[1])
        return "lex live?\nAnswer: Rome", "stop"

    sampler = TextSampler(Sudden(chat, wanders), chat, CONFIG, 0, 512)  # type: ignore[arg-type]
    ids = chat.text("Question: Where does Ann live?")
    (surprise,) = sampler.token_nll([sampler.qa_prefix(FREE_QA)], [ids])
    rows = sample_near_questions(sampler, DOCUMENTS, [replace(ANN, ids=ids, nll=surprise)], 20)
    assert len(begun) == 20 and set(begun) == {" Where does A"}
    assert [chat.decode(row.prompt_ids) for row in rows] == ["Where does Alex live?"]


def test_only_whole_texts_are_kept_and_all_are_counted(chat: ChatFormatter) -> None:
    pool, result = written(chat)
    assert all(t.finish_reason == "stop" for t in result.trajectories)
    assert all(t.response_ids[-1] == chat.end for t in result.trajectories)
    assert result.written == len(pool.prompts)
    # Of 30 and of 60 questions every seventh is long, and every fifth of the others no pair; of
    # the facts every fourth is long.
    assert result.malformed == 2 * (4 + 6) + (8 + 11) + 2 * 2 + 3


def test_uids_and_seeds_are_all_different_and_repeat(chat: ChatFormatter) -> None:
    pool, result = written(chat)
    uids = [t.uid for t in result.trajectories]
    assert len(set(uids)) == len(uids)
    seeds = [s.seed for s in pool.sampling]
    assert None not in seeds and len(set(seeds)) == len(seeds)
    assert {s.max_tokens for s in pool.sampling} == {32}
    again, same = written(chat)
    assert [s.seed for s in again.sampling] == seeds
    assert same.trajectories == result.trajectories and same.probes == result.probes
    other, differs = written(chat, seed=1)
    assert not set(seeds) & {s.seed for s in other.sampling}
    assert differs.probes != result.probes


def test_what_the_engine_gave_goes_into_the_trajectory(chat: ChatFormatter) -> None:
    _, result = written(chat)
    for text in result.trajectories:
        assert text.logprobs == [-0.5] * len(text.response_ids)
        assert text.versions == [Script.version] * len(text.response_ids)


def test_no_replay_and_no_usable_pair(chat: ChatFormatter) -> None:
    config = SelfStudyConfig(
        pairs_per_document=2,
        facts_per_document=0,
        replay_questions=0,
        max_tokens=32,
        held_out_share=0.25,
    )
    _, result = written(chat, config=config, who=lambda message, number: ("no pair", "stop"))
    assert result.trajectories == result.probes == result.held_questions == []
    assert (result.written, result.malformed) == (3 * 4, 3 * 4)  # it was asked three times
    line = describe_study(
        {"new": 0, "replay": 0, "written": result.written, "malformed": result.malformed}
    )
    assert (
        "12 of 12 texts" in line
        and "self_study.replay_conversations, assistant_prefix and few_shot_examples" in line
    )
    assert (
        describe_study({"new": 3, "replay": 2, "written": 9, "malformed": 1}) == "3 new, 2 replayed"
    )


def test_a_document_that_does_not_fit_is_refused_before_anything_is_written(
    chat: ChatFormatter,
) -> None:
    pool = Script(chat, author)
    with pytest.raises((ValueError, ConfigError), match=r"model\.max_length=64") as caught:
        study(pool, chat, ["word " * 30], CONFIG, 0, 64)  # type: ignore[arg-type]
    assert "raise model.max_length" in str(caught.value)
    assert pool.prompts == []


def test_a_study_is_saved_without_its_trajectories(chat: ChatFormatter, tmp_path: Path) -> None:
    _, result = written(chat)
    result.save(tmp_path / "study.json")
    assert load_probes(tmp_path / "study.json") == result.probes
    values = json.loads((tmp_path / "study.json").read_text())
    assert (values["written"], values["malformed"]) == (result.written, result.malformed)
    assert isinstance(result.probes[0], Pair)
