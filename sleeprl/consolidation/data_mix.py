"""The data mix: the training examples of each step of a job.

The draw depends on the seed and the step only, so a resumed job continues with the same rows as an
uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from sleeprl.config.methods import NEW, PASSAGE, REPLAY, STUDENT, Method
from sleeprl.config.schema import ConsolidationConfig
from sleeprl.consolidation.methods import loss_weights
from sleeprl.data.trajectory import Trajectory
from sleeprl.losses.types import LossWeights
from sleeprl.self_study.study import STUDY
from sleeprl.trainer.batching import TrainingExample

T = TypeVar("T")


class DataMix:
    """The streams of texts that a method trains on, in shuffled passes with each text once per pass."""

    def __init__(
        self,
        method: Method,
        texts: Sequence[Trajectory],
        passages: Sequence[list[int]],
        config: ConsolidationConfig,
        seed: int,
    ) -> None:
        """Select the streams of a method.

        Args:
            method: The method to train with.
            texts: Texts of self-study, with purpose ``self_study`` or ``replay``.
            passages: Token ids of the day's documents.
            config: Settings as the method changes them (``Method.objective``).
            seed: Seed of the order.

        Raises:
            ValueError: A stream that the method needs is empty.
        """
        self.method, self.config, self.seed = method, config, seed
        read = set(self.parts(0))
        self.rollouts = STUDENT in read
        """Whether the method trains on the student's rollouts."""
        self.new = [t for t in texts if t.purpose == "self_study"]
        replay = [t for t in texts if t.purpose == "replay"]
        self.replay = replay if REPLAY in method.texts else []
        free = [t for t in replay if not t.task_id.startswith(STUDY)]
        if not self.new and read & {NEW, STUDENT}:
            raise ValueError("self-study wrote no usable text; look at `malformed` in study.json")
        if method.anchored and not free:
            raise ValueError(
                f"{method.title} needs the smaller self's own texts, but there is no replay; "
                "set self_study.replay_questions above 0"
            )
        self.free_texts = [to_example(text, REPLAY) for text in free]
        """All texts that the smaller self wrote without a document, even if the method does not
        train on them."""
        count = config.batch_size
        replayed = round(count * config.replay_ratio) if self.replay else 0
        streams = {
            NEW: ([to_example(text, NEW) for text in self.new], count),
            REPLAY: ([to_example(text, REPLAY) for text in self.replay], replayed),
            PASSAGE: ([TrainingExample(ids[:1], ids[1:], PASSAGE) for ids in passages], count),
        }
        self.streams = {name: streams[name] for name in method.texts}

    @property
    def replay_share(self) -> float:
        """Share of the rollouts that continue replay texts, in [0, 1]."""
        return self.config.replay_ratio / (1.0 + self.config.replay_ratio) if self.replay else 0.0

    def parts(self, step: int) -> dict[str, LossWeights]:
        """Return the loss weights of each part at ``step``."""
        return loss_weights(self.method, self.config, step)

    def rows(self, step: int) -> list[TrainingExample]:
        """Draw the texts of ``step``, for all ranks together."""
        drawn: list[TrainingExample] = []
        for name, (rows, count) in self.streams.items():
            drawn += _pass(rows, step, count, f"{self.seed}-{name}")
        return drawn

    def tokens_per_step(self) -> float:
        """Estimate ``trained_tokens`` per step. A rollout counts as long as the text it continues."""
        tokens = sum(count * _mean_tokens(rows) for rows, count in self.streams.values())
        if self.rollouts:
            config, share = self.config, self.replay_share
            count = config.rollout_prompts * config.group_size / config.rollout_every
            tokens += (
                count * (1.0 - share) * _mean_tokens([to_example(t, STUDENT) for t in self.new])
            )
            tokens += count * share * _mean_tokens([to_example(t, STUDENT) for t in self.replay])
        return tokens


def to_example(text: Trajectory, part: str) -> TrainingExample:
    """Convert a text to a training example of ``part``, with the teacher's prompt."""
    return TrainingExample(
        text.prompt_ids, text.response_ids, part, text.teacher_prompt_ids, key=text.uid
    )


def trained_tokens(rows: Sequence[TrainingExample]) -> int:
    """Count the tokens in the trained model's forward and backward pass."""
    return sum(r.student_length() for r in rows)


def _mean_tokens(rows: Sequence[TrainingExample]) -> float:
    return trained_tokens(rows) / len(rows) if rows else 0.0


def _pass(items: Sequence[T], step: int, count: int, seed: str) -> list[T]:
    """Return items ``step*count`` to ``(step+1)*count`` of an endless sequence of shuffled passes."""
    drawn: list[T] = []
    position = step * count
    while len(drawn) < count:
        epoch, offset = divmod(position + len(drawn), len(items))
        order = list(range(len(items)))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        drawn.extend(items[i] for i in order[offset : offset + count - len(drawn)])
    return drawn
