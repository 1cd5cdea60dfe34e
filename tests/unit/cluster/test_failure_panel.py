"""The panel of a failed actor is whole on a narrow terminal, and shows texts as they are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind, failure_panel

FILE = "/home/somebody/a/very/long/path/site-packages/" + "module_" * 12 + "end.py"
TRACE = f'Traceback (most recent call last):\n  File "{FILE}", line 1234, in [red]step[/]\n    boom'


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_panel_is_whole_at_any_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    logs = tmp_path / "ray" / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-ab-4321.err").write_text(":job_id:01\n" + "x" * 150 + " [bold]last words[/]\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    message = "ValueError: reward '[red]' gave [1, 2] for a dream"
    error = ActorFailure("reward-0.[i]score", Failure(FailureKind.FATAL, message, TRACE, pid=4321))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(failure_panel(error))
    lines = console.export_text().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    content = "".join(line.strip("│ ") for line in lines).replace(" ", "")
    for whole in (message, FILE, "line 1234, in [red]step[/]", "x" * 150, "[bold]last words[/]"):
        assert whole.replace(" ", "") in content
    assert "reward-0.[i]score failed (fatal)" in lines[0] and "…" not in content


def test_a_long_message_is_shortened_and_says_so() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    failure = Failure(FailureKind.RETRYABLE, "many words " * 100)
    console.print(failure_panel(ActorFailure("engine-0.rollout", failure)))
    assert "…" in console.export_text()
