"""Formats of dreams: how a dream is requested, how it is parsed, and what is learned from it.

The rest of dreaming is independent of the format. A custom format is a class with the three methods
of ``DreamFormat``. ``dreaming.format`` names it by its dotted path, an entry point of the group
``sleeprl.dream_format``, or the short name that ``@register("dream_format", NAME)`` gives it.
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
    """The prompt for a dream."""

    message: str
    """The user's message: the experience and an instruction."""
    examples: tuple[tuple[str, str], ...] = ()
    """Worked examples before it, as (user, assistant) messages."""


class DreamFormat(Protocol):
    """The format of a dream: one text, a pair, or any number of them.

    ``parse`` reads a dream once, in the scorer. Its result travels as JSON to the reward (as
    ``Dream.parsed``) and to the trainer, so it must be plain: strings, numbers, lists and
    dictionaries.
    """

    def prompt(self, document: str, num_examples: int) -> DreamPrompt:
        """Build the prompt for a dream about a document.

        Args:
            document: The experience, as text.
            num_examples: Number of worked examples that the model needs
                (``self_study.few_shot_examples``).
        """
        ...

    def parse(self, text: str) -> Any | None:
        """Parse a complete dream; None for a malformed one, which teaches nothing."""
        ...

    def training_pairs(self, parsed: Any) -> Sequence[tuple[str, str]]:
        """Return what to learn from a dream.

        Returns:
            At least one pair of a message and its response, both without the experience.
        """
        ...


class QuestionAnswer:
    """A question about the document, and its answer (``qa``); parsed as ``[question, answer]``."""

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
        PluginError: The format cannot be found or created.
    """
    made: DreamFormat = create(config.format, "dream_format", config.format_options)
    return made


def parse_dreams(
    form: DreamFormat, chat: ChatFormatter, dreams: Sequence[Trajectory]
) -> list[str | None]:
    """Parse dreams, for the column ``parsed`` of their batch.

    Args:
        form: The format.
        chat: The model's chat format.
        dreams: The dreams.

    Returns:
        JSON for each dream; None for a malformed or truncated one.
    """
    parsed = [
        form.parse(chat.decode(d.response_ids)) if d.finish_reason == "stop" else None
        for d in dreams
    ]
    return [None if found is None else json.dumps(found) for found in parsed]
