"""Describe all settings: key, type, default, bounds and meaning, read from the schema itself.

The annotated YAML of ``sleeprl night --dry-run`` and the reference of the documentation come from
here. Imports neither torch nor ray.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

from sleeprl.config.bounds import bounds_of, plugin_kind_of
from sleeprl.config.loader import to_yaml
from sleeprl.config.schema import NightConfig

_WIDTH = 80
"""Columns of a comment in the annotated YAML."""


@dataclass(frozen=True)
class Setting:
    """One setting, as a reader needs it."""

    key: str
    """Dotted key, such as ``dreaming.max_staleness``."""
    type: str
    """Type of its value, as it is written in the schema."""
    default: Any
    """Its value where nobody sets it."""
    bounds: str
    """What it accepts, such as ``0 to 1``; empty where the type says it all."""
    plugin_kind: str | None
    """The kind of plug-in that it names, if it names one."""
    meaning: str
    """What it does."""


def describe_settings(section: Any = NightConfig, prefix: str = "") -> Iterator[Setting]:
    """Describe every setting, in the order of the schema.

    Args:
        section: The dataclass to describe.
        prefix: What stands before the names of its fields, with a dot at the end.
    """
    meanings, instance = _read_meanings(section), section()
    for entry in fields(section):
        value, key = getattr(instance, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            yield from describe_settings(type(value), f"{key}.")
            continue
        yield Setting(
            key=key,
            type=str(entry.type),
            default=value,
            bounds=bounds_of(entry).describe(),
            plugin_kind=plugin_kind_of(entry),
            meaning=meanings.get(entry.name, ""),
        )


def to_annotated_yaml(config: NightConfig) -> str:
    """Write a configuration as YAML with the meaning of each setting above it, as a comment."""
    meanings = {setting.key: setting.meaning for setting in describe_settings()}
    lines, path = list[str](), list[str]()
    for line in to_yaml(config).splitlines():
        if found := re.match(r"( *)(\w+):", line):
            indent, name = found.groups()
            path = [*path[: len(indent) // 2], name]
            lines += textwrap.wrap(
                meanings.get(".".join(path), ""),
                _WIDTH,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}# ",
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


def _read_meanings(section: Any) -> dict[str, str]:
    """Read the text below each field of a dataclass."""
    (node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(node, ast.ClassDef)
    below = {
        ast.unparse(entry.target): ast.literal_eval(text.value)
        for entry, text in pairwise(node.body)
        if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    return {name: " ".join(text.split()).replace("``", "`") for name, text in below.items()}
