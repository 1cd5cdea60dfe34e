"""The decoupled actor-learner loop of dreaming, as one page of straight code.

    curriculum -> admission -> engines -> scorers -> reward -> queue -> trainer -> engines

All stages work at the same time; the driver moves references. Admission bounds the work in flight:
a group is admitted only while fewer than ``(max_staleness + 1) * tasks_per_step`` groups precede it
in order of learning. So no dream is older than ``max_staleness`` updates when it is learned from,
and nothing is thrown away. An engine may continue a dream of another engine that missed an update;
tokens that are too old are not learned from.

Where the algorithm asks for it, a group that teaches nothing is set aside and another is admitted
in its place (DAPO's dynamic sampling; see ``AdmissionQueue``). Where engines and trainer share a
device, the engines sleep from the start of a step until its weights arrive.

After each update a checkpoint saves the trainer, the curriculum and every group. A killed run
continues from it. A dead engine or trainer rank is restarted; lost groups are admitted again under
their numbers, so each is learned from exactly once. A dead scorer, reward or curriculum ends the
run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind
from sleeprl.cluster.health import HealthState
from sleeprl.cluster.in_flight import Result
from sleeprl.cluster.waits import WAITS
from sleeprl.config.schema import DreamingConfig
from sleeprl.dreaming.admission import AdmissionQueue
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.dreaming.group_store import GroupStore, Stage
from sleeprl.dreaming.messages import LoadedGroup, PublishResult, StepResult
from sleeprl.dreaming.recovery import RecoveryManager
from sleeprl.dreaming.reward_watch import RewardWatch
from sleeprl.dreaming.types import Task, build_request
from sleeprl.rollout.types import RolloutResult

OnStep = Callable[[int, dict[str, Any]], None]


@dataclass
class Pipeline:
    """One phase of dreaming over running actors."""

    config: DreamingConfig
    tasks: Mapping[str, Task]
    engines: ActorGroup
    scorers: ActorGroup
    rewards: ActorGroup
    curriculum: ActorGroup
    learner: ActorGroup
    """The trainer's ranks, which step together."""
    build_prompt: Callable[[Task], list[int]]
    """Builds the token ids of a task's prompt."""
    seed: int
    queue: AdmissionQueue
    recovery: RecoveryManager
    colocated: bool = False
    """Whether trainer and engines take turns on one device."""
    store: GroupStore = field(default_factory=GroupStore)
    step: list[Any] = field(default_factory=list)
    """The calls of the running update, one per rank; empty without one."""
    step_groups: list[int] = field(default_factory=list)
    """The groups that the running update learns from."""
    stale: list[Any] = field(default_factory=list)
    """References to dreams that were regenerated since the last update; they only go into the lake."""
    failures: dict[int, Failure] = field(default_factory=dict)
    """The failure of each group that was lost in this tick."""
    needs_recovery: bool = False
    reward_watch: RewardWatch = field(default_factory=RewardWatch)

    @property
    def checkpoint(self) -> DreamingCheckpoint:
        return self.queue.checkpoint

    @property
    def actors(self) -> dict[str, ActorGroup]:
        """The groups whose waits are recorded, by name."""
        groups = (self.engines, self.scorers, self.rewards, self.learner)
        return {group.name: group for group in groups}

    def run(self, on_step: OnStep) -> None:
        """Run ``config.steps`` updates.

        Args:
            on_step: Receives the number of the update, from 1, and its metrics.

        Raises:
            ActorFailure: A failure that cannot be recovered from.
        """
        self._restore()
        pause = 0.0
        try:
            while self.checkpoint.version < self.config.steps:
                try:
                    moved = self._tick(on_step)
                except ActorFailure as failure:
                    self._handle(failure)
                    moved = True
                self.store.check(len(self.checkpoint.task_ids), self.engines.outstanding)
                self._record_idle()
                # Polling takes CPU time from the actors.
                time.sleep(pause := 0.0 if moved else min(0.02, pause + 0.001))
        finally:
            for name in self.actors:
                WAITS.set_target(name, None)

    def _restore(self) -> None:
        """Restore the groups of the checkpoint."""
        paths = [str(path) for _, path in self.checkpoint.group_files().values()]
        rest = [{"paths": list[str]()}] * (len(self.rewards) - 1)  # the first one reads all
        loaded: list[LoadedGroup] = self.rewards.scatter("load", [{"paths": paths}, *rest])[0]
        self.store.restore(self.queue, loaded)

    def _tick(self, on_step: OnStep) -> bool:
        """Poll every stage once, and return whether anything moved. May be repeated after a failure."""
        if self.needs_recovery:
            self._recover()
        moved = self._admit()
        self._collect_rollouts()
        self._collect(self.scorers, "scoring", "rewarding")
        self._collect(self.rewards, "rewarding", "queued")
        moved |= self._dispatch(self.scorers, "scoring")
        moved |= self._dispatch(self.rewards, "rewarding")
        moved |= self._learn(on_step)
        if self.failures:
            number, failure = next(iter(self.failures.items()))
            raise ActorFailure(f"group {number} of dreams", failure)
        return moved

    def _admit(self) -> bool:
        """Admit groups up to the staleness bound, one group per engine call."""
        moved, task_ids = False, self.checkpoint.task_ids
        bound = min(self.config.max_staleness + self.checkpoint.version + 1, self.config.steps)
        while self.queue.step_of(number := self.store.next_readmitted(len(task_ids))) < bound:
            if not self.engines.has_healthy():
                break
            if number == len(task_ids):
                (task,) = self.curriculum.call("next", n=1)[0]
                task_ids.append(task.id)
            task = self.tasks[task_ids[number]]
            group = build_request(self.config, self.seed, number, task, self.build_prompt)
            partial, oldest = self.store.partial(number), self.queue.min_version(number)
            arguments = {"request": group, "partial": partial, "min_version": oldest}
            if not self.engines.submit("rollout", str(number), **arguments):
                raise RuntimeError("admission let in more groups than the engines have room for")
            self.store.admit(number)
            moved = True
        return moved

    def _collect_rollouts(self) -> None:
        """Collect finished roll-outs; readmit groups that are incomplete or too old to learn from."""
        for number, result in self._finished(self.engines):
            rollout: RolloutResult = result.value
            oldest, reason = rollout.oldest_last_version, rollout.incomplete_reason
            self.stale += rollout.stale
            if self.queue.is_too_old(number, oldest):
                writer = f"engine-{result.actor}"
                reason = f"{writer} wrote with policy version {oldest}, older than allowed"
            if reason:
                self._lose(number, Failure(FailureKind.RETRYABLE, reason), rollout.batch)
            else:
                self.store.advance(number, "scoring", rollout.batch)

    def _collect(self, group: ActorGroup, stage: Stage, following: Stage) -> None:
        """Move the groups that a stage's actors have finished to the following stage."""
        for number, result in self._finished(group):
            self.store.advance(number, following, result.value.batch)
            if stage == "rewarding" and not result.value.is_informative:
                self.queue.uninformative.add(number)

    def _finished(self, group: ActorGroup) -> list[tuple[int, Result]]:
        """Return the groups that actors have finished, and readmit those that they lost.

        Raises:
            ActorFailure: A fatal failure, which a retry would repeat.
        """
        finished = []
        for result in group.ready():
            number, failure = int(result.tag), result.failure
            if failure is None:
                finished.append((number, result))
            elif failure.kind is FailureKind.FATAL:
                raise ActorFailure(f"{group.name}-{result.actor}, group {number}", failure)
            else:
                self._lose(number, failure)
        return finished

    def _lose(self, number: int, failure: Failure, partial: Any = None) -> None:
        self.failures[number] = failure
        self.store.lose(number, partial)

    def _dispatch(self, group: ActorGroup, stage: Literal["scoring", "rewarding"]) -> bool:
        """Send waiting groups to a stage, as far as its actors have room."""
        moved, waiting = False, self.store.waiting[stage]
        while waiting and group.has_healthy():
            batch = self.store.groups[waiting[0]].batch
            if not group.submit("score", str(waiting[0]), batch=batch, tasks=self.tasks):
                break
            waiting.popleft()
            moved = True
        return moved

    def _learn(self, on_step: OnStep) -> bool:
        """Start an update whose groups are queued, or finish one whose step is done."""
        if self.step:
            if not self.learner.is_done(self.step):
                return False
            self._finish_step(on_step)
            return True
        learned, redrawn = self.queue.next_step()
        # In order of admission: a group that others overtake would exceed the staleness bound.
        if len(learned) < self.queue.size or not self.store.all_queued(learned):
            return False
        if self.colocated:
            self.engines.call("sleep")
        batches, aside = ([self.store.groups[n].batch for n in ns] for ns in (learned, redrawn))
        arguments = {"batches": batches, "redrawn": aside}
        self.step, self.step_groups = (
            self.learner.send("step", [arguments] * len(self.learner)),
            learned,
        )
        self.store.start_step(learned, redrawn)
        return True

    def _finish_step(self, on_step: OnStep) -> None:
        """Publish the new weights, save the checkpoint, and report to the curriculum.

        The calls before ``observe`` are repeated when an actor dies during them.
        """
        checkpoint, latency, warn = self.checkpoint, self.store.latency, self.recovery.on_restart
        result: StepResult = self.learner.collect("step", self.step)[0]
        latency.end_step()
        sent = {**self._publish(), "publish_lag_seconds": latency.publish_lag()}
        groups, after = self._snapshot(), str(checkpoint.version_path(checkpoint.version + 1))
        self.learner.call("save", directory=after, groups=groups, stale=self.stale)
        self.stale = []
        self.curriculum.call("observe", outcomes=result.outcomes)
        checkpoint.curriculum_state = self.curriculum.call("state_dict")[0]
        checkpoint.num_finished += self.store.counts.learning
        checkpoint.version, self.step = checkpoint.version + 1, []
        redrawn = self.store.finish_step(self.step_groups)
        sent |= {"groups": self.step_groups, "redrawn": redrawn, "age_seconds": latency.last_ages}
        on_step(checkpoint.version, {**result.metrics, **sent})  # repeated after a kill, not lost
        self.reward_watch.check(self.config, checkpoint.version, result.all_unscored, warn)
        checkpoint.save()

    def _snapshot(self) -> dict[str, Any]:
        """Return all groups outside the running update, by number and stage."""
        answers = self.engines.call("partial_refs") if self.store.counts.generating else []
        self._collect_rollouts()  # of engines that finished before the call
        partials = {int(u.split("-")[1]): ref for answer in answers for u, ref in answer.items()}
        return self.store.snapshot(partials)

    def _publish(self) -> dict[str, Any]:
        """Send the trainer's weights to present engines and scorers; unverified engines get no work."""
        sent: PublishResult = self.learner.call("publish", engines=self.engines.actors)[0]
        self.engines.updated(sent.verified)
        dead = len(self.engines.health.having(HealthState.DEAD))  # no work, whatever they received
        if unverified := max(sent.num_unverified, dead):
            reason = f"{unverified} did not end the update verified"
            raise ActorFailure("engines", Failure(FailureKind.RETRYABLE, reason))
        self.scorers.call("set_expert", expert=sent.expert)
        return dict(sent.metrics)

    def _handle(self, failure: ActorFailure) -> None:
        """Classify a failure, and raise it if it cannot be recovered from."""
        lost, self.failures = self.failures, {}
        recoverable = self.recovery.classify(failure)
        limit = max(1, self.recovery.limit)
        often = any(self.store.groups[number].losses > limit for number in lost)
        if often or not (recoverable or lost):
            raise failure
        self.needs_recovery |= recoverable

    def _recover(self) -> None:
        """Restart dead actors, then send the trainer's weights to all engines."""
        if self.recovery.recover(self.checkpoint) and self.step:
            self.store.abort_step()  # its groups are still queued in the store
            self.step = []
        self._publish()
        self.needs_recovery = False

    def _record_idle(self) -> None:
        """Record which actors are idle, and what each waits for."""
        busy = {name: group.outstanding > 0 for name, group in self.actors.items()}
        busy["learner"] = bool(self.step)
        busy["engine"] &= not (self.colocated and self.step)
        for name, source, what, kind in self.store.counts.idle(busy):
            log_tail = self.actors[source].log_tail if source else list
            WAITS.set_target(name, source, what=what, kind=kind, log_tail=log_tail)
