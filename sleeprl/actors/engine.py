"""The rollout engine: tokens in, tokens out, on vLLM's AsyncLLM. One Ray actor each."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from sleeprl.actors.group import ServedAsync
from sleeprl.trajectories.schema import Trajectory, to_batch
from sleeprl.weights.verify import Canary, Certificate, largest_difference


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``seed`` makes one request's tokens repeatable whatever runs beside it."""

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


class RolloutEngine(Protocol):
    """Token in, token out; ``begin``/``load``/``finish`` loses no token of a running request,
    and the versions of a completion cover each of its tokens exactly once."""

    async def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[Sampling]
    ) -> list[Completion]: ...

    async def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]: ...

    async def begin_update(self, version: int) -> None: ...

    async def load_bucket(self, update_info: dict[str, Any]) -> None: ...

    async def finish_update(self, canary: Canary | None) -> Certificate: ...

    async def version(self) -> int: ...


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


class VLLMEngine(ServedAsync):
    """A ``RolloutEngine`` on vLLM.

    Between ``begin_update`` and ``finish_update`` running requests are frozen with
    their KV blocks and continue under the new weights (vLLM's ``keep``). The
    prefix cache is salted with the version, so blocks of old weights never match.
    """

    def __init__(self, name: str, options: EngineOptions) -> None:
        self.name = name
        self.options = options
        self._version = 0
        self._updating = 0.0
        self._pending_version = 0

    async def start(self) -> float:
        """Bring the engine up; returns the seconds that took."""
        began = time.monotonic()
        if not self.options.gpu:
            os.environ["OMP_NUM_THREADS"] = str(self.options.threads)
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(self.options.memory_gb)))
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # Eager anyway; without this the first batch waits 16 s for stray compilations.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
        # A partial update warns once per module that was not sent; the canary is what checks it.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        from sleeprl.weights.plugin import BACKEND

        arguments: dict[str, Any]
        if self.options.gpu:
            arguments = {"gpu_memory_utilization": self.options.gpu_utilization}
        else:
            # vLLM 0.32 rewinds the generator of a seeded request whose prefill is cut in two,
            # which a CPU generator cannot do: the engine dies. So no prompt is ever cut.
            arguments = {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, self.options.max_length),
            }
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=self.options.model,
                dtype=self.options.dtype,
                max_model_len=self.options.max_length,
                enforce_eager=not self.options.gpu,
                seed=self.options.seed,
                enable_prefix_caching=True,
                max_num_seqs=128,
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                disable_log_stats=True,
                **arguments,
            )
        )
        await self._sync_version()
        return time.monotonic() - began

    async def _sync_version(self) -> None:
        await self.llm.update_weight_version(str(self._version))

    async def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[Sampling]
    ) -> list[Completion]:
        """One completion per prompt, in their order."""
        return list(await asyncio.gather(*map(self._one, prompts, sampling)))

    async def rollout(
        self, task: str, attempts: Sequence[str], prompt: list[int], sampling: Sequence[Sampling]
    ) -> dict[str, Any]:
        """A group of dreams on one prompt, as a record batch in the object store.

        attempts: the uid of each. Returns ``batch`` (a reference), ``tokens``, and the
        oldest and newest policy ``versions`` in it: the caller moves references only.
        """
        completions = await self.generate([prompt] * len(attempts), sampling)
        batch = to_batch(
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
        versions = [v for c in completions for v in c.versions]
        return {
            "batch": ray.put(batch),
            "tokens": len(versions),
            "versions": (
                min(versions, default=self._version),
                max(versions, default=self._version),
            ),
        }

    async def _one(self, prompt: list[int], sampling: Sampling) -> Completion:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        text = TokensPrompt(prompt_token_ids=prompt, cache_salt=str(self._pending_version))
        final = None
        async for output in self.llm.generate(text, parameters, request_id=uuid.uuid4().hex):
            final = output
        if final is None:
            raise RuntimeError(f"{self.name}: the engine returned nothing for a request")
        return _completion(final.outputs[0], self._version)

    async def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """For each sequence of T ids the T-1 log-probabilities of ids 1..T-1, in nats."""
        return list(await asyncio.gather(*map(self._score, sequences)))

    async def _score(self, sequence: list[int]) -> list[float]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        text = TokensPrompt(prompt_token_ids=sequence, cache_salt=f"score-{uuid.uuid4().hex}")
        final = None
        async for output in self.llm.generate(text, parameters, request_id=uuid.uuid4().hex):
            final = output
        assert final is not None and final.prompt_logprobs is not None
        pairs = zip(sequence[1:], final.prompt_logprobs[1:], strict=True)
        return [entry[token].logprob for token, entry in pairs if entry is not None]

    async def begin_update(self, version: int) -> None:
        self._updating = time.monotonic()
        self._pending_version = version
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        await self.llm.start_weight_update()

    async def load_bucket(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_update(self, canary: Canary | None = None) -> Certificate:
        """Commit, resume, and score the canary; never raises for a canary that disagrees."""
        version = self._pending_version
        await self.llm.finish_weight_update(weight_version=str(version))
        self._version = version
        await self.llm.resume_generation()
        seconds = time.monotonic() - self._updating
        if canary is None:
            return Certificate(self.name, version, True, None, None, seconds)
        found = await self._score(canary.token_ids)
        difference = largest_difference(canary.logprobs, found)
        verified = difference <= canary.tolerance
        error = None if verified else "its log-probabilities differ from the sender's"
        return Certificate(
            self.name, version, verified, difference, canary.tolerance, seconds, error
        )

    async def version(self) -> int:
        return self._version

    async def shutdown(self) -> None:
        self.llm.shutdown()
        del self.llm


def _completion(output: Any, version: int) -> Completion:
    token_ids = list(output.token_ids)
    logprobs = [
        entry[token].logprob for token, entry in zip(token_ids, output.logprobs, strict=True)
    ]
    versions = [version] * len(token_ids)
    for span in output.weight_versions or []:
        versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    return Completion(token_ids, logprobs, versions, output.finish_reason or "unknown")
