"""A small rollout engine on plain transformers: the same contract, and the same numbers each time.

Requests take turns, one token each, every one with a KV cache of its own. What a request
gets does not depend on what runs beside it, down to the bit, so a loop over this engine
repeats exactly. For tests, and for machines without vLLM; slow on anything larger.

Shapes: T tokens of a sequence, V entries of the vocabulary.
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

from sleeprl.pretrained import load_model
from sleeprl.rollout.base_engine import BaseEngine
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.types import EMPTY, RUNNING, Completion, SamplingParams


class TorchEngine(BaseEngine):
    """A ``RolloutEngine``. Requests that an update keeps go on with their KV cache, as in vLLM."""

    def __init__(self, name: str, options: EngineOptions) -> None:
        super().__init__(name, options)
        self.device = torch.device("cuda" if options.gpu else "cpu")
        self.model: Any = None
        self._stop_ids: set[int] = set()
        self._growing: dict[str, Completion] = {}
        """Of requests that run: what they have generated, by uid."""
        self._resumed, self._open, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for event in (self._resumed, self._open, self._idle):
            event.set()
        self._num_running = 0
        self._num_aborts = 0
        """How often running requests lost their KV cache."""

    async def start(self) -> float:
        """Load the model; return the seconds that took."""
        began = time.monotonic()
        if not self.options.gpu:
            torch.set_num_threads(self.options.threads)
        dtype = getattr(torch, self.options.dtype)
        model: Any = load_model(self.options.model, dtype)
        self.model = model.to(self.device).eval().requires_grad_(False)
        stop_ids = model.generation_config.eos_token_id
        self._stop_ids = set(stop_ids) if isinstance(stop_ids, list) else {stop_ids}
        return time.monotonic() - began

    async def _generate_one(
        self, prompt: list[int], sampling: SamplingParams, prefix: Sequence[int] = (), uid: str = ""
    ) -> Completion:
        await self._open.wait()
        self._num_running += 1
        self._idle.clear()
        try:
            return await self._sample_response(prompt, sampling, prefix, uid)
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def _sample_response(
        self, prompt: list[int], sampling: SamplingParams, prefix: Sequence[int], uid: str
    ) -> Completion:
        generator = torch.Generator()
        if sampling.seed is not None:
            generator.manual_seed(sampling.seed)
        # A prefix is sampled again and dropped: cache and generator come to where they were.
        to_repeat = deque(prefix)
        cache, input_ids, aborts = None, prompt, self._num_aborts
        growing = self._growing[uid] = Completion([], [], [], RUNNING)
        room = min(sampling.max_tokens, self.options.max_length - len(prompt)) - len(prefix)
        while len(growing.token_ids) < room:
            await self._take_turn()
            if self.updates.stale_reason is not None:
                break
            if aborts != self._num_aborts:
                repeated = prefix[: len(prefix) - len(to_repeat)]
                input_ids = [*prompt, *repeated, *growing.token_ids]
                cache, aborts = None, self._num_aborts
            ids = torch.tensor([input_ids], device=self.device)
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token, logprob = _sample(out.logits[0, -1].float().cpu(), sampling, generator)
            if to_repeat:
                input_ids = [to_repeat.popleft()]
                continue
            input_ids = [token]
            growing.token_ids.append(token)
            growing.logprobs.append(logprob)
            growing.versions.append(self.updates.version)
            if token in self._stop_ids:
                break
        self._growing.pop(uid, None)  # requests without a uid share one place
        if self.updates.stale_reason is not None:
            return growing
        stopped = growing.token_ids and growing.token_ids[-1] in self._stop_ids
        return replace(growing, finish_reason="stop" if stopped else "length")

    def _partial(self, uid: str) -> Completion:
        return self._growing.get(uid, EMPTY)

    async def _take_turn(self) -> None:
        """Let other requests go on. Nobody does in an update, or while the engine sleeps."""
        await asyncio.sleep(0)
        while not self._resumed.is_set():  # it may be cleared again before a waiter has its turn
            await self._resumed.wait()

    async def _score(self, sequence: list[int], start: int = 1) -> list[float]:
        await self._take_turn()  # a ping is answered between two sequences
        ids = torch.tensor([sequence], device=self.device)
        logits_TV = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        chosen_T1 = ids[0, 1:, None]
        logprobs: list[float] = logits_TV.log_softmax(-1).gather(-1, chosen_T1)[:, 0].tolist()
        return logprobs[start - 1 :]

    async def _pause(self) -> None:
        mode = self.options.transport.mode
        self._open.clear()
        if mode == "drain" and self._resumed.is_set():
            await self._idle.wait()
        self._num_aborts += mode == "abort"
        self._resumed.clear()

    async def _load(self, update_info: dict[str, Any]) -> None:
        own = self.model.state_dict()
        for name, tensor in self.transport.receive(update_info):
            if name not in own:
                raise KeyError(f"{self.name} was sent {name!r}, which its model does not have")
            own[name].copy_(tensor)

    async def _commit(self) -> None:
        """Nothing: the model computes with what was loaded."""

    async def _resume(self, *, ending: bool) -> None:
        self._resumed.set()
        self._open.set()

    async def _sleep(self) -> None:
        self._resumed.clear()

    async def _wake_up(self) -> None:
        self._resumed.set()

    async def shutdown(self) -> None:
        """Let go of the model."""
        self.model = None


def _sample(
    logits_V: Tensor, sampling: SamplingParams, generator: torch.Generator
) -> tuple[int, float]:
    """Return a token and its log-probability under the distribution it was sampled from."""
    greedy = sampling.temperature == 0.0
    logprobs_V = (logits_V if greedy else logits_V / sampling.temperature).log_softmax(-1)
    if greedy:
        token = int(logprobs_V.argmax())
    else:
        token = int(torch.multinomial(logprobs_V.exp(), 1, generator=generator))
    return token, float(logprobs_V[token])
