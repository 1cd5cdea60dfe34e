"""Layout of a micro-batch's texts in tensors: one text per row, or all packed into one sequence.

A packed sequence stores a prefix that several prompts share only once, such as the document of many
questions or the prompt of a GRPO group. Attention by text and the positions separate the texts, so
both layouts compute the same and differ only in cost.

Shapes: B texts, R response positions, S rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeprl.data.padding import pad_batch
from sleeprl.trainer.packed_attention import SHARED, PackedSequences, Segment

Inputs = tuple[Tensor, Tensor | PackedSequences, Tensor]
"""Token ids [S, T]; the mask or the packed sequences; and the index [B, R] of the logits that
predict each response token."""

MAX_PACKED_RATIO = 0.9
"""Texts are packed if that reduces the number of tokens to at most this share of the padded layout."""
MIN_OWN_BLOCK = 64
"""Number of tokens at which a segment of a group is closed. Texts in one segment compute attention
scores for each other's tokens in vain; each further segment copies the shared prefix."""


@dataclass(frozen=True)
class Group:
    """Texts whose prompts share a prefix."""

    prefix: int
    """Length of the shared prefix, in tokens."""
    texts: list[int]
    """Indices of the texts."""


def inputs(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device
) -> Inputs:
    """Build the inputs of ``ResponseModel``, in the layout with fewer tokens.

    Args:
        prompts: Token ids of each prompt.
        responses: Token ids of each response.
        device: Device of the tensors.
    """
    groups = pack(prompts, responses)
    if groups is None:
        ids_ST, attends, index_BR = padded(prompts, responses)
        return ids_ST.to(device), attends.to(device), index_BR.to(device)
    ids_ST, texts, index_BR = packed(prompts, responses, groups)
    return ids_ST.to(device), texts.to(device), index_BR.to(device)


def padded(
    prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Put each text in a row of its own, padded on the right.

    Args:
        prompts: Token ids of each prompt.
        responses: Token ids of each response.

    Returns:
        Token ids [B, T], mask [B, T], and index [B, R] of the logits that predict each response
        token.
    """
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
    """Group texts by their shared prefixes.

    Args:
        prompts: Token ids of each prompt.
        responses: Token ids of each response.

    Returns:
        The groups, or None if packing saves too little (``MAX_PACKED_RATIO``).
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    groups = _alike(prompts)
    tokens = sum(lengths) - sum(group.prefix * (len(group.texts) - 1) for group in groups)
    return groups if tokens <= MAX_PACKED_RATIO * len(lengths) * max(lengths) else None


def packed(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], groups: Sequence[Group]
) -> tuple[Tensor, PackedSequences, Tensor]:
    """Put all texts into one sequence.

    Args:
        prompts: Token ids of each prompt.
        responses: Token ids of each response.
        groups: Groups of texts, as ``pack`` returns them.

    Returns:
        Token ids [1, T], the packed sequences, and index [B, R] of the logits that predict each
        response token.
    """
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
        """Close a segment at the current end; return the start of the next one."""
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
    """Group prompts whose common prefix has at least half the length of the longest one."""
    found: list[Group] = []
    longest = 0
    # In sorted order, the common prefix of the first and the last prompt is that of all.
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
    """Return the length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
