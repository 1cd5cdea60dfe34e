"""The gated-MLP expert, and the training form of a model that grows by one expert.

In the training form the occupied columns of a checkpoint are the frozen MLP. The night's new slot
is a small module in parallel with it. Only its parameters have gradients and optimiser state, and
only they are checkpointed.

Slots that only one of the two selves has are cut out of the frozen MLP and placed in parallel with
it, also frozen. So both selves are states of one module, and no second copy of the base is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sleeprl.memory.slots import Slots
from sleeprl.pretrained import load_model

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
COLUMN_DIM = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
"""Dimension of each weight along which the MLP's hidden units (its columns) lie."""
FAMILIES = "Llama, Mistral, Qwen2, Qwen3, Gemma, SmolLM, MiniMind"


class UnsupportedModel(ValueError):
    """A model without the gated MLPs in which experts grow."""


class Expert(nn.Module):
    """A gated MLP, down(act(gate(x)) * up(x)), with ``width`` hidden units.

    Its output is zero at initialisation, because ``down_proj`` is zero.

    A gated expert has a gate of its own that opens or closes all its units at once: one direction
    r, with which gate(x) becomes gate(x) + r . x. A unit far below zero is silent (silu, gelu). The
    checkpoint stores r added to every row of the gate projection (``checkpoint.expert_tensors``),
    so no router is ever served.
    """

    def __init__(
        self, hidden: int, width: int, act: nn.Module, dtype: torch.dtype, gated: bool = False
    ) -> None:
        """Initialise the projections.

        Args:
            hidden: Hidden size of the model.
            width: Hidden units of the expert.
            act: Activation function.
            dtype: Type of the parameters.
            gated: Add a gate of the expert's own.
        """
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.act = act
        for projection in (self.gate_proj, self.up_proj):
            nn.init.normal_(projection.weight, std=hidden**-0.5)
        nn.init.zeros_(self.down_proj.weight)
        self.router = nn.Linear(hidden, 1, bias=False, dtype=dtype) if gated else None
        if self.router is not None:
            nn.init.zeros_(self.router.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the expert's output for ``x``, [..., H] to [..., H]."""
        gate = self.gate_proj(x)
        if self.router is not None:
            gate = gate + self.router(x)
        return self.down_proj(self.act(gate) * self.up_proj(x))


class ModuleWithExpert(nn.Module):
    """A frozen module (a gated MLP or a projection) with one expert in parallel; they nest.

    ``enabled`` multiplies instead of branching: ZeRO-3 replays the order in which modules ran, and
    that order must not depend on which self is evaluated. Adding 0 * expert(x) changes no number,
    so the smaller self is exact.
    """

    def __init__(
        self,
        base: nn.Module,
        expert: nn.Module,
        slot: int | None = None,
        *,
        smaller: bool = False,
        enabled: bool = True,
    ) -> None:
        """Put ``expert`` in parallel with ``base``.

        Args:
            base: The frozen module.
            expert: Module whose output is added to that of ``base``.
            slot: Slot of the expert, if it has one.
            smaller: Whether the smaller self has the expert.
            enabled: Whether the expert is on now. A loaded model starts as the larger self.
        """
        super().__init__()
        self.base = base
        self.expert = expert
        self.slot = slot
        self.smaller = smaller
        self.enabled = enabled
        self.meter: ActivationMeter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus expert(x) if the expert is on."""
        base, expert_out = self.base(x), self.expert(x)
        if self.meter is not None:
            self.meter(base, expert_out)
        return base + float(self.enabled) * expert_out


class ActivationMeter:
    """Activity of experts: |expert(x)|^2 / |base(x)|^2, as a weighted sum over positions."""

    def __init__(self, weights_BT: Tensor) -> None:
        """Start at zero.

        Args:
            weights_BT: Weights of a batch's positions.
        """
        self.weights_BT = weights_BT
        self.total = weights_BT.new_zeros(())
        """Sum over all experts that were measured, a scalar."""

    def __call__(self, base_BTH: Tensor, expert_BTH: Tensor) -> None:
        """Add one expert's activity. Only the expert's output gets a gradient."""
        at = self.weights_BT != 0
        base_N = base_BTH.detach()[at].float().square().sum(-1)
        expert_N = expert_BTH[at].float().square().sum(-1)
        self.total = self.total + (self.weights_BT[at] * expert_N / base_N.clamp(min=1e-6)).sum()


def innermost(module: nn.Module) -> nn.Module:
    """Return the module below all its experts."""
    while isinstance(module, ModuleWithExpert):
        module = module.base
    return module


def mlps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find the gated MLP of every decoder layer, grown or not.

    Args:
        model: A Hugging Face causal language model.

    Returns:
        Dotted name and module of each MLP, in the order of the layers.

    Raises:
        UnsupportedModel: A decoder layer has no gated MLP, or its projections have biases.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.endswith(".mlp")
        and all(hasattr(innermost(module), part) for part in (*PROJECTIONS, "act_fn"))
    ]
    config: Any = model.config
    if not found or len(found) != getattr(config, "num_hidden_layers", None):
        architecture = (config.architectures or [type(model).__name__])[0]
        raise UnsupportedModel(
            f"model architecture {architecture!r} has no gated MLP (gate_proj, up_proj, down_proj) in "
            f"every decoder layer; supported families: {FAMILIES}"
        )
    for name, module in found:
        if any(projection(module, part).bias is not None for part in PROJECTIONS):
            raise UnsupportedModel(
                f"{name} has biases in its projections; experts need them without"
            )
    return found


def projection(mlp: nn.Module, part: str) -> nn.Linear:
    """Return the linear layer ``part`` of an MLP, below any experts."""
    layer = innermost(innermost(mlp).get_submodule(part))
    assert isinstance(layer, nn.Linear)
    return layer


def shrink(model: nn.Module, columns: list[int]) -> None:
    """Keep only ``columns`` of every MLP, in place. The others are zero and only cost time."""
    keep = torch.tensor(columns)
    for _, mlp in mlps(model):
        for part in PROJECTIONS:
            layer = getattr(mlp, part)
            narrowed = layer.weight.data.index_select(COLUMN_DIM[part], keep)
            layer.weight = nn.Parameter(narrowed.contiguous())
            layer.in_features, layer.out_features = layer.weight.shape[1], layer.weight.shape[0]


def grow(
    model: nn.Module, width: int, seed: int, slot: int | None = None, *, gated: bool = False
) -> list[nn.Parameter]:
    """Add one expert to every MLP and freeze everything else.

    The initial weights depend on ``seed`` only.

    Args:
        model: A training form.
        width: Hidden units of the expert.
        seed: Seed of the initial weights.
        slot: Slot that the expert is trained for.
        gated: Give the expert a gate of its own.

    Returns:
        The new parameters.
    """
    return put_beside(model, mlps(model), lambda mlp: _newborn(mlp, width, gated), seed, slot)


def put_beside(
    model: nn.Module,
    places: Collection[tuple[str, nn.Module]],
    make: Callable[[nn.Module], nn.Module],
    seed: int,
    slot: int | None,
) -> list[nn.Parameter]:
    """Freeze the model and put a new expert in parallel with each of the given modules.

    Args:
        model: A training form.
        places: Dotted name and module of each place.
        make: Makes the expert for a module.
        seed: Seed of the initial weights.
        slot: Slot that the experts are trained for.

    Returns:
        The new parameters.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    fresh: list[nn.Parameter] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in places:
            expert = make(module)
            model.set_submodule(name, ModuleWithExpert(module, expert, slot))
            fresh.extend(expert.parameters())
    return fresh


def _newborn(mlp: nn.Module, width: int, gated: bool = False) -> Expert:
    weight = projection(mlp, "gate_proj").weight
    act = getattr(innermost(mlp), "act_fn")  # noqa: B009 - a submodule, not a tensor
    return Expert(weight.shape[1], width, act, weight.dtype, gated)


def _cut(mlp: nn.Module, columns: slice) -> Expert:
    """Copy some of the MLP's units into a frozen expert."""
    width = columns.stop - columns.start
    with torch.random.fork_rng():
        expert = _newborn(mlp, width)
    with torch.no_grad():
        for part in PROJECTIONS:
            weight = projection(mlp, part).weight
            piece = weight.narrow(COLUMN_DIM[part], columns.start, width)
            projection(expert, part).weight.copy_(piece)
    return expert.requires_grad_(False)


@contextmanager
def smaller_self(model: nn.Module) -> Iterator[None]:
    """Switch to the smaller self within the context: the teacher, without a second copy of the model.

    The new expert is off; slots that the larger self loses are on.
    """
    with _switched(model, lambda grown: grown.smaller):
        yield


def become_smaller_self(model: nn.Module) -> None:
    """Switch to the smaller self permanently."""
    for module in model.modules():
        if isinstance(module, ModuleWithExpert):
            module.enabled = module.smaller


def enable_teacher_slots(model: nn.Module) -> None:
    """Keep the smaller self's slots on in the larger self, permanently: for a transfer that resets none."""
    for module in model.modules():
        if isinstance(module, ModuleWithExpert) and module.smaller:
            module.enabled = True


@contextmanager
def measure_activity(model: nn.Module, weights_BT: Tensor) -> Iterator[ActivationMeter]:
    """Measure the new experts' activity in everything computed within the context.

    Args:
        model: A training form.
        weights_BT: Weights of the batch's positions. The sum is averaged over the layers.

    Yields:
        The meter.
    """
    newborn = [
        m for m in model.modules() if isinstance(m, ModuleWithExpert) and _is_trained(m.expert)
    ]
    meter = ActivationMeter(weights_BT / max(1, len(newborn)))
    try:
        for module in newborn:
            module.meter = meter
        yield meter
    finally:
        for module in newborn:
            module.meter = None


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def switched(model: nn.Module, on: Collection[int]) -> Iterator[None]:
    """Switch on, within the context, only the slots ``on`` among those that have a switch."""
    with _switched(model, lambda grown: grown.slot in on):
        yield


@contextmanager
def _switched(model: nn.Module, state: Callable[[ModuleWithExpert], bool]) -> Iterator[None]:
    grown = [module for module in model.modules() if isinstance(module, ModuleWithExpert)]
    before = [module.enabled for module in grown]
    try:
        for module in grown:
            module.enabled = state(module)
        yield
    finally:
        for module, was in zip(grown, before, strict=True):
            module.enabled = was


def load_training_form(
    directory: Path,
    slots: Slots,
    dtype: torch.dtype,
    teacher_only_slots: Collection[int] = (),
    wake_gradients: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Load a checkpoint with only its occupied columns, in eval mode on the CPU.

    Args:
        directory: The checkpoint.
        slots: Its layout.
        dtype: Type of the parameters.
        teacher_only_slots: Slots that only the smaller self has (``Transfer.teacher_only``). They
            become frozen experts in parallel with the MLPs, each with its switch.
        wake_gradients: Gradients accumulated for the sender's base, by checkpoint name and at the
            checkpoint's width. They are applied in the larger self and not in the smaller self (the
            *compute* stage).

    Raises:
        ValueError: One of ``teacher_only_slots`` is not in use.
        UnsupportedModel: The model has no gated MLPs.
    """
    slots.require_used(teacher_only_slots)
    model: nn.Module = load_model(directory, dtype)
    cut = {
        slot: [(name, _cut(mlp, slots.columns(slot))) for name, mlp in mlps(model)]
        for slot in sorted(teacher_only_slots)
    }
    columns = slots.occupied_columns(set(slots.used) - set(teacher_only_slots))
    shrink(model, columns)
    apply_in_larger_self(model, wake_gradients or {}, torch.tensor(columns))
    for slot, experts in cut.items():
        for name, expert in experts:
            mlp = model.get_submodule(name)
            model.set_submodule(
                name, ModuleWithExpert(mlp, expert, slot, smaller=True, enabled=False)
            )
    return model.eval()


def apply_in_larger_self(
    model: nn.Module, gradients: Mapping[str, Tensor], columns: Tensor | None = None
) -> None:
    """Make the larger self compute projections W as W - g: (W - g) x = W x + (-g) x.

    Args:
        model: A training form.
        gradients: g by the name of W, a projection of an MLP.
        columns: Columns of g that W still has. By default all.

    Raises:
        ValueError: A gradient belongs to a tensor that is no MLP projection.
    """
    places = {
        f"{name}.{part}.weight": (innermost(mlp), part)
        for name, mlp in mlps(model)
        for part in PROJECTIONS
    }
    require_projections(gradients, places)
    for name, gradient in gradients.items():
        mlp, part = places[name]
        layer = mlp.get_submodule(part)
        weight = projection(mlp, part).weight
        if columns is not None:
            gradient = gradient.index_select(COLUMN_DIM[part], columns)
        shift = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        with torch.no_grad():
            shift.weight.copy_(-gradient)
        mlp.set_submodule(part, ModuleWithExpert(layer, shift.requires_grad_(False)))


def require_projections(gradients: Mapping[str, Tensor], known: Collection[str]) -> None:
    """Raise ValueError for a gradient of a tensor that is no MLP projection."""
    if unknown := sorted(set(gradients) - set(known)):
        raise ValueError(f"wake has gradients for {unknown}; only MLP projections learn in wake")
