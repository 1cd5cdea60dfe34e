"""From a plain checkpoint to one that can grow, and from an expert back to a plain checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import COLUMN_DIM, PROJECTIONS, mlps, require_projections
from sleeprl.memory.slots import Slots
from sleeprl.utils.files import atomic_directory

WEIGHTS = "model.safetensors"
EXPERT = "expert.safetensors"
ROUTER = ".router.weight"
WAKE = "wake.gradients"
"""What was learned in wake and waits, in safetensors format; not so named, because engines load
every ``*.safetensors`` of a directory as weights."""
QUESTIONS = "questions.json"
"""What the model has asked itself (``self_study.question_bank``)."""


def widen(
    source: Path, target: Path, count: int, width: int, dtype: str, pools: Sequence[int] = ()
) -> Slots:
    """Write ``source`` again with ``count`` zero slots in every MLP; a Hugging Face checkpoint.

    pools: how the slots are shared out among levels, fastest first; one level by default.

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
                    pad_columns(layer.weight.data, count * width, COLUMN_DIM[part])
                )
        model.config.intermediate_size = base_width + count * width
        model.save_pretrained(directory, max_shard_size="1TB")
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.save_pretrained(directory)
        slots = Slots(base_width=base_width, width=width, count=count, pools=tuple(pools))
        slots.save(directory)
    return slots


def scatter_columns(name: str, tensor: Tensor, slots: Slots) -> Tensor:
    """A tensor of the training form at the checkpoint's width; others pass unchanged."""
    parts = name.split(".")
    if "mlp" not in parts or parts[-2] not in PROJECTIONS:
        return tensor
    dim = COLUMN_DIM[parts[-2]]
    shape = list(tensor.shape)
    shape[dim] = slots.total_width
    return tensor.new_zeros(shape).index_copy_(dim, torch.tensor(slots.occupied_columns()), tensor)


def pad_columns(weight: Tensor, extra: int, dim: int) -> Tensor:
    shape = list(weight.shape)
    shape[dim] = extra
    return torch.cat([weight, weight.new_zeros(shape)], dim=dim)


def expert_tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The newborn expert's parameters of a training form, under checkpoint names.

    ``model.layers.0.mlp.expert.gate_proj.weight`` becomes
    ``model.layers.0.mlp.gate_proj.weight``: the name of the tensor it ends up in. The
    newborn is the outermost expert; what is below a ``base`` is frozen. A gate of its own
    is added to the gate projection, where it computes the same.
    """
    found = {
        name[name.index("model.layers") :].replace(".expert.", "."): tensor
        for name, tensor in named.items()
        if ".expert." in name and ".base." not in name
    }
    for name in [name for name in found if name.endswith(ROUTER)]:
        gate = name.removesuffix(ROUTER) + ".gate_proj.weight"
        found[gate] = found[gate] + found.pop(name)
    return found


def training_name(name: str) -> str:
    """The inverse of the renaming in ``expert_tensors``."""
    if ".lora_" in name:  # beside a projection, not beside the whole MLP
        return name.replace(".lora_", ".expert.lora_")
    return name.replace(".mlp.", ".mlp.expert.")


def fold(checkpoint: Path, slots: Slots, update: ExpertUpdate) -> Iterator[tuple[str, Tensor]]:
    """Yield the MLP tensors of a checkpoint after an update.

    They come as whole fused groups (gate, up and down of a layer): an engine that packs
    gate and up together computes nonsense when it is sent only one of them.
    """
    expert, gradients = update.expert, update.wake_gradients or {}
    require_projections(gradients, expert)
    with safe_open(checkpoint / WEIGHTS, framework="pt") as base:
        for name in sorted(expert, key=layer_order):
            tensor = base.get_tensor(name)
            if name in gradients:
                tensor = (tensor.float() - gradients[name]).to(tensor.dtype)
            dim = COLUMN_DIM[name.split(".")[-2]]
            for emptied in update.reset:
                columns_of(tensor, dim, slots, emptied).zero_()
            columns_of(tensor, dim, slots, update.slot).copy_(expert[name])
            yield name, tensor


def columns_of(tensor: Tensor, dim: int, slots: Slots, slot: int) -> Tensor:
    """A slot's part of a tensor; a view to write into."""
    return tensor.narrow(dim, slots.columns(slot).start, slots.width)


def mlp_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The MLP tensors as they are on disk: what takes an expert back out of an engine."""
    with safe_open(checkpoint / WEIGHTS, framework="pt") as base:
        names = [n for n in base.keys() if ".mlp." in n and n.split(".")[-2] in PROJECTIONS]  # noqa: SIM118
        for name in sorted(names, key=layer_order):
            yield name, base.get_tensor(name)


def all_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    yield from load_file(checkpoint / WEIGHTS).items()


def write_grown(checkpoint: Path, target: Path, slots: Slots, update: ExpertUpdate) -> Slots:
    """Write the grown model into ``target``, a plain checkpoint and the layout of its slots.

    Returns:
        That layout.
    """
    grown = update.layout_after(slots)
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    tensors = load_file(checkpoint / WEIGHTS)
    tensors.update(fold(checkpoint, slots, update))
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    grown.save(target)
    return grown


def write_merged(checkpoint: Path, target: Path, slots: Slots, slot: int) -> Slots:
    """Write the model into ``target`` with ``slot``'s columns as base columns, and the slot free.

    Exact: hidden units only change places. The MLPs get wider by one slot, so an
    engine has to be restarted.
    """
    merged = slots.merged(slot)
    moved = [*range(slots.base_width), *_range(slots, slot)]
    for number in range(slots.count):
        moved += [-1] * slots.width if number == slot else _range(slots, number)
    order = torch.tensor(moved)
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    tensors = load_file(checkpoint / WEIGHTS)
    for name, tensor in mlp_tensors(checkpoint):
        dim = COLUMN_DIM[name.split(".")[-2]]
        tensors[name] = tensor.index_select(dim, order.clamp(min=0))
        columns_of(tensors[name], dim, merged, slot).zero_()
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config["intermediate_size"] = merged.total_width
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    merged.save(target)
    return merged


def _range(slots: Slots, slot: int) -> range:
    return range(slots.total_width)[slots.columns(slot)]


def intermediate_size(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "config.json").read_text())["intermediate_size"])


def layer_order(name: str) -> tuple[int, str]:
    digits = [int(part) for part in name.split(".") if part.isdigit()]
    return (digits[0] if digits else -1, name)
