"""Forms that a dream can have: how it is asked for, how it is read, and what is learned from it.

The rest of dreaming knows none of them. A format of one's own is a class with these three methods,
named in ``dreaming.format`` by its dotted path, an entry point of the group ``sleeprl.dream_format``,
or the short name that ``@register("dream_format", NAME)`` gives it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sleeprl.config.schema import DreamingConfig
from sleeprl.plugins import create
from sleeprl.text.prompts import STUDY_QA, examples, parse_qa, with_experience

if TYPE_CHECKING:
    from sleeprl.data.trajectory import Trajectory
    from sleeprl.text.chat import ChatFormatter


@dataclass(frozen=True)
class DreamPrompt:
    """What the model is asked for a dream."""

    message: str
    """The user's message: the experience and an instruction."""
    examples: tuple[tuple[str, str], ...] = ()
    """Worked examples that come before it: messages of the user and of the assistant."""


class DreamFormat(Protocol):
    """The form of a dream: one text, a pair, or any number of them.

    ``parse`` reads a dream once, in the scorer. What it returns travels as JSON to the reward (as
    ``Dream.parsed``) and to the trainer, so it has to be plain: strings, numbers, lists and
    dictionaries.
    """

    def prompt(self, document: str, num_examples: int) -> DreamPrompt:
        """Ask for a dream about a document.

        Args:
            document: the experience, as text.
            num_examples: how many worked examples the model needs (``self_study.few_shot_examples``).
        """
        ...

    def parse(self, text: str) -> Any | None:
        """Read a whole dream; None for a malformed one, which teaches nothing."""
        ...

    def training_pairs(self, parsed: Any) -> Sequence[tuple[str, str]]:
        """Return what is learned from a dream: messages, each with its response, without the
        experience in sight. There is at least one."""
        ...


class QuestionAnswer:
    """A question about the document, and its answer (``qa``). Parsed it is ``[question, answer]``."""

    def prompt(self, document: str, num_examples: int) -> DreamPrompt:
        few_shot = tuple(examples(num_examples, free=False))
        return DreamPrompt(with_experience(document, STUDY_QA), few_shot)

    def parse(self, text: str) -> list[str] | None:
        pair = parse_qa(text)
        return None if pair is None else [*pair]

    def training_pairs(self, parsed: list[str]) -> list[tuple[str, str]]:
        question, answer = parsed
        return [(question, answer)]


def format_of(config: DreamingConfig) -> DreamFormat:
    """Create the format that a configuration names.

    Raises:
        PluginError: it cannot be found or made.
    """
    made: DreamFormat = create(config.format, "dream_format", config.format_options)
    return made


def parse_dreams(
    form: DreamFormat, chat: ChatFormatter, dreams: Sequence[Trajectory]
) -> list[str | None]:
    """Read dreams, for the column ``parsed`` of their batch.

    Returns:
        JSON for each; None for a malformed one, and for one that the model did not end.
    """
    parsed = [
        form.parse(chat.decode(d.response_ids)) if d.finish_reason == "stop" else None
        for d in dreams
    ]
    return [None if found is None else json.dumps(found) for found in parsed]
