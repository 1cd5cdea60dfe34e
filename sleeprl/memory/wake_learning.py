"""Wake learning of a level: gradients add up, and are applied at its own boundary only.

Equation (2) of the paper: theta <- theta - sum of eta_t * f(theta_t; x_t) over the last
period if the step is a multiple of it, else theta is unchanged. Pure; tensors by
checkpoint name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Tensors = Mapping[str, Tensor]


def accumulate(total: Tensors, gradient: Tensors, eta: float) -> dict[str, Tensor]:
    """g + eta * gradient, in float32: many small steps must not round away in a half type.

    total: the sum so far, ``{}`` at the start of a period; it is left as it is.
    """
    summed = dict(total)
    for name, tensor in gradient.items():
        step = eta * tensor.detach().float()
        summed[name] = summed[name] + step if name in summed else step
    return summed


def prospective(theta: Tensors, total: Tensors) -> dict[str, Tensor]:
    """theta - g, as new tensors of theta's type: the *compute* stage; nothing is applied.

    Raises ValueError for an accumulated name that theta lacks.
    """
    if missing := sorted(set(total) - set(theta)):
        raise ValueError(f"gradients were accumulated for {missing}, which the weights lack")
    return {
        name: (tensor.float() - total[name]).to(tensor.dtype) if name in total else tensor.clone()
        for name, tensor in theta.items()
    }
