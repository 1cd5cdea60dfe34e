"""The day of a night before the night: its documents and questions in tokens, and whether they fit.

A dry run and the start of a night read the inputs with the model's own tokenizer. Nothing is
recorded, and neither torch nor ray is needed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.evaluation.measure import build_prompts
from sleeprl.evaluation.questions import Day
from sleeprl.night.parts import prompts_about, response_length, split_day
from sleeprl.self_study.sampler import build_qa_prompt
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import FREE_QA, STUDY_QA, with_experience
from sleeprl.wake.day import preview_day, read_own_questions

_EXAMINED = 64
"""How many of the longest documents and questions are put into every prompt that they will be in."""
_CHARACTERS = 4
"""Characters of a token, where no tokenizer is at hand."""


@dataclass(frozen=True)
class DayInTokens:
    """A night's day in numbers."""

    documents: Sequence[int]
    """Tokens of each document."""
    questions: Sequence[int]
    """Tokens of the prompt of each question, without its document."""
    with_context: Sequence[int]
    """The same with the question's document."""
    texts: int
    """Held-out texts for the perplexity; 0 where the model writes them."""
    split: int = 0
    """Number of documents that are longer than the model can read; ``documents`` has their parts."""
    exact: bool = True
    """Whether a tokenizer counted; otherwise tokens are guessed from characters."""


def preview_night(config: NightConfig, model: Path | None) -> DayInTokens | None:
    """Read the day of a night, and check that every prompt leaves room for its response.

    Args:
        config: The settings.
        model: The checkpoint, for its tokenizer; None where it is not on this machine.

    Returns:
        The day in tokens; None where it comes from stdin, which can be read only once.

    Raises:
        ConfigError: A prompt would be too long; the message names the document or the question.
    """
    if "-" in config.wake.inputs:
        read_own_questions(config)  # refuses bad ones
        return None
    day, sources = preview_day(config)
    if model is None:
        return _guess(day)
    chat = ChatFormatter(model, config.model.chat_template_kwargs)
    day, parts = split_day(day, config, chat)
    sources = [
        name if count == 1 else f"{name} (part {number} of {count})"
        for name, count in zip(sources, parts, strict=True)
        for number in range(1, count + 1)
    ]
    documents = [len(chat.text(text)) for text in day.documents]
    bare = build_prompts(chat, day.probes, with_context=False)
    full = build_prompts(chat, day.probes, with_context=True)
    _require_room_for_documents(config, chat, day, sources, documents)
    _require_room_for_questions(config, day, [*map(len, bare)], [*map(len, full)])
    split = sum(count > 1 for count in parts)
    return DayInTokens(documents, [*map(len, bare)], [*map(len, full)], len(day.texts), split)


def _guess(day: Day) -> DayInTokens:
    bare = [1 + len(q.question) // _CHARACTERS for q in day.probes]
    read = [
        n + len(q.experience or "") // _CHARACTERS for n, q in zip(bare, day.probes, strict=True)
    ]
    documents = [1 + len(text) // _CHARACTERS for text in day.documents]
    return DayInTokens(documents, bare, read, len(day.texts), exact=False)


def _require_room_for_documents(
    config: NightConfig,
    chat: ChatFormatter,
    day: Day,
    sources: Sequence[str],
    lengths: Sequence[int],
) -> None:
    """Check the prompts of self-study and of dreams with the longest documents.

    Raises:
        ConfigError: One leaves no room for its response.
    """
    study = config.self_study
    free = len(build_qa_prompt(chat, study, FREE_QA))
    _require_room(config, "what self-study asks without a document", free, "self_study.max_tokens")
    if study.replay_questions >= 4:  # a stated fact becomes a document
        fact = len(build_qa_prompt(chat, study, with_experience("", STUDY_QA))) + study.max_tokens
        _require_room(config, "a question about a stated fact", fact, "self_study.max_tokens")
    for number in heapq.nlargest(_EXAMINED, range(len(lengths)), key=lengths.__getitem__):
        for setting, prompt in prompts_about(config, chat, day.documents[number]):
            what = f"{sources[number]} ({day.documents[number][:40]!r}...)"
            _require_room(config, what, len(prompt), setting)


def _require_room_for_questions(
    config: NightConfig, day: Day, bare: Sequence[int], full: Sequence[int]
) -> None:
    """Check the prompts of the measurements.

    Raises:
        ConfigError: One leaves no room for an answer.
    """
    for lengths, beside in ((bare, ""), (full, " with its document")):
        if lengths:
            number = max(range(len(lengths)), key=lengths.__getitem__)
            what = f"the question {day.probes[number].question[:60]!r}{beside}"
            _require_room(config, what, lengths[number], "evaluation.max_tokens")


def _require_room(config: NightConfig, what: str, prompt: int, setting: str) -> None:
    response = response_length(config, setting)
    longest = config.model.max_length
    if prompt + response <= longest:
        return
    raise ConfigError(
        f"model.max_length={longest} is too short: {what} makes a prompt of {prompt} tokens, and "
        f"{setting}={response} may follow; set model.max_length={_round_up(prompt + response)} if the "
        f"model reads so much, or lower {setting}{_shorten(config, what)}"
    )


def _shorten(config: NightConfig, what: str) -> str:
    """Say how the prompt becomes shorter, as the end of a message."""
    if config.wake.inputs:
        return ", or shorten the text"
    return ", or wake.people_per_document" if "document" in what else ""


def _round_up(tokens: int) -> int:
    """Round up to a multiple of 64."""
    return -(-tokens // 64) * 64
