"""The scorer: parses dreams, scores them under the smaller self, and measures what they teach.

A trial takes one step of plain gradient descent on the expert, on the lessons of the dream without
the experience in context, and measures the likelihood of the task's probes. Then the step is
undone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.config.schema import DreamingConfig
from sleeprl.data.padding import pad_batch
from sleeprl.data.trajectory import from_batch, with_column, with_ref_logprobs
from sleeprl.dreaming.formats import format_of, parse_dreams
from sleeprl.dreaming.messages import ScoreResult
from sleeprl.dreaming.types import Task
from sleeprl.memory.checkpoint import expert_tensors
from sleeprl.memory.gated_mlp import smaller_self
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.options import TrainerOptions

Example = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""


class LearningGainScorer(RemoteActor):
    """A plain torch copy of the trainer's model, at most one update behind it.

    It computes in single precision even where the trainer uses half precision: rounding would erase
    or distort a trial's small step.
    """

    def __init__(self, model: TrainerOptions, config: DreamingConfig, gpu: bool = False) -> None:
        """Load the model.

        Args:
            model: Options of the trainer, with the checkpoint and the slots.
            config: Step size and number of probes of a trial, and the format of dreams.
            gpu: Whether this process has a GPU.
        """
        torch.set_num_threads(1)
        directory = Path(model.checkpoint)
        slots = Slots.load(directory)
        assert slots is not None
        growth, wake = growth_of(slots), model.wake_gradients_path
        self.chat = ChatFormatter(model.checkpoint)
        self.format = format_of(config)
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = growth.load(
            directory,
            slots,
            torch.float32,
            model.teacher_only_slots,
            load_file(wake) if wake else None,
        )
        self.parameters = growth.grow(self.model, slots.width, model.seed)
        self.model.to(self.device)
        self.learning_rate = config.trial_learning_rate
        self.num_questions = config.trial_questions

    def set_expert(self, expert: Mapping[str, Tensor]) -> None:
        """Load the trainer's current expert."""
        own = expert_tensors(dict(self.model.named_parameters()))
        with torch.no_grad():
            for name, tensor in expert.items():
                own[name].copy_(tensor)

    def score(self, batch: pa.RecordBatch, tasks: Mapping[str, Task]) -> ScoreResult:
        """Add the columns ``ref_logprobs``, ``parsed``, ``gain`` and ``gap`` to a batch of dreams.

        Args:
            batch: Complete groups.
            tasks: All tasks, by id.
        """
        dreams = from_batch(batch)
        with torch.no_grad(), smaller_self(self.model):
            references = [
                self._logprobs([(d.prompt_ids, d.response_ids)])[0].tolist() for d in dreams
            ]
        probes = {
            d.task_id: self._tokenise(tasks[d.task_id].probes[: self.num_questions]) for d in dreams
        }
        known = {task: self._likelihood(examples) for task, examples in probes.items()}
        parsed = parse_dreams(self.format, self.chat, dreams)
        gains = [
            self._gain(text, probes[dream.task_id], known[dream.task_id])
            for dream, text in zip(dreams, parsed, strict=True)
        ]
        scored = with_ref_logprobs(batch, references)
        scored = with_column(scored, "parsed", parsed)
        scored = with_column(scored, "gain", gains)
        scored = with_column(scored, "gap", [-known[d.task_id] for d in dreams])
        return ScoreResult(ray.put(scored))

    def _gain(self, parsed: str | None, probes: Sequence[Example], known: float) -> float | None:
        """Measure the log-likelihood that learning from a dream adds to the probes, in nats per token.

        Args:
            parsed: The parsed dream, as JSON.
            probes: The task's probes.
            known: Their mean log-likelihood before the trial, in nats per token.

        Returns:
            The gain; None where there is nothing to learn from, or no probe.
        """
        if parsed is None or not probes:
            return None
        lessons = self._tokenise(self.format.training_pairs(json.loads(parsed)))
        return self._try(lessons, probes) - known if lessons else None

    def _try(self, lessons: Sequence[Example], probes: Sequence[Example]) -> float:
        """Take a step on the lessons, measure the likelihood of the probes, and undo the step."""
        loss = -torch.cat(self._logprobs(lessons)).mean()
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            before = [p.clone() for p in self.parameters]
            try:
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    parameter.sub_(self.learning_rate * gradient)
                return self._likelihood(probes)
            finally:
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def _likelihood(self, examples: Sequence[Example]) -> float:
        """Return the mean log-likelihood of the response tokens (nats per token); 0 without any."""
        if not examples:
            return 0.0
        return float(torch.cat(self._logprobs(examples)).mean())

    def _tokenise(self, pairs: Sequence[tuple[str, str]]) -> list[Example]:
        return [(self.chat.prompt(message), self.chat.response(text)) for message, text in pairs]

    def _logprobs(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the log-probabilities of each example's response tokens, given its prompt."""
        padded = pad_batch([prompt + response for prompt, response in examples], 0)
        ids, mask = (torch.from_numpy(part).long().to(self.device) for part in padded)
        logits_BTV = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        logprobs_BT = (
            torch.log_softmax(logits_BTV[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        )
        return [
            logprobs_BT[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
            for row, (prompt, response) in enumerate(examples)
        ]
