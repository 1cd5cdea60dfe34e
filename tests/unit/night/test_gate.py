"""The gate: what must hold before a generation is committed, and what is said where it does not."""

from __future__ import annotations

import math
import platform
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, GateConfig
from sleeprl.night.gate import MIN_QUESTIONS, check_gate
from sleeprl.utils.machine import available_cpus, describe_environment

CONFIG = GateConfig(max_retention_drop=0.02, max_perplexity_ratio=1.25)


def figures(retention: float | None, perplexity: float | None, asked: int = 60) -> dict[str, Any]:
    return {"retention": retention, "perplexity": perplexity, "n": {"retention": asked}}


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ((1.0, 40.0), (1.0, 40.0), []),
        ((1.0, 40.0), (0.98, 50.0), []),  # both at their limits
        ((0.5, 40.0), (0.9, 10.0), []),  # better is never refused
        ((1.0, 40.0), (0.979, 40.0), ["retention fell from 100.0% to 97.9%, more than"]),
        (
            (1.0, 40.0),
            (1.0, 50.1),
            ["rose from 40 to 50.1, more than gate.max_perplexity_ratio=1.25 times"],
        ),
        ((1.0, 40.0), (0.5, 900.0), ["retention fell", "perplexity of held-out texts rose"]),
        # Nothing could be asked: the texts alone decide.
        ((None, 3e4), (None, 6e9), ["rose from 3e+04 to 6e+09"]),
        ((None, 3e4), (None, 3e4), []),
        ((1.0, None), (0.9, None), ["retention fell"]),
        ((1.0, None), (1.0, None), []),
        ((None, None), (None, None), ["nothing measured what was known before"]),
        # An overflow is no rise that can be compared.
        ((1.0, 40.0), (1.0, math.inf), ["perplexity"]),
        ((1.0, 40.0), (1.0, math.nan), ["perplexity"]),
    ],
)
def test_what_was_known_must_hold(
    before: tuple[float | None, float | None],
    after: tuple[float | None, float | None],
    refused: list[str],
) -> None:
    told = check_gate(figures(*before), figures(*after), CONFIG)
    assert told["passed"] == (not refused)
    assert all(reason in told["refused"] for reason in refused)
    assert told["refused"].count(";") == max(0, len(refused) - 1) + (before == (None, None))


@pytest.mark.parametrize(
    ("asked", "perplexity", "passed"),
    [(MIN_QUESTIONS, 40.0, False), (MIN_QUESTIONS - 1, 40.0, True), (2, None, False)],
)
def test_one_slip_in_few_questions_undoes_no_night(
    asked: int, perplexity: float | None, passed: bool
) -> None:
    """Where the texts say that nothing else moved; without any the few are all there is."""
    told = check_gate(figures(1.0, perplexity, asked), figures(0.9, perplexity, asked), CONFIG)
    assert told["passed"] is passed and told["lost"] == pytest.approx(0.1)
    assert told["tolerance"] == (None if passed else CONFIG.max_retention_drop)


SHARES, PERPLEXITIES = st.floats(0, 1), st.floats(1, 1e6)


@given(SHARES, SHARES, PERPLEXITIES, PERPLEXITIES)
def test_each_measure_can_refuse_alone(
    known: float, kept: float, before: float, after: float
) -> None:
    def passed(retention: bool, perplexity: bool) -> bool:
        pairs = [(known, kept)] * retention or [(None, None)]
        more = [(before, after)] * perplexity or [(None, None)]
        old, new = (figures(a, b) for a, b in zip(*pairs, *more, strict=True))
        return bool(check_gate(old, new, CONFIG)["passed"])

    assert passed(True, True) == (passed(True, False) and passed(False, True))


def test_a_gate_always_has_texts_to_measure() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.perplexity_texts=0 must be greater than 0"):
        cfg.load(None, ["evaluation.perplexity_texts=0"])


def test_a_figure_says_on_what_machine_it_was_measured() -> None:
    told = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", told.read_text() if told.is_file() else "")
    expected = [platform.machine(), *models[:1], f"{available_cpus()} cores"]
    assert describe_environment()["machine"] == ", ".join(expected)
