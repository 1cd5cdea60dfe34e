"""Build the configuration of a night: defaults, a model's settings, a file, ``key=value`` words.

OmegaConf merges the layers; ``validation`` refuses what cannot work before any process is started.
Imports neither torch nor ray.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sleeprl.config.aliases import (
    ALIASES,
    describe_renames,
    rename_algorithm_options,
    rename_old_keys,
)
from sleeprl.config.schema import ConfigError, NightConfig, iter_fields, keys
from sleeprl.config.validation import validate

logger = logging.getLogger(__name__)

Layer = tuple[str, Any]
"""How an error in a layer begins, and the layer's values."""
ModelSettings = Mapping[str, Mapping[str, Any]]
"""Settings of a night by the name of the model that they are for."""
_TYPE_PROBLEMS: dict[type, str] = {
    bool: "neither true nor false",
    int: "not a whole number",
    float: "not a number",
    str: "not text",
}
"""What is wrong with a value that has not the type of its field."""


def load(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    of_model: ModelSettings | None = None,
    settings: Mapping[str, Any] | None = None,
) -> NightConfig:
    """Merge the defaults, a YAML file, words and values, and validate the result.

    Args:
        path: A YAML file.
        overrides: Words such as ``seed=1``. They win over the file.
        of_model: Settings by model name. Those of ``model.name`` lie between the defaults and the
            file.
        settings: Values by dotted key. They win over the words.

    Raises:
        ConfigError: For a file that cannot be read, an unknown key, or a value that cannot work.
    """
    layers = [] if path is None else [(f"config file {_quote(path)}: ", _read(path))]
    return _build(layers, overrides, of_model, settings)


def from_dict(
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    of_model: ModelSettings | None = None,
) -> NightConfig:
    """Do what ``load`` does, with plain data, such as ``to_dict`` makes, in place of a file."""
    return _build([("", OmegaConf.create(dict(values)))], overrides, of_model)


def validated(config: NightConfig) -> NightConfig:
    """Check a configuration that was built in Python exactly as a file is checked.

    Returns:
        A copy with values of the fields' types.

    Raises:
        ConfigError: If a value has the wrong type or cannot work.
    """
    return from_dict(dataclasses.asdict(config))


def to_yaml(config: NightConfig) -> str:
    """Write a configuration as YAML that ``load`` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: NightConfig) -> dict[str, Any]:
    """Turn a configuration into plain data that ``from_dict`` reads."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def is_key(name: str) -> bool:
    """Tell whether something can be set under a dotted name: a setting or a section."""
    for key, _, default in iter_fields(NightConfig()):
        free = isinstance(default, dict) and name.startswith(f"{key}.")
        if free or key == name or key.startswith(f"{name}."):
            return True
    return False


def _build(
    layers: Sequence[Layer],
    overrides: Sequence[str],
    of_model: ModelSettings | None,
    settings: Mapping[str, Any] | None = None,
) -> NightConfig:
    words = [*layers, *_parse_words(overrides)]
    try:
        layers = _with_present_keys([*words, ("", OmegaConf.create(_nest(settings or {})))])
        config = _merge(layers)
    except RecursionError:
        raise ConfigError("the configuration is nested too deeply; write it flatter") from None
    except OmegaConfBaseException as error:  # a value that is no plain data
        raise ConfigError(_explain(error)) from None
    below = (of_model or {}).get(config.model.name)
    return _merge([("", dict(below)), *layers]) if below else config


def _read(path: str | Path) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"config file {_quote(path)} does not exist; give the path of a YAML file"
        ) from None
    except (OSError, TypeError, ValueError) as error:  # no file, no path, or no UTF-8
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"config file {_quote(path)} cannot be read: {reason}; give the path of a YAML file"
        ) from None
    try:
        layer = OmegaConf.load(io.StringIO(text))
    except Exception as error:
        raise ConfigError(f"config file {_quote(path)} is not readable YAML: {error}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"config file {_quote(path)} holds a list; write key: value lines")
    return layer


def _quote(path: object) -> str:
    """Quote a path for a message; of a very long one its beginning."""
    text = repr(path if isinstance(path, str) else str(path))
    return text if len(text) <= 200 else f"{text[:80]}...'"


def _parse_words(words: Sequence[str]) -> list[Layer]:
    layers = list[Layer]()
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(
                f"{_short(repr(word))} is neither a config file nor key=value; write for example seed=1"
            )
        if not is_key(name) and name not in ALIASES:
            raise ConfigError(_unknown_key(name))
        try:
            layer = OmegaConf.from_dotlist([word])
            if _type_of(ALIASES.get(name, name)) is str and _is_number(_leaf(layer, name)):
                OmegaConf.update(layer, name, text)  # a generation's id may look like 3e85
            layers.append(("", layer))
        except Exception as error:
            reason = _short(str(error).splitlines()[0])
            raise ConfigError(f"{_short(repr(word))} is not readable: {reason}") from None
    return layers


def _nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn values by dotted key into sections."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        if not is_key(key) and key not in ALIASES:
            raise ConfigError(_unknown_key(key))
        *path, leaf = key.split(".")
        section = nested
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: {name} is set as a whole as well; leave one of them out")
        section[leaf] = _to_plain(value)
    return nested


def _leaf(layer: Any, key: str) -> Any:
    """Get a value by its dotted key, with what it refers to not looked up."""
    return reduce(getitem, key.split("."), cast(Any, OmegaConf.to_container(layer)))


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _to_plain(value: Any) -> Any:
    """Turn paths into text, also those in a list."""
    if isinstance(value, list | tuple):
        return [_to_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _with_present_keys(layers: Sequence[Layer]) -> list[Layer]:
    """Rename old keys, and warn of all of them in one line."""
    present, old_keys = list[Layer](), dict[str, None]()
    for where, layer in layers:
        values, found = rename_old_keys(cast(dict[str, Any], OmegaConf.to_container(layer)))
        if values:
            present.append((where, values))
        old_keys |= dict.fromkeys(found)
    if old_keys:
        logger.warning(describe_renames(list(old_keys)))
    return present


@cache
def _defaults() -> Any:
    """Make the typed form of the defaults, which takes a while."""
    return OmegaConf.structured(NightConfig)


def _merge(layers: Sequence[Layer]) -> NightConfig:
    merged, default = None, NightConfig()
    for where, values in layers:
        layer = None
        try:
            _check_shape(values, default)
            layer = OmegaConf.create(values)
            merged = copy.deepcopy(_defaults()) if merged is None else merged
            merged = OmegaConf.unsafe_merge(merged, layer)  # it may share nodes with the copies
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
        except OmegaConfBaseException as error:
            raise ConfigError(where + _explain(error, layer)) from None
    try:
        config = cast(NightConfig, OmegaConf.to_object(merged or _defaults()))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from None
    if config.dreaming.importance_weight.level == "False":  # YAML reads a bare `off` as false
        config.dreaming.importance_weight.level = "off"
    rename_algorithm_options(config)
    validate(config)
    return config


def _check_shape(values: Any, default: Any, prefix: str = "") -> None:
    """Raise ConfigError for a plain value where a section, a list or named values must be."""
    for name, value in values.items():
        wanted, key = getattr(default, str(name), None), f"{prefix}{name}"
        given = f"{key}={_short(value)}"
        _refuse_missing(key, value)
        if value is None:
            continue
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                suggestion = f"{key}.{fields(wanted)[0].name}={_short(value)}"
                raise ConfigError(f"{given}: {key} is a section; did you mean {suggestion}?")
            _check_shape(value, wanted, f"{key}.")
        elif isinstance(wanted, bool):
            _check_truth(key, value, wanted)
        elif isinstance(wanted, list) and not isinstance(value, list):
            raise ConfigError(f"{given}: {key} is a list; write {key}=[{_short(value)}]")
        elif isinstance(wanted, list):
            _check_items(key, value)
        elif isinstance(wanted, dict) and not isinstance(value, dict):
            raise ConfigError(
                f"{given}: {key} holds named values; write {key}.NAME={_short(value)}"
            )


def _refuse_missing(key: str, value: Any) -> None:
    """Refuse OmegaConf's mark for a missing value, wherever it is in a value."""
    if value == "???":
        raise ConfigError(
            f"{key}=??? stands for a missing value; write one, or leave the setting out"
        )
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_missing(f"{key}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            _refuse_missing(key, item)


def _check_truth(key: str, value: Any, default: bool) -> None:
    """Refuse numbers but 0 and 1 for a truth value; OmegaConf takes every other one for true."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return  # OmegaConf knows the words
    if number not in (0, 1) or isinstance(value, float):
        example = f"{key}={str(default).lower()}"
        raise ConfigError(
            f"{key}={_short(value)} is {_TYPE_PROBLEMS[bool]}; write for example {example}"
        )


def _check_items(key: str, items: list[Any]) -> None:
    """Refuse lists, and named values but the levels of the memory, as items of a list."""
    if any(isinstance(each, list) for each in items):
        raise ConfigError(f"{key}={_short(items)}: {key} has no lists in it; write {key}=[A, B]")
    if key == "memory.levels":
        for each in items:
            if not isinstance(each, dict):
                raise ConfigError(
                    f"{key}={_short(items)}: {_short(each)} is no level; "
                    f"write {key}=[{{period: 5, slots: 5}}]"
                )
    elif any(each is None or isinstance(each, dict) for each in items):
        raise ConfigError(f"{key}={_short(items)}: {key} is a list of texts; write {key}=[A, B]")


def _short(value: Any) -> str:
    """Write a value for a message; of a long one its beginning."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:80]}..."


def _explain(error: OmegaConfBaseException, layer: Any = None) -> str:
    """Put OmegaConf's error into words: the key, the layer's value, and an example."""
    key = str(error.full_key or error.key or "the configuration")
    if isinstance(error, ConfigKeyError):
        return _unknown_key(key)
    default = OmegaConf.select(_defaults(), key)
    kind = _type_of(key)
    if layer is None or not isinstance(error, ValidationError) or kind not in _TYPE_PROBLEMS:
        return f"{key}: {_short(str(error).splitlines()[0])}"
    value = OmegaConf.select(layer, key)
    problem = f"{key}={'null' if value is None else _short(repr(value))} is {_TYPE_PROBLEMS[kind]}"
    if default is None:
        return f"{problem}; write {_TYPE_PROBLEMS[kind].removeprefix('not ')}, or null"
    example = str(default).lower() if isinstance(default, bool) else default
    return f"{problem}; write for example {key}={example}"


def _type_of(key: str) -> Any:
    """Get the type of a setting's values, leaving aside that it may have none."""
    found: Any = NightConfig
    for name in key.split("."):
        found = get_type_hints(found).get(name) if is_dataclass(found) else None
        if isinstance(found, UnionType):
            found = next(each for each in get_args(found) if each is not NoneType)
    return found


def _unknown_key(key: str) -> str:
    """Say that a key is unknown, with the nearest known one."""
    known = list(keys())
    sections = {name.rpartition(".")[0] for name in known} - {""}
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    section, _, leaf = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[0] == section]
    near = [name for name in beside if _is_short_for(leaf, name.rpartition(".")[2])]
    near = near or difflib.get_close_matches(key, known, n=1)
    if not near and section not in sections and not leaf:
        near = difflib.get_close_matches(key, sections, n=1)
    if not near:
        near = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1)]
    hint = f"; did you mean {near[0]!r}?" if near else "; `sleeprl night --dry-run` lists all keys"
    return f"unknown key {key!r}{hint}"


def _is_short_for(leaf: str, name: str) -> bool:
    """Tell whether a word is one of the words of a name, or their initials: ``kl``, ``lr``."""
    words = name.split("_")
    return leaf in words or leaf == "".join(word[:1] for word in words)
