"""The configuration of a night: a file and words over the defaults. Imports neither torch nor ray.

A YAML file and ``key=value`` words on the command line are merged over ``settings`` by
OmegaConf; ``checks`` then refuses what cannot work, before any process is started.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sleeprl.checks import check
from sleeprl.settings import ConfigError, NightConfig, keys


def load(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    of_model: Mapping[str, Mapping[str, Any]] | None = None,
) -> NightConfig:
    """Merge defaults, a YAML file and ``key=value`` words, then ``check`` the result.

    of_model: settings of models by name. Those of ``model.name`` lie below what the file
        and the words say.
    """
    layers = [] if path is None else [_read(path)]
    config = _merge(layers, overrides)
    below = (of_model or {}).get(config.model.name)
    return _merge([OmegaConf.create(dict(below)), *layers], overrides) if below else config


def _read(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist; give the path of a YAML file")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"config file {str(path)!r} is not readable YAML: {error}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"config file {str(path)!r} holds a list; write key: value lines")
    return layer


def _merge(layers: Sequence[Any], overrides: Sequence[str]) -> NightConfig:
    words: list[Any] = []
    for word in overrides:
        if "=" not in word:
            raise ConfigError(
                f"{word!r} is neither a config file nor key=value; write for example seed=1"
            )
        name = word.partition("=")[0]
        known = any(key == name or key.startswith(f"{name}.") for key in keys())
        if not known and not name.startswith(_OPEN):
            raise ConfigError(_unknown_key(name))
        try:
            words.append(OmegaConf.from_dotlist([word]))
        except Exception as error:
            raise ConfigError(f"{word!r} is not readable: {str(error).splitlines()[0]}") from None
    merged = OmegaConf.structured(NightConfig)
    try:
        for layer in [*layers, *words]:
            merged = OmegaConf.merge(merged, layer)
        config = cast(NightConfig, OmegaConf.to_object(merged))
        if config.dreaming.correction_level == "False":  # YAML reads a bare `off` as false
            config.dreaming.correction_level = "off"
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key or error.key))) from None
    except OmegaConfBaseException as error:
        key = error.full_key or ", ".join(overrides) or "the configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    check(config)
    return config


def to_yaml(config: NightConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: NightConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def from_dict(values: dict[str, Any], overrides: Sequence[str] = ()) -> NightConfig:
    """A checked configuration from plain data, such as ``to_dict`` makes, and ``key=value`` words."""
    return _merge([OmegaConf.create(values)], overrides)


def _unknown_key(key: str) -> str:
    known = list(keys())
    sections = {name.split(".")[0] for name in known}
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    section, _, leaf = key.rpartition(".")
    near = difflib.get_close_matches(key, known, n=1)
    if not near and section not in sections and not leaf:
        near = difflib.get_close_matches(key, sections, n=1)
    if not near:
        near = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1)]
    hint = f"; did you mean {near[0]!r}?" if near else "; `sleeprl night --dry-run` lists all keys"
    return f"unknown key {key!r}{hint}"


_OPEN = (
    "dreaming.reward_options.", "dreaming.curriculum_options.", "fixed_capacity.learning_rates.",
    "consolidation.judge_options.", "consolidation.algorithm_options.", "dreaming.algorithm_options.",
)  # fmt: skip
