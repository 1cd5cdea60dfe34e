"""What every command prints with: the console, and pieces that stay whole on narrow terminals.

Texts of users and models are data. Everything here takes them as ``Text`` or plain ``str`` without
markup, so a run named ``[red]`` is printed as it is.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table

from sleeprl.utils.terminal_text import AnyText, PlainConsole, Text

GAP = "  "


def make_console(*, stderr: bool = False) -> Console:
    """Create the console of a command.

    It draws live displays only where a person can watch one: on a terminal that moves its cursor,
    and not in a CI job. Rich leaves out escape codes where the output is no terminal, unless
    FORCE_COLOR asks for them; a live display would be unreadable there even so.
    """
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):  # a locale that lacks a character shows its code instead
        stream.reconfigure(errors="backslashreplace")
    watched = stream.isatty() and os.environ.get("CI", "").lower() in ("", "0", "false")
    return PlainConsole(stderr=stderr, force_interactive=None if watched else False)


def print_message(console: Console, text: str, label: str = "", style: str = "") -> None:
    """Print a message for a person.

    On a terminal it wraps between words. A path or a command without spaces stays in one piece, so
    that it can be copied. Elsewhere a message is one line, so that it can be searched.

    Args:
        console: Where to print.
        text: The message; markup in it is printed as it is.
        label: What stands before it, such as ``error:``.
        style: Style of the label or, without one, of the message.
    """
    # A word of the shell that is no UTF-8 cannot be printed as it is.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    lines = (f"{label} {text}" if label else text).split("\n")
    if console.is_terminal:
        wrap = partial(
            textwrap.fill, width=console.width, break_long_words=False, break_on_hyphens=False
        )
        lines = [wrap(line) for line in lines]
    message = Text("\n".join(lines))
    message.stylize(style, 0, len(label) or len(message))
    console.print(message, soft_wrap=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the progress bars of transformers, and remarks of DeepSpeed, out of a night's display.

    Errors of both are shown.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    had_bars, deepspeed = not are_progress_bars_disabled(), logging.getLogger("DeepSpeed")
    transformers_logging.disable_progress_bar()  # also those of huggingface_hub
    deepspeed.addFilter(is_error)
    try:
        yield
    finally:
        deepspeed.removeFilter(is_error)
        if had_bars:
            transformers_logging.enable_progress_bar()
            enable_progress_bars()


@dataclass(frozen=True)
class Flow:
    """Items on as many lines as they need. A line breaks between items, not inside one.

    Where lines must not wrap, as in a file, all items stand on one line.
    """

    items: Sequence[AnyText]

    @classmethod
    def of(cls, items: Iterable[str | AnyText], style: str = "") -> Flow:
        """Take the items that are not empty; ``style`` is for those without a style of their own."""
        texts = (Text(item, style) if isinstance(item, str) else item for item in items)
        return cls([text for text in texts if text.plain])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        lines: list[AnyText] = []
        for item in self.items:
            fits = lines and lines[-1].cell_len + len(GAP) + item.cell_len <= width
            if lines and (fits or options.no_wrap):
                lines[-1] = Text.assemble(lines[-1], GAP, item)
            else:
                lines.append(item.copy())
        for line in lines:
            line.overflow = None if options.no_wrap else "fold"
            yield line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        if not self.items:
            return Measurement(0, 0)
        words = (word for item in self.items for word in item.plain.split())
        least = max((cell_len(word) for word in words), default=0)
        most = sum(item.cell_len for item in self.items) + len(GAP) * (len(self.items) - 1)
        return Measurement(min(least, options.max_width), min(most, options.max_width))


def plan_panel(lines: Iterable[tuple[str, str]]) -> Panel:
    """Return the plan of a night: names on the left, what they stand for on the right."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(Text(name), Text(text))
    return Panel(table, title="plan", expand=False)
