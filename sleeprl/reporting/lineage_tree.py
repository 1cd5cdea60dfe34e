"""Generations and their differences as a terminal shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.tree import Tree

from sleeprl.lineage.store import LineageStore, Manifest, Node
from sleeprl.reporting.lineage_diff import BASE, Change, Diff, WeightChanges
from sleeprl.reporting.summary_view import (
    RATES,
    STATES,
    Figure,
    format_number,
    format_percent,
    read_figure,
)
from sleeprl.reporting.terminal import Flow
from sleeprl.utils.terminal_text import Text

_NAMES_SHOWN = 3


def lineage_tree(store: LineageStore) -> Tree:
    """Return all generations as a tree, each below its parent."""
    nodes = store.tree()
    known = {manifest.id for manifest in store.list()}
    empty = "" if nodes else ": no generation has been committed yet"
    top = Tree(Text(f"{store.root}{empty}", overflow="fold"))

    def grow(branch: Tree, children: Sequence[Node]) -> None:
        for node in children:
            grow(branch.add(_label(node, known)), node.children)

    grow(top, nodes)
    return top


def _label(node: Node, known: set[str]) -> Flow:
    """Return what a generation's line says, in pieces between which it may be wrapped."""
    manifest = node.manifest
    name = Text(manifest.id[:8], style="bold")
    if node.is_head:
        name.append(" HEAD", style="bold green")
    items = [name, Text(_format_date(manifest.created), style="dim")]
    for key, title in RATES.items():
        if change := _format_change(manifest.figures, key):
            items.append(Text(f"{title.lower()} {change}"))
    if "count" in manifest.slots:
        items.append(Text(f"slots {len(manifest.slots['used'])}/{manifest.slots['count']}"))
    items.append(Text(_format_bytes(manifest.size)))
    if manifest.parent is None:
        items.append(Text(f"from {manifest.base_model}", style="dim"))
    elif manifest.parent not in known:
        items.append(Text(f"parent {manifest.parent[:8]} is gone", style="yellow"))
    return Flow.of([*items, Text(manifest.note, style="italic")])


def diff_view(diff: Diff) -> RenderableType:
    """Return what ``sleeprl diff`` prints: slots, weights, figures and settings that differ."""
    a, b = diff.a, diff.b
    parts: list[RenderableType] = [
        Text.assemble(
            (a.id[:8], "bold"),
            f" ({_format_date(a.created)}) → ",
            (b.id[:8], "bold"),
            f" ({_format_date(b.created)})",
        ),
        _slots_line(diff),
        *_weights_view(diff.weights),
        _figures_table(diff),
        _settings_table(diff.settings),
    ]
    return Group(*parts)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)


def _weights_view(weights: WeightChanges) -> list[RenderableType]:
    changed = {key: c for key, c in weights.parts.items() if c.changed}
    same = sum(c.tensors for c in weights.parts.values() if not c.changed)
    lines: list[RenderableType] = []
    for names, which in ((weights.only_a, "first"), (weights.only_b, "second")):
        if names:
            hidden = len(names) - _NAMES_SHOWN
            more = f" and {hidden} more" if hidden > 0 else ""
            text = f"only in the {which}: {', '.join(names[:_NAMES_SHOWN])}{more}"
            lines.append(Text(text, style="yellow", overflow="fold"))
    if not changed:
        return [*lines, Text("parameters: all the same")]
    table = _table("Parameters")
    table.add_column("where", overflow="fold")
    table.add_column("part", overflow="fold")
    table.add_column("tensors changed", justify="right", overflow="fold")
    table.add_column("|b − a| / |a|", justify="right", overflow="fold")
    for (where, part), change in sorted(changed.items(), key=_sort_key):
        count = f"{change.changed} of {change.tensors}"
        table.add_row(Text(where), Text(part), count, _format_relative(change))
    lines.append(table)
    if same:
        lines.append(Text(f"the same in both: {same} more", style="dim italic"))
    by_layer = {layer: c.relative for layer, c in weights.layers.items() if c.changed}
    if by_layer:
        most = max(by_layer, key=lambda layer: by_layer[layer])
        least, largest = format_number(min(by_layer.values())), format_number(by_layer[most])
        lines.append(
            Text(
                f"layers changed: {len(by_layer)} of {len(weights.layers)}, by {least} to {largest} "
                f"of their norm, most in layer {most}"
            )
        )
    return lines


def _sort_key(item: tuple[tuple[str, str], Change]) -> tuple[bool, int, str]:
    where, part = item[0]
    return (where != BASE, int(where.split()[-1]) if where != BASE else 0, part)


def _format_relative(change: Change) -> str:
    return "new (was zero)" if math.isinf(change.relative) else format_number(change.relative)


def _slots_line(diff: Diff) -> Text:
    changes = [
        f"{verb} {', '.join(map(str, slots))}"
        for verb, slots in (("filled", diff.filled), ("emptied", diff.emptied))
        if slots
    ]

    def usage(manifest: Manifest) -> str:
        if "count" not in manifest.slots:
            return "none known"
        return f"{len(manifest.slots['used'])} of {manifest.slots['count']} used"

    return Text(
        f"slots: {usage(diff.a)} → {usage(diff.b)}; {', '.join(changes) or 'the same ones'}"
    )


def _figures_table(diff: Diff) -> RenderableType:
    if not diff.figures:
        return Text("figures: none in either")
    table = _table("Figures")
    table.add_column("state", overflow="fold")
    table.add_column("figure", no_wrap=True)
    for name in (diff.a.id[:8], diff.b.id[:8]):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("difference", justify="right", no_wrap=True)
    for (state, name), (a, b) in diff.figures.items():
        unit = " %" if name in RATES else ""
        table.add_row(
            STATES[state],
            f"{name.replace('_', '-')}{unit}",
            _format_figure(a, name),
            _format_figure(b, name),
            _format_gain(a, b, name),
        )
    caption = Text("95 % intervals; every night asks its own questions", style="dim italic")
    return Group(table, caption)


def _format_figure(found: Figure | None, name: str) -> str:
    """Return a rate in percent with its interval, or another figure as it is."""
    if found is None:
        return "-"
    if name not in RATES:
        return format_number(found.value)
    value = f"{100 * found.value:.1f}"
    if found.interval is None:
        return value
    low, high = found.interval
    return f"{value} ({100 * low:.0f}-{100 * high:.0f})"


def _format_gain(a: Figure | None, b: Figure | None, name: str) -> str:
    """Return ``b - a``, of rates in percentage points."""
    if a is None or b is None:
        return "-"
    gain = b.value - a.value
    if name in RATES:
        return f"{100 * gain:+.1f}"
    return f"{'+' if gain >= 0 else '-'}{format_number(abs(gain))}"


def _settings_table(settings: Mapping[str, tuple[Any, Any]]) -> RenderableType:
    if not settings:
        return Text("settings: the same")
    table = _table("Settings")
    for name in ("key", "first", "second"):
        table.add_column(name, overflow="fold")
    for key, (a, b) in settings.items():
        table.add_row(Text(key), Text(str(a)), Text(str(b)))
    return table


def _format_change(figures: Mapping[str, Any], name: str) -> str:
    before, after = read_figure(figures, "before", name), read_figure(figures, "after", name)
    if after is None:
        return ""
    now = format_percent(after.value, 0)
    return f"{format_percent(before.value, 0)} → {now}" if before else now


def _format_date(created: str) -> str:
    return f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M}" if created else "no date"


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
