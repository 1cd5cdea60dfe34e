"""The decoupled actor-learner loop of dreaming, as one page of straight code.

    curriculum -> admission -> engines -> scorers -> reward -> queue -> learner -> engines

Everything between the arrows is in flight at the same time; the driver moves references. What bounds it is
admission: a group is admitted only where fewer than ``(staleness + 1) * tasks_per_step`` wait in line before
it, so no dream can be older than ``staleness`` updates when it is learned from, and nothing is thrown away.
What an engine that missed an update had written is gone on from; tokens that are too old teach nothing.

Where the algorithm asks for it, a group whose rewards are all equal is set aside and another is admitted in
its place (DAPO's dynamic sampling); ``AdmissionQueue`` says which. Where engines and learner share a
device, the engines sleep from the beginning of a step until its weights come.

After each update the position is kept: learner, curriculum, and what has come of each group. A killed run
goes on from there, and an engine or a learner worker that dies is restarted; lost groups are admitted again
under their numbers, so each is learned from exactly once. A dead scorer, reward or curriculum ends the run.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sleeprl.cluster.actor_group import ActorGroup, Result
from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind
from sleeprl.cluster.health import HealthState
from sleeprl.cluster.waits import WAITS
from sleeprl.config.schema import DreamingConfig
from sleeprl.dreaming.admission import AdmissionQueue
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.dreaming.recovery import RecoveryManager
from sleeprl.dreaming.stage_counts import GroupLatency, StageCounts
from sleeprl.dreaming.types import Task, request

OnStep = Callable[[int, dict[str, Any]], None]


@dataclass
class Pipeline:
    """The actors of one dreaming phase. ``learner`` ranks step together; the other groups have
    processes of their own. asks: the prompt of a task's message. redraws: groups that may be set
    aside for an update. colocated: learner and engines take turns."""

    config: DreamingConfig
    tasks: Mapping[str, Task]
    engines: ActorGroup
    scorers: ActorGroup
    rewards: ActorGroup
    curriculum: ActorGroup
    learner: ActorGroup
    asks: Callable[[str], list[int]]
    seed: int
    position: DreamingCheckpoint
    mender: RecoveryManager
    redraws: int = 0
    colocated: bool = False
    counts: StageCounts = field(default_factory=StageCounts)
    ages: GroupLatency = field(default_factory=GroupLatency)

    @property
    def groups(self) -> tuple[ActorGroup, ...]:
        return self.engines, self.scorers, self.rewards, self.learner

    def run(self, on_step: OnStep) -> None:
        """Learn ``config.steps`` times. Raises ActorFailure for what cannot be mended."""
        self._begin()
        idle = 0.0
        try:
            while self.position.version < self.config.steps:
                try:
                    moved = self._turn(on_step)
                except ActorFailure as failure:
                    self._failed(failure)
                    moved = True
                where = len(self.position.admitted) - len(self.again), self.engines.outstanding
                self.counts.check(*where, (stage for stage, _ in self.held.values()))
                self._account()
                time.sleep(idle := 0.0 if moved else min(0.02, idle + 0.001))  # looking costs
        finally:
            for group in self.groups:
                WAITS.now(group.name, None)

    def _begin(self) -> None:
        """Take up what the position kept; what it did not is admitted again."""
        position, counts, self.size = self.position, self.counts, self.config.tasks_per_step
        counts.admitted, counts.learned = position.done, position.version * self.size
        counts.redrawn = counts.admitted - counts.learned
        self.step: list[Any] = []
        self.broken, self.lost, self.losses = False, dict[int, Failure](), Counter[int]()
        # What groups to be admitted again go on from, and what of them had to be written anew.
        self.begun, self.outdated = dict[int, Any](), list[Any]()
        # Of each group that was written its batch, and the stage that it waits for or is in.
        self.held: dict[int, tuple[str, Any]] = {}
        self.waiting: dict[str, deque[int]] = {"scoring": deque(), "rewarding": deque()}
        kept, idle = position.groups(), [{"paths": list[str]()}] * (len(self.rewards) - 1)
        paths = [str(path) for _, path in kept.values()]  # which one of them reads
        loaded = self.rewards.scatter("load", [{"paths": paths}, *idle])[0]
        self.line = AdmissionQueue(position, self.size, self.config.max_staleness, self.redraws)
        for (number, (stage, _)), found in zip(kept.items(), loaded, strict=True):
            if stage == "generating" or self.line.too_old(number, found["newest"]):
                self.begun[number] = found["batch"]
                continue
            self.held[number] = (stage, found["batch"])
            if stage == "queued" and found["equal"]:
                self.line.equal.add(number)
            counts.move("admitted", stage)
            if stage in self.waiting:
                self.waiting[stage].append(number)
        rest = range(position.done, len(position.admitted))
        self.again = deque(n for n in rest if n not in self.held)

    def _turn(self, on_step: OnStep) -> bool:
        """Look at everything once, and say whether anything moved. May be repeated where it fails."""
        if self.broken:
            self._mend()
        moved = self._admit()
        self._take(self.engines, "generating", "scoring")
        self._take(self.scorers, "scoring", "rewarding")
        self._take(self.rewards, "rewarding", "queued")
        moved |= self._send(self.scorers, "scoring") | self._send(self.rewards, "rewarding")
        moved |= self._learn(on_step)
        if self.lost:
            number, failure = next(iter(self.lost.items()))
            raise ActorFailure(f"group {number} of dreams", failure)
        return moved

    def _admit(self) -> bool:
        """Fill the room that the staleness bound leaves, one group per engine call."""
        config, admitted, moved = self.config, self.position.admitted, False
        updates = min(config.max_staleness + self.position.version + 1, config.steps)
        while self.line.update(self.again[0] if self.again else len(admitted)) < updates:
            if not self.engines.able():
                break
            number, task = self._next()
            asked = request(self.config, self.seed, number, task, self.asks)
            begun = {"begun": self.begun.pop(number, None), "since": self.line.since(number)}
            if not self.engines.submit("rollout", str(number), **asked, **begun):
                raise RuntimeError("admission let in more groups than the engines have room for")
            self.counts.move("admitted", "generating")
            moved = True
        return moved

    def _next(self) -> tuple[int, Task]:
        """The number and task of the group to admit: one that was lost, or a new one."""
        admitted = self.position.admitted
        if self.again:
            number = self.again.popleft()
            return number, self.tasks[admitted[number]]
        (task,) = self.curriculum.call("next", n=1)[0]
        admitted.append(task.id)
        return len(admitted) - 1, task

    def _take(self, group: ActorGroup, stage: str, following: str) -> None:
        """Hold what a stage has done for the one that follows."""
        for number, value in self._ends(group, stage):
            self.held[number] = (following, value["batch"])
            self.counts.move(stage, following)
            self.ages.seen(number)
            if value.get("equal"):
                self.line.equal.add(number)
            if following in self.waiting:
                self.waiting[following].append(number)

    def _ends(self, group: ActorGroup, stage: str) -> list[tuple[int, dict[str, Any]]]:
        """What a stage has done; what it lost is admitted again, if that can be mended."""
        done = []
        for result in group.ready():
            number, failure = int(result.tag), result.failure
            if failure and failure.kind is FailureKind.DATA:
                raise ActorFailure(f"{group.name}-{result.actor}, group {number}", failure)
            if failure is None and stage == "generating":
                failure = self._incomplete(number, result)
            if failure is None:
                done.append((number, result.value))
                continue
            self.lost[number] = failure
            self.held.pop(number, None)
            self.counts.move(stage, "admitted")
            self.again = deque(sorted([*self.again, number]))
        return done

    def _incomplete(self, number: int, result: Result) -> Failure | None:
        """Why a group has to go on from what an engine made of it."""
        value, newest = result.value, result.value["newest"]
        self.outdated += value.get("outdated", ())
        told = f"engine-{result.actor} wrote with policy version {newest}, older than allowed"
        why = told if self.line.too_old(number, newest) else value.get("unfinished")
        if why:
            self.begun[number] = value["batch"]
        return Failure(FailureKind.INFRA, why) if why else None

    def _send(self, group: ActorGroup, stage: str) -> bool:
        moved, waiting = False, self.waiting[stage]
        while waiting and group.able():
            number = waiting[0]
            if not group.submit("score", str(number), batch=self.held[number][1], tasks=self.tasks):
                break
            waiting.popleft()
            moved = True
        return moved

    def _learn(self, on_step: OnStep) -> bool:
        """Start an update whose groups are there, or end one that is done."""
        if self.step:
            if not self.learner.ended(self.step):
                return False
            self._learned(on_step)
            return True
        wanted, redrawn = self.line.next()
        # In the order of admission: whom others overtake gets older than the bound allows.
        if sum(self.held.get(n, ("", None))[0] == "queued" for n in wanted) < self.size:
            return False
        if self.colocated:
            self.engines.call("sleep")
        told = {"batches": wanted, "redrawn": redrawn}
        asked = {name: [self.held[n][1] for n in numbers] for name, numbers in told.items()}
        self.step, self.wanted = self.learner.send("step", [asked] * len(self.learner)), wanted
        for number in (*wanted, *redrawn):
            self.held[number] = ("learning", self.held[number][1])
        self.counts.move("queued", "learning", len(wanted) + len(redrawn))
        self.ages.learning(wanted)
        return True

    def _learned(self, on_step: OnStep) -> None:
        """Publish the new weights, make this the position, and tell the curriculum.

        What comes before ``observe`` may be done twice, when somebody dies on the way.
        """
        position = self.position
        outcome = self.learner.collect("step", self.step)[0]
        self.ages.updated()
        sent = {**self._publish(), "publish_lag_seconds": self.ages.lag()}
        groups, after = self._under_way(), str(position.at(position.version + 1))
        self.learner.call("save", directory=after, groups=groups, outdated=self.outdated)
        self.outdated = []
        self.curriculum.call("observe", outcomes=outcome["outcomes"])
        position.curriculum = self.curriculum.call("state_dict")[0]
        position.version += 1
        position.done += self.counts.learning
        position.save()
        self.step = []
        self.held = {n: held for n, held in self.held.items() if held[0] != "learning"}
        self.counts.move("learning", "learned", self.size)
        sent |= {"groups": self.wanted, "redrawn": self.counts.learning}
        self.counts.move("learning", "redrawn", self.counts.learning)
        on_step(position.version, {**outcome["metrics"], **sent, "age_seconds": self.ages.last})

    def _under_way(self) -> dict[str, Any]:
        """All groups but those of this update, as they are now, by number and stage."""
        told = self.engines.call("prefixes") if self.counts.generating else []
        self._take(self.engines, "generating", "scoring")  # who ended before they were asked
        begun = self.begun | {int(u.split("-")[1]): ref for of in told for u, ref in of.items()}
        running = {f"{n}-generating": ref for n, ref in begun.items() if n not in self.held}
        held = {f"{n}-{s}": batch for n, (s, batch) in self.held.items() if s != "learning"}
        return running | held

    def _publish(self) -> dict[str, Any]:
        """The learner's weights to all engines there are now, and to the scorers. Whoever fails to
        get them gets no work."""
        sent: dict[str, Any] = self.learner.call("publish", engines=self.engines.actors)[0]
        self.engines.updated(sent.pop("verified"))
        silent = len(self.engines.health.having(HealthState.DEAD))  # gets no work in any case
        if stale := max(sent.pop("stale_engines", 0), silent):
            told = f"{stale:.0f} did not end the update verified"
            raise ActorFailure("engines", Failure(FailureKind.INFRA, told))
        self.scorers.scatter("set_expert", [{"expert": sent.pop("expert")}] * len(self.scorers))
        sent.pop("version")
        return sent

    def _failed(self, failure: ActorFailure) -> None:
        """Find out what a failure is, and raise it where nothing can be done about it."""
        lost, self.lost = self.lost, {}
        self.losses.update(lost.keys())
        mendable = self.mender.diagnose(failure)
        often = any(self.losses[number] > max(1, self.mender.limit) for number in lost)
        if often or not (mendable or lost):
            raise failure
        self.broken |= mendable

    def _mend(self) -> None:
        if self.mender.mend(self.position) and self.step:  # its groups are still here
            self.counts.move("learning", "queued", self.counts.learning)
            for number, (stage, batch) in self.held.items():
                self.held[number] = ("queued" if stage == "learning" else stage, batch)
            self.step = []
        self._publish()
        self.broken = False

    def _account(self) -> None:
        """Who has nothing to do now, and for whom it waits."""
        of = {group.name: group for group in self.groups}
        busy = {n: g.outstanding > 0 for n, g in of.items()} | {"learner": bool(self.step)}
        busy["engine"] &= not (self.colocated and self.step)
        for name, whom, what, kind in self.counts.idle(busy):
            WAITS.now(name, whom, what=what, kind=kind, wrote=of[whom].wrote if whom else list)
