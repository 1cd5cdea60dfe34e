"""Compares two generations: parameters, slots, figures and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeprl.config.aliases import rename_old_keys
from sleeprl.lineage.store import LineageError, LineageStore, Manifest
from sleeprl.reporting.summary_view import RATES, STATES, Figure, read_figure

if TYPE_CHECKING:
    from torch import Tensor

BASE = "base"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_UNIT_DIMENSIONS = {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1}
"""Dimension of a gated MLP's projection along which its hidden units lie."""
_ADAPTER = "adapter"
"""Directory that ``memory.low_rank`` writes beside a base. Importing it would take torch's seconds."""
_RANK_DIMENSIONS = {"lora_A": 0, "lora_B": 1}
"""Dimension of an adapter's factor along which its ranks lie."""


@dataclass
class Change:
    """Sums up how tensors of one kind differ from model ``a`` to model ``b``."""

    tensors: int = 0
    changed: int = 0
    squared_difference: float = 0.0
    """||b - a||^2."""
    squared_norm: float = 0.0
    """||a||^2."""

    @property
    def relative(self) -> float:
        """||b - a|| / ||a||: 0 where nothing changed, infinite where ``a`` is zero."""
        if self.squared_difference == 0:
            return 0.0
        if self.squared_norm == 0:
            return math.inf
        return math.sqrt(self.squared_difference / self.squared_norm)

    def add(self, squared_difference: float, squared_norm: float) -> None:
        self.tensors += 1
        self.changed += squared_difference > 0
        self.squared_difference += squared_difference
        self.squared_norm += squared_norm


@dataclass
class WeightChanges:
    """How the parameters of two checkpoints differ, by part and by layer."""

    parts: dict[tuple[str, str], Change] = field(default_factory=dict)
    """(where, part), such as ``("base", "self_attn.q_proj")`` or ``("slot 2", "mlp.up_proj")``."""
    layers: dict[int, Change] = field(default_factory=dict)
    """Number of a decoder layer, and all its tensors taken together."""
    only_a: list[str] = field(default_factory=list)
    """Names of the tensors that ``b`` does not have."""
    only_b: list[str] = field(default_factory=list)
    """Names of the tensors that ``a`` does not have."""

    def add(self, where: str, part: str, layer: int | None, difference: float, norm: float) -> None:
        self.parts.setdefault((where, part), Change()).add(difference, norm)
        if layer is not None:
            self.layers.setdefault(layer, Change()).add(difference, norm)


@dataclass(frozen=True)
class Diff:
    """What differs from generation ``a`` to generation ``b``."""

    a: Manifest
    b: Manifest
    weights: WeightChanges
    emptied: Sequence[int]
    """Slots that hold an expert in ``a`` only."""
    filled: Sequence[int]
    """Slots that hold an expert in ``b`` only."""
    figures: Mapping[tuple[str, str], tuple[Figure | None, Figure | None]]
    """(state, figure), such as ``("after", "recall")``, where either generation has it."""
    settings: Mapping[str, tuple[Any, Any]]
    """Values by dotted key, where they differ; None where a key is missing."""


def diff_generations(store: LineageStore, a: str, b: str) -> Diff:
    """Compare two generations.

    Memory holds one pair of tensors at a time.

    Args:
        store: The generations.
        a: Id, unique prefix of an id, or HEAD.
        b: The same of the other generation.

    Raises:
        LineageError: There is no such generation.
    """
    first, second = store.get(a), store.get(b)
    used_a, used_b = set(first.slots.get("used", ())), set(second.slots.get("used", ()))
    return Diff(
        a=first,
        b=second,
        weights=compare_weights(
            store.path(first.id), store.path(second.id), first.slots, second.slots
        ),
        emptied=sorted(used_a - used_b),
        filled=sorted(used_b - used_a),
        figures=compare_figures(first.figures, second.figures),
        settings=compare_settings(
            rename_old_keys(first.config)[0], rename_old_keys(second.config)[0]
        ),
    )


def compare_weights(
    a: Path, b: Path, slots_a: Mapping[str, Any], slots_b: Mapping[str, Any]
) -> WeightChanges:
    """Compare all safetensors of two checkpoint directories, and of the adapters in them.

    MLPs, or an adapter's ranks, are split into the base and the slots where both checkpoints have the
    same layout. A tensor that is larger on one side is compared as if the other were padded with
    zeros, because that is what widening does.

    Args:
        a: Directory of a checkpoint.
        b: Directory of the other.
        slots_a: Slots in the manifest of ``a``.
        slots_b: Slots in the manifest of ``b``.

    Raises:
        LineageError: A file cannot be read; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    layout = _shared_layout(slots_a, slots_b)
    found = WeightChanges()
    with ExitStack() as stack:

        def tensors(directory: Path) -> dict[str, Any]:
            files = []
            for where in (directory, directory / _ADAPTER):
                for file in sorted(where.glob("*.safetensors")):
                    try:
                        files.append(stack.enter_context(safe_open(file, framework="pt")))
                    except SafetensorError as error:
                        raise LineageError(f"{file} is damaged: {error}") from None
            return {name: file for file in files for name in file.keys()}  # noqa: SIM118

        in_a, in_b = tensors(a), tensors(b)
        found.only_a = sorted(in_a.keys() - in_b.keys())
        found.only_b = sorted(in_b.keys() - in_a.keys())
        for name in sorted(in_a.keys() & in_b.keys()):
            layer, part = _split_name(name)
            one, two = in_a[name].get_tensor(name), in_b[name].get_tensor(name)
            for where, left, right in _split_slots(part, one, two, layout):
                difference, norm = _squared_norms(left, right)
                if where == BASE or difference or norm:  # a slot that is empty in both is left out
                    found.add(where, part, layer, difference, norm)
    return found


def compare_figures(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> dict[tuple[str, str], tuple[Figure | None, Figure | None]]:
    """Return the figures of every state of a night that either summary has."""
    pairs = {
        (state, name): (read_figure(a, state, name), read_figure(b, state, name))
        for state in STATES
        for name in (*RATES, "perplexity")
    }
    return {key: pair for key, pair in pairs.items() if pair != (None, None)}


def compare_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by dotted key."""
    first, second = dict(_flatten(a)), dict(_flatten(b))
    keys = sorted(first.keys() | second.keys())
    return {k: (first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)}


def _split_name(name: str) -> tuple[int | None, str]:
    """Split a tensor's name: ``model.layers.3.mlp.up_proj.weight`` gives (3, ``mlp.up_proj``)."""
    inside = _LAYER.search(name)
    layer, rest = (int(inside[1]), inside[2]) if inside else (None, name.removeprefix("model."))
    return layer, rest.removesuffix(".weight")


def _shared_layout(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return base width and slot width, or None where the manifests do not agree on them."""
    if a.get("base_width") != b.get("base_width") or a.get("width") != b.get("width"):
        return None
    return (int(a["base_width"]), int(a["width"])) if "base_width" in a and "width" in a else None


def _split_slots(
    part: str, a: Tensor, b: Tensor, layout: tuple[int, int] | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the base and then each slot of a pair of tensors, or the pair whole where it has no slots.

    An MLP is cut along its hidden units, an adapter along its ranks.
    """
    dim = _RANK_DIMENSIONS.get(part.rpartition(".")[2])
    # A low-rank model has no base width: its slots are ranks of the adapter, and its MLPs are whole.
    if dim is None and layout is not None and layout[0]:
        dim = _UNIT_DIMENSIONS.get(part)
    if layout is None or dim is None or a.dim() != 2 or b.dim() != 2:
        yield BASE, a, b
        return
    base, width = layout
    cuts = [0, *range(base, max(a.shape[dim], b.shape[dim]) + 1, width)]
    for number, (start, end) in enumerate(pairwise(cuts)):
        if start == end:
            continue
        pair = [
            t.narrow(dim, min(start, t.shape[dim]), max(0, min(end, t.shape[dim]) - start))
            for t in (a, b)
        ]
        yield (BASE if number == 0 else f"slot {number - 1}"), pair[0], pair[1]


def _squared_norms(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return ||b - a||^2 and ||a||^2, computed in float32 or wider."""
    import torch

    a, b = a.float(), b.float()
    norm = float(torch.linalg.vector_norm(a)) ** 2
    if torch.equal(a, b):
        return 0.0, norm
    if a.shape != b.shape:
        a, b = _pad_to_match(a, b)
    return float(torch.linalg.vector_norm(b - a)) ** 2, norm


def _pad_to_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() != b.dim():
        a, b = a.flatten(), b.flatten()
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]

    def pad(tensor: Tensor) -> Tensor:
        wide = tensor.new_zeros(shape)
        wide[tuple(slice(size) for size in tensor.shape)] = tensor
        return wide

    return pad(a), pad(b)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
