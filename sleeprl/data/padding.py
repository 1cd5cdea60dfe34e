"""Sequences of unequal length in rectangular batches of bounded size (pure numpy)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Pad sequences on the right to the longest one.

    Args:
        sequences: Token ids of each sequence.
        pad_id: Token id of the padding.

    Returns:
        ``ids_BT``, and ``mask_BT`` with True on real tokens.
    """
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    width = int(lengths.max(initial=0))
    mask_BT = np.arange(width) < lengths[:, None]
    ids_BT = np.full(mask_BT.shape, pad_id, dtype=np.int64)
    for row, sequence in zip(ids_BT, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids_BT, mask_BT


def token_budget_batches(
    lengths: Sequence[int], max_tokens: int, *, ranks: int = 1
) -> list[list[int]]:
    """Split sequences into batches of at most ``max_tokens`` *padded* tokens.

    Every index occurs exactly once, and the order depends on the arguments only. The number of
    batches is a multiple of ``ranks``, so all ranks take part in the same number of collective
    steps. The batches of one step differ by at most one sequence and have sequences of similar
    length. A batch is empty only if there are fewer sequences than batches; its rank takes the step
    with zero weight.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Budget of a batch, in tokens.
        ranks: Number of ranks.

    Returns:
        Lists of indices into ``lengths``; batch ``i`` is for rank ``i % ranks``.

    Raises:
        ValueError: A sequence is longer than the budget, or a number is less than 1.
    """
    if max_tokens < 1 or ranks < 1:
        raise ValueError(f"max_tokens={max_tokens} and ranks={ranks} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > max_tokens:
        raise ValueError(
            f"sequence {order[0]} has {lengths[order[0]]} tokens, more than "
            f"max_tokens={max_tokens}; raise max_tokens or shorten the sequence"
        )
    batches: list[list[int]] = []
    while order:
        size = ranks * (max_tokens // max(lengths[order[0]], 1))
        if len(order) > size:  # leave one sequence for each rank of the last step
            size = max(ranks, min(size, len(order) - ranks))
        step, order = order[:size], order[size:]
        batches += [step[rank::ranks] for rank in range(ranks)]
    return batches
