"""Sampling from the smaller self: one seed per text, and a count of malformed texts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from sleeprl.config.schema import SelfStudyConfig
from sleeprl.data.trajectory import Trajectory
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import FREE_QA, examples, parse_qa, with_experience

if TYPE_CHECKING:
    from sleeprl.rollout.engine_pool import EnginePool


def build_qa_prompt(chat: ChatFormatter, config: SelfStudyConfig, message: str) -> list[int]:
    """Build a prompt that asks for a question with its answer, in token ids.

    Args:
        chat: Chat format of the model.
        config: Settings with the number of few-shot examples and the prefix of the response.
        message: ``FREE_QA``, or the instruction to write a pair about a text.
    """
    few_shot = examples(config.few_shot_examples, free=message == FREE_QA)
    return chat.prompt(message, config.assistant_prefix, few_shot)


@dataclass(frozen=True)
class GeneratedQuestion:
    """A question about a document, written by the smaller self."""

    document: int
    """Index of the document."""
    question: str
    prompt: list[int]
    """Token ids of the prompt that it was sampled with."""
    written: Completion
    """The completion with the question and its answer."""
    ids: list[int] = field(default_factory=list)
    """Token ids of the mark and the question, as in a free pair."""
    nll: list[float] = field(default_factory=list)
    """-log p of each of these tokens without the document, in nats."""


class TextSampler:
    """A sampler with one seed per text, so a study is reproducible."""

    def __init__(
        self, engines: EnginePool, chat: ChatFormatter, config: SelfStudyConfig, seed: int, max_length: int,
        on_written: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Create the sampler.

        Args:
            engines: Engines with the weights of the smaller self.
            chat: Its chat format.
            config: Temperatures and lengths.
            seed: Seed from which the seeds of all texts are derived.
            max_length: Maximum sequence length, in tokens.
            on_written: Called after each batch with the total number of texts.
        """
        self.engines, self.chat, self.config, self.seed = engines, chat, config, seed
        self.max_length, self.on_written = max_length, on_written
        self.written = self.malformed = 0

    def require_room(self, prompts: Sequence[list[int]]) -> None:
        """Check that every prompt leaves room for a response.

        Raises:
            ValueError: A prompt is too long.
        """
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
        """Return whether a document, a question and an answer fit into the maximum length."""
        return self.has_room(with_experience(document, question))

    def has_room(self, message: str) -> bool:
        """Return whether a message and an answer fit into the maximum length."""
        return len(self.chat.prompt(message)) <= self._room

    def generate(
        self, prompts: Sequence[list[int]], temperature: float | None = None
    ) -> list[Completion]:
        """Sample one text for each prompt, and count those that are truncated.

        Args:
            prompts: Token ids of each prompt.
            temperature: Sampling temperature. By default that of the settings.

        Raises:
            ValueError: A prompt leaves no room for a response.
        """
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
        """Build a prompt to which a question and its answer, marks included, can be appended."""
        return build_qa_prompt(self.chat, replace(self.config, assistant_prefix=""), message)

    def token_nll(
        self, prompts: Sequence[list[int]], texts: Sequence[list[int]]
    ) -> list[list[float]]:
        """Score texts after their prompts.

        Args:
            prompts: Token ids of each prompt.
            texts: Token ids of each text.

        Returns:
            -log p of each token of each text, in nats.
        """
        whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
        found = self.engines.logprobs(whole, [len(prompt) for prompt in prompts]) if whole else []
        return [[-value for value in values] for values in found]

    def hold_out(self, texts: Sequence[str], share: float) -> set[str]:
        """Draw a share of the texts to exclude from training."""
        return set(random.Random(f"{self.seed}-held").sample(texts, int(share * len(texts))))

    def parse_pair(self, completion: Completion) -> tuple[str, str] | None:
        """Parse question and answer; return None, and count the text, if it is malformed."""
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
    """Convert a text to a trajectory for the lake, with a uid made of purpose, task and attempt.

    Args:
        purpose: The stream of the text.
        task: Task id.
        attempt: Number of the text within its task.
        prompt: Token ids of the student's prompt.
        completion: The sampled text.
        teacher_prompt: Token ids of the teacher's prompt, if it differs.
    """
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
    """Derive the seed of text ``number``."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}-{number}".encode(), digest_size=4).digest(), "big"
    )
