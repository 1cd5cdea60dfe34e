"""Plug-ins by short name, by dotted path, or by installed entry point.

A plug-in is any callable that returns an object of the wanted protocol; the
configured options are its keyword arguments. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

BUILTIN: Mapping[str, Mapping[str, str]] = {
    "reward": {"likelihood_gain": "sleeprl.dreaming.reward_process.LikelihoodGain"},
    "curriculum": {
        "uniform": "sleeprl.dreaming.curricula.Uniform",
        "weak_spots": "sleeprl.dreaming.curricula.WeakSpots",
    },
    "engine": {
        "vllm": "sleeprl.rollout.vllm_engine.VLLMEngine",
        "torch": "sleeprl.rollout.torch_engine.TorchEngine",
    },
    "judge": {
        "exact": "sleeprl.consolidation.judges.Exact",
        "embedding": "sleeprl.consolidation.judges.Embedding",
        "teacher": "sleeprl.consolidation.judges.Teacher",
    },
    "algorithm": {
        "grpo": "sleeprl.algorithms.grpo.GRPO",
        "dr_grpo": "sleeprl.algorithms.dr_grpo.DrGRPO",
        "dapo": "sleeprl.algorithms.dapo.DAPO",
        "dapo_unscaled": "sleeprl.algorithms.dapo.DAPOUnscaled",
        "gspo": "sleeprl.algorithms.gspo.GSPO",
        "cispo": "sleeprl.algorithms.cispo.CISPO",
        "rloo": "sleeprl.algorithms.rloo.RLOO",
        "reinforce": "sleeprl.algorithms.reinforce.Reinforce",
        "reinforce_plus_plus": "sleeprl.algorithms.reinforce_plus_plus.ReinforcePlusPlus",
        "ppo": "sleeprl.algorithms.ppo.PPO",
        "rest_em": "sleeprl.algorithms.rest_em.RestEM",
    },
    "metric": {},
    "phase": {},
    "growth": {
        "gated_mlp": "sleeprl.memory.growth.GatedMLPGrowth",
        "low_rank": "sleeprl.memory.low_rank.LowRankGrowth",
    },
}
"""What comes with sleepRL, by kind and short name."""


class PluginError(ValueError):
    """A plug-in that cannot be found or made; the message says where it was looked for."""


def check(name: str, kind: str, options: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Raise PluginError unless ``create`` could call ``name`` with ``options``; it is not called.

    given: the keyword arguments that the program adds.
    """
    factory = resolve(name, kind)
    if not callable(factory):
        raise PluginError(
            f"{kind} {name!r} is a {type(factory).__name__} and cannot be called; name a class, or a "
            f"function that returns a {kind}"
        )
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin of Python's may have none
        return
    try:
        signature.bind(**{**options, **dict.fromkeys(given)})
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "nothing"
        adds = f", and every {kind} is given {', '.join(given)}" if given else ""
        raise PluginError(
            f"{kind} {name!r} with options {dict(options)}: {error}; it takes {takes}{adds}. "
            f"Mend the options, or name another {kind}"
        ) from None


def resolve(name: str, kind: str) -> Callable[..., Any]:
    """Find the factory called ``name``.

    name: a short name in ``BUILTIN[kind]``, the name of an entry point in the group
        ``sleeprl.<kind>``, or ``package.module.Thing``; the working directory counts as
        importable, so a plug-in may be a file there.
    """
    builtin = BUILTIN.get(kind, {})
    if name in builtin:
        return _import(builtin[name], kind)
    installed = {point.name: point for point in entry_points(group=f"sleeprl.{kind}")}
    if name in installed:
        return installed[name].load()
    if "." in name:
        return _import(name, kind)
    known = sorted({*builtin, *installed})
    near = difflib.get_close_matches(name, known, n=1)
    raise PluginError(
        f"{kind} {name!r} is unknown"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" Known: {', '.join(known)}; or give a dotted path such as my_module.MyThing"
    )


def create(name: str, kind: str, options: Mapping[str, Any]) -> Any:
    """``resolve`` and call with ``options``; a wrong option is named with the plug-in."""
    factory = resolve(name, kind)
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{kind} {name!r} with options {dict(options)}: {error}") from error


def _import(path: str, kind: str) -> Callable[..., Any]:
    module_name, _, attribute = path.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a fault of the plug-in's own code, too
        raise PluginError(
            f"{kind} {path!r}: module {module_name!r} cannot be imported: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise PluginError(f"{kind} {path!r}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)
