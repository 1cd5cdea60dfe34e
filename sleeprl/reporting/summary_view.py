"""Formats the figures of a night for a reader: intervals, units, one sentence.

Everything is read from ``summary.json``, of which any part may still be missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sleeprl.evaluation.metrics import METRICS
from sleeprl.evaluation.statistics import wilson_interval

Summary = Mapping[str, Any]

STATES = {
    "before": "Before",
    "before_with_context": "Before, text in prompt",
    "fine_tuned": "Plain fine-tuning",
    "after": "After the night",
}
"""Names of the measured states, by their key in ``summary.json``, in the order of a table."""
_FINE_TUNING = "fine_tuning"
"""The baseline whose figures are in ``summary.json`` as ``fine_tuned`` too."""
RATES = {metric.key: metric.label for metric in METRICS}
"""Names of the shares of right answers that every night measures, by their key."""


def read_rates(summary: Summary) -> dict[str, str]:
    """Return names of all shares that a night measured, by their key: plug-ins have theirs."""
    return dict(summary.get("metrics") or RATES)


@dataclass(frozen=True)
class Figure:
    """A measured value."""

    value: float
    n: int | None = None
    """Number of trials it rests on; None where that is not recorded."""
    interval: tuple[float, float] | None = None
    """95 % interval of a rate whose ``n`` is known."""


def read_figure(summary: Summary, state: str, name: str) -> Figure | None:
    """Return one figure of one state, or None where it was not measured. Rates get an interval."""
    block = summary.get(state) or {}
    value, n = block.get(name), (block.get("n") or {}).get(name)
    if value is None:
        return None
    if not n:
        return Figure(value)
    if name == "perplexity":
        return Figure(value, n)
    return Figure(value, n, wilson_interval(round(value * n), n))


def measured_states(summary: Summary) -> list[tuple[str, str, Summary]]:
    """Return every state with figures, the baselines before the state after the night.

    Returns:
        Key, name for a reader, and the block in which ``read_figure`` finds the key.
    """
    states = [(key, label, summary) for key, label in STATES.items() if summary.get(key)]
    baselines = summary.get("baselines") or {}
    others = [
        (key, block.get("title") or humanize_key(key), baselines)
        for key, block in baselines.items()
        if block and key != _FINE_TUNING
    ]
    last = len(states) - bool(summary.get("after"))
    return [*states[:last], *others, *states[last:]]


def format_percent(rate: float, digits: int = 1) -> str:
    """Format a share as '97.8 %'."""
    return f"{100 * rate:.{digits}f} %"


def format_number(value: float) -> str:
    """Format a number in about six characters or fewer."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Format seconds as '0.42 s', '12.3 s', '3 min 05 s' or '1 h 02 min'."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def humanize_key(key: str) -> str:
    """Turn the key 'self_study' into 'Self study'."""
    return key.replace("_", " ").capitalize()


def format_headline(summary: Summary) -> str:
    """Describe the night in one sentence, from what has been measured.

    ``slept_on`` in the summary, such as '20 new people', says what the experience was.
    """
    if not summary:
        return "This night is not finished."
    subject = f"Slept on {summary['slept_on']}" if summary.get("slept_on") else "One night"
    parts = [_format_change(summary, "recall"), _format_change(summary, "retention")]
    changes = ", ".join(part for part in parts if part) or "no morning figures yet"
    return f"{subject}: {changes}{_format_verdict(summary)}."


def format_comparison(summary: Summary) -> str:
    """Describe what to compare the figures with, in one sentence; '' where it was not measured."""
    parts = []
    if context := read_figure(summary, "before_with_context", "recall"):
        parts.append(
            f"with the text in its prompt the same model recalls {format_percent(context.value)}"
        )
    reached = [
        f"{RATES[name].lower()} {format_percent(found.value)}"
        for name in ("recall", "retention")
        if (found := read_figure(summary, "fine_tuned", name))
    ]
    if reached:
        parts.append(f"plain fine-tuning on the same experience reaches {', '.join(reached)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _format_change(summary: Summary, name: str) -> str:
    before, after = read_figure(summary, "before", name), read_figure(summary, "after", name)
    if after is None:
        return f"{name} {format_percent(before.value)} before" if before else ""
    if before is None:
        return f"{name} {format_percent(after.value)}"
    digits = 0 if abs(after.value - before.value) >= 0.02 else 1
    return f"{name} {format_percent(before.value, digits)} → {format_percent(after.value, digits)}"


def _format_verdict(summary: Summary) -> str:
    gate = summary.get("gate") or {}
    if "passed" not in gate:
        return ""
    if not gate["passed"]:
        return "; gate refused it, rolled back"
    perplexity_only = gate.get("tolerance", 0.0) is None
    return "; gate passed on the perplexity alone" if perplexity_only else "; gate passed"
