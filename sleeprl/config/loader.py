"""The configuration of a night: a file and words over the defaults. Imports neither torch nor ray.

A YAML file and ``key=value`` words on the command line are merged over ``settings`` by
OmegaConf; ``checks`` then refuses what cannot work, before any process is started.
"""

from __future__ import annotations

import difflib
import logging
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sleeprl.config.aliases import ALIASES, describe_renames, rename_old_keys
from sleeprl.config.schema import ConfigError, NightConfig, keys, meanings
from sleeprl.config.validation import check

logger = logging.getLogger(__name__)

Layer = tuple[str, Any]
"""What an error in it begins with, and its values."""
_KINDS: dict[type, str] = {
    bool: "neither true nor false",
    int: "not a whole number",
    float: "not a number",
    str: "not text",
}
"""What is said of a value, by the type of its field's default."""


def load(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    of_model: Mapping[str, Mapping[str, Any]] | None = None,
) -> NightConfig:
    """Merge defaults, a YAML file and ``key=value`` words, then ``check`` the result.

    of_model: settings of models by name. Those of ``model.name`` lie below what the file
        and the words say.
    """
    layers = [] if path is None else [(f"config file {str(path)!r}: ", _read(path))]
    return _layered(layers, overrides, of_model)


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


def _layers(layers: Sequence[Layer], overrides: Sequence[str]) -> list[Layer]:
    """All layers, lowest first, under present keys. Old ones are named in one warning."""
    words: list[Layer] = []
    for word in overrides:
        if "=" not in word:
            raise ConfigError(
                f"{word!r} is neither a config file nor key=value; write for example seed=1"
            )
        name = word.partition("=")[0]
        if not is_key(name) and name not in ALIASES:
            raise ConfigError(_unknown_key(name))
        try:
            words.append(("", OmegaConf.from_dotlist([word])))
        except Exception as error:
            raise ConfigError(f"{word!r} is not readable: {str(error).splitlines()[0]}") from None
    present, old_keys = list[Layer](), dict[str, None]()
    for where, layer in [*layers, *words]:
        values, found = rename_old_keys(cast(dict[str, Any], OmegaConf.to_container(layer)))
        present.append((where, OmegaConf.create(values)))
        old_keys |= dict.fromkeys(found)
    if old_keys:
        logger.warning(describe_renames(list(old_keys)))
    return present


def _merge(layers: Sequence[Layer]) -> NightConfig:
    merged = OmegaConf.structured(NightConfig)
    for where, layer in layers:
        try:
            _refuse_plain(OmegaConf.to_container(layer), NightConfig())
            merged = OmegaConf.merge(merged, layer)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
        except OmegaConfBaseException as error:
            raise ConfigError(where + _told(error, layer)) from None
    try:
        config = cast(NightConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_told(error)) from None
    if config.dreaming.importance_weight.level == "False":  # YAML reads a bare `off` as false
        config.dreaming.importance_weight.level = "off"
    check(config)
    return config


def to_yaml(config: NightConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def explained(config: NightConfig) -> str:
    """``to_yaml`` with what each setting means above it, as a comment."""
    told, lines, path = dict(meanings()), list[str](), list[str]()
    for line in to_yaml(config).splitlines():
        if found := re.match(r"( *)(\w+):", line):
            indent, name = found.groups()
            path = [*path[: len(indent) // 2], name]
            mark = f"{indent}# "
            lines += textwrap.wrap(
                told.get(".".join(path), ""), 100, initial_indent=mark, subsequent_indent=mark
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


def to_dict(config: NightConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def from_dict(
    values: dict[str, Any],
    overrides: Sequence[str] = (),
    of_model: Mapping[str, Mapping[str, Any]] | None = None,
) -> NightConfig:
    """``load`` with plain data, such as ``to_dict`` makes, in the place of a file."""
    return _layered([("", OmegaConf.create(values))], overrides, of_model)


def is_key(name: str) -> bool:
    """Whether something can be set under a dotted name."""
    known = any(key == name or key.startswith(f"{name}.") for key in keys())
    return known or name.startswith(_OPEN)


def _layered(
    layers: Sequence[Layer],
    overrides: Sequence[str],
    of_model: Mapping[str, Mapping[str, Any]] | None,
) -> NightConfig:
    layers = _layers(layers, overrides)
    config = _merge(layers)
    below = (of_model or {}).get(config.model.name)
    return _merge([("", OmegaConf.create(dict(below))), *layers]) if below else config


def _refuse_plain(values: Any, default: Any, prefix: str = "") -> None:
    """Raise ConfigError for another kind of value where a section, a list or named values must be."""
    for name, value in values.items():
        wanted, key = getattr(default, str(name), None), f"{prefix}{name}"
        if value is None:
            continue
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                meant = f"{key}.{fields(wanted)[0].name}={value}"
                raise ConfigError(f"{key}={value}: {key} is a section; did you mean {meant}?")
            _refuse_plain(value, wanted, f"{key}.")
        elif isinstance(wanted, list) and not isinstance(value, list):
            raise ConfigError(f"{key}={value}: {key} is a list; write {key}=[{value}]")
        elif isinstance(wanted, list) and any(isinstance(each, list) for each in value):
            raise ConfigError(f"{key}={value}: {key} has no lists in it; write {key}=[A, B]")
        elif isinstance(wanted, dict) and not isinstance(value, dict):
            raise ConfigError(f"{key}={value}: {key} holds named values; write {key}.NAME={value}")


def _told(error: OmegaConfBaseException, layer: Any = None) -> str:
    """What is wrong; with a layer's value by the type of the field's default, if it has one."""
    key = str(error.full_key or error.key or "the configuration")
    if isinstance(error, ConfigKeyError):
        return _unknown_key(key)
    default = OmegaConf.select(OmegaConf.structured(NightConfig), key)
    kind = _type_of(key)
    if layer is None or not isinstance(error, ValidationError) or kind not in _KINDS:
        return f"{key}: {str(error).splitlines()[0]}"
    value = OmegaConf.select(layer, key)
    said = "null" if value is None else repr(value)
    told = f"{key}={said} is {_KINDS[kind]}"
    if default is None:
        return f"{told}; write {_KINDS[kind].removeprefix('not ')}, or null"
    example = str(default).lower() if isinstance(default, bool) else default
    return f"{told}; write for example {key}={example}"


def _type_of(key: str) -> Any:
    """Of the values of a field, leaving aside that it may have none."""
    of: Any = NightConfig
    for name in key.split("."):
        of = get_type_hints(of).get(name) if is_dataclass(of) else None
        if isinstance(of, UnionType):
            of = next(each for each in get_args(of) if each is not NoneType)
    return of


def _unknown_key(key: str) -> str:
    known = list(keys())
    sections = {name.split(".")[0] for name in known}
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    section, _, leaf = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[0] == section]
    near = [name for name in beside if _short_for(leaf, name.rpartition(".")[2])]
    near = near or difflib.get_close_matches(key, known, n=1)
    if not near and section not in sections and not leaf:
        near = difflib.get_close_matches(key, sections, n=1)
    if not near:
        near = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1)]
    hint = f"; did you mean {near[0]!r}?" if near else "; `sleeprl night --dry-run` lists all keys"
    return f"unknown key {key!r}{hint}"


def _short_for(leaf: str, name: str) -> bool:
    """Whether it is one of the words of a name, or their initials: ``kl``, ``lr``."""
    words = name.split("_")
    return leaf in words or leaf == "".join(word[:1] for word in words)


_OPEN = (
    "dreaming.reward_options.", "dreaming.curriculum_options.", "fixed_capacity.learning_rates.",
    "consolidation.judge_options.", "consolidation.algorithm_options.", "dreaming.algorithm_options.",
)  # fmt: skip
