"""``sleeprl report`` writes over nothing but a report of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sleeprl import cli
from sleeprl.reporting.report import write_report
from sleeprl.utils.files import DamagedFile


def test_a_report_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "p", "step": 1, "loss": 1.0}\n')
    path = write_report(tmp_path)
    page = path.read_text()
    path.write_text(page.replace("loss", "lost"))
    write_report(tmp_path)
    assert path.read_text() == page


@pytest.mark.parametrize("page", [b"<html>mine</html>", b"", b"\xff\xfe"])
def test_a_page_of_somebody_else_stays(tmp_path: Path, page: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "report.html").write_bytes(page)
    with pytest.raises(FileExistsError, match=r"report\.html is not a report of sleepRL"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == page


def test_any_directory_is_not_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sleeprl", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "is not a run directory: it has none of config.yaml" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[1]", "null", "3", "\x00"])
def test_a_damaged_summary_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(DamagedFile, match=r"summary\.json is damaged"):
        write_report(tmp_path)
