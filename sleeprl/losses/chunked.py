"""Per-token loss values from hidden states, without materialising the logits of the batch.

The logits are the largest tensor of a batch: 8,192 positions with a vocabulary of 150,000 are 4.9
GB in float32, and a divergence needs several tensors of that size. Here the positions go through
the language head in chunks; the tensors that are stored have the hidden size.

Shapes: N positions of a batch, n positions of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sleeprl.losses.divergence import full_precision, logprobs_of, top_k_with_tail

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**25}
"""Default number of logits in a chunk by device, 16 and 128 MiB in float32: small enough for a
CPU's caches, large enough to amortise a GPU's kernel launches. A chunk never has fewer positions
than ``CHUNK_POSITIONS``, because the whole head is read for each chunk."""
CHUNK_POSITIONS = 256
"""Smallest default number of positions in a chunk."""

Values = Callable[[Tensor, slice], Sequence[Tensor]]
"""Maps logits [n, V] and their slice of the positions to tensors [n]."""


def chunked_values(
    hidden_NH: Tensor,
    head_VH: Tensor,
    values: Values,
    differentiable: Sequence[bool],
    *,
    chunk: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute ``values(hidden_NH @ head_VH.T, slice(0, N))`` with its gradient, chunk by chunk.

    Each value depends on one position only, so its gradient with respect to that position's hidden
    state is one row [H]. The forward pass computes these rows while it has the chunk's logits, and
    the backward pass only scales them. Nothing is projected twice, and a frozen head is not read in
    the backward pass, when ZeRO-3 has released it. The gradient of a trained head needs the logits
    a second time; they are recomputed.

    Args:
        hidden_NH: Hidden states.
        head_VH: Weight of the language head.
        values: Maps logits [n, V] and the slice of positions they belong to, to tensors [n].
            Position i of a result may depend on row i of the logits only. It must be pure: with a
            trained head it is called again in the backward pass.
        differentiable: For each of these tensors, whether it needs a gradient.
        chunk: Positions per chunk. By default as many as ``CHUNK_LOGITS`` allows.

    Returns:
        The tensors of ``values`` over all positions, each [N].

    Raises:
        ValueError: ``chunk`` is less than 1.
    """
    chunk = _chunk_size(head_VH, chunk)
    wanted = [flag and torch.is_grad_enabled() for flag in differentiable]
    return _ChunkedValues.apply(hidden_NH, head_VH, values, wanted, chunk)


def token_logprobs(
    hidden_NH: Tensor, head_VH: Tensor, tokens_N: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Compute the log-probability of each position's token.

    Args:
        hidden_NH: Hidden states.
        head_VH: Weight of the language head.
        tokens_N: Token ids.
        chunk: Positions per chunk.

    Returns:
        Log-probabilities [N], in nats.
    """

    def values(logits_nV: Tensor, part: slice) -> list[Tensor]:
        return [logprobs_of(logits_nV, tokens_N[part])]

    return chunked_values(hidden_NH, head_VH, values, [True], chunk=chunk)[0]


@torch.no_grad()
def chunked_top_k(
    hidden_NH: Tensor, head_VH: Tensor, k: int, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ``top_k_with_tail`` of the logits ``hidden_NH @ head_VH.T``, without gradient.

    Args:
        hidden_NH: Hidden states.
        head_VH: Weight of the language head.
        k: Number of tokens, K in the shapes.
        chunk: Positions per chunk.

    Returns:
        Token ids [N, K] and log-probabilities [N, K+1], in nats.
    """
    pieces = [
        top_k_with_tail(hidden_NH[part] @ head_VH.T, k)
        for part in _slices(len(hidden_NH), _chunk_size(head_VH, chunk))
    ]
    ids, logprobs = zip(*pieces, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


class _ChunkedValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        values: Values,
        wanted: Sequence[bool],
        chunk: int,
    ) -> tuple[Tensor, ...]:
        rows = [
            torch.empty_like(hidden_NH) if flag and ctx.needs_input_grad[0] else None
            for flag in wanted
        ]
        outputs: list[list[Tensor]] = [[] for _ in wanted]
        for part in _slices(len(hidden_NH), chunk):
            logits_nV = (hidden_NH[part] @ head_VH.T).detach()
            with torch.set_grad_enabled(any(row is not None for row in rows)):
                found = values(logits_nV.requires_grad_(torch.is_grad_enabled()), part)
            for position, (row, value) in enumerate(zip(rows, found, strict=True)):
                if row is not None:
                    more = any(later is not None for later in rows[position + 1 :])
                    gradient_nV = _gradient(value, None, logits_nV, retain_graph=more)
                    torch.matmul(gradient_nV.to(head_VH.dtype), head_VH, out=row[part])
                    del gradient_nV
                outputs[position].append(value.detach())
            del logits_nV, found, value  # else they would coexist with the next chunk's
        # The hidden states' gradient needs only the rows. The inputs are saved only if the head
        # is trained.
        trained = [hidden_NH, head_VH] if ctx.needs_input_grad[1] else []
        kept_rows = [row for row in rows if row is not None]
        ctx.save_for_backward(*kept_rows, *trained)
        ctx.values, ctx.wanted, ctx.chunk, ctx.rows = values, wanted, chunk, len(kept_rows)
        results = tuple(torch.cat(pieces) for pieces in outputs)
        ctx.mark_non_differentiable(*(r for r, flag in zip(results, wanted) if not flag))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, trained = ctx.saved_tensors[: ctx.rows], ctx.saved_tensors[ctx.rows :]
        scales = [scale for scale, flag in zip(upstream, ctx.wanted, strict=True) if flag]
        hidden_gradient = head_gradient = None
        for scale_N, row_NH in zip(scales, rows):
            scaled_NH = row_NH * scale_N[:, None].to(row_NH.dtype)
            hidden_gradient = scaled_NH if hidden_gradient is None else hidden_gradient + scaled_NH
        if trained:
            hidden_NH, head_VH = trained
            # Summed in float32: a half-precision sum over many chunks is biased.
            total_VH = full_precision(torch.zeros_like(head_VH))
            for part in _slices(len(hidden_NH), ctx.chunk):
                logits_nV = (hidden_NH[part] @ head_VH.T).requires_grad_()
                with torch.enable_grad():
                    found = ctx.values(logits_nV, part)
                wanted_values = [value for value, flag in zip(found, ctx.wanted) if flag]
                upstream_n = [scale_N[part] for scale_N in scales]
                gradient_nV = _gradient(wanted_values, upstream_n, logits_nV).to(total_VH.dtype)
                total_VH.addmm_(gradient_nV.T, hidden_NH[part].to(total_VH.dtype))
                del logits_nV, found, wanted_values, gradient_nV
            head_gradient = total_VH.to(head_VH.dtype)
        return hidden_gradient, head_gradient, None, None, None


def _chunk_size(head_VH: Tensor, chunk: int | None) -> int:
    if chunk is None:
        logits = CHUNK_LOGITS["cuda" if head_VH.is_cuda else "cpu"]
        chunk = max(CHUNK_POSITIONS, logits // head_VH.shape[0])
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 position")
    return chunk


def _slices(length: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` over ``length``; one empty slice if ``length`` is 0."""
    for start in range(0, max(length, 1), size):
        yield slice(start, start + size)


def _gradient(
    values: Tensor | Sequence[Tensor],
    upstream: Sequence[Tensor] | None,
    logits_nV: Tensor,
    *,
    retain_graph: bool = False,
) -> Tensor:
    """Differentiate the sum of the values, weighted by ``upstream`` (default: ones), by the logits."""
    if upstream is None:
        assert isinstance(values, Tensor)
        upstream = [torch.ones_like(values)]
    return torch.autograd.grad(values, logits_nV, upstream, retain_graph=retain_graph)[0]
