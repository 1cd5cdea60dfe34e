"""Generations and their differences as a terminal shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from sleeprl.lineage.store import LineageStore, Manifest, Node
from sleeprl.reporting.lineage_diff import BASE, Change, Diff, Weights
from sleeprl.reporting.summary_view import RATES, STATES, Figure, figure, percent, short


def tree(store: LineageStore) -> Tree:
    """All generations, each below its parent."""
    nodes = store.tree()
    known = {manifest.id for manifest in store.list()}
    top = Tree(Text(f"{store.root}" + ("" if nodes else ": no generation has been committed yet")))

    def grow(branch: Tree, children: Sequence[Node]) -> None:
        for node in children:
            grow(branch.add(_label(node, known)), node.children)

    grow(top, nodes)
    return top


def _label(node: Node, known: set[str]) -> Text:
    manifest = node.manifest
    label = Text(manifest.id[:8], style="bold")
    if node.is_head:
        label.append(" HEAD", style="bold green")
    label.append(f"  {_date(manifest.created)}", style="dim")
    for name, title in RATES.items():
        if said := _from_to(manifest.figures, name):
            label.append(f"  {title.lower()} {said}")
    if "count" in manifest.slots:
        label.append(f"  slots {len(manifest.slots['used'])}/{manifest.slots['count']}")
    label.append(f"  {_size(manifest.size)}")
    if manifest.parent is None:
        label.append(f"  from {manifest.base_model}", style="dim")
    elif manifest.parent not in known:
        label.append(f"  parent {manifest.parent[:8]} is gone", style="yellow")
    if manifest.note:
        label.append(f"  {manifest.note}", style="italic")
    return label


def difference(found: Diff) -> RenderableType:
    """``sleeprl diff``: weights, slots, figures, settings; what is the same is said in a word."""
    a, b = found.a, found.b
    parts: list[RenderableType] = [
        Text.assemble(
            (a.id[:8], "bold"),
            f" ({_date(a.created)}) → ",
            (b.id[:8], "bold"),
            f" ({_date(b.created)})",
        ),
        _slots(found),
        *_weights(found.weights),
        _figures(found),
        _config(found.config),
    ]
    return Group(*parts)


def _weights(weights: Weights) -> list[RenderableType]:
    changed = {key: c for key, c in weights.parts.items() if c.changed}
    same = sum(c.tensors for c in weights.parts.values() if not c.changed)
    lines: list[RenderableType] = []
    for names, which in ((weights.only_a, "first"), (weights.only_b, "second")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(Text(f"only in the {which}: {', '.join(names[:3])}{more}", style="yellow"))
    if not changed:
        return [*lines, Text("parameters: all the same")]
    table = Table(title="Parameters", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("where")
    table.add_column("part")
    table.add_column("tensors changed", justify="right")
    table.add_column("|b − a| / |a|", justify="right")
    for (where, part), change in sorted(changed.items(), key=_order):
        table.add_row(where, part, f"{change.changed} of {change.tensors}", _relative(change))
    if same:
        table.caption, table.caption_justify = f"the same in both: {same} more", "left"
    lines.append(table)
    by_layer = {layer: c.relative for layer, c in weights.layers.items() if c.changed}
    if by_layer:
        most = max(by_layer, key=lambda layer: by_layer[layer])
        least, largest = short(min(by_layer.values())), short(by_layer[most])
        lines.append(
            Text(
                f"layers changed: {len(by_layer)} of {len(weights.layers)}, by {least} to {largest} "
                f"of their norm, most in layer {most}"
            )
        )
    return lines


def _order(item: tuple[tuple[str, str], Change]) -> tuple[bool, int, str]:
    where, part = item[0]
    return (where != BASE, int(where.split()[-1]) if where != BASE else 0, part)


def _relative(change: Change) -> str:
    return "new (was zero)" if math.isinf(change.relative) else short(change.relative)


def _slots(found: Diff) -> Text:
    said = [
        f"{verb} {', '.join(map(str, slots))}"
        for verb, slots in (("filled", found.filled), ("emptied", found.emptied))
        if slots
    ]

    def used(manifest: Manifest) -> str:
        if "count" not in manifest.slots:
            return "none known"
        return f"{len(manifest.slots['used'])} of {manifest.slots['count']} used"

    return Text(f"slots: {used(found.a)} → {used(found.b)}; {', '.join(said) or 'the same ones'}")


def _figures(found: Diff) -> RenderableType:
    if not found.figures:
        return Text("figures: none in either")
    table = Table(title="Figures", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("state", "figure"):
        table.add_column(name)
    for name in (found.a.id[:8], found.b.id[:8], "difference"):
        table.add_column(name, justify="right")
    for (state, name), (a, b) in found.figures.items():
        table.add_row(
            STATES[state],
            name.replace("_", "-"),
            _value(a, name),
            _value(b, name),
            _gain(a, b, name),
        )
    table.caption = "95 % intervals; every night asks its own questions"
    table.caption_justify = "left"
    return table


def _value(found: Figure | None, name: str) -> str:
    if found is None:
        return "-"
    if name not in RATES:
        return short(found.value)
    if found.interval is None:
        return percent(found.value)
    low, high = found.interval
    return f"{percent(found.value)} ({100 * low:.0f}-{100 * high:.0f})"


def _gain(a: Figure | None, b: Figure | None, name: str) -> str:
    if a is None or b is None:
        return "-"
    gain = b.value - a.value
    return (
        f"{100 * gain:+.1f} points"
        if name in RATES
        else f"{'+' if gain >= 0 else '-'}{short(abs(gain))}"
    )


def _config(config: Mapping[str, tuple[Any, Any]]) -> RenderableType:
    if not config:
        return Text("settings: the same")
    table = Table(title="Settings", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("key", "first", "second"):
        table.add_column(name)
    for key, (a, b) in config.items():
        table.add_row(Text(key), Text(str(a)), Text(str(b)))
    return table


def _from_to(figures: Mapping[str, Any], name: str) -> str:
    before, after = figure(figures, "before", name), figure(figures, "after", name)
    if after is None:
        return ""
    now = percent(after.value, 0)
    return f"{percent(before.value, 0)} → {now}" if before else now


def _date(created: str) -> str:
    return f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M}" if created else "no date"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
