"""Draws the report's pictures as SVG, which the page's CSS colours in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from sleeprl.reporting.summary_view import Figure, format_number, format_percent

MAX_POINTS = 400
"""Points of one curve. More are averaged, because a page must stay light."""
_Point = tuple[float, float]
_Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class ModelState:
    """One model on the map of recall against retention."""

    key: str
    """Its key in ``summary.json``, and its CSS class."""
    label: str
    recall: Figure
    retention: Figure | None


@dataclass(frozen=True)
class Series:
    """One metric of one phase."""

    name: str
    steps: Sequence[float]
    """They do not decrease."""
    values: Sequence[float | None]
    """None where the value was not finite."""

    @property
    def finite(self) -> list[_Point]:
        """Steps and values that are finite."""
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if value is not None]


@dataclass(frozen=True)
class _Axes:
    """Maps data to pixels of the view box, in which y grows downwards."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float
    top: float
    right: float
    bottom: float

    def px(self, x: float) -> float:
        return _interpolate(x, self.x, (self.left, self.right))

    def py(self, y: float) -> float:
        return _interpolate(y, self.y, (self.bottom, self.top))


def draw_tradeoff(states: Sequence[ModelState], floor: float | None = None) -> Markup:
    """Draw recall (x) against retention (y), each state with its 95 % intervals.

    Args:
        states: The measured models. One without retention is a vertical line at its recall.
        floor: Lowest retention that the gate lets pass.
    """
    retentions = [s.retention for s in states if s.retention]
    reach = [edge for f in retentions for edge in (f.interval or (f.value, f.value))]
    reach += [] if floor is None else [floor]
    low, high = (min(reach), max(reach)) if reach else (0.0, 1.0)
    margin = max(0.05 * (high - low), 0.03 - 0.5 * (high - low))  # noise must not fill the picture
    ys = (max(0.0, low - margin), min(1.0, high + margin))
    axes = _Axes((-0.03, 1.03), ys, left=54, top=30, right=446, bottom=370)
    taken: list[_Box] = []
    parts = [
        *_draw_grid(axes, x_ticks=[0, 0.25, 0.5, 0.75, 1.0], y_ticks=round_ticks(*ys, count=5))
    ]
    if floor is not None:
        y, middle = axes.py(floor), (axes.left + axes.right) / 2
        taken.append((middle - 96, y + 4, middle + 96, y + 20))
        parts.append(
            f'<rect class="refused" x="{axes.left}" y="{y:.1f}" width="{axes.right - axes.left}" '
            f'height="{max(0.0, axes.bottom - y):.1f}"/>'
            f'<text class="faint" x="{middle}" y="{y + 16:.1f}" text-anchor="middle">'
            f"the gate refuses below {format_percent(floor)}</text>"
        )
    parts += _draw_arrow(axes, states, taken)
    parts += [_draw_state(axes, state) for state in states]
    parts += _draw_labels(axes, states, taken)
    parts.append(
        f'<text class="axis" x="{(axes.left + axes.right) / 2}" y="406" text-anchor="middle">'
        "recall of what was new →</text>"
        '<text class="axis" x="4" y="15">↑ retention of what was known</text>'
    )
    description = "; ".join(
        f"{s.label}: recall {format_percent(s.recall.value)}"
        + (f", retention {format_percent(s.retention.value)}" if s.retention else "")
        for s in states
    )
    return _make_svg(460, 410, "Recall against retention", description, parts)


def draw_curve(series: Series, *, large: bool) -> Markup:
    """Draw one metric over the steps. Where there are many, values are faint below their moving mean."""
    points = series.finite
    (first_step, first), (last_step, last) = points[0], points[-1]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.06
    ys = (low - margin, high + margin)
    width, height = (420, 190) if large else (230, 120)
    xs = (first_step, last_step if last_step > first_step else first_step + 1)
    axes = _Axes(xs, ys, left=52, top=8, right=width - 12, bottom=height - 24)
    y_ticks = round_ticks(low, high, count=4 if large else 3)
    parts = [*_draw_grid(axes, x_ticks=[xs[0], xs[1]], y_ticks=y_ticks, rates=False)]
    window = _mean_window(series)
    runs = _finite_runs(series)
    faint = "raw" if window > 1 else "line"
    parts += [_draw_path(axes, thin_points(run), faint) for run in runs]
    if window > 1:
        parts += [_draw_path(axes, thin_points(_moving_mean(run, window)), "line") for run in runs]
    if len(points) <= 12:
        parts += [
            f'<circle class="dot" cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="3"/>'
            for x, y in points
        ]
    description = (
        f"from {format_number(first)} at step {format_number(first_step)} to {format_number(last)} at step "
        f"{format_number(last_step)}, lowest {format_number(low)}, highest {format_number(high)}"
    )
    return _make_svg(width, height, series.name, description, parts)


def draw_histogram(name: str, bars: Sequence[tuple[str, float]]) -> Markup:
    """Draw how much falls into each bin; ``bars`` are labels, in order, with counts of 0 or more."""
    highest, total = max(count for _, count in bars), sum(count for _, count in bars)
    axes = _Axes((0, len(bars)), (0, 1.06 * highest), left=52, top=8, right=408, bottom=166)
    parts = _draw_grid(axes, x_ticks=[], y_ticks=round_ticks(0, highest, count=4), rates=False)
    every = math.ceil(len(bars) / 6)  # so many labels have room
    for index, (label, count) in enumerate(bars):
        left, right, top = axes.px(index + 0.06), axes.px(index + 0.94), axes.py(count)
        parts.append(
            f'<rect class="bin" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{max(0.0, axes.bottom - top):.1f}"/>'
        )
        if index % every == 0:
            parts.append(
                f'<text class="tick" x="{axes.px(index + 0.5):.1f}" y="{axes.bottom + 17}" '
                f'text-anchor="middle">{escape(label)}</text>'
            )
    description = "; ".join(
        f"{label}: {format_percent(count / total)}" for label, count in bars if count
    )
    return _make_svg(420, 190, name, description, parts)


def make_bins(values: Sequence[float], count: int = 12) -> list[tuple[str, float]]:
    """Count values in equal bins from 0 to the highest; a label is where its bin begins."""
    width = max(values) / count or 1.0
    counts = [0] * count
    for value in values:
        counts[min(count - 1, int(value / width))] += 1
    return [(format_number(index * width), n) for index, n in enumerate(counts)]


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers within [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin_points(points: Sequence[_Point]) -> list[_Point]:
    """Return at most ``MAX_POINTS`` points: neighbours are averaged, the two ends stay."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil((len(points) - 2) / (MAX_POINTS - 2))
    inner = [points[i : i + size] for i in range(1, len(points) - 1, size)]
    inner[-1] = [point for point in inner[-1] if point is not points[-1]]
    return [points[0], *(_mean_point(chunk) for chunk in inner if chunk), points[-1]]


def _mean_window(series: Series) -> int:
    count = len(series.finite)
    return max(1, count // 25) if count > 50 else 1


def _moving_mean(points: Sequence[_Point], window: int) -> list[_Point]:
    """Return the centred mean of ``window`` values, of fewer at the ends."""
    half, means = window // 2, []
    for i, (step, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        means.append((step, sum(value for _, value in near) / len(near)))
    return means


def _mean_point(points: Sequence[_Point]) -> _Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _finite_runs(series: Series) -> list[list[_Point]]:
    """Return the stretches between values that were not finite, at which the line breaks."""
    runs: list[list[_Point]] = [[]]
    for step, value in zip(series.steps, series.values, strict=True):
        if value is not None:
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _draw_path(axes: _Axes, points: Sequence[_Point], css: str) -> str:
    data = "L".join(f"{axes.px(x):.1f} {axes.py(y):.1f}" for x, y in points)
    return f'<path class="{css}" d="M{data}"/>'


def _draw_grid(
    axes: _Axes, x_ticks: Sequence[float], y_ticks: Sequence[float], rates: bool = True
) -> list[str]:
    lines = []
    for tick, text in zip(y_ticks, _format_ticks(y_ticks, rates), strict=True):
        y = axes.py(tick)
        lines.append(
            f'<line class="grid" x1="{axes.left}" x2="{axes.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{axes.left - 7}" y="{y + 4:.1f}" text-anchor="end">'
            f"{text}</text>"
        )
    for tick in x_ticks:
        x, last = axes.px(tick), tick == x_ticks[-1]
        anchor = "middle" if rates else "end" if last else "start"
        text = format_percent(tick, 0) if rates else f"{'step ' if last else ''}{tick:,.0f}"
        lines.append(
            f'<text class="tick" x="{x:.1f}" y="{axes.bottom + 17}" '
            f'text-anchor="{anchor}">{text}</text>'
        )
    return lines


def _format_ticks(values: Sequence[float], rates: bool) -> list[str]:
    """Format ticks with as few digits as round none of them."""
    scale, unit = (100.0, " %") if rates else (1.0, "")
    scaled = [value * scale for value in values]
    for digits in range(5):
        if all(
            abs(value - round(value, digits)) < 1e-9 * max(map(abs, scaled)) for value in scaled
        ):
            return [f"{value:,.{digits}f}{unit}" for value in scaled]
    return [format_number(value) + unit for value in scaled]


def _draw_arrow(axes: _Axes, states: Sequence[ModelState], taken: list[_Box]) -> list[str]:
    """Draw an arrow from before the night to after it, and add the places that it crosses to ``taken``."""
    places = {s.key: (s.recall.value, s.retention.value) for s in states if s.retention}
    if "before" not in places or "after" not in places:
        return []
    (x0, y0), (x1, y1) = ((axes.px(x), axes.py(y)) for x, y in (places["before"], places["after"]))
    length = math.hypot(x1 - x0, y1 - y0)
    if length < 50:
        return []
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    x0, y0, x1, y1 = x0 + 14 * ux, y0 + 14 * uy, x1 - 16 * ux, y1 - 16 * uy
    head = (
        f"M{x1 - 8 * ux + 4 * uy:.1f} {y1 - 8 * uy - 4 * ux:.1f}L{x1:.1f} {y1:.1f}"
        f"L{x1 - 8 * ux - 4 * uy:.1f} {y1 - 8 * uy + 4 * ux:.1f}"
    )
    for part in range(33):
        x, y = x0 + (x1 - x0) * part / 32, y0 + (y1 - y0) * part / 32
        taken.append((x - 6, y - 3, x + 6, y + 3))
    return [f'<path class="night" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}{head}"/>']


def _draw_state(axes: _Axes, state: ModelState) -> str:
    x = axes.px(state.recall.value)
    if state.retention is None:
        return (
            f'<line class="{state.key} ceiling" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{axes.top}" y2="{axes.bottom}"/>'
        )
    y, bars = axes.py(state.retention.value), ""
    if state.recall.interval:
        low, high = map(axes.px, state.recall.interval)
        bars += f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    if state.retention.interval:
        low, high = map(axes.py, state.retention.interval)
        bars += f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    return f'<g class="{state.key}">{bars}{_draw_mark(state.key, x, y)}</g>'


def _draw_mark(key: str, x: float, y: float) -> str:
    """Draw another shape for each state, so that colour is not needed to tell them apart."""
    outlines = {
        "before_with_context": [(0, -11), (11, 0), (0, 11), (-11, 0)],
        "fine_tuned": [(0, -8), (8, 6), (-8, 6)],
        "before": [(-6, -6), (6, -6), (6, 6), (-6, 6)],
    }
    if key not in outlines:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
    outline = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outlines[key])
    return f'<polygon class="mark" points="{outline}"/>'


def _draw_labels(axes: _Axes, states: Sequence[ModelState], taken: Sequence[_Box]) -> list[str]:
    """Write each state's name next to its mark, where least is in the way."""
    middle = (axes.top + axes.bottom) / 2
    marks = [
        (axes.px(s.recall.value), axes.py(s.retention.value) if s.retention else middle)
        for s in states
    ]
    taken = [*taken, *((x - 10, y - 10, x + 10, y + 10) for x, y in marks)]
    for state, (x, y) in zip(states, marks, strict=True):
        if state.recall.interval and state.retention:
            low, high = map(axes.px, state.recall.interval)
            taken.append((low, y - 2, high, y + 2))
        if state.retention and state.retention.interval:
            low, high = map(axes.py, state.retention.interval)
            taken.append((x - 2, high, x + 2, low))
        if state.retention is None:
            taken.append((x - 2, axes.top, x + 2, axes.bottom))
    texts = []
    for state, (x, y) in zip(states, marks, strict=True):
        width = 8.6 * len(state.label)
        places = [
            (x0, y0, anchor)
            for y0 in (y - 10, y + 20, y - 28, y + 38, y - 46, y + 56, y - 64, y + 74, y + 92)
            for x0, anchor in ((x + 13, "start"), (x - 13, "end"), (x, "middle"))
        ]
        boxes = {place: _text_box(*place, width) for place in places}
        inside = [place for place in places if _is_inside(boxes[place], axes)] or places
        place = min(inside, key=lambda p: sum(_overlap_area(boxes[p], other) for other in taken))
        taken.append(boxes[place])
        x0, y0, anchor = place
        texts.append(
            f'<text class="{state.key} label" x="{x0:.1f}" y="{y0:.1f}" '
            f'text-anchor="{anchor}">{escape(state.label)}</text>'
        )
    return texts


def _text_box(x: float, y: float, anchor: str, width: float) -> _Box:
    left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
    return left, y - 12, left + width, y + 4


def _is_inside(box: _Box, axes: _Axes) -> bool:
    return (
        box[0] >= axes.left
        and box[2] <= axes.right + 10
        and box[1] >= axes.top - 12
        and box[3] <= axes.bottom
    )


def _overlap_area(a: _Box, b: _Box) -> float:
    """Return the area shared by two boxes, in square pixels."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _interpolate(value: float, source: _Point, target: _Point) -> float:
    share = (value - source[0]) / (source[1] - source[0])
    return target[0] + share * (target[1] - target[0])


def _make_svg(width: int, height: int, name: str, description: str, parts: Sequence[str]) -> Markup:
    """Wrap the parts of a picture; a screen reader says its name and description instead."""
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"{name}: {description}")}">'
        f"<title>{escape(name)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )
