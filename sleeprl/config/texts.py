"""Refuse texts that can be no name or path on this machine. Imports neither torch nor ray."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sleeprl.config.schema import ConfigError, NightConfig, iter_fields

_FREE = ("self_study.assistant_prefix",)
"""Settings whose text may be empty and have line breaks."""
_PATHS = ("name", "runs", "generations", "model.name", "wake.inputs", "evaluation.questions")
"""Settings that are paths, or may be."""
_DIRECTORIES = ("runs", "generations")
"""Settings that name a directory, which a night creates if it does not exist."""
_NAME_BYTES = 255
"""The longest name of a file or directory, in bytes, that common file systems have."""
_PATH_BYTES = 4095
"""The longest path that Linux takes, in bytes."""
_RUN_NAME_BYTES = 200
"""The longest name of a run: it becomes part of other names, such as that of its next attempt."""
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def check_texts(config: NightConfig) -> None:
    """Check every text of a configuration, and the names and paths among them.

    Raises:
        ConfigError: A text cannot be stored, or is no name or path where one belongs.
    """
    for key, _, value in iter_fields(config):
        plain = isinstance(value, str | list)
        for text in _texts_in(value):
            _check_characters(key, text, strict=plain and key not in _FREE)
            if key in _PATHS:
                _check_lengths(key, text)
    _check_run_name(config.name)
    for key in _DIRECTORIES:
        _check_directory(key, getattr(config, key))


def path_exists(key: str, text: str) -> bool:
    """Tell whether a path exists.

    Raises:
        ConfigError: The system cannot say, for example for want of a permission.
    """
    try:
        return Path(text).exists()
    except OSError as error:
        raise ConfigError(
            f"{key}: {text!r}: {error.strerror}; give a path that can be read"
        ) from None


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a value, keys of named values too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts_in(name)
            yield from _texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)


def _check_characters(key: str, text: str, *, strict: bool) -> None:
    """Refuse what UTF-8 or the system cannot hold and, if ``strict``, an empty text and control
    characters."""
    given = f"{key}={_shorten(text)}"
    if text == "???":
        raise ConfigError(f"{given} stands for a missing value; write one, or leave it out")
    if strict and not text.strip():
        raise ConfigError(f"{given} is empty; write a value, or leave the setting out")
    for place, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise ConfigError(
                f"{given} has half of a surrogate pair at character {place}; remove it"
            )
        if character == "\0" or (strict and not character.isprintable() and ord(character) < 160):
            raise ConfigError(
                f"{given} has the control character {character!r} at character {place}; remove it"
            )


def _check_lengths(key: str, path: str) -> None:
    longest = max(path.split("/"), key=lambda part: len(os.fsencode(part)))
    if (size := len(os.fsencode(longest))) > _NAME_BYTES:
        raise ConfigError(
            f"{key}={_shorten(path)} has a name of {size} bytes, and a file system takes "
            f"{_NAME_BYTES}; shorten it"
        )
    if (size := len(os.fsencode(path))) > _PATH_BYTES:
        raise ConfigError(
            f"{key}={_shorten(path)} has {size} bytes, and a path at most {_PATH_BYTES}; shorten it"
        )


def _check_run_name(name: str) -> None:
    given = f"name={_shorten(name)}"
    if "/" in name or name in (".", ".."):
        raise ConfigError(
            f"{given} is a path; write one name, such as name=night, and runs=DIRECTORY for where it "
            "lies"
        )
    if (size := len(os.fsencode(name))) > _RUN_NAME_BYTES:
        raise ConfigError(f"{given} has {size} bytes; write a name of at most {_RUN_NAME_BYTES}")


def _check_directory(key: str, text: str) -> None:
    """Refuse a path at which no directory can be or be made."""
    if _URL.match(text):
        raise ConfigError(
            f"{key}={_shorten(text)} is a URL; give a directory, for example where that is mounted"
        )
    path = Path(text).absolute()
    nearest = next(each for each in (path, *path.parents) if path_exists(key, str(each)))
    if not nearest.is_dir():
        raise ConfigError(
            f"{key}={_shorten(text)}: {str(nearest)!r} is a file; give the path of a directory"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}={_shorten(text)}: no permission to write into {str(nearest)!r}; give another "
            "directory"
        )


def _shorten(text: str) -> str:
    """Quote a text; of a long one its beginning."""
    return repr(text) if len(text) <= 60 else f"{text[:40]!r}..."
