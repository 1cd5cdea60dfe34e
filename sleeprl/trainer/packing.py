"""How the texts of a micro-batch lie in tensors: each in a sequence of its own, or packed.

Packed, all stand behind one another in one sequence, and what several prompts begin with (the
document that many questions are about, the prompt of a GRPO group) is there once. Attention by
text and the positions keep them apart, so that nothing but the work is different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeprl.data.padding import pad_batch
from sleeprl.trainer.packed_attention import SHARED, PackedSequences, Segment

Inputs = tuple[Tensor, Tensor | PackedSequences, Tensor]
"""ids [S, T]; what attends to what; index [B, R], where the logits of a response token are."""

MAX_PACKED_RATIO = 0.9
"""Packed are texts that then have at most so many of the tokens that padding would have."""
MIN_OWN_BLOCK = 64
"""Tokens from which on the texts of a group attend on their own: together they would look at what is
the others', alone each would have a copy made of what they share."""


@dataclass(frozen=True)
class Group:
    """Texts whose prompts begin alike."""

    prefix: int
    """Tokens that they have in common."""
    texts: list[int]
    """Their numbers."""


def inputs(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device
) -> Inputs:
    """Return what ``ResponseModel`` reads, in the layout that takes less work."""
    groups = pack(prompts, responses)
    if groups is None:
        ids_ST, attends, index_BR = padded(prompts, responses)
        return ids_ST.to(device), attends.to(device), index_BR.to(device)
    ids_ST, texts, index_BR = packed(prompts, responses, groups)
    return ids_ST.to(device), texts.to(device), index_BR.to(device)


def padded(
    prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one text a sequence, padded on the right: ids and mask [B, T], index [B, R]."""
    whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    ids_BT, mask_BT = (torch.from_numpy(part).long() for part in pad_batch(whole, 0))
    steps = torch.arange(max(1, *map(len, responses)))
    index_BR = torch.stack(
        [
            steps.clamp(max=max(0, len(response) - 1)) + len(prompt) - 1
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    return ids_BT, mask_BT, index_BR


def pack(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[Group] | None:
    """Group texts by what they have in common; None where padding is as good."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    groups = _alike(prompts)
    tokens = sum(lengths) - sum(group.prefix * (len(group.texts) - 1) for group in groups)
    return groups if tokens <= MAX_PACKED_RATIO * len(lengths) * max(lengths) else None


def packed(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], groups: Sequence[Group]
) -> tuple[Tensor, PackedSequences, Tensor]:
    """Return all texts in one sequence: ids [1, T], the texts in it, and index [B, R] into T."""
    index_BR = torch.zeros(len(prompts), max(1, *map(len, responses)), dtype=torch.long)
    ids: list[int] = []
    positions: list[int] = []
    text_of: list[int] = []
    pieces: list[Segment] = []

    def add(tokens: list[int], position: int, text: int) -> None:
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        text_of.extend([text] * len(tokens))

    def cut(start: int, before: range) -> int:
        """Make a piece of what came since; returns where the next one starts."""
        if start < len(ids):
            pieces.append(Segment(range(start, len(ids)), before))
        return len(ids)

    for group in groups:
        start = len(ids)
        add(prompts[group.texts[0]][: group.prefix], 0, SHARED)
        before = range(start, cut(start, range(0)))
        start = before.stop
        for text in group.texts:
            own = len(ids)
            add(prompts[text][group.prefix :] + responses[text], group.prefix, text)
            first = own + len(prompts[text]) - group.prefix  # of the response
            count = max(1, len(responses[text]))
            index_BR[text, 0] = first - 1 if first > own else before.stop - 1
            index_BR[text, 1:count] = torch.arange(first, first + count - 1)
            if len(ids) - start >= MIN_OWN_BLOCK:
                start = cut(start, before)
        cut(start, before)
    return torch.tensor([ids]), PackedSequences.of(positions, text_of, pieces), index_BR


def _alike(prompts: Sequence[list[int]]) -> list[Group]:
    """Prompts put together whose beginning in common is at least half of the longest."""
    found: list[Group] = []
    longest = 0
    # In their order the first and the last of a group have in common what all have.
    for number in sorted(range(len(prompts)), key=prompts.__getitem__):
        length = len(prompts[number])
        if found:
            common = _common(prompts[found[-1].texts[0]], prompts[number])
            if 2 * common >= max(longest, length):
                found[-1] = Group(common, [*found[-1].texts, number])
                longest = max(longest, length)
                continue
        found.append(Group(0, [number]))
        longest = length
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
