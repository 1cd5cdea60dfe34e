"""Read and write the trained parameters and the optimiser of a ZeRO-3 engine, whole.

The state does not depend on the number of ranks. All functions are collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CRITIC = "critic."
"""What the names of the critic's parameters begin with."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def trained_parameters(module: nn.Module, *, critic: bool = True) -> dict[str, Any]:
    """Return the parameters that get gradients, by name; without ``critic`` the policy's alone."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (critic or not name.startswith(CRITIC))
    }


def set_parameters(module: nn.Module, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Replace every trained parameter by its whole value; a critic without a value stays.

    Raises:
        KeyError: A trained parameter of the policy has no value.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in trained_parameters(module).items():
        # An expert comes without a critic.
        if name in values or not name.startswith(CRITIC):
            value = values[name].to(device)
            # Both copies: the optimiser's master and the one the forward pass reads.
            safe_set_full_fp32_param(parameter, value)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)


def read_state(module: nn.Module, steps: int) -> dict[str, Tensor]:
    """Return ``steps``, the trained parameters in float32 and AdamW's moments, on the CPU."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {"steps": torch.tensor(steps)}
    for name, parameter in trained_parameters(module).items():
        state[name] = safe_get_full_fp32_param(parameter).cpu().clone()
        # Before the first step the optimiser has no moments to give.
        for moment in _MOMENTS if steps else ():
            value = safe_get_full_optimizer_state(parameter, moment)
            state[f"{moment}:{name}"] = value.cpu().clone()
    return state


def write_state(
    module: nn.Module, optimizer: Any, state: Mapping[str, Tensor], device: torch.device
) -> int:
    """Put back what ``read_state`` returned; returns its steps."""
    from deepspeed.utils import safe_set_full_optimizer_state

    steps = int(state["steps"])
    set_parameters(module, state, device)
    for flat in optimizer.fp32_partitioned_groups_flat:
        # A fresh optimiser has no moments to write into.
        moments = optimizer.optimizer.state[flat]
        if not moments:
            moments["step"] = torch.zeros(())
            moments["exp_avg"] = torch.zeros_like(flat)
            moments["exp_avg_sq"] = torch.zeros_like(flat)
    for name, parameter in trained_parameters(module).items():
        for moment in _MOMENTS:
            if f"{moment}:{name}" in state:
                whole = state[f"{moment}:{name}"].to(device)
                safe_set_full_optimizer_state(parameter, whole, moment)
    for partition in optimizer.optimizer.state.values():
        if "step" in partition:
            partition["step"] = torch.full_like(partition["step"], float(steps))
    return steps
