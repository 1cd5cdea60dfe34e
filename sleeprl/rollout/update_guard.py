"""The weight updates of one engine: how each ended, and what the engine may answer since."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from sleeprl.weight_sync.verification import (
    Canary,
    StaleWeights,
    UpdateReceipt,
    largest_difference,
    reached,
)

T = TypeVar("T")
Score = Callable[[list[int]], Awaitable[list[float]]]


class Resume(Protocol):
    def __call__(self, *, ending: bool) -> Awaitable[None]: ...


class UpdateGuard:
    """Judges the updates of an engine, and holds back what it computes with unproven weights.

    Guarantees:

    * ``finish`` returns a receipt, whatever fails; it never raises an engine's error.
    * No answer leaves while an update is judged (``wait_judged``).
    * No answer leaves that weights of a failed update had a part in (``wait_verified``).
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.version = 0
        """Of the weights in use, whether or not they are proven."""
        self.pending_version = 0
        """Of the update that is under way, or of the last one."""
        self.stale_reason: str | None = None
        """Why the last update did not end verified; None where it did."""
        self._verified_version = 0
        """Of the last update that ended verified."""
        self._failures: list[int] = []
        """For each update that failed, the version that was verified before it."""
        self._began = 0.0
        self._fault: str | None = None
        """What went wrong in the update that is under way."""
        self._last_reached: Canary | None = None
        """Of the last update that is known to have moved the scores to where the sender's are."""
        self._verdict_known = asyncio.Event()
        self._verdict_known.set()

    @property
    def num_failures(self) -> int:
        """Updates that failed so far."""
        return len(self._failures)

    @property
    def has_fault(self) -> bool:
        """Whether the update that is under way has failed already."""
        return self._fault is not None

    def version_before_failure(self, number: int) -> int:
        """Return the last version whose tokens are right, before the failure of that number."""
        return self._failures[number]

    def require_verified(self) -> None:
        """Raise StaleWeights where the last update did not end verified."""
        if self.stale_reason is not None:
            raise StaleWeights(
                f"{self.engine} is STALE since version {self.version}: {self.stale_reason}"
            )

    async def wait_judged(self) -> None:
        """Wait until no update is being judged."""
        await self._verdict_known.wait()

    async def wait_verified(self, failures_before: int) -> None:
        """Wait for a judgement, and refuse an answer that wrong weights may have computed.

        Args:
            failures_before: ``num_failures`` when the work was requested.

        Raises:
            StaleWeights: the engine is stale, or was since the work was requested.
        """
        await self.wait_judged()
        self.require_verified()
        if self.num_failures > failures_before:
            raise StaleWeights(f"{self.engine} was STALE meanwhile")

    def begin(self, version: int) -> None:
        """Note that an update to a version begins."""
        self._began, self._fault = time.monotonic(), None
        self.pending_version = version

    async def run_step(self, step: Awaitable[T]) -> T | None:
        """Run a step of an update. Its failure fails the update, not the call.

        Half of the weights may be new by then, so somebody has to go on to the end.
        """
        try:
            return await step
        except Exception as error:
            self._fault = self._fault or f"{type(error).__name__}: {error}"
            return None

    async def finish(
        self,
        commit: Callable[[], Awaitable[None]],
        resume: Resume,
        score: Score,
        canary: Canary | None,
    ) -> UpdateReceipt:
        """Commit what was loaded, let requests go on, and judge the result by the canary.

        Args:
            commit: Puts what was loaded to use as ``version``.
            resume: Lets requests go on or, with ``ending``, ends those that were running.
            score: Returns the log-probabilities of a sequence of T ids, T-1 values in nats.
            canary: What the sender expects; None leaves the update unchecked.
        """
        self._verdict_known.clear()
        self.version = self.pending_version
        try:
            await self.run_step(commit())
            self.stale_reason = self._fault
            await self.run_step(resume(ending=self.stale_reason is not None))
            seconds = time.monotonic() - self._began
            receipt = await self._receipt(score, canary, seconds)
            if receipt.verified:
                self._verified_version = self.version
            else:
                self._failures.append(self._verified_version)
                if self.stale_reason is None:
                    self.stale_reason = receipt.error
                    await self.run_step(resume(ending=True))
        finally:
            self._verdict_known.set()
        return receipt

    async def _receipt(self, score: Score, canary: Canary | None, seconds: float) -> UpdateReceipt:
        difference = tolerance = None
        if canary is not None and self._fault is None:
            difference = await self.run_step(self._judge(score, canary))
            tolerance = canary.tolerance
        fault = self._fault
        return UpdateReceipt(
            self.engine, self.version, fault is None, difference, tolerance, seconds, fault
        )

    async def _judge(self, score: Score, canary: Canary) -> float:
        """Return the largest difference of a log-probability from the sender's, in nats.

        What is too large becomes the update's fault. Scores are compared with those of the last
        update that certainly arrived: many updates that are lost one by one add up.
        """
        scores, last = await score(canary.token_ids), self._last_reached
        difference = largest_difference(canary.logprobs, scores)
        comparable = last is not None and last.token_ids == canary.token_ids
        old = last.logprobs if last is not None and comparable else canary.fresh
        arrived = old is None or reached(old, canary.logprobs, scores)
        if arrived is False:
            self._fault = (
                "its log-probabilities differ from the sender's and are those of an earlier "
                "version: the update was lost"
            )
        elif not difference <= canary.tolerance:  # also for NaN
            self._fault = "its log-probabilities differ from the sender's"
        elif arrived:
            self._last_reached = canary
        return difference
