"""Texts of users and models are printed as they are, whatever is in them, and one helper sees to it."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from typer.testing import CliRunner

from sleeprl import cli
from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind, failure_panel
from sleeprl.cluster.waits import to_stderr
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.terminal import make_console, plan_panel, print_message
from sleeprl.utils.terminal_text import PlainConsole, Text, show
from sleeprl.wake import answer
from tests.support.paths import ROOT

HOSTILE = {
    "[/INST]": "[/INST]",
    "[/x]": "[/x]",
    "[red]no[/red]": "[red]no[/red]",
    "[link=file:///etc/passwd]here": "[link=file:///etc/passwd]here",
    ":smile: [bold]": ":smile: [bold]",
    "a\x1b[2Jb": r"a\x1b[2Jb",
    "a\x1b]0;title\x07b": r"a\x1b]0;title\x07b",
    "a\rb": r"a\rb",
    "a\x08b": r"a\x08b",
    "\x9b31mb": r"\x9b31mb",
    "a\x00b": r"a\x00b",
    "\u202etxt.exe": r"\u202etxt.exe",
    "half \ud83d": r"half \ud83d",
    "Köln, 東京, ی‌ک, 👩‍🔬": "Köln, 東京, ی‌ک, 👩‍🔬",
}


def test_only_what_cannot_be_seen_is_written_out() -> None:
    for text, shown in HOSTILE.items():
        assert show(text) == shown
    assert show("two\nlines\tand a tab") == "two\nlines\tand a tab"


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items(), ids=map(ascii, HOSTILE))
def test_every_way_to_the_terminal_shows_text_as_it_is(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(box=None)
    table.add_column("x")
    table.add_row(text)
    table.add_row(Text(text))
    ways: dict[str, Any] = {
        "string": text,
        "text": Text(text),
        "assembled": Text.assemble(("prompt ", "bold"), text, (text, "dim")),
        "appended": Text("x").append(text),
        "table": table,
        "plan": plan_panel([(text, text)]),
        "panel": failure_panel(ActorFailure(text, Failure(FailureKind.FATAL, text, text))),
    }
    for way, printed in ways.items():
        console = PlainConsole(file=io.StringIO(), width=200)
        console.print(printed)
        assert shown in console.file.getvalue(), way  # type: ignore[attr-defined]
    monkeypatch.setenv("COLUMNS", "200")
    print_message(make_console(), text, "error:", "red")
    to_stderr(text)
    out, err = capsys.readouterr()
    assert (out, err) == (f"error: {shown}\n", f"{shown}\n")
    console = PlainConsole(file=io.StringIO(), width=200)
    progress = NightProgress([("key", text)], console)
    progress.start("key", note=text)
    progress.fail("key", ValueError(text))
    assert console.file.getvalue().count(shown) == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items(), ids=map(ascii, HOSTILE))
def test_an_answer_is_printed_as_the_model_gave_it(
    text: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "answer", lambda lake, asked, model: [text for _ in asked])
    monkeypatch.setattr(cli, "console", stream := PlainConsole(file=io.StringIO(), width=200))
    notes = tmp_path / "notes.txt"
    notes.write_text("Mara lives in Porto.")
    words = ["wake", str(notes), "--lake", str(tmp_path / "lake"), "--ask", "[/x] where?"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.exception
    printed = stream.file.getvalue()  # type: ignore[attr-defined]
    assert f"[/x] where?\n{shown}\n" in printed


@pytest.mark.parametrize("command", ["inspect", "report", "diff", "rollback"])
def test_words_of_a_command_are_data_too(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["[/x]", "[red]"] if command == "diff" else ["[/x]"]
    monkeypatch.setattr(sys, "argv", ["sleeprl", command, *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "[/x]" in capsys.readouterr().err


def test_a_locale_without_the_characters_shows_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1"))
    console = make_console()
    console.print("Köln → 東京")
    sys.stdout.flush()
    assert written.getvalue() == b"K\xf6ln \\u2192 \\u6771\\u4eac\n"


# --- no other way -------------------------------------------------------------------------


HELPER = "utils/terminal_text.py"
PRINTS = {"cluster/warm.py", "cluster/waits.py"}
"""Files with a plain ``print``: a worker's log, and the helper itself."""


def other_ways(path: Path) -> list[str]:
    """Where a file makes rich's own texts or consoles, switches markup on, or prints past them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module="rich.text" | "rich.markup"):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            case ast.ImportFrom(module="rich", names=names) if {n.name for n in names} != {"box"}:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            case ast.Call(func=ast.Name(id="Console")):
                found.append(f"{node.lineno}: a console of its own")
            case ast.Call(func=ast.Name(id="print")) if not str(path).endswith(tuple(PRINTS)):
                found.append(f"{node.lineno}: print")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="typer"), attr="echo" | "secho")):
                found.append(f"{node.lineno}: typer.echo")
            case ast.keyword(arg="markup" | "emoji", value=ast.Constant(value=True)):
                found.append(f"{node.lineno}: markup")
            case ast.Attribute(attr="from_markup" | "from_ansi"):
                found.append(f"{node.lineno}: {node.attr}")
    return found


def test_nothing_reaches_the_terminal_past_the_helper(tmp_path: Path) -> None:
    files = [
        path
        for path in (ROOT / "sleeprl").rglob("*.py")
        if not str(path).endswith(HELPER) and "worlds" not in path.parts
    ]
    assert {str(p.relative_to(ROOT)): f for p in files if (f := other_ways(p))} == {}
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from rich.text import Text\nConsole()\nprint(x)\nText.from_markup(x)\n"
        "c.print(x, markup=True)\ntyper.echo(x)\n"
    )
    assert len(other_ways(bad)) == 6
