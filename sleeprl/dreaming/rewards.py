"""The built-in reward, and the actor in which rewards run, one deadline per batch of dreams."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pyarrow as pa
import ray

from sleeprl.actors.group import Served
from sleeprl.chat import Chat
from sleeprl.dreaming.position import read_group
from sleeprl.dreaming.tasks import Dream, Reward, Task, scores
from sleeprl.losses.algorithms.base import Algorithm
from sleeprl.prompts import parse_qa
from sleeprl.registry import create
from sleeprl.trajectories.schema import FLOAT32_MAX, from_batch, with_rewards


class LikelihoodGain:
    """What the dream teaches: the gain of its trial; a malformed dream teaches nothing.

    scale: reward per nat, so that the numbers are of the order of one.
    """

    def __init__(self, scale: float = 10.0) -> None:
        self.scale = scale

    def __call__(self, dream: Dream) -> float | None:
        if dream.pair is None:
            return 0.0
        return None if dream.gain is None else self.scale * dream.gain


class RewardActor(Served):
    """Runs a reward. What it raises or lets pass the deadline is *unscored*, with the reason.

    algorithm: says which groups teach nothing. limit: tokens that a dream may have.
    """

    def __init__(
        self,
        model: str,
        name: str,
        options: Mapping[str, Any],
        deadline: float,
        algorithm: Algorithm | None = None,
        limit: int = 0,
    ) -> None:
        self.algorithm, self.limit = algorithm, limit
        self.chat = Chat(model)
        self.reward: Reward = create(name, "reward", options)
        self.deadline = deadline

    def score(self, batch: pa.RecordBatch, tasks: Mapping[str, Task]) -> dict[str, Any]:
        """``batch``: a reference to the batch with ``reward`` or ``unscored`` in every row; and
        whether its rewards are ``equal``, which leaves the algorithm without a gradient."""
        rewards: list[float | None] = []
        reasons: list[str | None] = []
        for trajectory in from_batch(batch):
            text = self.chat.decode(trajectory.response_ids)
            whole = trajectory.finish_reason == "stop"
            dream = Dream(
                task=tasks[trajectory.task_id],
                text=text,
                token_ids=trajectory.response_ids,
                pair=parse_qa(text) if whole else None,
                gain=json.loads(trajectory.meta).get("gain"),
            )
            reward, reason = self._one(dream)
            rewards.append(reward)
            reasons.append(reason)
        judged = with_rewards(batch, rewards, reasons)
        return {"batch": ray.put(judged), "equal": self._equal(judged)}

    def load(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """Groups that a position kept: ``batch`` (a reference), the ``oldest`` policy version, and
        ``equal`` as ``score`` says it."""
        batches = [read_group(path) for path in paths]
        versions = [batch.column("versions").flatten().to_pylist() for batch in batches]
        return [
            {
                "batch": ray.put(batch),
                "oldest": min(found, default=None),
                "equal": self._equal(batch),
            }
            for batch, found in zip(batches, versions, strict=True)
        ]

    def _equal(self, batch: pa.RecordBatch) -> bool:
        if self.algorithm is None:
            return False
        # As it is for the learner: after the algorithm's own shaping, and rounded by the batch.
        return not any(self.algorithm.advantages(scores(from_batch(batch), self.limit)))

    def _one(self, dream: Dream) -> tuple[float | None, str | None]:
        # A thread of its own: one that hangs must not take the actor with it.
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            running = pool.submit(self.reward, dream)
            if not wait([running], timeout=self.deadline).done:
                return None, f"the reward took longer than {self.deadline} s"
            value = running.result()
        except BaseException as error:  # sys.exit in a reward must not end the actor
            return None, f"{type(error).__name__}: {error}"
        finally:
            pool.shutdown(wait=False)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) <= FLOAT32_MAX:
            return None, f"the reward returned {value!r}"
        return number, None
