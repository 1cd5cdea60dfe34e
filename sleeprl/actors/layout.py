"""How the texts of a micro-batch lie in tensors: each in a sequence of its own, or packed.

Packed, texts stand behind one another in few sequences, and what several prompts begin with (the
document that many questions are about, the prompt of a GRPO group) is there once. A mask and the
positions keep them apart, so that nothing but the work is different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeprl.trajectories.packing import pad_batch

LENGTHS = range(128, 1025, 128)
"""Most tokens of a packed sequence; its attention takes a mask of that size squared. A text that is
longer than the last is not worth packing."""
WORTH = 0.9
"""Packed is what then costs at most so much of what padding costs."""


@dataclass(frozen=True)
class Group:
    """Texts, by number, whose prompts have their first ``prefix`` tokens in common."""

    prefix: int
    texts: list[int]


def inputs(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device
) -> tuple[Tensor, ...]:
    """What ``ResponseModel`` reads, in the layout that takes the least work.

    Of B texts with at most R response tokens in S sequences of T tokens: ids [S, T]; what may be
    attended to; and index [B, R], where in its sequence the logits of a response token are.
    Packed, also positions [S, T] and each text's sequence [B]; else B = S.
    """
    sequences = pack(prompts, responses)
    asked = (
        padded(prompts, responses) if sequences is None else packed(prompts, responses, sequences)
    )
    return tuple(part.to(device) for part in asked)


def padded(
    prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """One text a sequence, padded on the right: ids and mask [B, T], index [B, R]."""
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


def pack(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[list[Group]] | None:
    """The groups of each packed sequence; None where padding is as good."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    alone = WORTH * _cost(len(lengths), max(lengths))
    ways: list[tuple[float, list[list[Group]] | None]] = [(alone, None)]
    together = _alike(prompts)
    for room in LENGTHS:
        if max(lengths) > room:
            continue
        pieces = [piece for group in together for piece in _split(group, lengths, room)]
        sequences = _fill(pieces, lengths, room)
        longest = max(sum(_size(each, lengths) for each in groups) for groups in sequences)
        ways.append((_cost(len(sequences), longest), sequences))
    return min(ways, key=lambda way: way[0])[1]


def packed(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], sequences: Sequence[list[Group]]
) -> tuple[Tensor, ...]:
    """ids [S, T]; a mask [S, 1, T, T], by which a token sees what its text has before it;
    index [B, R]; positions [S, T] in each one's own text; the sequence of each text [B]."""
    sequence_B = torch.zeros(len(prompts), dtype=torch.long)
    index_BR = torch.zeros(len(prompts), max(1, *map(len, responses)), dtype=torch.long)
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for number, groups in enumerate(sequences):
        ids: list[int] = []
        places: list[int] = []
        group_of: list[int] = []
        text_of: list[int] = []  # -1: of all texts of the group
        for nth, group in enumerate(groups):
            shared = len(ids) + group.prefix - 1  # the last token that all have
            pieces = [(-1, prompts[group.texts[0]][: group.prefix])]
            pieces += [(n, prompts[n][group.prefix :] + responses[n]) for n in group.texts]
            for text, tokens in pieces:
                if text >= 0:
                    own = len(ids) + len(prompts[text]) - group.prefix  # its first response token
                    count = max(1, len(responses[text]))
                    sequence_B[text] = number
                    index_BR[text] = own - 1 if own > len(ids) else shared
                    index_BR[text, 1:count] = torch.arange(own, own + count - 1)
                place = 0 if text < 0 else group.prefix
                ids += tokens
                places += range(place, place + len(tokens))
                group_of += [nth] * len(tokens)
                text_of += [text] * len(tokens)
        rows.append((ids, places, group_of, text_of))
    whole = [
        torch.from_numpy(pad_batch(column, -2)[0]).long() for column in zip(*rows, strict=True)
    ]
    ids_ST, positions_ST, group_ST, text_ST = whole
    alike = lambda part_ST: part_ST[:, :, None] == part_ST[:, None, :]  # noqa: E731
    sees_STT = alike(group_ST) & (alike(text_ST) | (text_ST == -1)[:, None, :])
    length = ids_ST.shape[1]
    mask_S1TT = (sees_STT & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    return ids_ST.clamp(min=0), mask_S1TT, index_BR, positions_ST.clamp(min=0), sequence_B


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


def _size(group: Group, lengths: Sequence[int]) -> int:
    return group.prefix + sum(lengths[text] - group.prefix for text in group.texts)


def _split(group: Group, lengths: Sequence[int], room: int) -> list[Group]:
    """The group in pieces that fit; the prefix is there once in each."""
    pieces: list[Group] = []
    left = 0
    for text in group.texts:
        own = lengths[text] - group.prefix
        if not pieces or own > left:
            pieces.append(Group(group.prefix, []))
            left = room - group.prefix
        pieces[-1].texts.append(text)
        left -= own
    return pieces


def _fill(pieces: Sequence[Group], lengths: Sequence[int], room: int) -> list[list[Group]]:
    """Sequences of at most ``room`` tokens: the largest piece first, each where it first fits."""
    sequences: list[list[Group]] = []
    left: list[int] = []
    sized = [(_size(piece, lengths), piece) for piece in pieces]
    for size, piece in sorted(sized, key=lambda one: -one[0]):
        at = next((n for n, free in enumerate(left) if free >= size), None)
        if at is None:
            sequences.append([])
            left.append(room)
            at = len(left) - 1
        sequences[at].append(piece)
        left[at] -= size
    return sequences


def _cost(sequences: int, length: int) -> float:
    """Work, in tokens: attention takes its part with the length, about this one in small models."""
    return sequences * length * (1 + length / 2048)
