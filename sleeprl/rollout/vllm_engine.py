"""A rollout engine on vLLM's AsyncLLM."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from sleeprl.rollout.base_engine import BaseEngine
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.types import EMPTY, RUNNING, Completion, SamplingParams, concat_completions
from sleeprl.rollout.vllm_args import engine_args, set_environment
from sleeprl.weight_sync.vllm_plugin import BACKEND

PAUSE_MODES = {"keep": "keep", "drain": "wait", "abort": "abort"}
"""vLLM's word for each update mode."""
SEED_STRIDE = 7919
"""Times the tokens of a prefix, added to the seed: the same seed would draw the first tokens' numbers."""


class VLLMEngine(BaseEngine):
    """A ``RolloutEngine`` on vLLM.

    Requests that an update keeps go on under the new weights with the KV blocks of the old;
    those that it aborts go on from their tokens with none. The prefix cache is salted with the
    version, so blocks of old weights never match.
    """

    def __init__(self, name: str, options: EngineOptions) -> None:
        super().__init__(name, options)
        self.llm: Any = None
        self._update_open = False
        """Whether vLLM is in an update that has not ended."""
        self._pieces: dict[str, Completion] = {}
        """Of requests that an update ended: their tokens up to then."""
        self._receives = self.transport.vllm_backend is None
        """Whether weights come by the transport's ``receive``, not by a receiver of vLLM's."""
        self._frees_memory = options.gpu and options.colocated
        """Whether vLLM is started with its sleep mode."""

    async def start(self) -> float:
        """Bring vLLM up; return the seconds that took."""
        began = time.monotonic()
        set_environment(self.options, self.transport.vllm_environment)
        from vllm.v1.engine.async_llm import AsyncLLM

        backend = self.transport.vllm_backend or BACKEND
        self.llm = AsyncLLM.from_engine_args(engine_args(self.options, backend))
        await self.llm.update_weight_version(str(self.updates.version))
        return time.monotonic() - began

    async def ping(self) -> str:  # type: ignore[override]
        """Raise vLLM's EngineDeadError where its core, another process, is gone."""
        await self.llm.check_health()
        return await super().ping()

    async def _generate_one(
        self, prompt: list[int], sampling: SamplingParams, prefix: Sequence[int] = (), uid: str = ""
    ) -> Completion:
        """A request that an update ended is sent again, with its tokens for a prefix."""
        uid = uid or uuid.uuid4().hex
        made = await self._request(prompt, sampling, prefix, uid)
        try:
            while made.finish_reason == "abort":
                if self.updates.stale_reason is not None:
                    return replace(made, finish_reason=RUNNING)
                tokens = [*prefix, *made.token_ids]
                if len(tokens) >= min(sampling.max_tokens, self.options.max_length - len(prompt)):
                    return replace(made, finish_reason="length")
                self._pieces[uid] = made
                rest = await self._request(prompt, sampling, tokens, uid)
                made = concat_completions(made, rest)
        finally:
            self._pieces.pop(uid, None)
        return made

    async def _request(
        self, prompt: list[int], sampling: SamplingParams, prefix: Sequence[int], uid: str
    ) -> Completion:
        seed = sampling.seed
        output = await self._final_output(
            [*prompt, *prefix],
            cache_salt=str(self.updates.pending_version),
            uid=uid,
            max_tokens=sampling.max_tokens - len(prefix),
            temperature=sampling.temperature,
            seed=None if seed is None else seed + SEED_STRIDE * len(prefix),
            logprobs=0,
        )
        return _completion(output.outputs[0], self.updates.version)

    async def _final_output(
        self, token_ids: list[int], cache_salt: str, uid: str, **parameters: Any
    ) -> Any:
        """Send one request to vLLM and return its ``RequestOutput``."""
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        final = None
        async for output in self.llm.generate(
            TokensPrompt(prompt_token_ids=token_ids, cache_salt=cache_salt),
            VLLMSamplingParams(
                detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **parameters
            ),
            request_id=uid,
        ):
            final = output
        if final is None:
            raise RuntimeError(f"{self.name}: vLLM returned nothing for a request")
        return final

    def _partial(self, uid: str) -> Completion:
        # vLLM reports a request's tokens at its end, or all along, which costs speed; it has them.
        states = self.llm.output_processor.request_states.values()
        state = next((state for state in states if state.external_req_id == uid), None)
        before = self._pieces.get(uid, EMPTY)
        if state is None or state.detokenizer is None or state.logprobs_processor is None:
            return replace(before, finish_reason=RUNNING)
        tokens = list(state.detokenizer.output_token_ids)
        starts = [*state.weight_version_starts, ("", len(tokens))]
        versions = [int(of) for (of, a), (_, b) in pairwise(starts) for _ in range(a, b)]
        entries = state.logprobs_processor.logprobs or []
        logprobs = [entry[token].logprob for token, entry in zip(tokens, entries, strict=True)]
        return concat_completions(before, Completion(tokens, logprobs, versions, RUNNING))

    async def _score(self, sequence: list[int], start: int = 1) -> list[float]:
        # vLLM has no log-probabilities of tokens that it finds in its cache, so by default it does not
        # use the cache to score. Tokens before ``start`` are not asked for, and may come from there:
        # texts that have them in common read them once.
        version = self.updates.pending_version
        output = await self._scored(sequence, cached=start > 1)
        if output.num_cached_tokens >= start or self.updates.pending_version != version:
            output = await self._scored(sequence, cached=False)
        pairs = zip(sequence[start:], output.prompt_logprobs[start:], strict=True)
        return [entry[token].logprob for token, entry in pairs]

    async def _scored(self, sequence: list[int], *, cached: bool) -> Any:
        uid = uuid.uuid4().hex
        return await self._final_output(
            sequence,
            cache_salt=f"score-{self.updates.pending_version if cached else uid}",
            uid=uid,
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0,
            skip_reading_prefix_cache=not cached,
        )

    async def connect(self, info: dict[str, Any]) -> None:
        """Join the sender's collective."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def _pause(self) -> None:
        mode = self.options.transport.mode
        if self._update_open:  # the sender of the last update is gone; this one sends it all again
            await self.llm.finish_weight_update(weight_version=str(self.updates.version))
            mode = "keep"  # what is frozen can no longer be waited for
        self._update_open = True
        # As pause_generation does, which then waits for 20 ms, so that outputs are there by its end.
        await self.llm.sleep(level=0, mode=PAUSE_MODES[mode])
        await self.llm.start_weight_update()

    async def _load(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if self._receives:
            update_info = {"transport": self.options.transport.kind, "bucket": update_info}
        try:
            await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        except Exception:
            # vLLM has dropped the update, but its layers still wait for the end of it.
            await self.llm.start_weight_update()
            raise

    async def _commit(self) -> None:
        await self.llm.finish_weight_update(weight_version=str(self.updates.version))
        self._update_open = False
        if self._receives:
            faults: list[str | None] = await self.llm.collective_rpc("weight_fault")
            for rank, fault in enumerate(faults):
                if fault is not None:
                    raise RuntimeError(f"rank {rank}: {fault}")

    async def _resume(self, *, ending: bool) -> None:
        if ending:  # a version may be sent again, and would match blocks of these wrong weights
            await self.llm.pause_generation(mode="abort", clear_cache=True)
        await self.llm.resume_generation()

    async def _sleep(self) -> None:
        """Give a GPU back: weights go to the host's memory and the KV cache is dropped.

        What runs is read again by ``_wake_up``, and goes on. A CPU has no sleep mode; there
        requests are frozen.
        """
        await self.llm.sleep(level=1 if self._frees_memory else 0, mode="keep")

    async def _wake_up(self) -> None:
        await self.llm.wake_up(None if self._frees_memory else ["scheduling"])

    async def shutdown(self) -> None:
        """End vLLM's processes."""
        self.llm.shutdown()
        self.llm = None


def _completion(output: Any, version: int) -> Completion:
    """Read vLLM's output; tokens outside its version spans are of ``version``."""
    token_ids = list(output.token_ids)
    logprobs = [
        entry[token].logprob for token, entry in zip(token_ids, output.logprobs, strict=True)
    ]
    versions = [version] * len(token_ids)
    for span in output.weight_versions or []:
        versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    return Completion(token_ids, logprobs, versions, output.finish_reason or "unknown")
