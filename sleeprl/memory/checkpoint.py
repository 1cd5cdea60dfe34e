"""From a plain checkpoint to one that can grow, and from an expert back to a plain checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleeprl.files import atomic_directory
from sleeprl.memory.experts import PROJECTIONS, mlps
from sleeprl.memory.slots import Slots

WEIGHTS = "model.safetensors"
EXPERT = "expert.safetensors"


def widen(source: Path, target: Path, count: int, width: int, dtype: str) -> Slots:
    """Write ``source`` again with ``count`` zero slots in every MLP; a Hugging Face checkpoint.

    A checkpoint that already has slots is copied with the slots it has. The new
    model computes what the old one did: added units have zero output weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    existing = Slots.load(source)
    with atomic_directory(target, overwrite=True) as directory:
        if existing is not None:
            shutil.copytree(source, directory, dirs_exist_ok=True)
            (directory / "manifest.json").unlink(missing_ok=True)
            return existing
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        layers = mlps(model)
        base_width = model.config.intermediate_size
        for _, mlp in layers:
            for part in PROJECTIONS:
                layer = getattr(mlp, part)
                layer.weight = torch.nn.Parameter(
                    pad_columns(layer.weight.data, count * width, 1 if part == "down_proj" else 0)
                )
        model.config.intermediate_size = base_width + count * width
        model.save_pretrained(directory, max_shard_size="1TB")
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.save_pretrained(directory)
        slots = Slots(base_width=base_width, width=width, count=count)
        slots.save(directory)
    return slots


def scatter_columns(name: str, tensor: Tensor, slots: Slots) -> Tensor:
    """A tensor of the training form at the checkpoint's width; others pass unchanged."""
    parts = name.split(".")
    if "mlp" not in parts or parts[-2] not in PROJECTIONS:
        return tensor
    dim = 1 if parts[-2] == "down_proj" else 0
    shape = list(tensor.shape)
    shape[dim] = slots.total_width
    return tensor.new_zeros(shape).index_copy_(dim, torch.tensor(slots.occupied_columns()), tensor)


def pad_columns(weight: Tensor, extra: int, dim: int) -> Tensor:
    shape = list(weight.shape)
    shape[dim] = extra
    return torch.cat([weight, weight.new_zeros(shape)], dim=dim)


def expert_tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The expert parameters of a training form, under their layer's MLP name.

    ``model.layers.0.mlp.expert.gate_proj.weight`` becomes
    ``model.layers.0.mlp.gate_proj.weight``: the name of the tensor it ends up in.
    """
    marker = ".mlp.expert."
    return {
        name[name.index("model.layers") :].replace(marker, ".mlp."): tensor
        for name, tensor in named.items()
        if marker in name
    }


def training_name(name: str) -> str:
    """The inverse of the renaming in ``expert_tensors``."""
    return name.replace(".mlp.", ".mlp.expert.")


def fold(
    checkpoint: Path, slots: Slots, slot: int, expert: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The MLP tensors of ``checkpoint`` with ``expert`` written into ``slot``.

    Yields whole fused groups (gate, up and down of a layer): an engine that packs
    gate and up together computes nonsense when it is sent only one of them.
    """
    columns = slots.columns(slot)
    with safe_open(checkpoint / WEIGHTS, framework="pt") as base:
        for name in sorted(expert, key=_layer_order):
            tensor = base.get_tensor(name)
            piece = expert[name].to(tensor.dtype)
            if name.endswith("down_proj.weight"):
                tensor[:, columns] = piece
            else:
                tensor[columns, :] = piece
            yield name, tensor


def mlp_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The MLP tensors as they are on disk: what takes an expert back out of an engine."""
    with safe_open(checkpoint / WEIGHTS, framework="pt") as base:
        names = [n for n in base.keys() if ".mlp." in n and n.split(".")[-2] in PROJECTIONS]  # noqa: SIM118
        for name in sorted(names, key=_layer_order):
            yield name, base.get_tensor(name)


def all_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    yield from load_file(checkpoint / WEIGHTS).items()


def write_grown(
    checkpoint: Path, target: Path, slots: Slots, slot: int, expert: Mapping[str, Tensor]
) -> Slots:
    """Write the grown model into the directory ``target``: plain checkpoint plus slot layout."""
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    tensors = load_file(checkpoint / WEIGHTS)
    tensors.update(fold(checkpoint, slots, slot, expert))
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    grown = slots.filled(slot)
    grown.save(target)
    return grown


def intermediate_size(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "config.json").read_text())["intermediate_size"])


def _layer_order(name: str) -> tuple[int, str]:
    digits = [int(part) for part in name.split(".") if part.isdigit()]
    return (digits[0] if digits else -1, name)
