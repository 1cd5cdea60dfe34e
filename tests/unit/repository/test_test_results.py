"""What test runs came to: read from pytest's files, kept, and drawn."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

CASES = """<testsuites><testsuite>
<testcase classname="tests.unit.data.test_lake" name="test_a" time="0.5"/>
<testcase classname="tests.unit.data.test_lake" name="test_b[x]" time="1.0"><skipped/></testcase>
<testcase classname="tests.scenarios.test_night" name="test_c" time="61"><failure>no</failure></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("results", ROOT / "tools" / "test_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_is_stored(tool: Any) -> None:
    page = tool.PAGE.read_text()
    assert tool.draw(page) == page, "run: python tools/test_results.py table"


def test_a_ci_run_is_summed_by_folder_and_drawn(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "BUILD", tmp_path)
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    (tmp_path / "ci-steps.txt").write_text("lint 5\ntest 61\n")
    for name in ("test", "test-slow"):
        (tmp_path / f"{name}.xml").write_text(CASES)
    tool.keep_ci()
    found = json.loads((tmp_path / "ci.json").read_text())
    assert found["test"] == [
        {"where": "tests/scenarios/test_night.py", "tests": 1, "skipped": 0, "seconds": 61.0},
        {"where": "tests/unit/data", "tests": 2, "skipped": 1, "seconds": 1.5},
    ]
    table = tool.ci_table()
    assert "| lint | 0:05 |" in table and "| **in all** | **1:06** |" in table
    assert "| test-slow | `tests/scenarios/test_night.py` | 1 | 0 | 1:01 |" in table


def test_a_part_of_the_soak_leaves_the_other_results(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "BUILD", tmp_path)
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    (tmp_path / "soak.xml").write_text(CASES)
    tool.keep_soak()
    (tmp_path / "soak.xml").write_text(CASES.replace("test_a", "test_d"))
    tool.keep_soak()
    tests = json.loads((tmp_path / "soak.json").read_text())["tests"]
    assert tests["tests/unit/data/test_lake.py::test_a"]["result"] == "passed"
    assert tests["tests/unit/data/test_lake.py::test_d"]["result"] == "passed"
    assert tests["tests/scenarios/test_night.py::test_c"]["result"] == "failure"
    assert all(test["commit"] and test["date"] for test in tests.values())
