"""The figures of a night as a person reads them: intervals, units, one sentence.

Read from ``summary.json``, of which any part may still be missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Any]

# key in summary.json -> the name a reader sees
STATES = {
    "before": "Before",
    "before_with_context": "Before, text in prompt",
    "fine_tuned": "Plain fine-tuning",
    "after": "After the night",
}
_PICTURED = "fine_tuning"  # the baseline whose figures are `fine_tuned` too
RATES = {"recall": "Recall", "two_hop": "Two-hop", "retention": "Retention"}
_Z95 = 1.959963984540054


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; ``n`` > 0 independent trials."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials is not a proportion")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Figure:
    """A measured value, how many trials it rests on, and its 95 % interval (None: no n)."""

    value: float
    n: int | None = None
    interval: tuple[float, float] | None = None


def figure(summary: Summary, state: str, name: str) -> Figure | None:
    """One figure of one state; None when it was not measured. Rates get an interval."""
    block = summary.get(state) or {}
    value, n = block.get(name), (block.get("n") or {}).get(name)
    if value is None:
        return None
    if not n:
        return Figure(value)
    if name not in RATES:
        return Figure(value, n)
    return Figure(value, n, wilson_interval(round(value * n), n))


def measured(summary: Summary) -> list[tuple[str, str, Summary]]:
    """Every state with figures, in the order of a table: its key, the name a reader sees, and
    where ``figure`` finds it. The baselines stand before the state after the night."""
    states = [(key, label, summary) for key, label in STATES.items() if summary.get(key)]
    baselines = summary.get("baselines") or {}
    others = [
        (key, block.get("title") or title(key), baselines)
        for key, block in baselines.items()
        if block and key != _PICTURED
    ]
    last = len(states) - bool(summary.get("after"))
    return [*states[:last], *others, *states[last:]]


def percent(rate: float, digits: int = 1) -> str:
    return f"{100 * rate:.{digits}f} %"


def short(value: float) -> str:
    """A number in at most about six characters."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """'0.42 s', '12.3 s', '3 min 05 s', '1 h 02 min'."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def title(key: str) -> str:
    """'self_study' -> 'Self study'."""
    return key.replace("_", " ").capitalize()


def headline(summary: Summary) -> str:
    """The night in one sentence, of whatever has been measured.

    ``slept_on`` in the summary ('20 new people') says what the experience was.
    """
    if not summary:
        return "This night is not finished."
    subject = f"Slept on {summary['slept_on']}" if summary.get("slept_on") else "One night"
    parts = [_change(summary, "recall"), _change(summary, "retention")]
    told = ", ".join(part for part in parts if part) or "no morning figures yet"
    return f"{subject}: {told}{_verdict(summary)}."


def comparison(summary: Summary) -> str:
    """What the figures are to be held against, in one sentence; '' when not measured."""
    parts = []
    if context := figure(summary, "before_with_context", "recall"):
        parts.append(f"with the text in its prompt the same model recalls {percent(context.value)}")
    tuned = [
        f"{RATES[name].lower()} {percent(found.value)}"
        for name in ("recall", "retention")
        if (found := figure(summary, "fine_tuned", name))
    ]
    if tuned:
        parts.append(f"plain fine-tuning on the same experience reaches {', '.join(tuned)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _change(summary: Summary, name: str) -> str:
    before, after = figure(summary, "before", name), figure(summary, "after", name)
    if after is None:
        return f"{name} {percent(before.value)} before" if before else ""
    if before is None:
        return f"{name} {percent(after.value)}"
    digits = 0 if abs(after.value - before.value) >= 0.02 else 1
    return f"{name} {percent(before.value, digits)} → {percent(after.value, digits)}"


def _verdict(summary: Summary) -> str:
    gate = summary.get("gate") or {}
    if "passed" not in gate:
        return ""
    if not gate["passed"]:
        return "; gate refused it, rolled back"
    alone = gate.get("tolerance", 0.0) is None
    return "; gate passed on the perplexity alone" if alone else "; gate passed"
