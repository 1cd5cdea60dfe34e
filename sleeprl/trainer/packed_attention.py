"""Attention over several texts packed into one sequence, in which a shared prefix is stored once.

Each token attends to the earlier tokens of its own text, wherever they are in the sequence. So the
cost is that of the texts alone. A mask over the whole sequence would cost its length squared,
mostly for pairs of tokens from different texts.

Shapes: T tokens of the sequence, N segments of a block, Q queries, K keys, H heads, G key-value
heads, D head size.
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
"""Text number of tokens that several texts share."""
NOWHERE = 2**31 - 1
"""Position of a padding key: behind all queries, so no query sees it."""


@dataclass(frozen=True)
class Segment:
    """Tokens of one or more texts with their common prefix, as ranges of the sequence."""

    own: range
    """Tokens of the segment itself."""
    before: range
    """The common prefix, to which all of these tokens attend."""


@dataclass(frozen=True)
class AttentionBlock:
    """N segments of similar size, padded to Q queries and K keys."""

    queries_NQ: Tensor
    """Index of each query in the sequence. A padding query repeats the segment's first one, and its
    output is not used."""
    keys_NK: Tensor
    """Index of each key in the sequence."""
    query_at_NQ: Tensor
    """Position of each query in its text."""
    key_at_NK: Tensor
    """Position of each key in its text."""
    seen_NQK: Tensor
    """True where a query attends to a key, without a sliding window."""

    def sees(self, window: int | None) -> Tensor:
        """Return the attention mask [N, 1, Q, K].

        Args:
            window: Sliding window of a layer, in tokens including the query's own; None for full
                attention.
        """
        if window is None:
            return self.seen_NQK[:, None]
        back_NQK = self.query_at_NQ[:, :, None] - self.key_at_NK[:, None, :]
        return (self.seen_NQK & (back_NQK < window))[:, None]


@dataclass(frozen=True)
class PackedSequences:
    """Texts packed into one sequence of T tokens."""

    positions_1T: Tensor
    """Position of each token in its text."""
    blocks: tuple[AttentionBlock, ...]
    """The segments, grouped by size."""
    found_T: Tensor
    """Index of each token among the queries of all blocks, padding included."""

    @classmethod
    def of(
        cls, positions: Sequence[int], text_of: Sequence[int], pieces: Sequence[Segment]
    ) -> PackedSequences:
        """Group segments into blocks.

        Segments share a block if their numbers of queries, and of keys, differ by less than a
        factor of two.

        Args:
            positions: Position of each token in its text.
            text_of: Text number of each token, or ``SHARED``.
            pieces: The segments. Each token is in exactly one.
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
        """Copy all tensors to a device."""
        blocks = tuple(
            AttentionBlock(*(p.to(device) for p in vars(block).values())) for block in self.blocks
        )
        return PackedSequences(self.positions_1T.to(device), blocks, self.found_T.to(device))


def use(model: Any) -> None:
    """Enable attention by text in a transformers model.

    It applies to calls with the argument ``texts``; any other call computes the same as before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, partial(_by_text, sdpa_attention_forward))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def model_arguments(texts: PackedSequences) -> dict[str, Any]:
    """Return the keyword arguments of a model call, besides the token ids [1, T]."""
    positions_1T = texts.positions_1T
    # transformers passes a mask of four dimensions through; without a mask it would create one.
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
    """Compute attention [1, T, H, D] by text; without ``texts``, call transformers' own ``sdpa``."""
    if texts is None:
        return sdpa(module, query_1HTD, key_1GTD, value_1GTD, attention_mask, **how)
    found = []
    for block in texts.blocks:
        keys = _take(key_1GTD, block.keys_NK), _take(value_1GTD, block.keys_NK)
        sees, query = block.sees(sliding_window), _take(query_1HTD, block.queries_NQ)
        found.append(sdpa(module, query, *keys, sees, **how)[0].flatten(0, 1))
    return torch.cat(found).index_select(0, texts.found_T)[None], None


def _take(part_1HTD: Tensor, places_NK: Tensor) -> Tensor:
    """Gather heads at the indices ``places_NK``: [1, H, T, D] to [N, H, K, D]."""
    taken = part_1HTD[0].index_select(1, places_NK.flatten())
    return taken.unflatten(1, places_NK.shape).transpose(0, 1)
