"""What a person sees is whole at 60, 80 and 200 columns, and a file has plain lines without escape codes."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

from sleeprl.config.methods import METHODS
from sleeprl.reporting.model_list import model_list
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.terminal import (
    Flow,
    make_console,
    plan_panel,
    print_message,
    quiet_libraries,
)
from tests.support.paths import ROOT

ESCAPE = "\x1b"
WIDTHS = pytest.mark.parametrize("width", [60, 80, 200])
PLAIN = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "CI", "NO_COLOR")}


def lines_of(view: RenderableType, width: int) -> list[str]:
    """What a terminal of this width shows; no line is wider."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(view)
    lines = console.export_text().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    return lines


# --- progress ------------------------------------------------------------------------------


class Screen:
    """A terminal of some size, and what a person sees on it after each print."""

    def __init__(self, width: int, height: int = 24) -> None:
        self._out = io.StringIO()
        self.console = Console(
            file=self._out, force_terminal=True, force_interactive=True, width=width, height=height,
            color_system=None,
        )  # fmt: skip

    def lines(self) -> list[str]:
        """Everything printed, also what was drawn over."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._out.getvalue()).splitlines()


TITLES = [(name, f"Baseline: {method.title}") for name, method in METHODS.items()]
TITLES += [
    ("mine", "[red] a phase of somebody with a title of more than eighty columns, all in all")
]


@WIDTHS
def test_the_live_display_is_whole(width: int) -> None:
    screen = Screen(width)
    now = 0.0
    progress = NightProgress(TITLES, screen.console, clock=lambda: now)
    metrics = {"imitation_reward_new": 0.123, "[bold]mine": 12345.0, "loss": 1.5e-9}
    with progress:
        for key, _ in TITLES:
            progress.start(key, total=150)
            for step in (1, 75, 150):
                now += 700
                progress.update(key, completed=step, **metrics)
            progress.finish(key, "recall 1%, retention 100%; with the text: recall 100%")
    lines = screen.lines()
    assert all(cell_len(line) <= width for line in lines)
    text = "".join("".join(lines).split())
    assert "…" not in text
    for whole in ("imitation_reward_new0.123", "[bold]mine12,345", "loss1.5e-9", "35:00"):
        assert text.count(whole) >= len(TITLES), whole
    assert text.count("withthetext:recall100%") == len(TITLES), "a finished phase is printed once"
    for _, title in TITLES[:-1]:
        assert any(title in line for line in lines), "a title that fits is not wrapped"
    assert "[red]" in text


def test_a_low_terminal_counts_the_phases_to_come() -> None:
    high, low = Screen(80, height=40), Screen(80, height=8)
    for screen in (high, low):
        progress = NightProgress(TITLES, screen.console)
        with progress:
            progress.start(TITLES[0][0])
    waiting = len(TITLES) - 1
    assert any(f"{waiting} phases to come" in line for line in low.lines())
    assert all("phases to come" not in line for line in high.lines())
    assert TITLES[1][1] in "".join(high.lines()) and TITLES[1][1] not in "".join(low.lines())


def test_a_failed_phase_says_all_of_its_first_line() -> None:
    screen = Screen(60)
    error = ValueError("[red] " + "why it failed " * 10 + "\nand a trace")
    with pytest.raises(ValueError), NightProgress(TITLES[:1], screen.console) as progress:
        progress.start(TITLES[0][0])
        raise error
    text = " ".join(" ".join(screen.lines()).split())
    assert "✗" in text and "ValueError: [red] " in text and text.count("why it failed") == 10
    assert "and a trace" not in text


# --- pieces --------------------------------------------------------------------------------


@WIDTHS
def test_the_list_of_models_is_whole(width: int) -> None:
    text = " ".join(" ".join(lines_of(model_list(), width)).split())
    assert "…" not in text
    assert "qwen2.5-coder-1.5b 1,540 M 1,030 MB 3,555 MB" in text
    assert "(Gemma Terms of Use)" in text


@WIDTHS
def test_the_plan_is_whole(width: int) -> None:
    path = "runs/[red]" + "a-long-name-" * 10
    lines = lines_of(plan_panel([("run directory", path), ("ray", "local, 2 cores")]), width)
    assert path in "".join(line.strip("│ ").removeprefix("run directory").strip() for line in lines)


def test_a_flow_breaks_between_items() -> None:
    flow = Flow.of(["recall 5 % → 80 %", "", "two-hop 10 % → 40 %", Text("slots 2/5", "bold")])
    assert lines_of(flow, 40) == ["recall 5 % → 80 %  two-hop 10 % → 40 %", "slots 2/5"]
    assert lines_of(flow, 200) == ["recall 5 % → 80 %  two-hop 10 % → 40 %  slots 2/5"]
    assert lines_of(flow, 12) == ["recall 5 % →", "80 %", "two-hop 10 %", "→ 40 %", "slots 2/5"]


def test_a_message_wraps_between_words_on_a_terminal_and_is_one_line_elsewhere() -> None:
    path = "/a/path/" + "of-more-than-forty-columns" * 2
    text = f"[red] is no name of a run: {path} has one already"
    out = io.StringIO()
    print_message(
        Console(file=out, force_terminal=True, width=40, color_system=None), text, "error:"
    )
    assert path in out.getvalue().splitlines(), "a path is in one piece, to be copied"
    assert " ".join(out.getvalue().split()) == f"error: {text}"
    out = io.StringIO()
    print_message(Console(file=out, width=40), text, "error:")
    assert out.getvalue() == f"error: {text}\n"


def test_live_only_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "CI", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert make_console().is_interactive
    for name, value in (("CI", "true"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not make_console().is_interactive
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not make_console().is_interactive
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not make_console().is_interactive, "colours were asked for, not a display"


def test_libraries_are_quiet_while_a_night_runs(
    tiny_model: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    def load() -> str:
        capfd.readouterr()
        AutoModelForCausalLM.from_pretrained(tiny_model)
        return capfd.readouterr().err

    with quiet_libraries():
        assert "Loading weights" not in load()
        logging.getLogger("DeepSpeed").warning("no GPU here")
        logging.getLogger("DeepSpeed").error("this is wrong")
    assert "no GPU here" not in caplog.text and "this is wrong" in caplog.text
    assert "Loading weights" in load(), "afterwards they are as they were"


# --- the command ---------------------------------------------------------------------------


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sleeprl.cli", *words]


@pytest.mark.parametrize(
    "environment",
    [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "xterm-256color", "CI": "true"}],
)
def test_a_file_has_no_escape_codes(tmp_path: Path, environment: dict[str, str]) -> None:
    for words in (["models"], ["night", "--dry-run", "name='[red]'"], ["night", "wake.peple=1"]):
        done = subprocess.run(
            command(*words), cwd=tmp_path, env={**PLAIN, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ESCAPE not in done.stdout + done.stderr
        assert done.stdout if words != ["night", "wake.peple=1"] else "did you mean" in done.stderr


@pytest.mark.parametrize("width", [60, 80])
def test_on_a_real_terminal_no_line_is_wider_than_it(tmp_path: Path, width: int) -> None:
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {**PLAIN, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        command("models"), cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    content = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        content += part
    assert process.wait(60) == 0
    os.close(ours)
    text = content.decode()
    assert ESCAPE in text
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
    assert max(map(cell_len, lines)) <= width and any("1,540 M" in line for line in lines)
