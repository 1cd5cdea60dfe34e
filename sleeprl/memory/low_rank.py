"""The low-rank expert (the paper's {A, B}): a LoRA on gate, up and down of every MLP.

A checkpoint that grows this way is the plain base, which never changes, and beside it one PEFT
adapter of rank ``count * width``. Each slot is a range of its ranks, and an empty slot is zero. So
a reset is exact, and ``peft`` loads the adapter as it is.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sleeprl.memory.checkpoint import WAKE, WEIGHTS, columns_of, mlp_tensors
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import (
    PROJECTIONS,
    ModuleWithExpert,
    apply_in_larger_self,
    innermost,
    mlps,
    projection,
    put_beside,
    require_projections,
)
from sleeprl.memory.slots import FILE, LOW_RANK, Slots
from sleeprl.pretrained import load_model, load_tokenizer, save_model, save_tensors
from sleeprl.utils.files import atomic_directory

ADAPTER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SCALE = 2.0
"""alpha / r, the factor of the product B A. The paper uses 128 / 64."""
RANK_DIM = {"lora_A": 0, "lora_B": 1}
PEFT_PREFIX = "base_model.model."


class LowRank(nn.Module):
    """SCALE * B(A(x)) with A [rank, in] random and B [out, rank] zero at initialisation (LoRA)."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(rank, outputs, bias=False, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the expert's output for ``x``, [..., in] to [..., out]."""
        return SCALE * self.lora_B(self.lora_A(x))


class LowRankGrowth:
    """Growth by low-rank experts; ``growth.Growth`` documents the methods."""

    def add_slots(
        self, source: Path, target: Path, pools: Sequence[int], width: int, dtype: str
    ) -> Slots:
        existing = Slots.load(source)
        with atomic_directory(target, overwrite=True) as directory:
            if existing is not None:
                shutil.copytree(source, directory, dirs_exist_ok=True)
                (directory / "manifest.json").unlink(missing_ok=True)
                return existing
            model = load_model(source, getattr(torch, dtype))
            slots = Slots(0, width, sum(pools), (), tuple(pools), LOW_RANK)
            empty: dict[str, Tensor] = {}
            for name, mlp in mlps(model):
                for part in PROJECTIONS:
                    weight = projection(mlp, part).weight
                    for factor, shape in (
                        ("lora_A", (slots.total_width, weight.shape[1])),
                        ("lora_B", (weight.shape[0], slots.total_width)),
                    ):
                        empty[f"{name}.{part}.{factor}.weight"] = weight.new_zeros(shape)
            save_model(model, load_tokenizer(source), directory)
            _write_adapter(directory / ADAPTER, empty)
            slots.save(directory)
        return slots

    def load(
        self,
        directory: Path,
        slots: Slots,
        dtype: torch.dtype,
        teacher_only_slots: Collection[int] = (),
        wake_gradients: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        slots.require_used(teacher_only_slots)
        model: nn.Module = load_model(directory, dtype)
        apply_in_larger_self(model, wake_gradients or {})
        factors = _read_adapter(directory)
        for slot in slots.used:
            for name, layer in _projections(model):
                with torch.random.fork_rng(), torch.no_grad():
                    expert = _newborn(layer, slots.width)
                    for factor, dim in RANK_DIM.items():
                        whole = factors[f"{name}.{factor}.weight"]
                        weight = expert.get_parameter(f"{factor}.weight")
                        weight.copy_(columns_of(whole, dim, slots, slot))
                grown = ModuleWithExpert(
                    layer, expert, slot, smaller=True, enabled=slot not in teacher_only_slots
                )
                model.set_submodule(name, grown)
        return model.eval().requires_grad_(False)

    def grow(
        self,
        model: nn.Module,
        width: int,
        seed: int,
        slot: int | None = None,
        *,
        gated: bool = False,
    ) -> list[nn.Parameter]:
        if gated:
            raise ValueError("a low-rank expert has no units that a gate of its own could close")
        make: Callable[[nn.Module], nn.Module] = lambda layer: _newborn(layer, width)  # noqa: E731
        return put_beside(model, _projections(model), make, seed, slot)

    def fold(
        self, checkpoint: Path, slots: Slots, update: ExpertUpdate
    ) -> Iterator[tuple[str, Tensor]]:
        grown = update.layout_after(slots)
        factors = _put(_read_adapter(checkpoint), slots, update)
        yield from _merge(checkpoint, factors, grown, grown.used, update.wake_gradients)

    def tensors(self, checkpoint: Path, slots: Slots) -> Iterator[tuple[str, Tensor]]:
        yield from _merge(checkpoint, _read_adapter(checkpoint), slots, slots.used)

    def write(self, checkpoint: Path, target: Path, slots: Slots, update: ExpertUpdate) -> Slots:
        grown, gradients = update.layout_after(slots), update.wake_gradients
        factors = _put(_read_adapter(checkpoint), slots, update)
        shutil.copytree(checkpoint, target, dirs_exist_ok=True)
        if gradients:
            _write_weights(checkpoint, target, _merge(checkpoint, factors, grown, (), gradients))
        _write_adapter(target / ADAPTER, factors)
        grown.save(target)
        return grown

    def merge(self, checkpoint: Path, target: Path, slots: Slots, slot: int) -> Slots:
        merged = slots.merged(slot)
        factors = _read_adapter(checkpoint)
        shutil.copytree(checkpoint, target, dirs_exist_ok=True)
        _write_weights(checkpoint, target, _merge(checkpoint, factors, slots, [slot]))
        _write_adapter(target / ADAPTER, _empty(factors, slots, [slot]))
        merged.save(target)
        return merged

    def export(self, checkpoint: Path, target: Path) -> None:
        slots = Slots.load(checkpoint)
        assert slots is not None
        shutil.copytree(
            checkpoint,
            target,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(FILE, ADAPTER, WAKE),
        )
        _write_weights(checkpoint, target, self.tensors(checkpoint, slots))


def export_adapter(checkpoint: Path, target: Path, on: Collection[int]) -> None:
    """Write the slots ``on`` as one PEFT adapter directory of rank ``len(on) * width``.

    The adapter is for the checkpoint's own model. An adapter of all slots, with free ranks, is the
    checkpoint's ``adapter/`` itself.

    Args:
        checkpoint: Directory of a checkpoint with low-rank slots.
        target: Directory to write.
        on: Slots to include.

    Raises:
        ValueError: ``on`` is empty or has a slot that is not in use.
    """
    slots = Slots.load(checkpoint)
    assert slots is not None
    slots.require_used(on)
    if not on:
        raise ValueError("on=() leaves an adapter of rank 0; name at least one slot that is in use")
    ranks = torch.tensor(slots.occupied_columns(on))
    factors = _read_adapter(checkpoint)
    _write_adapter(target, {n: t.index_select(_rank_dim(n), ranks) for n, t in factors.items()})


def _projections(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{name}.{part}", innermost(mlp).get_submodule(part))
        for name, mlp in mlps(model)
        for part in PROJECTIONS
    ]


def _newborn(layer: nn.Module, rank: int) -> LowRank:
    weight = innermost(layer).get_parameter("weight")
    return LowRank(weight.shape[1], weight.shape[0], rank, weight.dtype)


def _rank_dim(name: str) -> int:
    return RANK_DIM[name.split(".")[-2]]


def _put(factors: Mapping[str, Tensor], slots: Slots, update: ExpertUpdate) -> dict[str, Tensor]:
    """Return the adapter's tensors with the update's slots reset and the expert written to its slot."""
    changed = _empty(factors, slots, update.reset)
    for name, tensor in changed.items():
        columns_of(tensor, _rank_dim(name), slots, update.slot).copy_(update.expert[name])
    return changed


def _empty(
    factors: Mapping[str, Tensor], slots: Slots, reset: Collection[int]
) -> dict[str, Tensor]:
    """Return copies of the adapter's tensors with the slots ``reset`` set to zero."""
    changed = {name: tensor.clone() for name, tensor in factors.items()}
    for name, tensor in changed.items():
        for slot in reset:
            columns_of(tensor, _rank_dim(name), slots, slot).zero_()
    return changed


def _merge(
    checkpoint: Path,
    factors: Mapping[str, Tensor],
    slots: Slots,
    on: Collection[int],
    wake_gradients: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every MLP weight as W - g + SCALE * B A over the slots ``on``, computed in float32."""
    gradients = wake_gradients or {}
    ranks = torch.tensor(slots.occupied_columns(on), dtype=torch.long)
    base = dict(mlp_tensors(checkpoint))
    require_projections(gradients, base)
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        a_RI = factors[f"{module}.lora_A.weight"].index_select(0, ranks).float()
        b_OR = factors[f"{module}.lora_B.weight"].index_select(1, ranks).float()
        merged = weight.float() + SCALE * (b_OR @ a_RI)
        if name in gradients:
            merged -= gradients[name]
        yield name, merged.to(weight.dtype)


def _write_weights(checkpoint: Path, target: Path, changed: Iterator[tuple[str, Tensor]]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    tensors.update(changed)
    save_tensors(tensors, target / WEIGHTS, metadata={"format": "pt"})


def _read_adapter(checkpoint: Path) -> dict[str, Tensor]:
    tensors = load_file(checkpoint / ADAPTER / ADAPTER_WEIGHTS)
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def _write_adapter(directory: Path, factors: Mapping[str, Tensor]) -> None:
    """Write a PEFT adapter directory from ``factors`` by checkpoint name, all of one rank."""
    directory.mkdir(parents=True, exist_ok=True)
    name, tensor = next(iter(factors.items()))
    rank = tensor.shape[_rank_dim(name)]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": list(PROJECTIONS),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    (directory / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    named = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in factors.items()}
    save_tensors(named, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
