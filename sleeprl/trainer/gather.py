"""Gather whole parameters from a ZeRO-3 partition, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sleeprl.trainer.state import trained_parameters
from sleeprl.weight_sync.base import NamedTensor, split_tensors

GATHER_BYTES = 64 << 20


def gather_trained(module: nn.Module, *, keep: bool = True) -> Iterator[NamedTensor]:
    """Yield the trained parameters of a module but for a critic's, see ``gather_whole``."""
    return gather_whole(trained_parameters(module, critic=False).items(), keep=keep)


def gather_whole(
    parameters: Iterable[tuple[str, Any]], limit: int = GATHER_BYTES, *, keep: bool = True
) -> Iterator[NamedTensor]:
    """Yield parameters, whole, on the CPU, in copies of their own. Collective: all ranks iterate.

    Args:
        parameters: Partitioned parameters by name.
        limit: Most bytes of one gather, by ``ds_numel``; a partitioned parameter itself says that
            it has no elements and no shape. A larger one is gathered alone.
        keep: Whether this rank wants them. Without it, it takes part and yields nothing.
    """
    for group in split_tensors(parameters, limit):
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
