"""Find plug-ins by short name, by dotted path, by installed entry point, or by ``register``.

A plug-in is any callable that returns an object of the wanted protocol; the
configured options are its keyword arguments. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

Factory = TypeVar("Factory", bound=Callable[..., Any])

BUILTIN: Mapping[str, Mapping[str, str]] = {
    "reward": {"likelihood_gain": "sleeprl.dreaming.reward_process.LikelihoodGain"},
    "curriculum": {
        "uniform": "sleeprl.dreaming.curricula.Uniform",
        "weak_spots": "sleeprl.dreaming.curricula.WeakSpots",
    },
    "dream_format": {"qa": "sleeprl.dreaming.formats.QuestionAnswer"},
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
    "transport": {
        "shared_memory": "sleeprl.weight_sync.shared_memory.SharedMemoryTransport",
        "disk": "sleeprl.weight_sync.disk.DiskTransport",
        "nccl": "sleeprl.weight_sync.nccl.NcclTransport",
        "ipc": "sleeprl.weight_sync.ipc.IpcTransport",
    },
    "metric": {},
    "metrics_sink": {
        "tensorboard": "sleeprl.reporting.sinks.tensorboard_sink.TensorBoardSink",
        "wandb": "sleeprl.reporting.sinks.wandb_sink.WandbSink",
        "mlflow": "sleeprl.reporting.sinks.mlflow_sink.MLflowSink",
    },
    "phase": {},
    "growth": {
        "gated_mlp": "sleeprl.memory.growth.GatedMLPGrowth",
        "low_rank": "sleeprl.memory.low_rank.LowRankGrowth",
    },
}
"""Every kind of plug-in with what comes with sleepRL: a short name and where it is."""

ADDED_ARGUMENTS: Mapping[str, Collection[str]] = {
    "curriculum": ("tasks", "seed"),
    "engine": ("name", "options"),
    "transport": ("config",),
    "judge": ("learner", "chat"),
    "metrics_sink": ("run",),
}
"""The keyword arguments that the program adds to the configured options, by kind."""

REWARD_FORMS: Mapping[str, Collection[str]] = {
    "dream": ("dream",),
    "completions": ("prompts", "completions", "completion_ids"),
    "solution_str": ("data_source", "solution_str", "ground_truth", "extra_info"),
}
"""A reward may be a plain function instead of a class: of a dream, or in the form of TRL
(``completions, **columns``) or of verl (``data_source, solution_str, ground_truth, extra_info``).
The parameter that tells, and all that the program has for such a function."""

_registered: dict[tuple[str, str], Callable[..., Any]] = {}
_being_imported: list[str] = []


class PluginError(ValueError):
    """A plug-in that cannot be found or made; the message says where it was looked for."""


def register(kind: str, name: str) -> Callable[[Factory], Factory]:
    """Make a decorator that gives a class, or a function that makes one, a short name.

    The name works wherever the configuration names a plug-in of the kind. A night's actors are
    other processes: there the plug-in is imported from the module that it is defined in.

    Args:
        kind: A kind of plug-in: a key of ``BUILTIN``.
        name: The short name.

    Raises:
        PluginError: If there is no such kind, or the name is taken.
    """
    if kind not in BUILTIN:
        raise PluginError(f"no plug-ins of kind {kind!r}; there are {', '.join(sorted(BUILTIN))}")
    if name in BUILTIN[kind]:
        raise PluginError(f"{kind} {name!r} is built in; choose another name")
    if not name.isidentifier():
        raise PluginError(f"{kind} {name!r}: a short name is letters, digits and _; choose another")

    def add(factory: Factory) -> Factory:
        other = _registered.get((kind, name), factory)
        if other.__qualname__ != factory.__qualname__:
            raise PluginError(f"{kind} {name!r} is {_path_of(other)} already; choose another name")
        _registered[kind, name] = factory
        return factory

    return add


def importable_name(name: str, kind: str) -> str:
    """Give the name under which any process finds a plug-in.

    A name of ``register`` becomes the dotted path of what it stands for; every other name is
    returned as it is. What a script defines is imported from the script's file.

    Raises:
        PluginError: If a registered plug-in cannot be imported elsewhere: it is defined in a
            function, or in a script that is not below the working directory.
    """
    if file := _file_of(name):
        return f"{file.resolve()}:{name.rpartition(':')[2]}"
    factory = _registered.get((kind, name))
    if factory is None or name in BUILTIN[kind]:
        return name
    if "." in factory.__qualname__:
        raise PluginError(
            f"{kind} {name!r} is {factory.__qualname__}, which other processes cannot import; "
            "define it at the top level of a module"
        )
    module = factory.__module__
    return (
        f"{_name_of_script(kind, name) if module == '__main__' else module}.{factory.__qualname__}"
    )


def module_being_imported() -> str | None:
    """Name the module that is imported for a plug-in right now, if one is."""
    return _being_imported[-1] if _being_imported else None


def check(name: str, kind: str, options: Mapping[str, Any]) -> None:
    """Check that ``create`` could call a plug-in with its options; it is not called.

    Raises:
        PluginError: If it could not.
    """
    factory, added = resolve(name, kind), ADDED_ARGUMENTS.get(kind, ())
    form = reward_form(factory) if kind == "reward" else ""
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
        if form:
            signature.bind(**{**dict.fromkeys(form_arguments(factory, form)), **options})
        else:
            signature.bind(**{**options, **dict.fromkeys(added)})
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "nothing"
        adds = f", and every {kind} is given {', '.join(added)}" if added else ""
        if form:
            adds = f", and a function of {form!r} is given {', '.join(REWARD_FORMS[form])}"
        elif kind == "reward":
            adds = (
                "; a reward is a class whose objects take a dream, or a function of `dream`, of "
                "`completions, **columns` (TRL) or of `data_source, solution_str, ground_truth, "
                "extra_info` (verl)"
            )
        raise PluginError(
            f"{kind} {name!r} with options {dict(options)}: {error}; it takes {takes}{adds}. "
            f"Fix the options, or name another {kind}"
        ) from None


def reward_form(factory: Any) -> str:
    """Return which parameter a reward function gets its dream by; empty for a class or a factory."""
    if not inspect.isfunction(factory):
        return ""
    required = [
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    return next((form for form in REWARD_FORMS if form in required), "")


def form_arguments(function: Callable[..., Any], form: str) -> list[str]:
    """List those arguments of a form of rewards that a function takes.

    Args:
        function: The reward function.
        form: Its form, a key of ``REWARD_FORMS``.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [name for name in REWARD_FORMS[form] if takes_all or name in parameters]


def resolve(name: str, kind: str) -> Callable[..., Any]:
    """Find the factory of a plug-in.

    Args:
        name: A short name in ``BUILTIN[kind]`` or of ``register``, the name of an entry point in
            the group ``sleeprl.KIND``, ``package.module.Thing``, or ``path/to/file.py:Thing``. The
            working directory counts as importable, so a plug-in may be a file there.
        kind: A key of ``BUILTIN``.

    Raises:
        PluginError: If nothing has this name, or its module cannot be imported.
    """
    builtin = BUILTIN.get(kind, {})
    if name in builtin:
        return _import(builtin[name], kind)
    if (kind, name) in _registered:
        return _registered[kind, name]
    installed = {point.name: point for point in entry_points(group=f"sleeprl.{kind}")}
    if name in installed:
        return installed[name].load()
    if (file := _file_of(name)) is not None:
        return _import_file(file, name, kind)
    if "." in name:
        return _import(name, kind)
    known = sorted({*builtin, *installed, *(n for k, n in _registered if k == kind)})
    near = difflib.get_close_matches(name, known, n=1)
    raise PluginError(
        f"{kind} {name!r} is unknown"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" Known: {', '.join(known)}; or give a dotted path such as my_module.MyThing"
    )


def create(name: str, kind: str, options: Mapping[str, Any]) -> Any:
    """Find a plug-in and call it with its options.

    Raises:
        PluginError: If it cannot be found, or refuses its options.
    """
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
        with _importing(module_name):
            module = importlib.import_module(module_name)
    except Exception as error:  # a fault of the plug-in's own code, too
        raise PluginError(
            f"{kind} {path!r}: module {module_name!r} cannot be imported: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise PluginError(f"{kind} {path!r}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def _file_of(name: str) -> Path | None:
    """Return the file in ``path/to/file.py:Thing``; None for another name."""
    path, colon, _ = name.rpartition(":")
    return Path(path) if colon and path.endswith(".py") else None


def _import_file(file: Path, name: str, kind: str) -> Callable[..., Any]:
    """Import a plug-in from its file; the file's own directory counts as importable."""
    attribute, path = name.rpartition(":")[2], file.resolve()
    module_name = f"sleeprl_file_{path.as_posix().replace('/', '_')}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        sys.modules[module_name] = module
        try:
            with _importing(module_name):
                spec.loader.exec_module(module)
        except Exception as error:  # a fault of the plug-in's own code, too
            del sys.modules[module_name]
            raise PluginError(f"{kind} {name!r}: {file} cannot be imported: {error}") from error
    if not hasattr(sys.modules[module_name], attribute):
        raise PluginError(f"{kind} {name!r}: {file} has no {attribute!r}")
    found: Callable[..., Any] = getattr(sys.modules[module_name], attribute)
    return found


@contextmanager
def _importing(module: str) -> Iterator[None]:
    _being_imported.append(module)
    try:
        yield
    finally:
        _being_imported.pop()


def _path_of(factory: Callable[..., Any]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


def _name_of_script(kind: str, name: str) -> str:
    """Find the module name under which other processes import the running script."""
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:  # python -m package.module
        return str(spec.name).removesuffix(".__main__")
    file = getattr(main, "__file__", None)
    inside = Path(file).resolve() if file else None
    if inside is None or not inside.is_relative_to(Path.cwd()):
        raise PluginError(
            f"{kind} {name!r} is defined in {file or 'an interactive session'}, which other processes "
            "cannot import; move it into a module in the working directory or an installed package"
        )
    return ".".join(inside.relative_to(Path.cwd()).with_suffix("").parts)
