"""Tracks every group of dreams from its admission to its update."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from sleeprl.dreaming.admission import AdmissionQueue
from sleeprl.dreaming.messages import LoadedGroup
from sleeprl.dreaming.stage_counts import GroupLatency, StageCounts

Stage = Literal["readmitted", "generating", "scoring", "rewarding", "queued", "learning"]


@dataclass
class GroupState:
    """The driver's state of an admitted and unfinished group."""

    stage: Stage
    """The group's current or next stage. ``readmitted``: it waits for an engine again."""
    batch: Any = None
    """Reference to the record batch of the last finished stage; None before the first."""
    partial: Any = None
    """Reference to incomplete dreams that the next engine continues; None to start over."""
    losses: int = 0
    """Number of times that an actor failed while working on the group."""


class GroupStore:
    """The groups by number, with counts and ages. It moves references, never batches.

    Guarantees:

    * every transition is counted, and refused where the group is not in its source stage;
    * each waiting queue is first in, first out.
    """

    def __init__(self) -> None:
        self.groups: dict[int, GroupState] = {}
        self.counts = StageCounts()
        self.latency = GroupLatency()
        self.waiting: dict[Stage, deque[int]] = {"scoring": deque(), "rewarding": deque()}
        """Groups that were not yet sent to the actors of their stage, in order of arrival."""

    def numbers(self, stage: Stage) -> list[int]:
        """Return the groups in a stage, in order of admission."""
        return sorted(n for n, group in self.groups.items() if group.stage == stage)

    def next_readmitted(self, default: int) -> int:
        """Return the oldest group that waits for an engine again, or ``default``."""
        return min(self.numbers("readmitted"), default=default)

    def all_queued(self, numbers: Iterable[int]) -> bool:
        """Return whether all of these groups wait for their update."""
        return set(numbers) <= set(self.numbers("queued"))

    def partial(self, number: int) -> Any:
        """Return the reference to a group's incomplete dreams, or None."""
        return self.groups[number].partial if number in self.groups else None

    def restore(self, queue: AdmissionQueue, loaded: Sequence[LoadedGroup]) -> None:
        """Restore the unfinished groups of a checkpoint.

        Groups that were being generated, or are too old by now, are readmitted with their
        incomplete dreams. Groups without a file start over.

        Args:
            queue: The queue of the checkpoint; its ``uninformative`` groups are updated.
            loaded: The groups of the checkpoint's files, in their order.
        """
        checkpoint, counts = queue.checkpoint, self.counts
        counts.admitted = checkpoint.num_finished
        counts.learned = checkpoint.version * queue.size
        counts.redrawn = counts.admitted - counts.learned
        for number in range(checkpoint.num_finished, len(checkpoint.task_ids)):
            self.groups[number] = GroupState("readmitted")
        for (number, (saved, _)), group in zip(
            checkpoint.group_files().items(), loaded, strict=True
        ):
            if saved == "generating" or queue.is_too_old(number, group.oldest_last_version):
                self.groups[number].partial = group.batch
                continue
            stage = cast("Stage", saved)
            counts.move("admitted", stage)
            self.groups[number] = GroupState(stage, group.batch)
            self._wait(number, stage)
            if stage == "queued" and not group.is_informative:
                queue.uninformative.add(number)

    def admit(self, number: int) -> None:
        """Record that an engine works on a group, a new or a readmitted one."""
        self.counts.move("admitted", "generating")
        group = self.groups.setdefault(number, GroupState("generating"))
        group.stage, group.partial = "generating", None

    def advance(self, number: int, stage: Stage, batch: Any) -> None:
        """Record that a group has finished its stage and enters the next one.

        Args:
            number: The group.
            stage: The next stage.
            batch: Reference to the batch that the finished stage returned.
        """
        group = self.groups[number]
        self.counts.move(group.stage, stage)
        group.stage, group.batch = stage, batch
        self.latency.mark_generated(number)
        self._wait(number, stage)

    def lose(self, number: int, partial: Any = None) -> None:
        """Readmit a group whose stage failed or left incomplete dreams.

        Args:
            number: The group.
            partial: Reference to incomplete dreams to continue; None to start over.
        """
        group = self.groups[number]
        self.counts.move(group.stage, "admitted")
        group.stage, group.batch, group.partial = "readmitted", None, partial
        group.losses += 1

    def start_step(self, learned: Iterable[int], redrawn: Iterable[int]) -> None:
        """Move the groups of an update to ``learning``, including those that are set aside for them."""
        learned = list(learned)
        for number in (*learned, *redrawn):
            self.counts.move("queued", "learning")
            self.groups[number].stage = "learning"
        self.latency.start_step(learned)

    def abort_step(self) -> None:
        """Move the groups of an update back to ``queued`` after a failure of the trainer."""
        for number in self.numbers("learning"):
            self.counts.move("learning", "queued")
            self.groups[number].stage = "queued"

    def finish_step(self, learned: Iterable[int]) -> int:
        """Drop the groups of a finished update.

        Args:
            learned: The groups that it learned from.

        Returns:
            The number of groups that were set aside for them.
        """
        learned, finished = set(learned), self.numbers("learning")
        for number in finished:
            self.counts.move("learning", "learned" if number in learned else "redrawn")
            del self.groups[number]
        return len(finished) - len(learned)

    def snapshot(self, partials: Mapping[int, Any]) -> dict[str, Any]:
        """Return a reference for each group outside the running update, by ``NUMBER-STAGE``.

        Args:
            partials: The incomplete dreams of the groups that engines work on.
        """
        saved: dict[str, Any] = {}
        for number, group in self.groups.items():
            if group.stage in ("readmitted", "generating"):
                partial = group.partial or partials.get(number)
                if partial is not None:
                    saved[f"{number}-generating"] = partial
            elif group.stage != "learning":
                saved[f"{number}-{group.stage}"] = group.batch
        return saved

    def check(self, admitted: int, generating: int) -> None:
        """Check the counts against the groups' stages.

        Args:
            admitted: Number of groups that have a number.
            generating: Number of unfinished calls to engines.

        Raises:
            AssertionError: A group was lost or duplicated.
        """
        stages = [group.stage for group in self.groups.values()]
        beyond = [stage for stage in stages if stage not in ("readmitted", "generating")]
        self.counts.check(admitted - stages.count("readmitted"), generating, beyond)

    def _wait(self, number: int, stage: Stage) -> None:
        if stage in self.waiting:
            self.waiting[stage].append(number)
