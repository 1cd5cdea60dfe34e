"""Checkpoints that can grow: widening a plain one, writing an expert in, and merging it into the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import COLUMN_DIM, PROJECTIONS, mlps, require_projections
from sleeprl.memory.slots import Slots, padding_of
from sleeprl.pretrained import load_model, load_tokenizer, save_model, save_tensors
from sleeprl.utils.files import atomic_directory, write_json_atomic

WEIGHTS = "model.safetensors"
EXPERT = "expert.safetensors"
ROUTER = ".router.weight"
WAKE = "wake.gradients"
"""Accumulated wake gradients, in safetensors format. The name does not end in ``.safetensors``,
because engines load every such file of a directory as weights."""
QUESTIONS = "questions.json"
"""The question bank (``self_study.question_bank``)."""


def widen(
    source: Path, target: Path, count: int, width: int, dtype: str, pools: Sequence[int] = ()
) -> Slots:
    """Write a Hugging Face checkpoint with ``count`` empty slots added to every MLP.

    The new model computes the same as ``source``, because the added units have zero output weights.
    A checkpoint that already has slots is copied unchanged.

    Args:
        source: Directory of a Hugging Face checkpoint.
        target: Directory to write.
        count: Number of slots.
        width: Hidden units of a slot.
        dtype: Name of the parameters' torch dtype.
        pools: Number of slots of each level, fastest first. By default one level has them all.

    Returns:
        The slot layout of ``target``.
    """
    existing = Slots.load(source)
    with atomic_directory(target, overwrite=True) as directory:
        if existing is not None:
            shutil.copytree(source, directory, dirs_exist_ok=True)
            (directory / "manifest.json").unlink(missing_ok=True)
            return existing
        model = load_model(source, getattr(torch, dtype))
        layers = mlps(model)
        base_width = model.config.intermediate_size
        padding = padding_of(base_width + count * width) if count else 0
        extra = count * width + padding
        for _, mlp in layers:
            for part in PROJECTIONS:
                layer = getattr(mlp, part)
                layer.weight = torch.nn.Parameter(
                    pad_columns(layer.weight.data, extra, COLUMN_DIM[part])
                )
        model.config.intermediate_size = base_width + extra
        save_model(model, load_tokenizer(source), directory)
        slots = Slots(base_width, width, count, pools=tuple(pools), padding=padding)
        slots.save(directory)
    return slots


def stop_at(directory: Path, token: int) -> None:
    """Make engines stop at a token: the end of a turn, which need not be the checkpoint's own stop.

    Args:
        directory: The checkpoint.
        token: Id of the token, added to those of ``generation_config.json``.
    """
    path = directory / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stops = settings.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if token not in stops:
        write_json_atomic(path, {**settings, "eos_token_id": [*stops, token]})


def scatter_columns(name: str, tensor: Tensor, slots: Slots) -> Tensor:
    """Expand a tensor of the training form to the checkpoint's width.

    Args:
        name: Checkpoint name of the tensor.
        tensor: The tensor, with occupied columns only if it is an MLP projection.
        slots: Layout of the checkpoint.

    Returns:
        An MLP projection with zeros in the free columns; any other tensor unchanged.
    """
    parts = name.split(".")
    if "mlp" not in parts or parts[-2] not in PROJECTIONS:
        return tensor
    dim = COLUMN_DIM[parts[-2]]
    shape = list(tensor.shape)
    shape[dim] = slots.total_width
    return tensor.new_zeros(shape).index_copy_(dim, torch.tensor(slots.occupied_columns()), tensor)


def pad_columns(weight: Tensor, extra: int, dim: int) -> Tensor:
    """Append ``extra`` zero columns along dimension ``dim``."""
    shape = list(weight.shape)
    shape[dim] = extra
    return torch.cat([weight, weight.new_zeros(shape)], dim=dim)


def expert_tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the new expert's parameters from a training form, under checkpoint names.

    ``model.layers.0.mlp.expert.gate_proj.weight`` becomes ``model.layers.0.mlp.gate_proj.weight``,
    the name of the tensor that it is written into. The new expert is the outermost one; everything
    below a ``base`` is frozen. The direction of a gated expert is added to every row of its gate
    projection, which computes the same.

    Args:
        named: Parameters of the training form by name.
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
    """Convert a checkpoint name back to the training form's name (inverse of ``expert_tensors``)."""
    if ".lora_" in name:  # parallel to a projection, not to the whole MLP
        return name.replace(".lora_", ".expert.lora_")
    return name.replace(".mlp.", ".mlp.expert.")


def fold(checkpoint: Path, slots: Slots, update: ExpertUpdate) -> Iterator[tuple[str, Tensor]]:
    """Yield the MLP tensors of a checkpoint after an update.

    They come in whole fused groups (gate, up and down of a layer): an engine that packs gate and up
    together computes nonsense if it receives only one of them.

    Args:
        checkpoint: Directory of the checkpoint before the update.
        slots: Its layout.
        update: The expert to write, the slots to reset and the wake gradients to apply.

    Yields:
        Checkpoint name and tensor, in the order of the layers.

    Raises:
        ValueError: A wake gradient belongs to a tensor that is no MLP projection.
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
    """Return the columns of ``slot`` in a tensor, as a view that can be written to."""
    return tensor.narrow(dim, slots.columns(slot).start, slots.width)


def mlp_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the MLP tensors as they are on disk. Sending them to an engine undoes ``fold``."""
    with safe_open(checkpoint / WEIGHTS, framework="pt") as base:
        names = [n for n in base.keys() if ".mlp." in n and n.split(".")[-2] in PROJECTIONS]  # noqa: SIM118
        for name in sorted(names, key=layer_order):
            yield name, base.get_tensor(name)


def all_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a checkpoint by name."""
    yield from load_file(checkpoint / WEIGHTS).items()


def write_grown(checkpoint: Path, target: Path, slots: Slots, update: ExpertUpdate) -> Slots:
    """Write the model after an update into ``target``, as a plain checkpoint with its slot layout.

    Args:
        checkpoint: Directory of the model before the update.
        target: Directory to write.
        slots: Layout of ``checkpoint``.
        update: What changes.

    Returns:
        The slot layout after the update.
    """
    grown = update.layout_after(slots)
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    tensors = load_file(checkpoint / WEIGHTS)
    tensors.update(fold(checkpoint, slots, update))
    save_tensors(tensors, target / WEIGHTS, metadata={"format": "pt"})
    grown.save(target)
    return grown


def write_merged(checkpoint: Path, target: Path, slots: Slots, slot: int) -> Slots:
    """Write the model with the columns of ``slot`` as base columns and the slot free again.

    The merge is exact: hidden units only change places. The MLPs become wider by one slot, unless
    the padding has room for it, so engines have to be restarted.

    Args:
        checkpoint: Directory of the model before the merge.
        target: Directory to write.
        slots: Layout of ``checkpoint``.
        slot: The slot to merge.

    Returns:
        The slot layout after the merge.
    """
    merged = slots.merged(slot)
    moved = [*range(slots.base_width), *_range(slots, slot)]
    for number in range(slots.count):
        moved += [-1] * slots.width if number == slot else _range(slots, number)
    moved += [-1] * merged.padding
    order = torch.tensor(moved)
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    tensors = load_file(checkpoint / WEIGHTS)
    for name, tensor in mlp_tensors(checkpoint):
        dim = COLUMN_DIM[name.split(".")[-2]]
        tensors[name] = tensor.index_select(dim, order.clamp(min=0))
        tensors[name].index_fill_(dim, (order < 0).nonzero().flatten(), 0)
    save_tensors(tensors, target / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] = merged.total_width
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    merged.save(target)
    return merged


def _range(slots: Slots, slot: int) -> range:
    return range(slots.total_width)[slots.columns(slot)]


def intermediate_size(checkpoint: Path) -> int:
    """Read the MLPs' intermediate size from the checkpoint's configuration."""
    return int(
        json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["intermediate_size"]
    )


def layer_order(name: str) -> tuple[int, str]:
    """Return a sort key that orders tensor names by layer number, then by name."""
    digits = [int(part) for part in name.split(".") if part.isdigit()]
    return (digits[0] if digits else -1, name)
