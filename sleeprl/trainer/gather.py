"""Whole parameters out of a ZeRO-3 partition, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sleeprl.weight_sync.base import NamedTensor, split

GATHER_BYTES = 64 << 20


def gathered(
    parameters: Iterable[tuple[str, Any]],
    limit: int = GATHER_BYTES,
    *,
    keep: bool = True,
) -> Iterator[NamedTensor]:
    """The parameters, whole, on the CPU, in copies of their own. Collective: all ranks iterate.

    Those of one gather have at most ``limit`` bytes together (or are one that is larger), by
    ``ds_numel``: a partitioned parameter says that it has no elements and no shape. keep:
    whether this rank wants them; where it does not, it takes part in the gathers and yields nothing.
    """
    for group in split(parameters, limit):
        yield from _gather(group, keep)


def _gather(group: list[tuple[str, Any]], keep: bool) -> list[NamedTensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter for _, parameter in group]):
        # Copies: the gathered storage is gone when the gather closes.
        return [(name, _copy(parameter)) for name, parameter in group if keep]


def _copy(parameter: Any) -> Tensor:
    whole: Tensor = parameter.detach()
    if whole.shape != parameter.ds_shape:
        raise RuntimeError(f"a gathered parameter has {whole.shape}, not {parameter.ds_shape}")
    return whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
