"""The gated-MLP expert, and the training form of a model that grows by one.

In training the occupied columns of a checkpoint are the frozen MLP, and the
night's new slot is a small module of its own in parallel with it: only its
parameters get gradients, optimiser state and checkpoints. Switched off, the
model is exactly the smaller self; there is no second copy of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sleeprl.memory.slots import Slots

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class UnsupportedModel(ValueError):
    """A model without the gated MLP in which experts grow."""


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) with ``width`` hidden units; zero at birth (down = 0)."""

    def __init__(self, hidden: int, width: int, act: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.act = act
        for projection in (self.gate_proj, self.up_proj):
            nn.init.normal_(projection.weight, std=hidden**-0.5)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class GrownMLP(nn.Module):
    """A frozen gated MLP with one expert in parallel.

    ``enabled`` multiplies instead of branching: ZeRO-3 replays the order in which
    modules ran, and that order must not depend on which self is asked. Adding
    0 * expert(x) leaves every number as it was, so the smaller self is exact.
    """

    def __init__(self, base: nn.Module, expert: Expert) -> None:
        super().__init__()
        self.base = base
        self.expert = expert
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + float(self.enabled) * self.expert(x)


def mlps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The gated MLP of every decoder layer, with its dotted name.

    Raises UnsupportedModel for an architecture that has none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.endswith(".mlp") and all(hasattr(module, part) for part in (*PROJECTIONS, "act_fn"))
    ]
    config: Any = model.config
    if not found or len(found) != config.num_hidden_layers:
        architecture = (config.architectures or [type(model).__name__])[0]
        raise UnsupportedModel(
            f"model architecture {architecture!r} has no gated MLP (gate_proj, up_proj, down_proj) in "
            "every decoder layer; supported families: Llama, Mistral, Qwen2, Qwen3, SmolLM, MiniMind"
        )
    for name, module in found:
        if any(getattr(module, part).bias is not None for part in PROJECTIONS):
            raise UnsupportedModel(
                f"{name} has biases in its projections; experts need them without"
            )
    return found


def shrink(model: nn.Module, columns: list[int]) -> None:
    """Keep only ``columns`` of every MLP, in place; the others are zero and cost time."""
    keep = torch.tensor(columns)
    for _, mlp in mlps(model):
        for part in PROJECTIONS:
            layer = getattr(mlp, part)
            dim = 1 if part == "down_proj" else 0
            layer.weight = nn.Parameter(layer.weight.data.index_select(dim, keep).contiguous())
            layer.in_features, layer.out_features = layer.weight.shape[1], layer.weight.shape[0]


def grow(model: nn.Module, width: int, seed: int) -> list[nn.Parameter]:
    """Put one expert beside every MLP and freeze all else; returns the new parameters.

    Deterministic by ``seed``, whatever else drew random numbers before.
    """
    layers = mlps(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    fresh: list[nn.Parameter] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, mlp in layers:
            weight = mlp.get_submodule("gate_proj").weight
            assert isinstance(weight, Tensor)
            act = getattr(mlp, "act_fn")  # noqa: B009 - a submodule, not a tensor
            expert = Expert(weight.shape[1], width, act, weight.dtype)
            model.set_submodule(name, GrownMLP(mlp, expert))
            fresh.extend(expert.parameters())
    return fresh


@contextmanager
def smaller_self(model: nn.Module) -> Iterator[None]:
    """The experts off for the time being: the teacher, without a second copy of anything."""
    grown = [module for module in model.modules() if isinstance(module, GrownMLP)]
    before = [module.enabled for module in grown]
    try:
        for module in grown:
            module.enabled = False
        yield
    finally:
        for module, state in zip(grown, before, strict=True):
            module.enabled = state


def load_training_form(directory: Path, slots: Slots, dtype: torch.dtype) -> nn.Module:
    """A checkpoint with only its occupied columns, in eval mode on the CPU."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    shrink(model, slots.occupied_columns())
    return model.eval()
