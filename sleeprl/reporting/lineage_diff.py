"""What changed between two generations: parameters, slots, figures, settings. Reads, decides nothing."""

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
from sleeprl.lineage.store import LineageStore, Manifest
from sleeprl.reporting.summary_view import RATES, STATES, Figure, figure

if TYPE_CHECKING:
    from torch import Tensor

BASE = "base"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
# Dimension of a gated MLP's projection along which its hidden units lie.
_UNITS = {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1}
# What ``memory.lowrank`` writes beside a base, whose import takes torch's seconds.
_ADAPTER, _RANKS = "adapter", {"lora_A": 0, "lora_B": 1}


@dataclass
class Change:
    """Tensors of one kind in two models, taken together: ``b`` against ``a``."""

    tensors: int = 0
    changed: int = 0
    squared_difference: float = 0.0
    squared_norm: float = 0.0
    """Of ``a``'s."""

    @property
    def relative(self) -> float:
        """||b - a|| / ||a||: 0 when nothing changed, infinite for what was zero before."""
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
class Weights:
    """The parameters of two checkpoints, grouped."""

    parts: dict[tuple[str, str], Change] = field(default_factory=dict)
    """(where, part), such as ``("base", "self_attn.q_proj")`` or ``("slot 2", "mlp.up_proj")``."""
    layers: dict[int, Change] = field(default_factory=dict)
    """Decoder layer -> all its tensors together."""
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)

    def add(self, where: str, part: str, layer: int | None, difference: float, norm: float) -> None:
        self.parts.setdefault((where, part), Change()).add(difference, norm)
        if layer is not None:
            self.layers.setdefault(layer, Change()).add(difference, norm)


@dataclass(frozen=True)
class Diff:
    """Generation ``b`` seen from generation ``a``."""

    a: Manifest
    b: Manifest
    weights: Weights
    emptied: Sequence[int]
    """Slots that hold an expert in a only."""
    filled: Sequence[int]
    """Slots that hold an expert in b only."""
    figures: Mapping[tuple[str, str], tuple[Figure | None, Figure | None]]
    """(state, figure), such as ``("after", "recall")``, where either generation has it."""
    config: Mapping[str, tuple[Any, Any]]
    """Dotted keys whose values differ; None where a key is missing."""


def diff(store: LineageStore, a: str, b: str) -> Diff:
    """Compare two generations of ``store``, each given by id, unique prefix or HEAD.

    Reads both checkpoints tensor by tensor, so memory holds one pair of tensors at a
    time. Raises LineageError for a generation that is not there.
    """
    one, two = store.get(a), store.get(b)
    used_a, used_b = set(one.slots.get("used", ())), set(two.slots.get("used", ()))
    return Diff(
        a=one,
        b=two,
        weights=compare_weights(store.path(one.id), store.path(two.id), one.slots, two.slots),
        emptied=sorted(used_a - used_b),
        filled=sorted(used_b - used_a),
        figures=compare_figures(one.figures, two.figures),
        config=compare_config(rename_old_keys(one.config)[0], rename_old_keys(two.config)[0]),
    )


def compare_weights(
    a: Path, b: Path, slots_a: Mapping[str, Any], slots_b: Mapping[str, Any]
) -> Weights:
    """All safetensors of two checkpoint directories, and of the adapters in them.

    The MLPs, or an adapter's ranks, are split into the base and the slots where both have the
    same layout of them. A tensor that is larger on one side is compared as if the other were padded
    with zeros: that is what widening does.
    """
    from safetensors import safe_open

    layout = _layout(slots_a, slots_b)
    found = Weights()
    with ExitStack() as stack:

        def tensors(directory: Path) -> dict[str, Any]:
            files = [
                stack.enter_context(safe_open(file, framework="pt"))
                for where in (directory, directory / _ADAPTER)
                for file in sorted(where.glob("*.safetensors"))
            ]
            return {name: file for file in files for name in file.keys()}  # noqa: SIM118

        in_a, in_b = tensors(a), tensors(b)
        found.only_a = sorted(in_a.keys() - in_b.keys())
        found.only_b = sorted(in_b.keys() - in_a.keys())
        for name in sorted(in_a.keys() & in_b.keys()):
            layer, part = _place(name)
            one, two = in_a[name].get_tensor(name), in_b[name].get_tensor(name)
            for where, left, right in _pieces(part, one, two, layout):
                difference, norm = _squares(left, right)
                if where == BASE or difference or norm:  # else a slot that is empty in both
                    found.add(where, part, layer, difference, norm)
    return found


def compare_figures(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> dict[tuple[str, str], tuple[Figure | None, Figure | None]]:
    """The figures of every state of a night that either summary has."""
    pairs = {
        (state, name): (figure(a, state, name), figure(b, state, name))
        for state in STATES
        for name in (*RATES, "perplexity")
    }
    return {key: pair for key, pair in pairs.items() if pair != (None, None)}


def compare_config(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    one, two = dict(_flat(a)), dict(_flat(b))
    keys = sorted(one.keys() | two.keys())
    return {k: (one.get(k), two.get(k)) for k in keys if one.get(k) != two.get(k)}


def _place(name: str) -> tuple[int | None, str]:
    """``model.layers.3.mlp.up_proj.weight`` is (3, ``mlp.up_proj``)."""
    inside = _LAYER.search(name)
    layer, rest = (int(inside[1]), inside[2]) if inside else (None, name.removeprefix("model."))
    return layer, rest.removesuffix(".weight")


def _layout(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[int, int] | None:
    """Base width and slot width, if both manifests agree on them."""
    if a.get("base_width") != b.get("base_width") or a.get("width") != b.get("width"):
        return None
    return (int(a["base_width"]), int(a["width"])) if "base_width" in a and "width" in a else None


def _pieces(
    part: str, a: Tensor, b: Tensor, layout: tuple[int, int] | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tensor whole, or cut along an MLP's units or an adapter's ranks: the base, then each slot."""
    dim = _RANKS.get(part.rpartition(".")[2])
    # A low-rank model has no base width: its slots are ranks of the adapter, and its MLPs are whole.
    if dim is None and layout is not None and layout[0]:
        dim = _UNITS.get(part)
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


def _squares(a: Tensor, b: Tensor) -> tuple[float, float]:
    """||b - a||^2 and ||a||^2 in float32 and more."""
    import torch

    a, b = a.float(), b.float()
    norm = float(torch.linalg.vector_norm(a)) ** 2
    if torch.equal(a, b):
        return 0.0, norm
    if a.shape != b.shape:
        a, b = _padded(a, b)
    return float(torch.linalg.vector_norm(b - a)) ** 2, norm


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() != b.dim():
        a, b = a.flatten(), b.flatten()
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]

    def pad(tensor: Tensor) -> Tensor:
        wide = tensor.new_zeros(shape)
        wide[tuple(slice(size) for size in tensor.shape)] = tensor
        return wide

    return pad(a), pad(b)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
