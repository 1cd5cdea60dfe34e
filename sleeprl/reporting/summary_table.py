"""The morning's figures for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table

from sleeprl.reporting.summary_view import (
    Figure,
    Summary,
    format_duration,
    format_number,
    format_percent,
    measured_states,
    read_figure,
    read_rates,
)
from sleeprl.reporting.terminal import Flow
from sleeprl.utils.terminal_text import Text

PERPLEXITY = "perplexity"
_LOST_SHOWN = 5
_LABEL_WIDTH = 16
"""Columns that the name of a state needs; longer ones are wrapped."""


@dataclass(frozen=True)
class BeforeAfterTable:
    """Rates in percent with 95 % Wilson intervals, and the perplexity, of every measured state.

    On a narrow terminal the columns are shared out over several tables. No figure is cut off.
    """

    summary: Summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("Before and after the night", style="italic")
        yield from self._fitting_tables([*read_rates(self.summary), PERPLEXITY], console, options)
        yield Flow.of(["95 % intervals", self._questions()], "dim italic")
        if scores := self._scores():
            yield Flow.of(scores, "dim italic")

    def _fitting_tables(
        self, names: Sequence[str], console: Console, options: ConsoleOptions
    ) -> Iterator[Table]:
        """Yield tables of these figures that fit into the width, as few as are needed."""
        labels = max(
            (Text(label).cell_len for _, label, _ in measured_states(self.summary)), default=0
        )
        table = self._table(names)
        width = Measurement.get(console, options.update(width=10_000), table).maximum
        spare = options.max_width - (width - labels)
        if spare >= min(labels, _LABEL_WIDTH) or len(names) == 1:
            yield table
            return
        half = (len(names) + 1) // 2
        yield from self._fitting_tables(names[:half], console, options)
        yield from self._fitting_tables(names[half:], console, options)

    def _table(self, names: Sequence[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
        table.add_column("", overflow="fold")
        titles = read_rates(self.summary)
        for name in names:
            title = "Perplexity" if name == PERPLEXITY else f"{titles[name]} %"
            table.add_column(Text(title), justify="right", no_wrap=True)
        for state, label, block in measured_states(self.summary):
            cells = [_cell(read_figure(block, state, name), name) for name in names]
            style = "bold" if state == "after" else ""
            table.add_row(Text(label), *cells, style=style)
        return table

    def _scores(self) -> list[str]:
        """Return how the answers of the last state score by exact match and by F1.

        The rates of the table are of answers that contain the right one.
        """
        states = measured_states(self.summary)
        block = states[-1][2].get(states[-1][0]) or {} if states else {}
        exact, f1 = block.get("exact_match") or {}, block.get("f1") or {}
        scores = [
            f"{title.lower()} {format_percent(exact[name])} and {format_percent(f1[name])}"
            for name, title in read_rates(self.summary).items()
            if exact.get(name) is not None and f1.get(name) is not None
        ]
        return (
            ["rates: answers that contain the right one; exact match and F1:", *scores]
            if scores
            else []
        )

    def _questions(self) -> str:
        """Return how many questions were measured of the last state, by rate."""
        states = measured_states(self.summary)
        if not states:
            return ""
        state, _, block = states[-1]
        measured = {
            title: read_figure(block, state, name)
            for name, title in read_rates(self.summary).items()
        }
        counts = [
            f"{title.lower()} {found.n}" for title, found in measured.items() if found and found.n
        ]
        return f"questions: {', '.join(counts)}" if counts else ""


def night_result(summary: Summary, run_dir: Path, generations: Path) -> RenderableType:
    """Return what a night prints at its end: figures, report, and generation or what was lost.

    Args:
        summary: The run's ``summary.json``.
        run_dir: Directory of the run.
        generations: Directory of the generations.
    """
    parts: list[RenderableType] = [
        BeforeAfterTable(summary),
        Text(),
        Text(_describe_time(summary)),
        Text(f"Report: {run_dir / 'report.html'}", overflow="fold"),
    ]
    if summary["generation"]:
        parts.append(Text(f"Generation: {generations / summary['generation']}", overflow="fold"))
        return Group(*parts)
    return Group(*parts, *_refusal(summary["gate"]))


def _describe_time(summary: Summary) -> str:
    """Return how long the night took, and how much of it only waited for processes to start."""
    wall, starting = summary["wall_seconds"], summary["seconds"]["starting"]
    return (
        f"Time: {format_duration(wall)}, {format_duration(starting)} of it "
        f"({format_percent(starting / wall, 0)}) starting processes"
    )


def _refusal(gate: Mapping[str, Any]) -> list[Text]:
    lines = [Text(f"No generation: {gate['refused']}")]
    lost = gate["forgotten"]
    lines += [
        Text(f"  lost: {each['question']} {each['before']} → {each['after']}")
        for each in lost[:_LOST_SHOWN]
    ]
    if lost:
        lines.append(Text(f"All {len(lost)} of what was lost: the report"))
    return lines


def _cell(found: Figure | None, name: str) -> str:
    if found is None:
        return "-"
    if name == PERPLEXITY:
        return format_number(found.value)
    value = f"{100 * found.value:.0f}"
    if found.interval is None:
        return value
    low, high = found.interval
    return f"{value} ({100 * low:.0f}-{100 * high:.0f})"
