"""Text for a terminal: what users and models write is data, and is shown as it is.

All of it goes through ``Text``. Rich itself would pass escape sequences on to the terminal, which
could move the cursor or rename the window, and would drop a few other characters.
"""

from __future__ import annotations

import re
from typing import Any

from rich import text as rich_text
from rich.console import Console
from rich.style import Style

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"  # invisible, or turning the direction of writing
    "\ud800-\udfff]"  # halves of a character, which cannot be encoded
)


def show(text: str) -> str:
    r"""Return a text with what cannot be seen written out: an escape character as ``\x1b``."""
    return _HIDDEN.sub(lambda found: ascii(found.group())[1:-1], text)


AnyText = rich_text.Text
"""What rich's functions return: a type to annotate with, not to build texts with."""


class Text(AnyText):
    """Rich's text, with what cannot be seen written out. Markup in it is not interpreted."""

    def __init__(self, text: str = "", style: str | Style = "", **layout: Any) -> None:
        super().__init__(show(text), style, **layout)

    def append(self, text: rich_text.Text | str, style: str | Style | None = None) -> Text:
        """Append text; strings are shown as in a new ``Text``."""
        super().append(show(text) if isinstance(text, str) else text, style)
        return self


class PlainConsole(Console):
    """A console on which a ``str`` is data: neither markup nor emoji names are interpreted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> rich_text.Text:
        """Show a string as ``Text`` does; called for each string that is printed or in a table."""
        return super().render_str(show(text), **options)
