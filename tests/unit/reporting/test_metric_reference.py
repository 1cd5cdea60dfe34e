"""The reference of metrics says what a run writes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import sleeprl
from sleeprl.reporting import metric_reference
from sleeprl.reporting.metric_reference import METRIC_REFERENCE, undocumented_keys

PACKAGE = Path(sleeprl.__file__).parent


def test_an_unknown_key_is_found_wherever_it_is() -> None:
    rows = [{"time": 1.0, "phase": "dreaming", "dream/pg": 0.1, "age_seconds": [1.0]}, {"new": 1}]
    assert undocumented_keys(rows) == ["new"]
    summary = {
        "seconds": {"any_phase": 1.0},
        "after": {"recall": 0.5, "n": {"recall": 10}, "speed": 3},
        "samples": [{"title": "a"}, {"text": "b", "deep": {"er": 1}}],
        "gate": {"forgotten": []},
    }
    assert undocumented_keys(summary=summary) == ["after.speed", "samples[].deep.er"]


def test_every_key_is_described_once_and_in_a_sentence() -> None:
    keys = [(metric.file, metric.key) for metric in METRIC_REFERENCE]
    assert len(keys) == len(set(keys))
    for metric in METRIC_REFERENCE:
        assert metric.meaning[0].isupper() and metric.meaning.endswith("."), metric.key


def test_the_reference_describes_nothing_that_is_not_written() -> None:
    own = Path(metric_reference.__file__)
    source = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p != own)
    for metric in METRIC_REFERENCE:
        names = metric.key.replace("/", ".").replace("[]", "").split(".")
        for name in (name for name in names if name != "*"):
            assert f'"{name}"' in source or f"{name}=" in source, f"{metric.key}: who writes it?"
