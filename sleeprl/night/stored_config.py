"""The configuration of a run as its directory keeps it: with whole paths, and detectably whole."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from sleeprl._version import __version__
from sleeprl.config import loader as cfg
from sleeprl.config.aliases import rename_old_keys
from sleeprl.config.schema import ConfigError, NightConfig, get_setting, keys
from sleeprl.utils.files import DamagedFile

CONFIG = "config.yaml"
_FIRST = "# Settings of a run, by sleepRL "
_LAST = "# The end: a file without this line was cut off."
logger = logging.getLogger(__name__)


def to_text(config: NightConfig) -> str:
    """Write the configuration of a run, for ``load`` from any directory."""
    return f"{_FIRST}{__version__}.\n{cfg.to_yaml(with_whole_paths(config, Path.cwd()))}{_LAST}\n"


def with_whole_paths(config: NightConfig, base: Path) -> NightConfig:
    """Return a copy whose relative paths start at a directory, so that any other may read it."""
    config = copy.deepcopy(config)

    def whole(path: str) -> str:
        return os.path.abspath(base / path)

    config.runs, config.generations = whole(config.runs), whole(config.generations)
    config.wake.inputs = [text if text == "-" else whole(text) for text in config.wake.inputs]
    if config.evaluation.questions is not None:
        config.evaluation.questions = whole(config.evaluation.questions)
    if config.model.name != "embedded" and (base / config.model.name).is_dir():
        config.model.name = whole(config.model.name)
    return config


def load(directory: Path, *, inputs_are_read: bool) -> NightConfig:
    """Load the configuration of a run.

    Args:
        directory: The run; it may have been moved.
        inputs_are_read: Whether the night has recorded its inputs and questions, which may be gone
            then.

    Raises:
        ConfigError: It has settings that this version does not know, or values that cannot work.
        DamagedFile: The file is cut off or cannot be read.
    """
    path = directory / CONFIG
    values, version = _read(path)
    _tell_versions_apart(path, values, version)
    gone: dict[str, Any] = {}
    if inputs_are_read:
        for section, key, absent in (("wake", "inputs", ["-"]), ("evaluation", "questions", None)):
            if isinstance(values.get(section), dict) and values[section].get(key):
                gone[f"{section}.{key}"], values[section][key] = values[section][key], absent
    try:
        config = cfg.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"config file {str(path)!r}: {error}") from None
    for key, value in gone.items():
        section, _, leaf = key.rpartition(".")
        setattr(get_setting(config, section), leaf, value)
    config = with_whole_paths(config, _base_of(config, directory))
    if config.run_dir != directory.resolve():
        config.runs, config.name = str(directory.resolve().parent), directory.resolve().name
    return config


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Read the values with present keys, and the version that wrote them; refuse a cut file."""
    try:
        text = path.read_bytes().decode()
        values = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DamagedFile(f"{path} is damaged: {reason}; restore it from a copy") from None
    lines = text.rstrip().splitlines() or [""]
    if not isinstance(values, dict):
        raise DamagedFile(f"{path} is damaged: it has no settings; restore it from a copy")
    values = rename_old_keys(values)[0]
    missing = [f.name for f in fields(NightConfig) if f.name not in values]
    if lines[0].startswith(_FIRST):
        whole = lines[-1] == _LAST
    else:  # of an earlier version, or written by hand
        whole = not missing
    if not whole:
        lost = f"; it has no {', '.join(missing)}" if missing else ""
        raise DamagedFile(
            f"{path} is cut off{lost}. Restore it from a copy; with other settings than before the "
            "night would not go on but become another one"
        )
    return values, lines[0].removeprefix(_FIRST).rstrip(".") if lines[0].startswith(_FIRST) else ""


def _tell_versions_apart(path: Path, values: dict[str, Any], version: str) -> None:
    """Refuse settings that this version does not know, and name those that the file lacks."""
    known = set(keys())
    unknown = [key for key in _leaves(values, known) if not cfg.is_key(key)]
    other = f"sleepRL {version}" if version and version != __version__ else "another sleepRL"
    if unknown:
        raise ConfigError(
            f"{path}: sleepRL {__version__} does not know {', '.join(unknown)}, set by {other}; "
            "resume with that version, or remove the lines to go on without"
        )
    present = set(_leaves(values, known))
    defaults = cfg.to_dict(NightConfig())
    new = {}
    for key in keys():
        if not any(each == key or each.startswith(f"{key}.") for each in present):
            value: Any = defaults
            for name in key.split("."):
                value = value[name]
            new[key] = value
    if new:
        defaults_text = ", ".join(f"{key}={value}" for key, value in new.items())
        logger.warning("%s, of %s, does not set these, which take their defaults: %s",
                       path, other, defaults_text)  # fmt: skip


def _leaves(values: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested settings; a setting's own value is not entered."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in known:
            yield from _leaves(value, known, f"{key}.")
        elif not (isinstance(value, Mapping) and key not in known and cfg.is_key(key)):
            yield key


def _base_of(config: NightConfig, directory: Path) -> Path:
    """Return the directory that relative paths of an earlier version's file start at."""
    here, inside = directory.resolve(), (*Path(config.runs).parts, config.name)
    if not Path(config.runs).is_absolute() and here.parts[-len(inside) :] == inside:
        return Path(*here.parts[: -len(inside)])
    return Path.cwd()
