"""The rollout engine: tokens in, tokens out. One Ray actor each; a night's is ``VLLMEngine``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sleeprl.cluster.actor_group import AsyncRemoteActor
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.data.trajectory import Trajectory, from_batch, newest, outdated, to_batch
from sleeprl.plugins import resolve
from sleeprl.weight_sync.base import TransportConfig
from sleeprl.weight_sync.verification import (
    Canary,
    StaleWeights,
    UpdateReceipt,
    largest_difference,
    reached,
)

T = TypeVar("T")


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. ``seed`` makes one request's tokens repeatable whatever runs beside it.

    There is no top-p or top-k. A token's probability is then one among the few that were left
    to choose from, and the learner's ratio to it is wrong unless it knows these, for every
    token. vLLM 0.32 can return them (``return_sampling_mask``, with Triton), but such an
    engine refuses greedy requests, and every request without a top-k.
    """

    max_tokens: int
    temperature: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One response. logprobs and versions have one entry per token; logprobs are in nats and
    those of the distribution that was sampled from (after temperature)."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: str


RUNNING = "running"
NOTHING = Completion([], [], [], RUNNING)


class RolloutEngine(Protocol):
    """Token in, token out; ``begin``/``load``/``finish`` loses no token of a running request,
    and the versions of a completion cover each of its tokens exactly once.

    Whatever goes wrong in an update, it ends in a certificate. An engine that did not end
    verified raises StaleWeights (INFRA) for all work, also for what was running, until a later
    update verifies; only dreams that were being written are handed back as far as they are right.

    Asleep it writes no token and scores nothing; what is asked of it waits. ``wake``, or the
    beginning of an update, lets it go on, with tokens as if it had not slept. Both may be repeated.
    """

    async def delivery(self) -> TransportConfig: ...

    async def concat_completions(self, info: dict[str, Any]) -> None: ...

    async def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]: ...

    async def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]: ...

    async def begin_update(self, version: int) -> None: ...

    async def load_bucket(self, update_info: dict[str, Any]) -> None: ...

    async def finish_update(self, canary: Canary | None) -> UpdateReceipt: ...

    async def version(self) -> int: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...


@dataclass(frozen=True)
class EngineOptions:
    model: str
    dtype: str
    max_length: int
    threads: int
    memory_gb: float
    gpu: bool
    gpu_utilization: float
    seed: int
    delivery: TransportConfig = TransportConfig()
    colocated: bool = False
    """A learner works on the same device while it sleeps."""
    tensor_parallel: int = 1
    """Processes that share every layer of the model. threads and memory_gb are of all together."""

    @classmethod
    def of(cls, config: NightConfig, model: str, dtype: str) -> EngineOptions:
        """What a night's settings say of an engine that holds a checkpoint.

        Raises ConfigError for a checkpoint that cannot be split as they say.
        """
        resources, ranks = config.resources, config.resources.engine_tensor_parallel
        require_shards(Path(model), ranks)
        return cls(
            model=model,
            dtype=dtype,
            max_length=config.model.max_length,
            threads=resources.engine_cpus,
            memory_gb=resources.engine_kv_cache_gb,
            gpu=resources.engine_gpus > 0,
            gpu_utilization=resources.engine_gpu_memory_utilization,
            seed=config.seed,
            delivery=TransportConfig(
                resources.transport,
                resources.update_mode,
                str((config.run_dir / "weights").resolve()),
                ranks,
            ),
            colocated=resources.layout == "colocated",
            tensor_parallel=ranks,
        )


def require_shards(checkpoint: Path, ranks: int) -> None:
    """Raises ConfigError for a checkpoint whose heads or MLPs ``ranks`` processes cannot share."""
    if ranks == 1:
        return
    model = json.loads((checkpoint / "config.json").read_text())
    heads = model["num_attention_heads"]
    shared = model.get("num_key_value_heads") or heads
    for what, count in (
        ("num_attention_heads", heads),
        ("num_key_value_heads", max(shared, ranks) if ranks % shared == 0 else shared),
        ("intermediate_size", model["intermediate_size"]),
    ):
        if count % ranks:
            raise ConfigError(
                f"resources.engine_tensor_parallel={ranks} cannot share {what}={count} of "
                f"{checkpoint}; set it to a divisor, such as 1"
            )


def spawn_engine(
    index: int,
    options: EngineOptions,
    cpus: float,
    gpus: float,
    engine: str,
    placement: Any = None,
) -> Any:
    """The actor of one engine; it can generate when its ``start`` has returned.

    placement: a placement group, in whose bundle of this index it goes; an engine that was added
    to those the group was made for goes where there is room.
    """
    kind: Any = resolve(engine, "engine")
    where: Any = None
    if placement is not None and index < placement.bundle_count:
        where = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index)
    actor = ray.remote(kind).options(
        num_cpus=cpus, num_gpus=gpus, max_concurrency=256, scheduling_strategy=where
    )
    return actor.remote(name=f"engine-{index}", options=options)


class BaseEngine(AsyncRemoteActor):
    """What engines have in common, over ``_one`` request, the ``_score`` of one sequence, and
    the four steps of an update: ``_pause``, ``_load``, ``_commit``, ``_resume``; and ``_sleep``
    and ``_wake``."""

    def __init__(self, name: str, options: EngineOptions) -> None:
        self.name = name
        self.options = options
        self._version = 0
        self._updating = 0.0
        self._pending_version = 0
        self._asleep = False
        self._groups: dict[str, Callable[[], pa.RecordBatch]] = {}
        self._fault: str | None = None
        """What went wrong in the update that is under way."""
        self._stale: str | None = None
        """Why the last update did not end verified."""
        self._verified = 0
        """The version of the last update that ended verified."""
        self._failed: list[int] = []
        self._reached: Canary | None = None
        """Of the last update that is known to have moved the scores to where the sender's are."""
        self._settled = asyncio.Event()
        self._settled.set()

    async def _one(
        self, prompt: list[int], sampling: SamplingParams, begun: Sequence[int] = (), uid: str = ""
    ) -> Completion:
        """One request. begun: response tokens to go on from; only what follows them is returned, with
        the finish reason ``running`` where the engine is STALE before the end."""
        raise NotImplementedError

    def _so_far(self, uid: str) -> Completion:
        raise NotImplementedError

    async def _score(self, sequence: list[int]) -> list[float]:
        raise NotImplementedError

    async def _pause(self) -> None:
        raise NotImplementedError

    async def _load(self, update_info: dict[str, Any]) -> None:
        raise NotImplementedError

    async def _commit(self) -> None:
        raise NotImplementedError

    async def _resume(self, *, ending: bool) -> None:
        """ending: requests that were running end now, and are not gone on with."""
        raise NotImplementedError

    async def _sleep(self) -> None:
        """Freeze what runs, and give back the device's memory where that can be done."""
        raise NotImplementedError

    async def _wake(self) -> None:
        raise NotImplementedError

    async def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """One completion per prompt, in their order."""
        self._refuse_if_stale()
        failed = len(self._failed)
        made = list(await asyncio.gather(*map(self._one, prompts, sampling)))
        await self._settle(failed)
        return made

    async def _settle(self, failed: int) -> None:
        """No answer leaves while an update is being judged, and none of weights that are wrong, or
        were since it was asked for. failed: updates by then."""
        await self._settled.wait()
        self._refuse_if_stale()
        if len(self._failed) > failed:
            raise StaleWeights(f"{self.name} was STALE meanwhile")

    async def ping(self) -> str:  # type: ignore[override]
        """Raises StaleWeights of an engine that lives and is of no use."""
        self._refuse_if_stale()
        return "pong"

    def _refuse_if_stale(self) -> None:
        if self._stale is not None:
            raise StaleWeights(f"{self.name} is STALE since version {self._version}: {self._stale}")

    async def rollout(
        self,
        task: str,
        attempts: Sequence[str],
        prompt: list[int],
        sampling: Sequence[SamplingParams],
        begun: pa.RecordBatch | None = None,
        since: int = 0,
    ) -> dict[str, Any]:
        """``write`` into the object store: the caller moves references only.

        Returns ``batch`` (a reference), its number of ``tokens`` and ``newest`` version;
        ``unfinished``: why the rest has to be asked for again, where an update failed meanwhile;
        and of dreams that were written anew since all of their tokens are older than ``since``,
        what they were: ``outdated`` (references).
        """
        kept, over = split_resumable(begun, since)
        batch = await self.write(task, attempts, prompt, sampling, kept)
        running = RUNNING in batch.column("finish_reason").to_pylist()
        why = self._stale or "it is verified again since"
        return {
            "batch": ray.put(batch),
            "tokens": len(batch.column("response_ids").flatten()),
            "newest": newest(batch),
            "unfinished": f"{self.name} missed an update: {why}" if running else None,
            "outdated": [ray.put(over)] if over.num_rows else [],
        }

    async def prefixes(self) -> dict[str, Any]:
        """``so_far`` by reference."""
        return {group: ray.put(batch) for group, batch in self.so_far().items()}

    async def write(
        self,
        task: str,
        attempts: Sequence[str],
        prompt: list[int],
        sampling: Sequence[SamplingParams],
        begun: Mapping[str, Completion] | None = None,
    ) -> pa.RecordBatch:
        """A group of dreams on one prompt. attempts: the uid of each. begun: what there is of them
        already, by uid; its tokens are kept, with their versions, and gone on from."""
        before, ended = begun or {}, dict[str, Completion]()

        async def one(uid: str, how: SamplingParams) -> None:
            known = before.get(uid, NOTHING)
            if known.finish_reason == RUNNING:
                known = concat_completions(
                    known, await self._one(prompt, how, known.token_ids, uid)
                )
            ended[uid] = known

        def batch() -> pa.RecordBatch:
            now = [
                ended.get(uid) or concat_completions(before.get(uid, NOTHING), self._so_far(uid))
                for uid in attempts
            ]
            return _dreams(task, prompt, attempts, now)

        self._refuse_if_stale()
        failed, group = len(self._failed), attempts[0].rpartition("-")[0]
        self._groups[group] = batch
        try:
            await asyncio.gather(*map(one, attempts, sampling))
            await self._settled.wait()
        finally:
            self._groups.pop(group, None)
        if len(self._failed) > failed:  # what follows the first that failed is of wrong weights
            ended = {
                uid: truncate_to_version(self._failed[failed], made) for uid, made in ended.items()
            }
        return batch()

    def so_far(self) -> dict[str, pa.RecordBatch]:
        """Every group of dreams that is being written, by its uid, with the tokens it has by now;
        what goes on has the finish reason ``running``."""
        return {group: batch() for group, batch in self._groups.items()}

    async def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """For each sequence of T ids the T-1 log-probabilities of ids 1..T-1, in nats."""
        self._refuse_if_stale()
        failed = len(self._failed)
        found = list(await asyncio.gather(*map(self._score, sequences)))
        await self._settle(failed)
        return found

    async def version(self) -> int:
        return self._version

    async def sleep(self) -> None:
        """Leave the device to others until ``wake``; what was under way is frozen."""
        if not self._asleep:
            self._asleep = True
            await self._sleep()

    async def wake(self) -> None:
        if self._asleep:
            await self._wake()
            self._asleep = False

    # --- updates ------------------------------------------------------------------

    async def delivery(self) -> TransportConfig:
        """How this engine wants to be sent weights."""
        return self.options.delivery

    async def concat_completions(self, info: dict[str, Any]) -> None:
        """Meet the sender where the transport is a collective; here none is."""

    async def begin_update(self, version: int) -> None:
        """Bring running requests to rest, in the way that ``delivery.mode`` says."""
        await self.wake()  # there is nothing to load weights into
        self._updating, self._fault = time.monotonic(), None
        self._pending_version = version
        await self._pause()

    async def load_bucket(self, update_info: dict[str, Any]) -> None:
        """Nothing, once the update has failed: a failure shows in its certificate."""
        if self._fault is None:
            await self._try(self._load(update_info))

    async def _try(self, step: Awaitable[T]) -> T | None:
        """A failure makes the update fail, not the call: half of the weights may be new."""
        try:
            return await step
        except Exception as error:
            self._fault = self._fault or f"{type(error).__name__}: {error}"
            return None

    async def finish_update(self, canary: Canary | None = None) -> UpdateReceipt:
        """Commit, resume, and score the canary; no answer leaves before that is judged."""
        self._settled.clear()
        self._version = self._pending_version
        try:
            await self._try(self._commit())
            self._stale = self._fault
            await self._try(self._resume(ending=self._stale is not None))
            seconds = time.monotonic() - self._updating
            certificate = await self._certificate(canary, seconds)
            if certificate.verified:
                self._verified = self._version
            else:
                self._failed.append(self._verified)
                if self._stale is None:
                    self._stale = certificate.error
                    await self._try(self._resume(ending=True))
        finally:
            self._settled.set()
        return certificate

    async def _certificate(self, canary: Canary | None, seconds: float) -> UpdateReceipt:
        """How an update ended; never raises."""
        difference = tolerance = None
        if canary is not None and self._fault is None:
            difference, tolerance = await self._try(self._judge(canary)), canary.tolerance
        fault, version = self._fault, self._version
        return UpdateReceipt(
            self.name, version, fault is None, difference, tolerance, seconds, fault
        )

    async def _judge(self, canary: Canary) -> float:
        """The largest difference of a log-probability from the sender's; too large, it is the fault.

        Judged against what was reached for sure, many updates that are lost one by one add up.
        """
        found, last = await self._score(canary.token_ids), self._reached
        difference = largest_difference(canary.logprobs, found)
        known = last is not None and last.token_ids == canary.token_ids
        old = last.logprobs if last is not None and known else canary.fresh
        followed = old is None or reached(old, canary.logprobs, found)
        if followed is False:
            self._fault = (
                "its log-probabilities differ from the sender's and are those of an earlier "
                "version: the update was lost"
            )
        elif not difference <= canary.tolerance:
            self._fault = "its log-probabilities differ from the sender's"
        elif followed:
            self._reached = canary
        return difference


def split_resumable(
    begun: pa.RecordBatch | None, since: int
) -> tuple[dict[str, Completion], pa.RecordBatch]:
    """Of dreams that were begun what to go on from, by uid; and those that are over, and in which
    no token may be learned from: they are written anew, under the uid that is theirs no more."""
    kept, over = dict[str, Completion](), []
    for t in from_batch(begun) if begun is not None else ():
        if t.finish_reason != RUNNING and outdated(t.versions, since) == len(t.versions) > 0:
            over.append(replace(t, purpose="outdated", uid=f"{t.uid}@{t.versions[-1]}"))
        else:
            kept[t.uid] = Completion(t.response_ids, t.logprobs, t.versions, t.finish_reason)
    return kept, to_batch(over)


def truncate_to_version(version: int, made: Completion) -> Completion:
    """What of it was written up to a version; what is cut off has to be written again."""
    right = next((n for n, of in enumerate(made.versions) if of > version), None)
    if right is None:
        return made
    return Completion(made.token_ids[:right], made.logprobs[:right], made.versions[:right], RUNNING)


def concat_completions(first: Completion, then: Completion) -> Completion:
    return Completion(
        first.token_ids + then.token_ids,
        first.logprobs + then.logprobs,
        first.versions + then.versions,
        then.finish_reason,
    )


def _dreams(
    task: str, prompt: list[int], attempts: Sequence[str], completions: Sequence[Completion]
) -> pa.RecordBatch:
    return to_batch(
        [
            Trajectory(
                uid=uid,
                task_id=task,
                attempt=number,
                purpose="dream",
                prompt_ids=prompt,
                response_ids=completion.token_ids,
                logprobs=completion.logprobs,
                versions=completion.versions,
                finish_reason=completion.finish_reason,
            )
            for number, (uid, completion) in enumerate(zip(attempts, completions, strict=True))
        ]
    )
