"""Wake learning of a level: gradients accumulate and are applied only at the level's own boundary.

Equation (2) of the paper: if the step is a multiple of the period, theta <- theta - sum of eta_t *
f(theta_t; x_t) over the last period; otherwise theta does not change. Pure; tensors are indexed by
checkpoint name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sleeprl.memory.gated_mlp import COLUMN_DIM, PROJECTIONS, mlps, projection
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import GATED_MLP, Slots
from sleeprl.pretrained import load_model

Tensors = Mapping[str, Tensor]


def wake_gradient(
    checkpoint: Path,
    texts: Sequence[Sequence[int]],
    eta: float,
    total: Tensors,
    *,
    gpu: bool = False,
) -> dict[str, Tensor]:
    """Add, for each text, eta times the gradient of its mean next-token loss to ``total``.

    All gradients are taken at the current weights, because nothing is applied before the boundary.
    In a gated MLP only the base's columns learn: a slot may have another expert by the boundary.

    Args:
        checkpoint: Directory of the model.
        texts: Token ids; each text is a step t of equation (2). Texts of fewer than two tokens are
            skipped.
        eta: Learning rate.
        total: The sum so far, empty at the start of a period. It is not modified.
        gpu: Compute on the GPU.

    Returns:
        Float32 tensors of the MLP projections by checkpoint name, on the CPU.
    """
    device = torch.device("cuda" if gpu else "cpu")
    model = load_model(checkpoint, torch.float32).to(device)
    slots = Slots.load(checkpoint)
    if slots is not None:  # low-rank experts are stored beside the weights, not in them
        dense = dict(growth_of(slots).tensors(checkpoint, slots))
        model.load_state_dict(dense, strict=False)
    model.requires_grad_(False)
    learns = {
        f"{name}.{part}.weight": projection(mlp, part).weight.requires_grad_(True)
        for name, mlp in mlps(model)
        for part in PROJECTIONS
    }
    summed = dict(total)
    for text in texts:
        if len(text) < 2:
            continue
        ids = torch.tensor([list(text)], device=device)
        found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(learns.values()))
        named = {name: each.cpu() for name, each in zip(learns, found, strict=True)}
        if slots is not None and slots.growth == GATED_MLP:
            for name, gradient in named.items():
                dim = COLUMN_DIM[name.split(".")[-2]]
                gradient.narrow(dim, slots.base_width, slots.count * slots.width).zero_()
        summed = accumulate(summed, named, eta)
    return summed


def accumulate(total: Tensors, gradient: Tensors, eta: float) -> dict[str, Tensor]:
    """Return g + eta * gradient in float32, since in half precision many small steps would round to nothing.

    Args:
        total: The sum so far, ``{}`` at the start of a period. It is not modified.
        gradient: The gradient to add, by checkpoint name.
        eta: Learning rate.
    """
    summed = dict(total)
    for name, tensor in gradient.items():
        step = eta * tensor.detach().float()
        summed[name] = summed[name] + step if name in summed else step
    return summed


def prospective(theta: Tensors, total: Tensors) -> dict[str, Tensor]:
    """Return theta - g as new tensors of theta's type (the *compute* stage); nothing is applied.

    Args:
        theta: Weights by checkpoint name.
        total: Accumulated gradients g by checkpoint name.

    Raises:
        ValueError: ``theta`` lacks a name of ``total``.
    """
    if missing := sorted(set(total) - set(theta)):
        raise ValueError(f"gradients were accumulated for {missing}, which the weights lack")
    return {
        name: (tensor.float() - total[name]).to(tensor.dtype) if name in total else tensor.clone()
        for name, tensor in theta.items()
    }
