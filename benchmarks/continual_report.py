"""Table and picture of the chains of ``continual.py``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from sleeprl.config.methods import METHODS
from sleeprl.evaluation.statistics import interval, paired, trade_off

RESULTS = Path(__file__).parent / "results"
CHAINS = RESULTS / "continual"
IN_CONTEXT = "in_context"

LEVELS = ("memory.levels=[{{period: 2, slots: 2}}, {{period: {nights}, slots: {nights}}}]",)
VARIANTS = {
    "gate": ("consolidation.expert_gate=1.0",),
    "narrow": ("memory.width=16",),
    "wide": ("memory.width=256",),
    # Every second night the content of two slots is transferred to one slot, and both are reset.
    "levels": LEVELS,
    "levels_whole": LEVELS,
    # Both stay active beside the slot that learns from them.
    "no_reset": (
        "memory.levels=[{{period: 2, slots: {nights}}}, {{period: {nights}, slots: {nights}}}]",
        "memory.reset=false",
    ),
}
"""Ablations: Sleep with other settings, in chains of their own."""
WHOLE = ("levels_whole", "no_reset")
"""Variants where each transfer has the full token budget, as in ``sleeprl night``; elsewhere they
share it."""
TITLES = {
    IN_CONTEXT: "Text in the prompt",
    "gate": "Sleep, gated experts",
    "narrow": "Sleep, width 16",
    "wide": "Sleep, width 256",
    "levels": "Sleep, two levels",
    "levels_whole": "Sleep, two levels, more tokens",
    "no_reset": "Sleep, no reset, more tokens",
}


ORDER = (IN_CONTEXT, *METHODS, *VARIANTS)


def chains(nights: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Load the records of chains with at least so many nights, truncated, by method and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(CHAINS.glob("*.json")):
        record = json.loads(path.read_text())
        if len(record["nights"]) >= nights:
            record["nights"] = record["nights"][:nights]
            found.setdefault(record["method"], {})[record["seed"]] = record
    return {method: found[method] for method in ORDER if method in found}


def outcome(record: dict[str, Any]) -> dict[str, float]:
    """Compute the figures of one chain after the last night.

    Args:
        record: The record of the chain.

    Returns:
        ``recall`` and ``two_hop``: means over all days. ``learning``: recall of each day on its own
        morning; ``held``: the share of it that remains, over all days but the last.
        ``backward_transfer``: the same as a mean difference (Lopez-Paz & Ranzato, 1706.08840).
        ``trade_off``: see ``statistics.trade_off``. ``tokens``, ``seconds``: per night.
    """
    nights = record["nights"]
    last, fresh = nights[-1], [night["recall"][-1] for night in nights]
    # The last day cannot be forgotten yet.
    then, now = fresh[:-1], last["recall"][:-1]
    return {
        "recall": fmean(last["recall"]),
        "two_hop": fmean(last["two_hop"]),
        "learning": fmean(fresh),
        "held": fmean(now) / max(fmean(then), 1e-9),
        "backward_transfer": fmean(now) - fmean(then),
        "retention": last["retention"],
        "perplexity": last["perplexity"],
        "trade_off": trade_off(fmean(last["recall"]), last["retention"], record["before"]),
        **{name: fmean(night.get(name, 0) for night in nights) for name in ("tokens", "seconds")},
        "parameters": last.get("parameters", 0),
    }


def summarise(nights: int) -> dict[str, Any]:
    """Compute means and intervals of each method, and compare Sleep with it, paired by seed."""
    found = chains(nights)
    of = {m: {s: outcome(record) for s, record in seeds.items()} for m, seeds in found.items()}
    sleep = of.get("seeding", {})
    rows = {}
    for method, seeds in of.items():
        names = next(iter(seeds.values()))
        row: dict[str, Any] = {
            name: interval([figures[name] for figures in seeds.values()]) for name in names
        }
        both = sorted(set(seeds) & set(sleep))
        if method != "seeding" and len(both) > 1:
            ours = [sleep[seed]["trade_off"] for seed in both]
            row["sleep_minus"] = paired(ours, [seeds[seed]["trade_off"] for seed in both])
        rows[method] = {"seeds": sorted(seeds), **row}
    return {"command": "python benchmarks/continual.py", "nights": nights, "methods": rows}


def title(method: str) -> str:
    return TITLES.get(method) or METHODS[method].title


def percent(mean: float, half: float) -> str:
    """Format a percentage; one seed has no interval."""
    return f"{100 * mean:.0f}" + (f" ± {100 * half:.0f}" if math.isfinite(half) else "")


def show(result: dict[str, Any], console: Console) -> None:
    columns = ("recall", "learning", "backward_transfer", "retention", "trade_off")
    caption = f"After {result['nights']} nights (%, mean ± 95 % over seeds; p of each by itself)"
    table = Table(title=caption, box=None, padding=(0, 1, 0, 0))
    headings = (
        "method",
        "n",
        "recall",
        "learnt",
        "transfer",
        "kept",
        "trade-off",
        "Sleep - it (p)",
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for method, row in result["methods"].items():
        cells = [percent(*row[name]) for name in columns]
        against = ""
        if "sleep_minus" in row:
            mean, _, p = row["sleep_minus"]
            against = f"{100 * mean:+.0f} ({p:.2g})"
        table.add_row(title(method), str(len(row["seeds"])), *cells, against)
    console.print(table)


def draw(nights: int, path: Path) -> None:
    """Draw recall of all days so far and retention, night by night, and each day of Sleep over the nights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (*axes, matrix) = plt.subplots(1, 3, figsize=(13.6, 4.4), width_ratios=(1, 1, 0.95))
    # Without the greens, which are Sleep's. A method's colour does not depend on the other methods.
    colours = plt.get_cmap("tab20")([n for n in range(20) if n not in (4, 5)])
    for method, seeds in chains(nights).items():
        number, strong = ORDER.index(method), method == "seeding"
        style = "--" if title(method).startswith("Sleep,") else "-"
        look = {
            "color": "#009e73" if strong else colours[(2 * number + number // 9) % 18],
            "linewidth": 2.6 if strong else 1.3,
            "linestyle": ":" if method == IN_CONTEXT else style,
            "label": title(method),
            "zorder": 3 if strong else 2,
        }
        recall = lambda night: fmean(night["recall"])  # noqa: E731
        for axis, of in zip(axes, (recall, lambda night: night["retention"]), strict=True):
            values = [[of(night) * 100 for night in one["nights"]] for one in seeds.values()]
            axis.plot(range(1, nights + 1), [fmean(at) for at in zip(*values, strict=True)], **look)
    axes[0].set_ylabel("recall of everyone met so far (%)")
    axes[1].set_ylabel("retention of the old world (%)")
    for axis in axes:
        axis.set_xlabel("night")
        axis.set_xticks(range(1, nights + 1))
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _days(matrix, [one["nights"] for one in chains(nights).get("seeding", {}).values()])
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=4
    )
    figure.set_layout_engine("constrained")
    plt.rcParams["svg.hashsalt"] = path.name  # drawn again it is the same file
    figure.savefig(path, metadata={"Date": None})


def _days(axis: Any, lived: list[list[Any]]) -> None:
    """Draw the recall of day i after night j, as a mean over chains."""
    from matplotlib.patches import Rectangle

    axis.set_title(f"{title('seeding')}: recall of each day (%)", fontsize=10)
    axis.set_xlabel("after night")
    axis.set_ylabel("of day")
    for night, at in enumerate(zip(*lived, strict=True)):
        for day, recall in enumerate(zip(*(one["recall"] for one in at), strict=True)):
            mean = fmean(recall)
            corner = (night + 0.5, day + 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, facecolor=(0.0, 0.62, 0.45, mean**2)))
            axis.annotate(
                f"{100 * mean:.0f}", (night + 1, day + 1), ha="center", va="center", fontsize=7,
                color="white" if mean > 0.7 else "black",
            )  # fmt: skip
    count = len(lived[0]) if lived else 1
    axis.set_xlim(0.5, count + 0.5)
    axis.set_ylim(count + 0.5, 0.5)
    axis.set_xticks(range(1, count + 1))
    axis.set_yticks(range(1, count + 1))
    axis.spines[["top", "right"]].set_visible(False)
