"""Reference pages that are generated from the code: settings, commands, algorithms, files."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import typer
import yaml
from results import table

from sleeprl import cli
from sleeprl.config.describe import describe_settings
from sleeprl.config.schema import NightConfig
from sleeprl.data.trajectory import TRAJECTORY_SCHEMA, VERSION_KEY, Trajectory
from sleeprl.lineage import Manifest
from sleeprl.night.phases import phases_of, rows_of
from sleeprl.plugins import BUILTIN, resolve
from sleeprl.reporting.metric_reference import METRIC_REFERENCE

ROOT = Path(__file__).parents[2]


def documented(kind: type) -> dict[str, str]:
    """Find the text below each field of a dataclass."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    return {
        ast.unparse(entry.target): " ".join(ast.literal_eval(text.value).split())
        for entry, text in pairwise(node.body)
        if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def cell(text: str) -> str:
    """Make a docstring fit a cell of a Markdown table."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


# --- settings ----------------------------------------------------------------------------------------


@cache
def setting_names() -> frozenset[str]:
    """All dotted keys."""
    return frozenset(setting.key for setting in describe_settings())


def as_yaml(value: Any) -> str:
    """Write a default as YAML has it, on one line."""
    if isinstance(value, list) and any(map(is_dataclass, value)):
        value = [asdict(each) for each in value]
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def settings() -> str:
    """Write every setting by section: its key, its default, what it accepts and what it means."""
    sections: dict[str, list[list[str]]] = {}
    for setting in describe_settings():
        accepts = setting.bounds or setting.type.replace("|", "or")
        if setting.plugin_kind:
            accepts = f"a name of kind `{setting.plugin_kind}`"
        row = [
            f"[](){{ #{setting.key} }}`{setting.key.rpartition('.')[2]}`",
            f"`{as_yaml(setting.default)}`",
            cell(accepts),
            cell(setting.meaning),
        ]
        sections.setdefault(setting.key.rpartition(".")[0], []).append(row)
    parts = []
    for section, rows in sections.items():
        title = f"## `{section}`" if section else "## The night"
        parts.append(f"{title}\n\n{table(['setting', 'default', 'accepts', 'meaning'], rows)}")
    return "\n\n".join(parts)


# --- commands ----------------------------------------------------------------------------------------


def unstyled(text: str) -> str:
    """Turn Rich's markup of a command's help into Markdown."""
    text = inspect.cleandoc(text)
    lines, code = [], False
    for line in text.splitlines():
        example = line.startswith("[bold]sleeprl ")
        if example != code:
            lines += ["```" if code else "\n```text"]
            code = example
        plain = re.sub(r"\[(/?(bold|dim|italic|/)?)\]", "" if code else "**", line)
        lines.append(plain.replace("\\[", "["))
    return "\n".join([*lines, *(["```"] if code else [])])


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its name."""
    group = typer.main.get_command(cli.app)
    assert hasattr(group, "commands")
    yield from group.commands.items()


def command_line() -> str:
    """Write every command with its arguments and options."""
    parts = []
    for name, command in commands():
        context = click.Context(command, info_name=f"sleeprl {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(f"## sleeprl {name}\n\n```text\nsleeprl {name} {usage}\n```\n")
        parts.append(unstyled(command.help or ""))
        rows = []
        for parameter in command.params:
            record = parameter.get_help_record(context) or ("", "")
            label = record[0] or parameter.make_metavar(context)
            about = record[1] or getattr(parameter, "help", "") or ""
            if label != "--help":
                rows.append([f"`{label}`", cell(re.sub(r"\[/?\w+\]", "", about))])
        if rows:
            parts.append("\n" + table(["argument or option", ""], rows))
    return "\n\n".join(parts)


def phase_table(about: dict[str, str]) -> str:
    """Write the phases of a night as the terminal names them, with what a page says about each.

    Args:
        about: By key of the phase; all phases of a night with one baseline must be there.
    """
    rows = rows_of(phases_of(NightConfig()))
    if missing := {key for key, _ in rows} ^ about.keys():
        raise KeyError(f"phases that are not explained, or do not exist: {sorted(missing)}")
    return table(["phase", "what it says"], [[f"**{title}**", about[key]] for key, title in rows])


# --- plug-ins ----------------------------------------------------------------------------------------


def first_sentence(thing: Any) -> str:
    """The summary of a docstring, of the class or else of its module."""
    text = vars(thing).get("__doc__") or ""
    if not text or text.startswith(f"{thing.__name__}("):  # what a dataclass writes itself
        text = inspect.getmodule(thing).__doc__ or ""
    return cell(inspect.cleandoc(text).split("\n\n")[0])


def plugins() -> str:
    """Write the kinds of plug-ins with what is built in."""
    rows = [
        [f"`{kind}`", ", ".join(f"`{name}`" for name in names), f"`sleeprl.{kind}`"]
        for kind, names in BUILTIN.items()
    ]
    return table(["kind", "built in", "entry point group"], rows)


# --- files -------------------------------------------------------------------------------------------


def lake_columns() -> str:
    """Write the columns of a trajectory."""
    about = documented(Trajectory)
    return table(
        ["column", "type", "may be null", "meaning"],
        [
            [f"`{c.name}`", f"`{c.type}`", "yes" if c.nullable else "", cell(about.get(c.name, ""))]
            for c in TRAJECTORY_SCHEMA
        ],
    )


def schema_version() -> str:
    """The version of a trajectory's schema."""
    return (TRAJECTORY_SCHEMA.metadata or {})[VERSION_KEY].decode()


def manifest_fields() -> str:
    """Write the fields of a generation's manifest."""
    about = documented(Manifest)
    return table(
        ["field", "meaning"],
        [[f"`{f.name}`", cell(about.get(f.name, ""))] for f in fields(Manifest)],
    )


@cache
def summary_keys() -> frozenset[str]:
    """All keys of ``summary.json``; some look like settings."""
    return frozenset(metric.key for metric in METRIC_REFERENCE)


def metrics(file: str) -> str:
    """Write every key of a file that a run leaves, by group."""
    groups: dict[str, list[list[str]]] = {}
    for metric in METRIC_REFERENCE:
        if metric.file == file:
            row = [f"`{metric.key}`", cell(metric.meaning), cell(metric.unit), cell(metric.healthy)]
            groups.setdefault(metric.group, []).append(row)
    head = ["key", "meaning", "unit", "healthy"]
    return "\n\n".join(
        f"### {group[:1].upper()}{group[1:]}\n\n{table(head, rows)}"
        for group, rows in groups.items()
    )


FLAGS = (
    "loss_aggregation",
    "needs_critic",
    "compares_within_group",
    "has_ratio",
    "max_resample_rounds",
)


def algorithms() -> str:
    """Write each algorithm with its flags and its options."""
    rows = []
    for name in BUILTIN["algorithm"]:
        thing = resolve(name, "algorithm")
        made, options = thing(), inspect.signature(thing).parameters.values()
        flags = [getattr(made, flag) for flag in FLAGS]
        values = ["yes" if f is True else "" if f is False else str(f) for f in flags]
        defaults = ", ".join(f"`{p.name}={p.default}`" for p in options if p.name not in FLAGS)
        rows.append([f"`{name}`", first_sentence(thing), *values, defaults])
    head = ["name", "what it is", "loss is a mean over", "critic", "compares a group", "ratio"]
    return table([*head, "resample rounds", "options and defaults"], rows)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "settings": settings,
    "command_line": command_line,
    "plugins": plugins,
    "lake_columns": lake_columns,
    "manifest_fields": manifest_fields,
    "schema_version": schema_version,
    "algorithms": algorithms,
    "metrics": metrics,
    "phase_table": phase_table,
}
"""What a page may call."""
