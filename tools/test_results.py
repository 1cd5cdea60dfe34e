"""Stores the results of test runs, and generates the tables of docs/development/testing.md.

    python tools/test_results.py ci      after `.ci/run`: benchmarks/results/ci.json
    python tools/test_results.py soak    after `make soak`: benchmarks/results/soak.json
    python tools/test_results.py table   the tables alone

`.ci/run` writes the seconds of its steps to build/ci-steps.txt; pytest writes its cases to
build/NAME.xml.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD, RESULTS = ROOT / "build", ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "development" / "testing.md"


def describe_run() -> dict[str, Any]:
    """Describe the run: commit, whether the tree differs from it, date, and number of cores."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = [line for line in git("status", "--porcelain").splitlines() if "results/" not in line]
    return {
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "changed_files": len(changed),
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
    }


def read_cases(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """Yield each test case of a JUnit file: its file, name, result, and seconds."""
    for case in ET.parse(path).getroot().iter("testcase"):
        ended = {child.tag for child in case} & {"failure", "error", "skipped"}
        file = case.get("classname", "").replace(".", "/") + ".py"
        yield file, case.get("name", ""), next(iter(ended), "passed"), float(case.get("time", 0))


def summarise(path: Path) -> list[dict[str, Any]]:
    """Summarise a JUnit file per folder, and per file of the scenarios: tests, skipped tests, seconds."""
    rows: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"tests": 0, "skipped": 0, "seconds": 0.0}
    )
    for file, _, ended, seconds in read_cases(path):
        folder, name = file.rpartition("/")[::2]
        row = rows[file if folder.endswith("scenarios") else folder or name]
        row["tests"] += 1
        row["skipped"] += ended == "skipped"
        row["seconds"] += seconds
    return [{"where": where, **rows[where]} for where in sorted(rows)]


def write_json(name: str, value: Any) -> None:
    (RESULTS / name).write_text(json.dumps(value, indent=2) + "\n")


def keep_ci() -> None:
    """Store the result of a run of `.ci/run`."""
    steps = [line.split() for line in (BUILD / "ci-steps.txt").read_text().splitlines()]
    value = {
        "command": "bash .ci/run",
        **describe_run(),
        "steps": {name: int(seconds) for name, seconds in steps},
        "test": summarise(BUILD / "test.xml"),
        "test-slow": summarise(BUILD / "test-slow.xml"),
    }
    write_json("ci.json", value)


def keep_soak() -> None:
    """Update the entries of the tests that ran; the others stay as they are."""
    path = RESULTS / "soak.json"
    tests = json.loads(path.read_text())["tests"] if path.is_file() else {}
    about = describe_run()
    for file, name, ended, seconds in read_cases(BUILD / "soak.xml"):
        tests[f"{file}::{name}"] = {"result": ended, "seconds": round(seconds), **about}
    write_json("soak.json", {"command": "make soak", "tests": dict(sorted(tests.items()))})


def format_minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def ci_table() -> str:
    """Generate the tables of the last CI run."""
    path = RESULTS / "ci.json"
    if not path.is_file():
        return "No run is stored yet."
    run = json.loads(path.read_text())
    lines = [
        f"`{run['command']}` on {run['date']}, commit `{run['commit']}`, {run['cores']} cores:",
        "",
        "| step | minutes |",
        "|---|---:|",
        *(f"| {name} | {format_minutes(seconds)} |" for name, seconds in run["steps"].items()),
        f"| **in all** | **{format_minutes(sum(run['steps'].values()))}** |",
        "",
        "The seconds below are those of each test by the clock, added up; two run side by side.",
        "",
        "| step | where | tests | skipped | minutes |",
        "|---|---|---:|---:|---:|",
    ]
    for step in ("test", "test-slow"):
        for row in run[step]:
            minutes = format_minutes(row["seconds"])
            lines.append(
                f"| {step} | `{row['where']}` | {row['tests']} | {row['skipped']} | {minutes} |"
            )
    return "\n".join(lines)


def soak_table() -> str:
    """Generate the table of the soak tests."""
    path = RESULTS / "soak.json"
    tests = json.loads(path.read_text())["tests"] if path.is_file() else {}
    if not tests:
        return "No result is stored yet."
    lines = ["| test | result | minutes | commit | date |", "|---|---|---:|---|---|"]
    for name, test in tests.items():
        short = name.removeprefix("tests/").replace("|", "\\|")
        lines.append(
            f"| `{short}` | {test['result']} | {format_minutes(test['seconds'])} "
            f"| `{test['commit']}` | {test['date']} |"
        )
    return "\n".join(lines)


def draw(page: str) -> str:
    """Replace the generated parts of the page."""
    for name, table in (("ci", ci_table()), ("soak", soak_table())):
        part = re.compile(f"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page, count = part.subn(lambda found, t=table: f"{found[1]}\n{t}\n\n{found[2]}", page)
        assert count == 1, f"{PAGE} has {count} parts named {name}"
    return page


def main() -> None:
    {"ci": keep_ci, "soak": keep_soak, "table": lambda: None}[sys.argv[1]]()
    PAGE.write_text(draw(PAGE.read_text()))


if __name__ == "__main__":
    main()
