"""The actor that lets a reward judge the dreams of a group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from sleeprl.algorithms.base import Algorithm
from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.data.trajectory import FLOAT32_MAX, from_batch, newest, with_rewards
from sleeprl.dreaming.checkpoint import read_group
from sleeprl.dreaming.messages import LoadedGroup, RewardResult
from sleeprl.dreaming.reward_process import RewardProcess
from sleeprl.dreaming.types import Dream, Task, scores
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import parse_qa


class RewardActor(RemoteActor):
    """Has dreams judged in a ``RewardProcess``. Where the reward raises, lets the deadline pass or
    ends its process, the dream is *unscored*, with the reason.

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
        self.chat = ChatFormatter(model)
        self.reward = RewardProcess(name, options, deadline, FLOAT32_MAX)

    def score(self, batch: pa.RecordBatch, tasks: Mapping[str, Task]) -> RewardResult:
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
            reward, reason = self.reward(dream)
            rewards.append(reward)
            reasons.append(reason)
        judged = with_rewards(batch, rewards, reasons)
        return RewardResult(ray.put(judged), self._is_informative(judged))

    def load(self, paths: Sequence[str]) -> list[LoadedGroup]:
        """Groups that a position kept: ``batch`` (a reference), its ``newest`` version, and
        ``equal`` as ``score`` says it."""
        batches = [read_group(path) for path in paths]
        return [
            LoadedGroup(ray.put(batch), newest(batch), self._is_informative(batch))
            for batch in batches
        ]

    def _is_informative(self, batch: pa.RecordBatch) -> bool:
        if self.algorithm is None:
            return True
        # From the batch, whose rewards are rounded as the trainer sees them.
        return self.algorithm.is_informative(scores(from_batch(batch), self.limit))
