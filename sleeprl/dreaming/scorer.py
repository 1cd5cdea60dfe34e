"""The scorer: what the smaller self thinks of a dream, and what learning from it would do.

A trial is one step of plain gradient descent on the expert, on the dream's pair
without the experience in sight, and a look at how likely the task's probes have
become; then the step is taken back.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.data.padding import pad_batch
from sleeprl.data.trajectory import from_batch, with_column, with_ref_logprobs
from sleeprl.dreaming.messages import ScoreResult
from sleeprl.dreaming.types import Task
from sleeprl.memory.checkpoint import expert_tensors
from sleeprl.memory.gated_mlp import smaller_self
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import parse_qa


class LearningGainScorer(RemoteActor):
    """A plain torch copy of the learner's model, one step behind it at most. In single precision
    also where the learner's is half: a trial's step would be rounded away, or up to what it is not."""

    def __init__(
        self,
        checkpoint: str,
        slot_seed: int,
        rate: float,
        probes: int,
        threads: int,
        held: Collection[int] = (),
        wake: str = "",
        gpu: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        directory = Path(checkpoint)
        slots = Slots.load(directory)
        assert slots is not None
        self.chat = ChatFormatter(checkpoint)
        growth = growth_of(slots)
        applied = load_file(wake) if wake else None
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = growth.load(directory, slots, torch.float32, held, applied)
        self.parameters = growth.grow(self.model, slots.width, slot_seed)
        self.model.to(self.device)
        self.rate, self.probes = rate, probes

    def set_expert(self, expert: Mapping[str, Tensor]) -> None:
        own = expert_tensors(dict(self.model.named_parameters()))
        with torch.no_grad():
            for name, tensor in expert.items():
                own[name].copy_(tensor)

    def score(self, batch: pa.RecordBatch, tasks: Mapping[str, Task]) -> ScoreResult:
        """``batch``: a reference to the batch with ``ref_logprobs``, and in ``meta`` ``gain``
        and ``gap`` (nats per token).

        gain is None where the dream is not a whole pair, so that there is nothing to learn from.
        """
        trajectories = from_batch(batch)
        references = []
        with torch.no_grad(), smaller_self(self.model):
            for t in trajectories:
                references.append(self._logprobs([(t.prompt_ids, t.response_ids)])[0].tolist())
        asked = {
            t.task_id: self._rows(tasks[t.task_id].probes[: self.probes]) for t in trajectories
        }
        before = {task: self._likelihood(probes) for task, probes in asked.items()}
        metas = []
        for t in trajectories:
            probes, known = asked[t.task_id], before[t.task_id]
            pair = parse_qa(self.chat.decode(t.response_ids)) if t.finish_reason == "stop" else None
            gain = self._trial(pair, probes) - known if pair and probes else None
            metas.append(json.dumps({**json.loads(t.meta), "gain": gain, "gap": -known}))
        return ScoreResult(
            ray.put(with_column(with_ref_logprobs(batch, references), "meta", metas))
        )

    def _trial(self, pair: tuple[str, str], probes: Sequence[tuple[list[int], list[int]]]) -> float:
        (logprobs,) = self._logprobs(self._rows([pair]))
        gradients = torch.autograd.grad(-logprobs.mean(), self.parameters)
        with torch.no_grad():
            kept = [p.clone() for p in self.parameters]
            try:
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    parameter.sub_(self.rate * gradient)
                return self._likelihood(probes)
            finally:
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def _likelihood(self, rows: Sequence[tuple[list[int], list[int]]]) -> float:
        """Mean log-likelihood per token of the answers to bare questions."""
        if not rows:
            return 0.0
        return float(torch.cat(self._logprobs(rows)).mean())

    def _rows(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        return [
            (self.chat.prompt(question), self.chat.response(answer)) for question, answer in pairs
        ]

    def _logprobs(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Log-probabilities of each row's response tokens, given its prompt."""
        padded = pad_batch([prompt + response for prompt, response in rows], 0)
        ids, mask = (torch.from_numpy(part).long().to(self.device) for part in padded)
        logits_BTV = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        logprobs_BT = (
            torch.log_softmax(logits_BTV[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        )
        return [logprobs_BT[i, len(p) - 1 : len(p) + len(r) - 1] for i, (p, r) in enumerate(rows)]
