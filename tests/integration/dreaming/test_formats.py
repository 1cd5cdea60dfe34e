"""A dream format of a user's own is written, tried, judged and learned by the real actors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.my_dream_format import Facts
from sleeprl.config.schema import DreamingConfig, NightConfig
from sleeprl.data.lake import TRAJECTORIES, Lake
from sleeprl.data.trajectory import from_batch
from sleeprl.dreaming.formats import QuestionAnswer, format_of
from sleeprl.dreaming.launch import make_tasks, prompt_builder
from sleeprl.self_study.sampler import build_qa_prompt
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import STUDY_FACT, STUDY_QA, format_qa, with_experience
from tests.integration.dreaming.test_staleness import (  # noqa: F401
    DOCUMENTS,
    PROBES,
    by_the_pipeline,
    local_ray,
    place,
    settings,
)


def test_the_built_in_format_is_a_question_and_its_answer() -> None:
    form = format_of(DreamingConfig())
    assert isinstance(form, QuestionAnswer)
    parsed = form.parse(format_qa("Who?", "Ann"))
    assert parsed == json.loads(json.dumps(parsed)) == ["Who?", "Ann"]
    assert form.training_pairs(parsed) == [("Who?", "Ann")]
    assert form.parse("no pair at all") is None


def test_the_prompt_of_a_task_is_that_of_self_study(tiny_model: Path) -> None:
    chat, config = ChatFormatter(tiny_model), NightConfig()
    config.self_study.few_shot_examples, config.self_study.assistant_prefix = 2, "So: "
    task = make_tasks(DOCUMENTS, PROBES, config)[1]
    message = with_experience(DOCUMENTS[1], STUDY_QA)
    assert task.message == message and len(task.examples) == 2
    assert prompt_builder(config, chat)(task) == build_qa_prompt(chat, config.self_study, message)


@pytest.mark.usefixtures("local_ray")
def test_a_format_of_ones_own_is_dreamed_in(place: Path) -> None:  # noqa: F811
    """Every whole dream is parsed once, tried, rewarded and learned from, text by text."""
    config = settings(
        place, "dreaming.steps=3", "dreaming.format=examples.my_dream_format.Facts",
        "dreaming.format_options={most: 2}",
    )  # fmt: skip
    chat = ChatFormatter(place / "wide")
    metrics: list[dict[str, Any]] = by_the_pipeline(place, config, chat, "facts")
    rows = from_batch(Lake(place / "facts" / "lake").read(TRAJECTORIES))
    dreams = [row for row in rows if row.purpose in ("dream", "redrawn")]
    form, whole = Facts(most=2), [d for d in dreams if d.finish_reason == "stop"]
    prompts = [chat.prompt(with_experience(text, STUDY_FACT)) for text in DOCUMENTS]
    assert dreams and all(d.prompt_ids in prompts for d in dreams)
    parsed = [form.parse(chat.decode(d.response_ids)) for d in whole]
    assert any(parsed)
    assert [d.parsed and json.loads(d.parsed) for d in whole] == parsed
    assert all(d.parsed is None for d in dreams if d.finish_reason != "stop")
    for dream in dreams:
        assert (dream.gain is None) == (dream.parsed is None) and dream.gap is not None
    learned = [
        d for d in whole if d.purpose == "dream" and d.parsed is not None and (d.reward or 0) > 0
    ]
    assert bool(learned) == any(step.get("learn/ce", 0) > 0 for step in metrics)
