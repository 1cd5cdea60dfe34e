"""The actor that rewards the dreams of a group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pyarrow as pa
import ray

from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.config.schema import DreamingConfig
from sleeprl.data.trajectory import (
    FLOAT32_MAX,
    TRAJECTORY_SCHEMA,
    conform,
    find_oldest_last_version,
    from_batch,
    with_column,
    with_rewards,
)
from sleeprl.dreaming.checkpoint import read_group
from sleeprl.dreaming.formats import format_of, parse_dreams
from sleeprl.dreaming.messages import LoadedGroup, RewardResult
from sleeprl.dreaming.reward_process import RewardProcess
from sleeprl.dreaming.types import Dream, Task, algorithm_of, scores
from sleeprl.text.chat import ChatFormatter


class RewardActor(RemoteActor):
    """Computes rewards in a ``RewardProcess``.

    Where the reward raises, times out or ends its process, the dream is *unscored*, with the
    reason.
    """

    def __init__(self, checkpoint: str, config: DreamingConfig) -> None:
        """Start the reward's process.

        Args:
            checkpoint: Directory of the model; its tokenizer decodes the dreams.
            config: The reward, the algorithm and the format of dreams.

        Raises:
            PluginError: The reward cannot be created.
        """
        self.algorithm, self.limit = algorithm_of(config), config.max_tokens
        self.chat = ChatFormatter(checkpoint)
        self.format = format_of(config)
        self.reward = RewardProcess(
            config.reward, config.reward_options, config.reward_timeout_s, FLOAT32_MAX
        )

    def score(self, batch: pa.RecordBatch, tasks: Mapping[str, Task]) -> RewardResult:
        """Set ``reward`` or ``unscored`` in every row of a batch.

        Args:
            batch: A group after the scorer.
            tasks: All tasks, by id.
        """
        rewards: list[float | None] = []
        reasons: list[str | None] = []
        for trajectory in from_batch(batch):
            parsed = trajectory.parsed
            dream = Dream(
                task=tasks[trajectory.task_id],
                text=self.chat.decode(trajectory.response_ids),
                token_ids=trajectory.response_ids,
                parsed=None if parsed is None else json.loads(parsed),
                gain=trajectory.gain,
            )
            reward, reason = self.reward(dream)
            rewards.append(reward)
            reasons.append(reason)
        rewarded = with_rewards(batch, rewards, reasons)
        return RewardResult(ray.put(rewarded), self._is_informative(rewarded))

    def load(self, paths: Sequence[str]) -> list[LoadedGroup]:
        """Read the groups of a checkpoint, including those of an earlier schema."""
        return [self._load(path) for path in paths]

    def _load(self, path: str) -> LoadedGroup:
        found = read_group(path)
        batch = conform(found, TRAJECTORY_SCHEMA)
        if "parsed" not in found.schema.names:  # schemas before version 4 do not store it
            parsed = parse_dreams(self.format, self.chat, from_batch(batch))
            batch = with_column(batch, "parsed", parsed)
        return LoadedGroup(
            ray.put(batch), find_oldest_last_version(batch), self._is_informative(batch)
        )

    def _is_informative(self, batch: pa.RecordBatch) -> bool:
        # From the batch, whose rewards are rounded as the trainer sees them.
        return self.algorithm.is_informative(scores(from_batch(batch), self.limit))
