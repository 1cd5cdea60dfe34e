"""The gated-MLP expert, and the training form of a model that grows by one.

In training the occupied columns of a checkpoint are the frozen MLP, and the
night's new slot is a small module of its own in parallel with it: only its
parameters get gradients, optimiser state and checkpoints. Slots that only one of
the two selves has are taken out of the frozen MLP and stand beside it too, frozen.
So both selves are states of one module, and there is no second copy of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sleeprl.memory.slots import Slots

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
COLUMN_DIM = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
"""Along which dimension of each weight the MLP's hidden units lie: its columns."""
FAMILIES = "Llama, Mistral, Qwen2, Qwen3, Gemma, SmolLM, MiniMind"


class UnsupportedModel(ValueError):
    """A model without the gated MLP in which experts grow."""


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) with ``width`` hidden units; zero at birth (down = 0).

    gated: with a gate of its own that opens or closes all its units at once: one
        direction r, so that gate(x) becomes gate(x) + r . x. A unit far below zero is silent
        (silu, gelu). It is no more than r added to every row of the gate projection, which is
        how a checkpoint has it (``checkpoint.expert_tensors``): no router is ever served.
    """

    def __init__(
        self, hidden: int, width: int, act: nn.Module, dtype: torch.dtype, gated: bool = False
    ) -> None:
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
        gate = self.gate_proj(x)
        if self.router is not None:
            gate = gate + self.router(x)
        return self.down_proj(self.act(gate) * self.up_proj(x))


class ModuleWithExpert(nn.Module):
    """A frozen module (a gated MLP, a projection) with one expert in parallel; they nest.

    slot: where the expert lives. smaller: whether the smaller self has it; the larger
    self is the state at birth.

    ``enabled`` multiplies instead of branching: ZeRO-3 replays the order in which
    modules ran, and that order must not depend on which self is asked. Adding
    0 * expert(x) leaves every number as it was, so the smaller self is exact.
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
        super().__init__()
        self.base = base
        self.expert = expert
        self.slot = slot
        self.smaller = smaller
        self.enabled = enabled
        self.meter: ActivationMeter | None = None

    def forward(self, x: Tensor) -> Tensor:
        base, expert_out = self.base(x), self.expert(x)
        if self.meter is not None:
            self.meter(base, expert_out)
        return base + float(self.enabled) * expert_out


class ActivationMeter:
    """How loud an expert is: |expert(x)|^2 / |base(x)|^2, weighted over positions.

    weights_BT: of the positions of a batch. total: the sum over all experts that were heard.
    """

    def __init__(self, weights_BT: Tensor) -> None:
        self.weights_BT = weights_BT
        self.total = weights_BT.new_zeros(())

    def __call__(self, base_BTH: Tensor, expert_BTH: Tensor) -> None:
        at = self.weights_BT != 0
        base_N = base_BTH.detach()[at].float().square().sum(-1)
        expert_N = expert_BTH[at].float().square().sum(-1)
        self.total = self.total + (self.weights_BT[at] * expert_N / base_N.clamp(min=1e-6)).sum()


def innermost(module: nn.Module) -> nn.Module:
    """What is left of a module when its experts are taken away."""
    while isinstance(module, ModuleWithExpert):
        module = module.base
    return module


def mlps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The gated MLP of every decoder layer, grown or not, with its dotted name.

    Raises UnsupportedModel for an architecture that has none.
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
    """One of the three linear layers of an MLP, whatever has grown on it."""
    layer = innermost(innermost(mlp).get_submodule(part))
    assert isinstance(layer, nn.Linear)
    return layer


def shrink(model: nn.Module, columns: list[int]) -> None:
    """Keep only ``columns`` of every MLP, in place; the others are zero and cost time."""
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
    """Put one expert beside every MLP and freeze all else; returns the new parameters.

    Deterministic by ``seed``, whatever else drew random numbers before.
    """
    return put_beside(model, mlps(model), lambda mlp: _newborn(mlp, width, gated), seed, slot)


def put_beside(
    model: nn.Module,
    places: Collection[tuple[str, nn.Module]],
    make: Callable[[nn.Module], nn.Module],
    seed: int,
    slot: int | None,
) -> list[nn.Parameter]:
    """Freeze the model and grow a fresh expert at each of the named modules."""
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
    """An expert that is a copy of some of the MLP's units."""
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
    """The smaller self for the time being: the teacher, without a second copy of anything.

    The newborn expert is off; slots that the larger self will lose are on.
    """
    with _switched(model, lambda grown: grown.smaller):
        yield


def become_smaller_self(model: nn.Module) -> None:
    """The smaller self for good."""
    for module in model.modules():
        if isinstance(module, ModuleWithExpert):
            module.enabled = module.smaller


def enable_teacher_slots(model: nn.Module) -> None:
    """The larger self with all that the smaller self has, for good: nothing was reset."""
    for module in model.modules():
        if isinstance(module, ModuleWithExpert) and module.smaller:
            module.enabled = True


@contextmanager
def measure_activity(model: nn.Module, weights_BT: Tensor) -> Iterator[ActivationMeter]:
    """Hear how loud the newborn experts are in what is computed meanwhile."""
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
    """Of the slots that have a switch, only these are on for the time being."""
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
        teacher_only_slots: Slots that only the smaller self has (``Transfer.teacher_only``):
            frozen experts beside the MLPs, each with its switch.
        wake_gradients: Gradients accumulated for the sender's base, by checkpoint name and at the
            checkpoint's width. The larger self has them applied, the smaller self not (the
            *compute* stage, method.md 2.3).
    """
    from transformers import AutoModelForCausalLM

    slots.require_used(teacher_only_slots)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
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
    """Projections W that the larger self sees as W - g: (W - g) x = W x + (-g) x.

    gradients: g by the name of W, a projection of an MLP. columns: those of g that W still
    has; all by default.
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
    """Raise ValueError for a gradient of something else than an MLP projection."""
    if unknown := sorted(set(gradients) - set(known)):
        raise ValueError(f"wake has gradients for {unknown}; only MLP projections learn in wake")
