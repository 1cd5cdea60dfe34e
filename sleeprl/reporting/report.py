"""Renders a night as one self-contained HTML page: no network, no scripts, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sleeprl.cluster.waits import WAIT_KINDS
from sleeprl.reporting import charts
from sleeprl.reporting.charts import ModelState, Series
from sleeprl.reporting.metrics_log import read_metrics
from sleeprl.reporting.summary_view import (
    STATES,
    Summary,
    format_comparison,
    format_duration,
    format_headline,
    format_number,
    format_percent,
    humanize_key,
    measured_states,
    read_figure,
    read_rates,
)
from sleeprl.utils.files import read_record, write_text_atomic

IMPORTANT = ("loss", "diverg", "jsd", "reward", "recall", "retention", "accuracy", "perplexity")
"""Parts of the metric names that get large charts, the most important first."""
MAX_LARGE = 6
"""Large charts of one phase."""
_PARTS = ("config.yaml", "metrics.jsonl", "summary.json")
"""Files of a run; one of them is enough for a report."""
_MARK = "a night of sleepRL</title>"
"""What the page of every report has, and hardly another page."""
_NOT_METRICS = frozenset({"time", "phase", "step", "not_finite"})


@dataclass(frozen=True)
class Curve:
    """A metric of a phase with its picture."""

    series: Series
    last: float
    """Last finite value; NaN where there is none."""
    not_finite: int
    """Number of values that were NaN or infinite."""
    svg: Markup | None
    """None where the metric never changed."""


@dataclass(frozen=True)
class Distribution:
    """A distribution over a whole phase with its picture."""

    name: str
    middle: str
    """Its mean or median, with the word."""
    svg: Markup


@dataclass(frozen=True)
class PhaseCurves:
    """All metrics of one phase, by the room that they get."""

    key: str
    large: list[Curve]
    small: list[Curve]
    constant: list[Curve]


@dataclass(frozen=True)
class Bar:
    """A stretch of a timeline."""

    label: str
    css: str
    """Its CSS class."""
    start: float
    """In percent of the whole row."""
    width: float
    """In percent of the whole row."""
    seconds: float


@dataclass(frozen=True)
class IdleRow:
    """Idle time of one actor, by the kind of wait."""

    actor: str
    seconds: float
    bars: list[Bar]


def write_report(run_dir: str | Path) -> Path:
    """Render ``report.html`` of a run from its config.yaml, metrics.jsonl and summary.json.

    Each of the three may be missing or partial: an unfinished run is rendered with what is there.

    Args:
        run_dir: Directory of the run.

    Returns:
        Path of the page.

    Raises:
        NotADirectoryError: There is no such run.
        FileExistsError: ``report.html`` is another page.
        DamagedFile: ``summary.json`` cannot be read; the message names it.
    """
    run_dir = Path(run_dir)
    path = _own_page(run_dir)
    summary_path = run_dir / "summary.json"
    summary: Summary = read_record(summary_path, dict) if summary_path.exists() else {}
    rows = read_metrics(run_dir / "metrics.jsonl")
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters |= {
        "duration": format_duration,
        "short": format_number,
        "title": humanize_key,
    }
    page = templates.get_template("report.html.j2").render(
        name=summary.get("name") or run_dir.resolve().name,
        facts=_collect_facts(summary),
        headline=format_headline(summary),
        comparison=format_comparison(summary),
        gate=summary.get("gate") or {},
        generation=summary.get("generation"),
        tradeoff=_draw_tradeoff(summary),
        table=_table_rows(summary),
        rate_names=read_rates(summary),
        phases=collect_curves(rows),
        spreads=collect_distributions(rows),
        timeline=_timeline_bars(_phase_seconds(summary)),
        idle=_idle_rows(summary.get("idle") or {}),
        wait_kinds=WAIT_KINDS,
        samples=summary.get("samples") or [],
        environment=_flatten(summary.get("environment") or {}),
        config=_read_text(run_dir / "config.yaml"),
    )
    write_text_atomic(path, page)
    return path


def _own_page(run_dir: Path) -> Path:
    """Return the path of a run's page; refuse other directories, and pages of somebody else."""
    if not run_dir.is_dir():
        raise NotADirectoryError(f"{run_dir} is not a run directory")
    if not any((run_dir / name).is_file() for name in _PARTS):
        raise NotADirectoryError(
            f"{run_dir} is not a run directory: it has none of {', '.join(_PARTS)}"
        )
    path = run_dir / "report.html"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{path} is not a report of sleepRL; move it away")
    return path


def collect_curves(rows: Sequence[Mapping[str, Any]]) -> list[PhaseCurves]:
    """Return every numeric metric of every phase, phases and metrics in order of appearance.

    Where a resumed run recorded a step again, the last value counts.
    """
    values: dict[str, dict[str, dict[float, float | None]]] = {}
    for row in rows:
        lost = set(row.get("not_finite", ()))
        of_phase = values.setdefault(str(row.get("phase", "run")), {})
        for name, value in row.items():
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in _NOT_METRICS and (numeric or name in lost):
                of_phase.setdefault(name, {})[row.get("step", 0)] = value
    return [_make_phase(key, metrics) for key, metrics in values.items() if metrics]


def collect_distributions(rows: Sequence[Mapping[str, Any]]) -> list[Distribution]:
    """Return the distributions that a run recorded: staleness, age and publish lag.

    Staleness is the age of learned tokens in updates, age that of groups in seconds, and publish lag
    the time after an update until the engines had its weights. A staleness below zero is of a dream
    that a restarted trainer learned from with fewer updates than the engines had when they wrote it.
    """
    updates: dict[int, float] = {}
    for tokens_by_age in _last_values(rows, "staleness_tokens"):
        for age, tokens in tokens_by_age.items():
            updates[int(age)] = updates.get(int(age), 0) + tokens
    ages = [age for of_groups in _last_values(rows, "age_seconds") for age in of_groups]
    lags = _last_values(rows, "publish_lag_seconds")
    found = []
    if updates:
        every_age = range(min(0, *updates), max(0, *updates) + 1)
        bars = [(str(age), updates.get(age, 0)) for age in every_age]
        mean = sum(age * n for age, n in updates.items()) / max(1, sum(updates.values()))
        name = "staleness: tokens by age in updates"
        found.append(
            Distribution(name, f"mean {format_number(mean)}", charts.draw_histogram(name, bars))
        )
    for name, values in (
        ("age: groups by seconds from written to learned", ages),
        ("publish lag: updates by seconds until engines had them", lags),
    ):
        if values:
            middle = f"median {format_duration(median(values))}"
            found.append(
                Distribution(name, middle, charts.draw_histogram(name, charts.make_bins(values)))
            )
    return found


def _last_values(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return a metric's value of each step: the last, where a resumed run recorded it again."""
    found = {
        (row.get("phase"), row.get("step")): row[name] for row in rows if row.get(name) is not None
    }
    return list(found.values())


def _make_phase(key: str, metrics: Mapping[str, Mapping[float, float | None]]) -> PhaseCurves:
    all_series = []
    for name, by_step in metrics.items():
        steps = sorted(by_step)
        all_series.append(Series(name, steps, [by_step[step] for step in steps]))
    moving = [s for s in all_series if len({value for _, value in s.finite}) > 1]
    still = [s for s in all_series if s not in moving]
    large = sorted((s for s in moving if _importance(s.name) < len(IMPORTANT)), key=_by_rank)[
        :MAX_LARGE
    ]
    return PhaseCurves(
        key,
        large=[_make_curve(s, charts.draw_curve(s, large=True)) for s in large],
        small=[_make_curve(s, charts.draw_curve(s, large=False)) for s in moving if s not in large],
        constant=[_make_curve(s, None) for s in still],
    )


def _importance(name: str) -> int:
    return next((i for i, part in enumerate(IMPORTANT) if part in name.lower()), len(IMPORTANT))


def _by_rank(series: Series) -> int:
    return _importance(series.name)


def _make_curve(series: Series, svg: Markup | None) -> Curve:
    finite = series.finite
    last = finite[-1][1] if finite else float("nan")
    return Curve(series, last, len(series.values) - len(finite), svg)


def _draw_tradeoff(summary: Summary) -> Markup | None:
    states = [
        ModelState(key, label, recall, read_figure(summary, key, "retention"))
        for key, label in STATES.items()
        if (recall := read_figure(summary, key, "recall"))
    ]
    gate = summary.get("gate") or {}
    floor = None
    if gate.get("retention_before") is not None and gate.get("tolerance") is not None:
        floor = gate["retention_before"] - gate["tolerance"]
    return charts.draw_tradeoff(states, floor) if states else None


def _table_rows(summary: Summary) -> list[dict[str, Any]]:
    """Return the rows of the before/after table: the figures of each measured state."""
    return [
        {
            "key": key,
            "label": label,
            "cost": _format_cost(where[key]),
            "rates": {name: read_figure(where, key, name) for name in read_rates(summary)},
            "perplexity": read_figure(where, key, "perplexity"),
        }
        for key, label, where in measured_states(summary)
    ]


def _format_cost(block: Mapping[str, Any]) -> str:
    """Describe what a baseline took; '' for a state of the night itself."""
    parts = [f"{block['tokens']:,} tokens"] if block.get("tokens") else []
    parts += [format_duration(block["seconds"])] if block.get("seconds") else []
    return ", ".join(parts)


def _phase_seconds(summary: Summary) -> dict[str, float]:
    """Return the seconds of each phase. ``starting`` is a part of several phases, and none itself."""
    seconds = summary.get("seconds") or {}
    return {key: s for key, s in seconds.items() if s is not None and key != "starting"}


def _timeline_bars(seconds: Mapping[str, float]) -> list[Bar]:
    """Return a bar for each phase, one after the other in their order."""
    total = sum(seconds.values())
    bars, start = [], 0.0
    for key, length in seconds.items() if total else ():
        share = 100 / total
        bars.append(Bar(humanize_key(key), "phase", start * share, length * share, length))
        start += length
    return bars


def _idle_rows(idle: Mapping[str, Mapping[str, float]]) -> list[IdleRow]:
    """Return idle seconds by actor. The bars have one scale: the idlest actor fills its row."""
    longest = max((sum(kinds.values()) for kinds in idle.values()), default=0.0)
    rows = []
    for actor, kinds in idle.items():
        bars, began = [], 0.0
        for kind, seconds in kinds.items():
            if longest > 0 and seconds > 0:
                share = 100 / longest
                bars.append(Bar(kind, f"kind-{kind}", began * share, seconds * share, seconds))
                began += seconds
        rows.append(IdleRow(actor, began, bars))
    return rows


def _collect_facts(summary: Summary) -> list[tuple[str, str]]:
    """Return names and values of the small print under the title."""
    facts = [
        (name, str(summary[name])) for name in ("model", "seed") if summary.get(name) is not None
    ]
    coverage = (summary.get("self_study") or {}).get("replay_coverage")
    if coverage is not None:
        facts.append(("replay covers", f"{format_percent(coverage, 0)} of what it says freely"))
    total = summary.get("wall_seconds") or sum(_phase_seconds(summary).values())
    if not total:
        return facts
    facts.append(("time", format_duration(total)))
    starting = (summary.get("seconds") or {}).get("starting")
    if starting is not None:
        share = format_percent(starting / total, 0)
        facts.append(("starting processes", f"{format_duration(starting)}, {share}"))
    return facts


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as ('a.b', 'value') lines."""
    lines: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
