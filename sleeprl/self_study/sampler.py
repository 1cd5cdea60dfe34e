"""Samples texts of the smaller self: each with a seed of its own, and those that are not whole counted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sleeprl.config.schema import SelfStudyConfig
from sleeprl.data.trajectory import Trajectory
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import FREE_QA, examples, parse_qa, with_experience


def build_qa_prompt(chat: ChatFormatter, config: SelfStudyConfig, message: str) -> list[int]:
    """Return a prompt that asks for a question and its answer.

    Args:
        chat: The chat format.
        config: Says with how many examples, and how the text begins.
        message: ``FREE_QA``, or an instruction to write them about a text.
    """
    few_shot = examples(config.few_shot_examples, free=message == FREE_QA)
    return chat.prompt(message, config.assistant_prefix, few_shot)


@dataclass(frozen=True)
class GeneratedQuestion:
    """A question that the smaller self asked about a document."""

    document: int
    """Number of the document."""
    question: str
    prompt: list[int]
    """Token ids behind which it was written."""
    written: Completion
    """The text that holds it."""
    ids: list[int] = field(default_factory=list)
    """Token ids of the question behind its mark, as it is asked freely."""
    nll: list[float] = field(default_factory=list)
    """-log p of each of them when it is asked freely, in nats."""


class TextSampler:
    """Samples with a seed of its own for every text, so a study repeats."""

    def __init__(
        self, engines: EnginePool, chat: ChatFormatter, config: SelfStudyConfig, seed: int, max_length: int,
        on_written: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Args:
        engines: Engines that hold the smaller self.
        chat: Its chat format.
        config: Temperatures and lengths.
        seed: Of all texts together.
        max_length: Longest sequence, in tokens.
        on_written: Called with the number of texts so far, after each set of them.
        """
        self.engines, self.chat, self.config, self.seed = engines, chat, config, seed
        self.max_length, self.on_written = max_length, on_written
        self.written = self.malformed = 0

    def require_room(self, prompts: Sequence[list[int]]) -> None:
        """Raise ValueError for a prompt that leaves no room for what is to be written."""
        longest, room = max(map(len, prompts), default=0), self._room
        if longest > room:
            raise ValueError(
                f"a document makes a prompt of {longest} tokens, but model.max_length={self.max_length} "
                f"leaves {room} beside self_study.max_tokens={self.config.max_tokens}; "
                "raise model.max_length or split the document"
            )

    @property
    def _room(self) -> int:
        return self.max_length - self.config.max_tokens

    def can_answer(self, document: str, question: str) -> bool:
        """Decide whether a question fits behind its document, with an answer."""
        return self.has_room(with_experience(document, question))

    def has_room(self, message: str) -> bool:
        """Decide whether a message fits, with an answer."""
        return len(self.chat.prompt(message)) <= self._room

    def generate(
        self, prompts: Sequence[list[int]], temperature: float | None = None
    ) -> list[Completion]:
        """Sample one text for each prompt; by default at the temperature of the settings."""
        self.require_room(prompts)
        heat = self.config.temperature if temperature is None else temperature
        sampling = [
            SamplingParams(self.config.max_tokens, heat, _mix(self.seed, self.written + i))
            for i in range(len(prompts))
        ]
        completions = self.engines.generate(prompts, sampling)
        self.written += len(prompts)
        self.malformed += sum(c.finish_reason != "stop" for c in completions)
        self.on_written(self.written)
        return completions

    def qa_prefix(self, message: str) -> list[int]:
        """Return a prompt behind which a question and its answer can be put, mark and all."""
        return build_qa_prompt(self.chat, replace(self.config, assistant_prefix=""), message)

    def token_nll(
        self, prompts: Sequence[list[int]], texts: Sequence[list[int]]
    ) -> list[list[float]]:
        """Return -log p of each token of each text behind its prompt, in nats."""
        whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
        found = self.engines.logprobs(whole) if whole else []
        return [
            [-value for value in values[len(prompt) - 1 :]]
            for prompt, values in zip(prompts, found, strict=True)
        ]

    def hold_out(self, texts: Sequence[str], share: float) -> set[str]:
        """Draw a share of the texts."""
        return set(random.Random(f"{self.seed}-held").sample(texts, int(share * len(texts))))

    def parse_pair(self, completion: Completion) -> tuple[str, str] | None:
        """Return question and answer of a text, None where it is not of that form, which is counted."""
        if completion.finish_reason != "stop":
            return None
        pair = parse_qa(self.chat.decode(completion.token_ids))
        self.malformed += pair is None
        return pair


def trajectory(
    purpose: Literal["self_study", "replay"],
    task: str,
    attempt: int,
    prompt: list[int],
    completion: Completion,
    teacher_prompt: list[int] | None,
) -> Trajectory:
    """Return a text as the lake keeps it, named by its task and its number in it."""
    return Trajectory(
        uid=f"{purpose}-{task}-{attempt}",
        task_id=task,
        attempt=attempt,
        purpose=purpose,
        prompt_ids=prompt,
        response_ids=completion.token_ids,
        logprobs=completion.logprobs,
        versions=completion.versions,
        finish_reason=completion.finish_reason,
        teacher_prompt_ids=teacher_prompt,
    )


def _mix(seed: int, number: int) -> int:
    """A seed of its own for each text."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}-{number}".encode(), digest_size=4).digest(), "big"
    )
