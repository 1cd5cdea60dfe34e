"""Rows of text, split over ranks and micro-batches, and padded into tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sleeprl.losses.streams import Window
from sleeprl.trajectories.packing import pad_batch, token_budget_batches


@dataclass(frozen=True)
class Row:
    """One text to learn from.

    prompt_ids: what the student sees. response_ids: the tokens that are trained on.
    teacher_prompt_ids: what the teacher sees instead; None means the same prompt.
    advantage, behaviour: of a row in a ``pg`` part; behaviour has one entry per token, and so
        has an advantage that is not one number for the text. A row without an advantage has
        no policy gradient, and is not a zero to average with.
    reference: log-probabilities of the reference policy. values, returns: of a critic, see ``PPO``.
    key: names a text that comes again; the teacher, who never changes, is asked about it once.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    part: str
    teacher_prompt_ids: list[int] | None = None
    advantage: float | list[float] | None = None
    behaviour: list[float] = field(default_factory=list)
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


EMPTY = Row([0], [], "")
"""Keeps a rank's collectives in step with the others' without adding to the loss."""

Targets = tuple[Tensor, ...]
"""The teacher on one row's R response tokens: top-k ids [R, K] and k+1 log-probabilities, or,
where the student's choice of tokens matters, its last hidden states [R, H] alone."""


def micro_batches(
    rows: Sequence[Row], length: Callable[[Row], int], max_tokens: int, *, rank: int, ranks: int
) -> list[list[Row]]:
    """One rank's share of the rows, in batches of at most ``max_tokens`` padded tokens.

    The shares are alike in number and length of rows, and equally many batches on every
    rank, one at least. Raises ValueError for a row longer than the budget.
    """
    found = token_budget_batches([length(row) for row in rows], max_tokens, ranks=ranks)
    mine = [[rows[index] for index in batch] or [EMPTY] for batch in found[rank::ranks]]
    return mine or [[EMPTY]]


def inputs(
    prompts: Sequence[list[int]], answered: Sequence[Row], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids and mask [B, T] of the prompts with the rows' responses, and the
    positions [B, R] whose logits predict a response token."""
    responses = [row.response_ids for row in answered]
    whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    ids, mask = (torch.from_numpy(padded).long() for padded in pad_batch(whole, 0))
    steps = torch.arange(max(1, *map(len, responses)))
    index = torch.stack(
        [
            steps.clamp(max=max(0, len(response) - 1)) + len(prompt) - 1
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    return ids.to(device), mask.to(device), index.to(device)


LONGEST_SHARED = 1024
"""Tokens of a sequence with several responses: its attention takes a mask of that size squared."""


def shared(rows: Sequence[Row]) -> list[list[int]]:
    """Rows that have a prompt in common, so that it is read once for several responses.

    Lists of indices into ``rows``; the responses of a list can stand one after the other behind
    their prompt. As many in each as make the fewest padded tokens in all; one where
    nothing is saved by it.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(tuple(row.prompt_ids), []).append(number)
    ways = []
    for size in range(1, 1 + max(map(len, groups.values()))):
        pieces = [g[at : at + size] for g in groups.values() for at in range(0, len(g), size)]
        longest = max(
            len(rows[piece[0]].prompt_ids) + sum(len(rows[n].response_ids) for n in piece)
            for piece in pieces
        )
        if size == 1 or longest <= LONGEST_SHARED:
            ways.append((longest * len(pieces), size, pieces))
    return min(ways)[2]


def shared_inputs(
    rows: Sequence[Row], pieces: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, ...]:
    """What ``inputs`` makes, with the sequences of ``shared``; S of them for B rows.

    Returns ids [S, T]; a mask [S, 1, T, T], by which a response sees its prompt and itself;
    index [B, R] into the row's sequence; positions [S, T], which begin again behind the prompt
    with each response; and each row's sequence [B].
    """
    whole = [
        rows[piece[0]].prompt_ids + [i for n in piece for i in rows[n].response_ids]
        for piece in pieces
    ]
    ids_ST = torch.from_numpy(pad_batch(whole, 0)[0]).long()
    length = ids_ST.shape[1]
    part_ST = torch.full_like(ids_ST, -1)  # -1: padding; 0: prompt; n: its n-th response
    positions_ST = torch.zeros_like(ids_ST)
    sequence_B = torch.zeros(len(rows), dtype=torch.long)
    index_BR = torch.zeros(
        len(rows), max(1, *(len(row.response_ids) for row in rows)), dtype=torch.long
    )
    for number, piece in enumerate(pieces):
        start = prompt = len(rows[piece[0]].prompt_ids)
        part_ST[number, :prompt] = 0
        positions_ST[number, :prompt] = torch.arange(prompt)
        for nth, row in enumerate(piece):
            count = len(rows[row].response_ids)
            part_ST[number, start : start + count] = nth + 1
            positions_ST[number, start : start + count] = torch.arange(prompt, prompt + count)
            sequence_B[row] = number
            index_BR[row] = prompt - 1  # predicts the first token; each token the one behind it
            index_BR[row, 1:count] = torch.arange(start, start + count - 1)
            start += count
    sees_STT = (part_ST[:, None, :] == 0) | (part_ST[:, None, :] == part_ST[:, :, None])
    mask_S1TT = (sees_STT & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    made = (ids_ST, mask_S1TT, index_BR, positions_ST, sequence_B)
    return tuple(part.to(device) for part in made)


def window(
    rows: Sequence[Row], device: torch.device, targets: Sequence[Targets | None] = ()
) -> Window:
    """What the loss needs of the rows, padded to the longest response."""
    longest = max(1, *(len(row.response_ids) for row in rows))
    pad = lambda lists, fill: torch.tensor(  # noqa: E731
        [list(values) + [fill] * (longest - len(values)) for values in lists], device=device
    )
    tokens = lambda kind: pad(  # noqa: E731
        [getattr(row, kind) or [0.0] * len(row.response_ids) for row in rows], 0.0
    )
    there = lambda kind: tokens(kind) if any(getattr(row, kind) for row in rows) else None  # noqa: E731
    made = Window(
        tokens_BR=pad([row.response_ids for row in rows], 0),
        mask_BR=pad([[1.0] * len(row.response_ids) for row in rows], 0.0),
        part=[row.part for row in rows],
        advantages_BR=pad([_advantages(row) for row in rows], 0.0),
        behaviour_BR=tokens("behaviour"),
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


def _advantages(row: Row) -> list[float]:
    if isinstance(row.advantage, list):
        return row.advantage
    return [math.nan if row.advantage is None else row.advantage] * len(row.response_ids)
