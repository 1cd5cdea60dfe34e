"""A rollout engine on vLLM's AsyncLLM."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from sleeprl.rollout.engine import (
    NOTHING,
    RUNNING,
    BaseEngine,
    Completion,
    EngineOptions,
    SamplingParams,
    concat_completions,
)

PAUSES = {"keep": "keep", "drain": "wait", "abort": "abort"}
"""vLLM's word for each update mode."""
REPORTS = "sleeprl.weight_sync.vllm_receiver.Reports"
UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


class VLLMEngine(BaseEngine):
    """A ``RolloutEngine`` on vLLM.

    Requests that are kept continue under the new weights with the KV blocks of the old;
    those that are aborted go on from their tokens with none. The prefix cache is salted
    with the version, so blocks of old weights never match.
    """

    def __init__(self, name: str, options: EngineOptions) -> None:
        super().__init__(name, options)
        self._open = False
        self._pieces: dict[str, Completion] = {}
        """Of requests that an update ended: their tokens up to then."""

    async def start(self) -> float:
        """Bring the engine up; returns the seconds that took."""
        began = time.monotonic()
        if not self.options.gpu:
            ranks = self.options.tensor_parallel
            os.environ["OMP_NUM_THREADS"] = str(max(1, self.options.threads // ranks))
            space = max(1, round(self.options.memory_gb / ranks))  # vLLM's is that of one rank
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(space)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # Eager anyway; without this the first batch waits 16 s for stray compilations.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
        else:
            # Nothing is sampled by top-p or top-k here, whose kernels would be compiled at the start.
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        # A partial update warns once per module that was not sent; the canary is what checks it.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        from sleeprl.weight_sync.base import BETWEEN_GPUS
        from sleeprl.weight_sync.buckets import BACKEND

        kind = self.options.delivery.kind
        self._own_receiver = kind not in BETWEEN_GPUS
        if kind == "ipc":  # handles are not plain data; they come from this host's own learner
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        arguments: dict[str, Any]
        if self.options.gpu:
            arguments = {
                "gpu_memory_utilization": self.options.gpu_utilization,
                "enable_sleep_mode": self.options.colocated,
            }
        else:
            # vLLM 0.32 rewinds the generator of a seeded request whose prefill is cut in two,
            # which a CPU generator cannot do: the engine dies. So no prompt is ever cut.
            arguments = {
                "enable_chunked_prefill": False,
                # The smallest its attention takes, of 128 by default: what the prompts of a group
                # have in common is read once, by whole blocks.
                "block_size": 32,
                "max_num_batched_tokens": max(8192, self.options.max_length),
            }
        if self.options.tensor_parallel > 1:
            arguments["distributed_executor_backend"] = "mp"  # within this actor's resources
        elif not self.options.gpu:
            # The worker in the engine's own process: a process less to start, and none that spins
            # while the other works. OMP's threads are set above, for all of them.
            arguments["distributed_executor_backend"] = UNIPROC
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=self.options.model,
                tensor_parallel_size=self.options.tensor_parallel,
                dtype=self.options.dtype,
                max_model_len=self.options.max_length,
                enforce_eager=not self.options.gpu,
                seed=self.options.seed,
                enable_prefix_caching=True,
                max_num_seqs=128,
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(
                    backend=BACKEND if self._own_receiver else kind
                ),
                worker_extension_cls=REPORTS if self._own_receiver else "",
                disable_log_stats=True,
                **arguments,
            )
        )
        await self._sync_version()
        return time.monotonic() - began

    async def _sync_version(self) -> None:
        await self.llm.update_weight_version(str(self._version))

    async def ping(self) -> str:  # type: ignore[override]
        """Raises vLLM's EngineDeadError where its core, another process, is gone."""
        await self.llm.check_health()
        return await super().ping()

    async def _one(
        self, prompt: list[int], sampling: SamplingParams, begun: Sequence[int] = (), uid: str = ""
    ) -> Completion:
        """A request that an update ended is asked again, with the tokens it has for a prefix."""
        uid = uid or uuid.uuid4().hex
        made = await self._piece(prompt, sampling, begun, uid)
        try:
            while made.finish_reason == "abort":
                if self._stale is not None:
                    return replace(made, finish_reason=RUNNING)
                done = [*begun, *made.token_ids]
                if len(done) >= min(sampling.max_tokens, self.options.max_length - len(prompt)):
                    return replace(made, finish_reason="length")
                self._pieces[uid] = made
                made = concat_completions(made, await self._piece(prompt, sampling, done, uid))
        finally:
            self._pieces.pop(uid, None)
        return made

    async def _piece(
        self, prompt: list[int], sampling: SamplingParams, begun: Sequence[int], uid: str
    ) -> Completion:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = VLLMSamplingParams(
            max_tokens=sampling.max_tokens - len(begun),
            temperature=sampling.temperature,
            # The same seed again would draw the same numbers as for the first tokens.
            seed=None if sampling.seed is None else sampling.seed + 7919 * len(begun),
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        text = TokensPrompt(
            prompt_token_ids=[*prompt, *begun], cache_salt=str(self._pending_version)
        )
        final = None
        async for output in self.llm.generate(text, parameters, request_id=uid):
            final = output
        if final is None:
            raise RuntimeError(f"{self.name}: the engine returned nothing for a request")
        return _completion(final.outputs[0], self._version)

    def _so_far(self, uid: str) -> Completion:
        # vLLM tells a request's tokens at its end, or all the way, which costs speed; it has them.
        states = self.llm.output_processor.request_states.values()
        state = next((state for state in states if state.external_req_id == uid), None)
        before = self._pieces.get(uid, NOTHING)
        if state is None or state.detokenizer is None or state.logprobs_processor is None:
            return replace(before, finish_reason=RUNNING)
        tokens = list(state.detokenizer.output_token_ids)
        starts = [*state.weight_version_starts, ("", len(tokens))]
        versions = [int(of) for (of, a), (_, b) in pairwise(starts) for _ in range(a, b)]
        entries = state.logprobs_processor.logprobs or []
        logprobs = [entry[token].logprob for token, entry in zip(tokens, entries, strict=True)]
        return concat_completions(before, Completion(tokens, logprobs, versions, RUNNING))

    async def _score(self, sequence: list[int]) -> list[float]:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = VLLMSamplingParams(
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

    async def concat_completions(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def _pause(self) -> None:
        mode = self.options.delivery.mode
        if self._open:  # whoever began the last update is gone; this one sends it all again
            await self.llm.finish_weight_update(weight_version=str(self._version))
            mode = "keep"  # what is frozen can no longer be waited for
        self._open = True
        # As pause_generation does, which then waits for 20 ms, so that outputs are there by its end.
        await self.llm.sleep(level=0, mode=PAUSES[mode])
        await self.llm.start_weight_update()

    async def _load(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        except Exception:
            # vLLM has dropped the update, but its layers still wait for the end of it.
            await self.llm.start_weight_update()
            raise

    async def _commit(self) -> None:
        await self.llm.finish_weight_update(weight_version=str(self._version))
        self._open = False
        if self._own_receiver:
            faults: list[str | None] = await self.llm.collective_rpc("weight_fault")
            for rank, fault in enumerate(faults):
                if fault is not None:
                    raise RuntimeError(f"rank {rank}: {fault}")

    async def _resume(self, *, ending: bool) -> None:
        if ending:
            await self.llm.pause_generation(mode="abort", clear_cache=False)
        await self.llm.resume_generation()

    async def _sleep(self) -> None:
        """On a GPU the weights go to the host's memory and the KV cache is dropped; what runs is
        read again when it wakes, and goes on. On a CPU, which has no sleep mode, it is frozen."""
        await self.llm.sleep(level=1 if self._frees else 0, mode="keep")

    async def _wake(self) -> None:
        await self.llm.wake_up(None if self._frees else ["scheduling"])

    @property
    def _frees(self) -> bool:
        """Whether it was started with vLLM's sleep mode."""
        return self.options.gpu and self.options.colocated

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
