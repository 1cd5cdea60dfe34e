"""Splits documents that are longer than the model can read, where a night reads its day.

The lake keeps what was recorded as it is: another model may read more of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sleeprl.config.schema import NightConfig
from sleeprl.dreaming.formats import format_of
from sleeprl.evaluation.questions import Day, Question
from sleeprl.self_study.sampler import build_qa_prompt
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import STUDY_QA, with_experience
from sleeprl.text.split import split_text
from sleeprl.wake.day import most_similar

_SLACK = 8
"""Tokens by which a text may be longer in its prompt than alone."""
_LEAST = 16
"""Fewest tokens of a part. With less room nothing is split, and the settings are at fault."""
_SAMPLE = "A text."


def prompts_about(
    config: NightConfig, chat: ChatFormatter, document: str
) -> Iterator[tuple[str, list[int]]]:
    """Yield the prompts that hold a whole document, each with the setting of its response's length.

    Args:
        config: The settings.
        chat: The model's chat format.
        document: The document.
    """
    study = config.self_study
    message = with_experience(document, STUDY_QA)
    yield "self_study.max_tokens", build_qa_prompt(chat, study, message)
    if config.dreaming.enabled:
        dream = format_of(config.dreaming).prompt(document, study.few_shot_examples)
        prompt = chat.prompt(dream.message, study.assistant_prefix, dream.examples)
        yield "dreaming.max_tokens", prompt


@dataclass
class Room:
    """The room that a night's prompts leave for a document, in tokens."""

    config: NightConfig
    chat: ChatFormatter

    def split(self, document: str, questions: Sequence[str] = ()) -> list[str]:
        """Split a document into what the model can read; one part where it can read all of it.

        Args:
            document: The document.
            questions: Questions that are asked with it in the prompt.
        """
        longest = max((self.length(question) for question in questions), default=0)
        # A token is at least a byte.
        if len(document.encode()) <= self._room(longest) or self._fits(document, questions):
            return [document]
        # A part has to leave room for the questions that the model writes itself, too.
        room = self._room(max(longest, self.config.self_study.max_tokens))
        if room < _LEAST:
            return [document]
        return split_text(document, room, self.length)

    def length(self, text: str) -> int:
        """Count the tokens of a text."""
        return len(self.chat.text(text))

    def _fits(self, document: str, questions: Sequence[str]) -> bool:
        longest = self.config.model.max_length
        if any(
            len(prompt) + response_length(self.config, setting) > longest
            for setting, prompt in prompts_about(self.config, self.chat, document)
        ):
            return False
        answer = self.config.evaluation.max_tokens
        prompts = (self.chat.prompt(with_experience(document, each)) for each in questions)
        return all(len(prompt) + answer <= longest for prompt in prompts)

    def _room(self, question: int) -> int:
        """Return the tokens of the longest document that surely fits, with a question beside it."""
        answer = max(self.config.evaluation.max_tokens, self.config.self_study.max_tokens)
        beside = max(self._beside_study, self._beside_question + question + answer)
        return self.config.model.max_length - beside - _SLACK

    @cached_property
    def _beside_study(self) -> int:
        """Tokens beside the document in the prompts that are written about it, with the response."""
        return max(
            len(prompt) + response_length(self.config, setting)
            for setting, prompt in prompts_about(self.config, self.chat, _SAMPLE)
        )

    @cached_property
    def _beside_question(self) -> int:
        return len(self.chat.prompt(with_experience(_SAMPLE, _SAMPLE)))


def response_length(config: NightConfig, setting: str) -> int:
    """Return the length of a response: the value of a setting such as ``self_study.max_tokens``."""
    section, _, name = setting.partition(".")
    return int(getattr(getattr(config, section), name))


def split_day(day: Day, config: NightConfig, chat: ChatFormatter) -> tuple[Day, list[int]]:
    """Split the documents of a day that are longer than the model can read, in their order.

    A question about such a document is asked with the part that fits it best. The embedded world's
    documents stay whole: ``wake.people_per_document`` makes them.

    Args:
        day: The day.
        config: The settings.
        chat: The model's chat format.

    Returns:
        The day, and the number of parts of each document; the same day if there is one part of each.
    """
    if not config.wake.inputs:
        return day, [1] * len(day.documents)
    room = Room(config, chat)
    questions_of: dict[str, list[str]] = {}
    for probe in day.probes:
        if probe.experience:
            questions_of.setdefault(probe.experience, []).append(probe.question)
    texts = dict.fromkeys([*day.documents, *questions_of])
    parts = {text: room.split(text, questions_of.get(text, ())) for text in texts}
    documents = [part for text in day.documents for part in parts[text]]
    return (
        replace(day, documents=documents, probes=_with_parts(day.probes, parts)),
        [len(parts[text]) for text in day.documents],
    )


def _with_parts(probes: Sequence[Question], parts: dict[str, list[str]]) -> list[Question]:
    """Give the questions about a document in parts the part that fits each best."""
    about: dict[str, list[int]] = {}
    for n, probe in enumerate(probes):
        if len(parts.get(probe.experience or "", ())) > 1:
            about.setdefault(probe.experience or "", []).append(n)
    result = list(probes)
    for text, numbers in about.items():
        # All of a document at once: comparing reads each of its parts.
        best = most_similar([probes[n] for n in numbers], parts[text])
        for n, part in zip(numbers, best, strict=True):
            result[n] = replace(probes[n], experience=part)
    return result
