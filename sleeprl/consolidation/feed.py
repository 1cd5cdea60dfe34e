"""What each step of the job learns from: rows of the night's data, drawn by seed and step.

The draw of a step depends on the seed, the step and the number of ranks only, so
a resumed job continues with the rows it would have had.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from sleeprl.actors.learner import Row
from sleeprl.config import ConsolidationConfig
from sleeprl.losses.streams import Part
from sleeprl.trajectories.schema import Trajectory

T = TypeVar("T")
NEW, REPLAY, STUDENT, PASSAGE = "new", "replay", "student", "passage"


def seeding_parts(config: ConsolidationConfig) -> dict[str, Part]:
    """J_KS as stream weights: (1-alpha)*reward + alpha*(lambda*on-policy + (1-lambda)*teacher texts).

    Replay has the weight that ``replay_ratio`` gives it in the data; both streams
    are means, so without this it would count as much as the new.
    """
    alpha, on_policy = config.distillation, config.on_policy
    taught = alpha * (1.0 - on_policy)
    parts = {
        NEW: Part(kl=taught, ce=config.ce),
        REPLAY: Part(kl=taught * config.replay_ratio, ce=config.ce * config.replay_ratio),
    }
    if config.rollout_prompts:
        parts[STUDENT] = Part(pg=1.0 - alpha, kl=alpha * on_policy)
    return parts


def row(text: Trajectory, part: str) -> Row:
    return Row(text.prompt_ids, text.response_ids, part, text.teacher_prompt_ids, key=text.uid)


class SeedingFeed:
    """Teacher texts of both streams. Texts come in shuffled passes, each once per pass."""

    def __init__(self, texts: Sequence[Trajectory], config: ConsolidationConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.new = [t for t in texts if t.purpose == "self_study"]
        self.replay = [t for t in texts if t.purpose == "replay"]
        if not self.new:
            raise ValueError("self-study wrote no usable text; look at `malformed` in study.json")
        self.parts = seeding_parts(config)

    def rows(self, step: int, rank: int, world: int) -> list[Row]:
        """This rank's share of the teacher texts of ``step``."""
        new = _pass(self.new, step, self.config.batch_size, f"{self.seed}-new")
        count = round(self.config.batch_size * self.config.replay_ratio) if self.replay else 0
        replay = _pass(self.replay, step, count, f"{self.seed}-replay")
        rows = [row(t, NEW) for t in new] + [row(t, REPLAY) for t in replay]
        return rows[rank::world]


class PassageFeed:
    """The baseline: next-token prediction on the documents themselves."""

    parts = {PASSAGE: Part(ce=1.0)}  # noqa: RUF012 - never changed

    def __init__(self, passages: Sequence[list[int]], batch_size: int, seed: int) -> None:
        self.passages, self.batch_size, self.seed = passages, batch_size, seed

    def rows(self, step: int, rank: int, world: int) -> list[Row]:
        drawn = _pass(self.passages, step, self.batch_size, f"{self.seed}-passages")
        return [Row(ids[:1], ids[1:], PASSAGE) for ids in drawn[rank::world]]


def trained_tokens(rows: Sequence[Row]) -> int:
    """Tokens that go through the trained model's forward and backward pass."""
    return sum(len(r.prompt_ids) + len(r.response_ids) for r in rows)


def _pass(items: Sequence[T], step: int, count: int, seed: str) -> list[T]:
    """Items ``step*count`` to ``(step+1)*count`` of an endless shuffled repetition."""
    drawn: list[T] = []
    position = step * count
    while len(drawn) < count:
        epoch, offset = divmod(position + len(drawn), len(items))
        order = list(range(len(items)))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        drawn.extend(items[i] for i in order[offset : offset + count - len(drawn)])
    return drawn
