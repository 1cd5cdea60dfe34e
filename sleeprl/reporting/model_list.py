"""``sleeprl models``: the models that need no hub, as a table and with a word on each."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from sleeprl.models.catalogue import CATALOGUE, cached
from sleeprl.utils.terminal_text import Text


def model_list() -> RenderableType:
    """Return the catalogue's models with size, licence and whether they are in the cache."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("name", overflow="fold")
    for name in ("parameters", "download", "on disk"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cached", no_wrap=True)
    table.add_row("embedded", "3 M", "-", "-", "yes")
    for spec in CATALOGUE.values():
        table.add_row(
            spec.name,
            f"{spec.parameters:,.0f} M",
            f"{spec.download:,.0f} MB",
            f"{spec.disk:,.0f} MB",
            "yes" if cached(spec) else "no",
        )
    notes = {"embedded": "sleepRL's own; knows its made-up world and nothing else (Apache-2.0)"}
    notes |= {
        spec.name: f"{spec.title}; {spec.note} ({spec.licence})" for spec in CATALOGUE.values()
    }
    lines = [Text.assemble((name, "bold"), f": {note}") for name, note in notes.items()]
    return Group(table, Text(), *lines)
