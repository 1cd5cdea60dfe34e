"""Split training examples over ranks and micro-batches, and pad them into tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sleeprl.data.padding import token_budget_batches
from sleeprl.losses.combined import token_counts
from sleeprl.losses.types import LossBatch, LossWeights
from sleeprl.trainer.packing import Inputs, inputs


@dataclass(frozen=True)
class TrainingExample:
    """One text to learn from: a prompt, and a response of R tokens that is trained on."""

    prompt_ids: list[int]
    """What the student sees."""
    response_ids: list[int]
    """The R tokens that are trained on."""
    part: str
    """Name of the loss weights that apply."""
    teacher_prompt_ids: list[int] | None = None
    """What the teacher sees in place of the prompt; None is the same prompt."""
    advantage: float | list[float] | None = None
    """For the policy gradient: one number, or one per token [R]. A row without an advantage has no
    policy gradient, and is not a zero to average with."""
    rollout_logprobs: list[float] = field(default_factory=list)
    """Log-probabilities under the policy that sampled [R], in nats; for the policy gradient."""
    age: int | None = None
    """By how many versions the oldest weights that wrote it trail the trainer's, where it is asked
    how far their log-probabilities are apart."""
    reference_logprobs: list[float] = field(default_factory=list)
    """Log-probabilities under the reference policy [R], in nats."""
    values: list[float] = field(default_factory=list)
    """The critic's values before the step [R]."""
    returns: list[float] = field(default_factory=list)
    """What the critic is to learn [R]."""
    key: str = ""
    """Names a text that comes again; the teacher, who never changes, is asked about it once."""

    @property
    def teacher_prompt(self) -> list[int]:
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def student_length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def teacher_length(self) -> int:
        return len(self.teacher_prompt) + len(self.response_ids)


PADDING_EXAMPLE = TrainingExample([0], [], "")
"""Keeps a rank's collectives in step with the others' without adding to the loss."""

Targets = tuple[Tensor, ...]
"""The teacher on one row's R response tokens: top-k ids [R, K] and log-probabilities [R, K+1], or,
where the student's choice of tokens matters, its last hidden states [R, H] alone."""


def micro_batches(
    rows: Sequence[TrainingExample],
    length: Callable[[TrainingExample], int],
    max_tokens: int,
    *,
    rank: int,
    ranks: int,
) -> list[list[TrainingExample]]:
    """Return one rank's share of the rows, in batches of at most ``max_tokens`` padded tokens.

    The shares are alike in number and length of rows, with equally many batches on every rank, at
    least one.

    Args:
        rows: All rows.
        length: Tokens of a row.
        max_tokens: Most tokens of a batch, padding included.
        rank: Whose share.
        ranks: Number of shares.

    Raises:
        ValueError: A row is longer than ``max_tokens``.
    """
    found = token_budget_batches([length(row) for row in rows], max_tokens, ranks=ranks)
    own = [[rows[index] for index in batch] or [PADDING_EXAMPLE] for batch in found[rank::ranks]]
    return own or [[PADDING_EXAMPLE]]


def count_tokens(rows: Sequence[TrainingExample], parts: Mapping[str, LossWeights]) -> Tensor:
    """Return what the means of each part are over, see ``token_counts``; rows: the whole batch."""
    return token_counts(
        parts,
        [row.part for row in rows],
        [len(row.response_ids) for row in rows],
        [row.advantage for row in rows],
    )


def student_inputs(rows: Sequence[TrainingExample], device: torch.device) -> Inputs:
    """Return what a ``ResponseModel`` reads of the rows with the student's prompts."""
    responses = [row.response_ids for row in rows]
    return inputs([row.prompt_ids for row in rows], responses, device)


def make_loss_batch(
    rows: Sequence[TrainingExample], device: torch.device, targets: Sequence[Targets | None] = ()
) -> LossBatch:
    """Return what the loss needs of the rows, padded to the longest response.

    Args:
        rows: A micro-batch.
        device: Where the tensors are put.
        targets: The teacher's on each row, where there are any.
    """
    longest = max(1, *(len(row.response_ids) for row in rows))

    def pad(lists: Sequence[Sequence[Any]], fill: float) -> Tensor:
        padded = [list(values) + [fill] * (longest - len(values)) for values in lists]
        return torch.tensor(padded, device=device)

    def per_token(name: str) -> Tensor:
        return pad([getattr(row, name) or [0.0] * len(row.response_ids) for row in rows], 0.0)

    def if_given(name: str) -> Tensor | None:
        return per_token(name) if any(getattr(row, name) for row in rows) else None

    batch = LossBatch(
        tokens_BR=pad([row.response_ids for row in rows], 0),
        mask_BR=pad([[1.0] * len(row.response_ids) for row in rows], 0.0),
        part=[row.part for row in rows],
        advantages_BR=pad([_advantages(row) for row in rows], 0.0),
        rollout_logprobs_BR=per_token("rollout_logprobs"),
        age=[row.age for row in rows],
        reference_logprobs_BR=if_given("reference_logprobs"),
        values_BR=if_given("values"),
        returns_BR=if_given("returns"),
    )
    _add_targets(batch, targets, longest, device)
    return batch


def _add_targets(
    batch: LossBatch, targets: Sequence[Targets | None], longest: int, device: torch.device
) -> None:
    """Pad the teacher's targets into the batch; rows without any stay zero."""
    known = {row: target for row, target in enumerate(targets) if target is not None}
    if not known:
        return
    one, rows = next(iter(known.values())), len(batch.part)
    padded = [torch.zeros(rows, longest, part.shape[-1], dtype=part.dtype) for part in one]
    for row, target in known.items():
        for whole, part in zip(padded, target, strict=True):
            whole[row, : len(part)] = part
    if len(padded) == 1:
        batch.teacher_hidden_BRH = padded[0].to(device)
    else:
        batch.teacher_ids_BRK = padded[0].long().to(device)
        batch.teacher_logprobs_BRK1 = padded[1].to(device)


def _advantages(row: TrainingExample) -> list[float]:
    if isinstance(row.advantage, list):
        return row.advantage
    return [math.nan if row.advantage is None else row.advantage] * len(row.response_ids)
