"""The smaller self as a writer: a seed of its own for every text, and what is not whole is counted."""

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
    """A prompt that is answered with a question and its answer.

    message: ``FREE_QA``, or an instruction to write them about a text.
    """
    shown = examples(config.few_shot_examples, free=message == FREE_QA)
    return chat.prompt(message, config.assistant_prefix, shown)


@dataclass(frozen=True)
class GeneratedQuestion:
    """A question about document number ``document``, and the ``prompt`` and text it was ``written`` in.

    ids: of the question behind its mark, as it is asked freely; surprise: of each of them then, nats.
    """

    document: int
    question: str
    prompt: list[int]
    written: Completion
    ids: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)


class TextSampler:
    """Samples with a seed of its own for every text, so a study repeats.

    on_written: told of the texts so far after each set of them.
    """

    def __init__(
        self, fleet: EnginePool, chat: ChatFormatter, config: SelfStudyConfig, seed: int, max_length: int,
        on_written: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.fleet, self.chat, self.config, self.seed = fleet, chat, config, seed
        self.max_length, self.on_written = max_length, on_written
        self.written = self.malformed = 0

    def require_room(self, prompts: Sequence[list[int]]) -> None:
        """Raises ValueError for a prompt that leaves no room for what is to be written."""
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
        """Whether a question fits behind its document, with an answer."""
        return self.has_room(with_experience(document, question))

    def has_room(self, message: str) -> bool:
        """Whether a message fits, with an answer."""
        return len(self.chat.prompt(message)) <= self._room

    def generate(
        self, prompts: Sequence[list[int]], temperature: float | None = None
    ) -> list[Completion]:
        self.require_room(prompts)
        heat = self.config.temperature if temperature is None else temperature
        sampling = [
            SamplingParams(self.config.max_tokens, heat, _mix(self.seed, self.written + i))
            for i in range(len(prompts))
        ]
        completions = self.fleet.generate(prompts, sampling)
        self.written += len(prompts)
        self.malformed += sum(c.finish_reason != "stop" for c in completions)
        self.on_written(self.written)
        return completions

    def qa_prefix(self, message: str) -> list[int]:
        """A prompt behind which a question and its answer can be put, mark and all."""
        return build_qa_prompt(self.chat, replace(self.config, assistant_prefix=""), message)

    def token_nll(
        self, prompts: Sequence[list[int]], texts: Sequence[list[int]]
    ) -> list[list[float]]:
        """-log p of each token of a text behind its prompt, in nats."""
        whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
        found = self.fleet.logprobs(whole) if whole else []
        return [
            [-value for value in values[len(prompt) - 1 :]]
            for prompt, values in zip(prompts, found, strict=True)
        ]

    def hold_out(self, texts: Sequence[str], share: float) -> set[str]:
        return set(random.Random(f"{self.seed}-held").sample(texts, int(share * len(texts))))

    def parse_pair(self, completion: Completion) -> tuple[str, str] | None:
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
    return int.from_bytes(
        hashlib.blake2b(f"{seed}-{number}".encode(), digest_size=4).digest(), "big"
    )
