"""Where every group of dreams is between its admission and its update."""

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
    """What the driver knows of one group that is admitted and not finished."""

    stage: Stage
    """The stage that the group is in or waits for. ``readmitted``: it waits for an engine again."""
    batch: Any = None
    """Reference to the record batch that the last finished stage left; None before there is one."""
    partial: Any = None
    """Reference to incomplete dreams that the next engine continues; None to start over."""
    losses: int = 0
    """How often an actor failed while it worked on the group."""


class GroupStore:
    """The groups by number, their counts and their ages. It moves references, never batches.

    Guarantees:

    * every transition is counted, and refused where the group is not in the stage it leaves;
    * groups leave a waiting line in the order in which they joined it.
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
        """Tell whether all of these groups wait for their update."""
        return set(numbers) <= set(self.numbers("queued"))

    def partial(self, number: int) -> Any:
        """Return the reference to what an engine may continue of a group, or None."""
        return self.groups[number].partial if number in self.groups else None

    def restore(self, queue: AdmissionQueue, loaded: Sequence[LoadedGroup]) -> None:
        """Put in the unfinished groups of a checkpoint.

        Groups that were being generated, or are too old by now, are readmitted with what is written
        of them; groups that the checkpoint does not hold start over.

        Args:
            queue: the queue of the checkpoint; learns which groups are uninformative.
            loaded: the groups of the checkpoint's files, in their order.
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
        """Record that an engine has a group, a new one or a readmitted one, and its partial dreams."""
        self.counts.move("admitted", "generating")
        group = self.groups.setdefault(number, GroupState("generating"))
        group.stage, group.partial = "generating", None

    def advance(self, number: int, stage: Stage, batch: Any) -> None:
        """Record that a group has finished its stage and goes on to the next one.

        Args:
            number: the group.
            stage: the stage that follows.
            batch: reference to what the finished stage returned.
        """
        group = self.groups[number]
        self.counts.move(group.stage, stage)
        group.stage, group.batch = stage, batch
        self.latency.mark_generated(number)
        self._wait(number, stage)

    def lose(self, number: int, partial: Any = None) -> None:
        """Send a group back to the engines because what its stage made is lost or incomplete."""
        group = self.groups[number]
        self.counts.move(group.stage, "admitted")
        group.stage, group.batch, group.partial = "readmitted", None, partial
        group.losses += 1

    def start_step(self, learned: Iterable[int], redrawn: Iterable[int]) -> None:
        """Move the groups of an update to ``learning``, those set aside for them included."""
        learned = list(learned)
        for number in (*learned, *redrawn):
            self.counts.move("queued", "learning")
            self.groups[number].stage = "learning"
        self.latency.start_step(learned)

    def abort_step(self) -> None:
        """Move the groups of an update back to ``queued``: the trainer lost it."""
        for number in self.numbers("learning"):
            self.counts.move("learning", "queued")
            self.groups[number].stage = "queued"

    def finish_step(self, learned: Iterable[int]) -> int:
        """Forget the groups of an update.

        Returns:
            How many were set aside for those that were learned.
        """
        learned, finished = set(learned), self.numbers("learning")
        for number in finished:
            self.counts.move("learning", "learned" if number in learned else "redrawn")
            del self.groups[number]
        return len(finished) - len(learned)

    def snapshot(self, partials: Mapping[int, Any]) -> dict[str, Any]:
        """Return a reference for each group outside the running update, by ``NUMBER-STAGE``.

        Args:
            partials: what engines have written so far of the groups that they work on.
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
        """Compare the counts with where the groups are.

        Args:
            admitted: groups that have a number.
            generating: calls to engines that have not ended.

        Raises:
            AssertionError: a group was lost or doubled.
        """
        stages = [group.stage for group in self.groups.values()]
        beyond = [stage for stage in stages if stage not in ("readmitted", "generating")]
        self.counts.check(admitted - stages.count("readmitted"), generating, beyond)

    def _wait(self, number: int, stage: Stage) -> None:
        if stage in self.waiting:
            self.waiting[stage].append(number)
