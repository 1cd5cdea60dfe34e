"""Attention of texts that lie behind one another in a single sequence, what they share there once.

Each token attends to what its own text has before it, wherever that lies. So the work is that of
the texts alone: a mask over the whole sequence would cost its length squared, most of it for pairs
of tokens that have nothing to do with one another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sleeprl.data.padding import pad_batch

NAME = "by_text"
SHARED = -1
"""The text of a token that several have in common."""
NOWHERE = 2**31 - 1
"""The position of a key that pads: behind all queries, so that none sees it."""


@dataclass(frozen=True)
class Segment:
    """Tokens of one or more texts, and what these have in common: places in the sequence."""

    own: range
    before: range


@dataclass(frozen=True)
class AttentionBlock:
    """N pieces of about one size, padded: places of queries [N, Q] and of keys [N, K], the position
    of each in its text, and which key a query sees, window or not [N, Q, K]. A query that pads is
    the piece's first once more, which nobody asks for."""

    queries_NQ: Tensor
    keys_NK: Tensor
    query_at_NQ: Tensor
    key_at_NK: Tensor
    seen_NQK: Tensor

    def sees(self, window: int | None) -> Tensor:
        """[N, 1, Q, K]; window: how many tokens a layer looks back, with its own."""
        if window is None:
            return self.seen_NQK[:, None]
        back_NQK = self.query_at_NQ[:, :, None] - self.key_at_NK[:, None, :]
        return (self.seen_NQK & (back_NQK < window))[:, None]


@dataclass(frozen=True)
class PackedSequences:
    """Of a sequence of T tokens: positions [1, T] of each in its text, the blocks, and where among
    all their queries, padding included, each token is [T]."""

    positions_1T: Tensor
    blocks: tuple[AttentionBlock, ...]
    found_T: Tensor

    @classmethod
    def of(
        cls, positions: Sequence[int], text_of: Sequence[int], pieces: Sequence[Segment]
    ) -> PackedSequences:
        """Of each token its position and its text, or ``SHARED``; each is in one piece.

        Pieces whose queries, and whose keys, differ less than twofold in number are a block.
        """
        alike: dict[tuple[int, int], list[Segment]] = defaultdict(list)
        for piece in pieces:
            queries, keys = len(piece.own), len(piece.before) + len(piece.own)
            alike[queries.bit_length(), keys.bit_length()].append(piece)
        at = np.array([*positions, NOWHERE], dtype=np.int32)
        text = np.array([*text_of, SHARED], dtype=np.int32)
        blocks, found, start = list[AttentionBlock](), np.zeros(len(positions), dtype=np.int64), 0
        for group in alike.values():
            queries_NQ, real_NQ = pad_batch([piece.own for piece in group], -1)
            keys_NK, _ = pad_batch([[*piece.before, *piece.own] for piece in group], -1)
            found[queries_NQ[real_NQ]] = start + real_NQ.ravel().nonzero()[0]
            start += real_NQ.size
            queries_NQ = np.where(real_NQ, queries_NQ, queries_NQ[:, :1])
            query_at_NQ, key_at_NK = at[queries_NQ], at[keys_NK]
            same_NQK = text[queries_NQ][:, :, None] == text[keys_NK][:, None, :]
            seen_NQK = same_NQK | (text[keys_NK] == SHARED)[:, None, :]
            seen_NQK &= query_at_NQ[:, :, None] >= key_at_NK[:, None, :]
            parts = (queries_NQ, keys_NK.clip(0), query_at_NQ, key_at_NK, seen_NQK)
            blocks.append(AttentionBlock(*map(torch.from_numpy, parts)))
        return cls(torch.tensor([positions]), tuple(blocks), torch.from_numpy(found))

    def to(self, device: torch.device) -> PackedSequences:
        blocks = tuple(
            AttentionBlock(*(p.to(device) for p in vars(block).values())) for block in self.blocks
        )
        return PackedSequences(self.positions_1T.to(device), blocks, self.found_T.to(device))


def use(model: Any) -> None:
    """Let a model of transformers attend by text where a call to it says ``texts``; where none
    does, all is as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, partial(_by_text, sdpa_attention_forward))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def model_arguments(texts: PackedSequences) -> dict[str, Any]:
    """Return what to call such a model with, beside the ids [1, T]."""
    positions_1T = texts.positions_1T
    # A mask of four dimensions is handed down as it is; without one transformers would make one.
    unused = positions_1T[:, None, None]
    return {"position_ids": positions_1T, "attention_mask": unused, "texts": texts}


def _by_text(  # parameters: those of transformers' attention functions
    sdpa: Callable[..., tuple[Tensor, None]],
    module: torch.nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: Tensor | None,
    texts: PackedSequences | None = None,
    sliding_window: int | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """In place of transformers' own ``sdpa``: attention [1, T, H, D]."""
    if texts is None:
        return sdpa(module, query_1HTD, key_1GTD, value_1GTD, attention_mask, **how)
    found = []
    for block in texts.blocks:
        keys = _take(key_1GTD, block.keys_NK), _take(value_1GTD, block.keys_NK)
        sees, query = block.sees(sliding_window), _take(query_1HTD, block.queries_NQ)
        found.append(sdpa(module, query, *keys, sees, **how)[0].flatten(0, 1))
    return torch.cat(found).index_select(0, texts.found_T)[None], None


def _take(part_1HTD: Tensor, places_NK: Tensor) -> Tensor:
    """[N, H, K, D]"""
    taken = part_1HTD[0].index_select(1, places_NK.flatten())
    return taken.unflatten(1, places_NK.shape).transpose(0, 1)
