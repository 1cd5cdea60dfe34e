"""A small rollout engine on plain transformers: the same contract, and the same numbers each time.

Requests take turns, one token each, every one with a KV cache of its own. What a request
gets does not depend on what runs beside it, down to the bit, so a loop over this engine
repeats exactly. For tests, and for machines without vLLM; slow on anything larger.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sleeprl.rollout.engine import (
    NOTHING,
    RUNNING,
    BaseEngine,
    Completion,
    EngineOptions,
    SamplingParams,
)
from sleeprl.weight_sync.buckets import receive


class TorchEngine(BaseEngine):
    """A ``RolloutEngine``. Requests that an update keeps go on with their KV cache, as in vLLM."""

    def __init__(self, name: str, options: EngineOptions) -> None:
        super().__init__(name, options)
        self._made: dict[str, Completion] = {}
        self._resumed, self._open, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for event in (self._resumed, self._open, self._idle):
            event.set()
        self._running = 0
        self._cut = 0
        """How often running requests lost their KV cache."""

    async def start(self) -> float:
        from transformers import AutoModelForCausalLM

        began = time.monotonic()
        if not self.options.gpu:
            torch.set_num_threads(self.options.threads)
        self.device = torch.device("cuda" if self.options.gpu else "cpu")
        dtype = getattr(torch, self.options.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=dtype)
        self.model = model.to(self.device).eval().requires_grad_(False)
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        return time.monotonic() - began

    async def _one(
        self, prompt: list[int], sampling: SamplingParams, begun: Sequence[int] = (), uid: str = ""
    ) -> Completion:
        await self._open.wait()
        self._running += 1
        self._idle.clear()
        try:
            return await self._generate(prompt, sampling, begun, uid)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _generate(
        self, prompt: list[int], sampling: SamplingParams, begun: Sequence[int], uid: str
    ) -> Completion:
        generator = torch.Generator()
        if sampling.seed is not None:
            generator.manual_seed(sampling.seed)
        cache, given, before, cut = None, prompt, deque(begun), self._cut
        made = self._made[uid] = Completion([], [], [], RUNNING)
        room = min(sampling.max_tokens, self.options.max_length - len(prompt)) - len(begun)
        while len(made.token_ids) < room:
            await self._turn()
            if self._stale is not None:
                break
            if cut != self._cut:
                given = [*prompt, *begun[: len(begun) - len(before)], *made.token_ids]
                cache, cut = None, self._cut
            ids = torch.tensor([given], device=self.device)
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token, logprob = _sample(out.logits[0, -1].float().cpu(), sampling, generator)
            if before:  # the cache and the generator come to where they were, the same to the bit
                given = [before.popleft()]
                continue
            given = [token]
            made.token_ids.append(token)
            made.logprobs.append(logprob)
            made.versions.append(self._version)
            if token in self.ends:
                break
        self._made.pop(uid, None)  # requests without a uid share one place
        if self._stale is not None:
            return made
        stopped = made.token_ids and made.token_ids[-1] in self.ends
        return replace(made, finish_reason="stop" if stopped else "length")

    def _so_far(self, uid: str) -> Completion:
        return self._made.get(uid, NOTHING)

    async def _turn(self) -> None:
        """Let the others go on; asleep or in an update nobody does."""
        await asyncio.sleep(0)
        while not self._resumed.is_set():  # it may be cleared before who waits has its turn
            await self._resumed.wait()

    async def _score(self, sequence: list[int]) -> list[float]:
        await asyncio.sleep(0)  # who asks whether it is there is answered between two sequences
        while not self._resumed.is_set():
            await self._resumed.wait()
        ids = torch.tensor([sequence], device=self.device)
        logits_TV = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        chosen_T1 = ids[0, 1:, None]
        found: list[float] = logits_TV.log_softmax(-1).gather(-1, chosen_T1)[:, 0].tolist()
        return found

    async def _pause(self) -> None:
        mode = self.options.delivery.mode
        self._open.clear()
        if mode == "drain" and self._resumed.is_set():
            await self._idle.wait()
        self._cut += mode == "abort"
        self._resumed.clear()

    async def _load(self, update_info: dict[str, Any]) -> None:
        own = self.model.state_dict()
        for name, tensor in receive(**update_info)[1]:
            if name not in own:
                raise KeyError(f"{self.name} was sent {name!r}, which its model has not")
            own[name].copy_(tensor)

    async def _commit(self) -> None:
        pass

    async def _resume(self, *, ending: bool) -> None:
        self._resumed.set()
        self._open.set()

    async def _sleep(self) -> None:
        self._resumed.clear()

    async def _wake(self) -> None:
        self._resumed.set()

    async def shutdown(self) -> None:
        del self.model


def _sample(
    logits_V: Tensor, sampling: SamplingParams, generator: torch.Generator
) -> tuple[int, float]:
    """A token and its log-probability under the distribution it was sampled from."""
    greedy = sampling.temperature == 0.0
    logprobs_V = (logits_V if greedy else logits_V / sampling.temperature).log_softmax(-1)
    if greedy:
        token = int(logprobs_V.argmax())
    else:
        token = int(torch.multinomial(logprobs_V.exp(), 1, generator=generator))
    return token, float(logprobs_V[token])
