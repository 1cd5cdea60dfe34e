"""Rows of text, split over ranks and micro-batches, and padded into tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sleeprl.data.padding import token_budget_batches
from sleeprl.losses.combined import LossBatch, LossWeights, token_counts
from sleeprl.trainer.packing import Inputs, inputs


@dataclass(frozen=True)
class TrainingExample:
    """One text to learn from.

    prompt_ids: what the student sees. response_ids: the tokens that are trained on.
    teacher_prompt_ids: what the teacher sees instead; None means the same prompt.
    advantage, behaviour: of a row in a ``pg`` part; behaviour has one entry per token, and so
        has an advantage that is not one number for the text. A row without an advantage has
        no policy gradient, and is not a zero to average with.
    age: by how many versions the oldest weights that wrote it trail the learner's, if it is asked
        how far their log-probabilities are apart.
    reference: log-probabilities of the reference policy. values, returns: of a critic, see ``PPO``.
    key: names a text that comes again; the teacher, who never changes, is asked about it once.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    part: str
    teacher_prompt_ids: list[int] | None = None
    advantage: float | list[float] | None = None
    behaviour: list[float] = field(default_factory=list)
    age: int | None = None
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    key: str = ""

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
"""The teacher on one row's R response tokens: top-k ids [R, K] and k+1 log-probabilities, or,
where the student's choice of tokens matters, its last hidden states [R, H] alone."""


def micro_batches(
    rows: Sequence[TrainingExample],
    length: Callable[[TrainingExample], int],
    max_tokens: int,
    *,
    rank: int,
    ranks: int,
) -> list[list[TrainingExample]]:
    """One rank's share of the rows, in batches of at most ``max_tokens`` padded tokens.

    The shares are alike in number and length of rows, and equally many batches on every
    rank, one at least. Raises ValueError for a row longer than the budget.
    """
    found = token_budget_batches([length(row) for row in rows], max_tokens, ranks=ranks)
    mine = [[rows[index] for index in batch] or [PADDING_EXAMPLE] for batch in found[rank::ranks]]
    return mine or [[PADDING_EXAMPLE]]


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
    """What the loss needs of the rows, padded to the longest response."""
    longest = max(1, *(len(row.response_ids) for row in rows))
    pad = lambda lists, fill: torch.tensor(  # noqa: E731
        [list(values) + [fill] * (longest - len(values)) for values in lists], device=device
    )
    tokens = lambda kind: pad(  # noqa: E731
        [getattr(row, kind) or [0.0] * len(row.response_ids) for row in rows], 0.0
    )
    there = lambda kind: tokens(kind) if any(getattr(row, kind) for row in rows) else None  # noqa: E731
    made = LossBatch(
        tokens_BR=pad([row.response_ids for row in rows], 0),
        mask_BR=pad([[1.0] * len(row.response_ids) for row in rows], 0.0),
        part=[row.part for row in rows],
        advantages_BR=pad([_advantages(row) for row in rows], 0.0),
        behaviour_BR=tokens("behaviour"),
        age=[row.age for row in rows],
        reference_BR=there("reference"),
        values_BR=there("values"),
        returns_BR=there("returns"),
    )
    known = {row: target for row, target in enumerate(targets) if target is not None}
    if known:
        one = next(iter(known.values()))
        padded = [torch.zeros(len(rows), longest, part.shape[-1], dtype=part.dtype) for part in one]
        for row, target in known.items():
            for whole, part in zip(padded, target, strict=True):
                whole[row, : len(part)] = part
        if len(padded) == 1:
            made.teacher_hidden_BRH = padded[0].to(device)
        else:
            made.teacher_ids_BRK = padded[0].long().to(device)
            made.teacher_BRK1 = padded[1].to(device)
    return made


def _advantages(row: TrainingExample) -> list[float]:
    if isinstance(row.advantage, list):
        return row.advantage
    return [math.nan if row.advantage is None else row.advantage] * len(row.response_ids)
