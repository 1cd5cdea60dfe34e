"""One night over several seeds: recall and retention of Sleep against other methods.

    python benchmarks/night.py                      nights of seeds 0 1 2: table, JSON, picture
    python benchmarks/night.py --tune               the baseline's learning rate, on other seeds

Each seed has fresh people, so the nights are independent. A seed's night is that of ``sleeprl
night``, with plain fine-tuning as a baseline. A second night of the same day has no dreams, and the
methods of a fixed capacity that learn from a self-study as Sleep does. Intervals are 95 %
(Student's t over seeds); comparisons are paired by seed. The trade-off of a model is the harmonic
mean of its recall and of the share of old knowledge that it retains. Results go to
``benchmarks/results/night.json`` and ``night.svg``; tuning to ``night-tuning.json``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from sleeprl.cluster.runtime import cluster
from sleeprl.config import loader as cfg
from sleeprl.evaluation.statistics import interval, paired, trade_off
from sleeprl.night.context import Night
from sleeprl.night.orchestrator import run_evening, run_night
from sleeprl.night.phases import phases_of, rows_of, run_baseline
from sleeprl.night.run_dir import RunDirectory
from sleeprl.reporting.progress import NightProgress
from sleeprl.utils.files import write_json_atomic
from sleeprl.utils.machine import describe_environment

RESULTS = Path(__file__).parent / "results"
LEARNERS = ("fine_tuning_pairs", "replay")
STATES = ("before", "before_with_context", "fine_tuned", *LEARNERS, "without_dreams", "after")
FIGURES = ("recall", "two_hop", "retention", "perplexity")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEEDS = (100, 101)


def traded(state: dict[str, Any], before: dict[str, Any]) -> float:
    """Compute the trade-off of a state against the state before the night."""
    return trade_off(state["recall"], state["retention"], before["retention"])


def nights(seeds: Sequence[int], words: Sequence[str], console: Console) -> dict[str, Any]:
    """Run one night per seed, and combine their figures."""
    summaries = []
    with tempfile.TemporaryDirectory(prefix="sleeprl-benchmark-") as scratch:

        def night(name: str, *more: str) -> dict[str, Any]:
            places = [f"runs={scratch}/runs", f"generations={scratch}/generations"]
            config = cfg.load(None, [*words, *places, f"name={name}", *more])
            summary = run_night(config)
            shutil.rmtree(config.run_dir)
            return {k: v for k, v in summary.items() if k != "samples"}

        for seed in seeds:
            whole = night(f"seed-{seed}", f"seed={seed}")
            bare = ["dreaming.enabled=false", f"baselines=[{','.join(LEARNERS)}]"]
            other = night(f"seed-{seed}-undreamt", f"seed={seed}", *bare)
            undreamt = {"without_dreams": other["after"], **other["baselines"]}
            summaries.append({**whole, **undreamt})
    states = {
        state: {
            figure: dict(zip(("mean", "half_width"), interval(values), strict=True))
            for figure in FIGURES
            if (values := [s[state][figure] for s in summaries])
        }
        for state in STATES
    }
    learned = {state: [traded(s[state], s["before"]) for s in summaries] for state in STATES[2:]}
    return {
        "command": "python benchmarks/night.py",
        "seeds": list(seeds),
        "states": states,
        "trade_off": {state: interval(values) for state, values in learned.items()},
        "ahead_of": {
            state: paired(learned["after"], values)
            for state, values in learned.items()
            if state != "after"
        },
        "recall_of_with_context": interval(
            [s["after"]["recall"] / s["before_with_context"]["recall"] for s in summaries]
        ),
        "retention_change": interval(
            [s["after"]["retention"] - s["before"]["retention"] for s in summaries]
        ),
        "gate_passed": sum(s["gate"]["passed"] for s in summaries),
        "wall_seconds": interval([s["wall_seconds"] for s in summaries]),
        "nights": summaries,
        "environment": describe_environment(),
    }


def tune_baseline(
    rates: Sequence[float], seeds: Sequence[int], tokens: int, words: Sequence[str]
) -> dict[str, Any]:
    """Measure the trade-off of fine-tuning on ``tokens`` at each rate, on seeds that are not reported."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="sleeprl-benchmark-") as scratch:
        for seed in seeds:
            places = [
                f"runs={scratch}",
                f"seed={seed}",
                f"name=seed-{seed}",
                "self_study.replay_questions=0",
            ]
            small = ["self_study.pairs_per_document=2", "self_study.facts_per_document=0"]
            config = cfg.load(None, [*words, *places, *small])
            with NightProgress(rows_of(phases_of(config))) as progress, cluster(config.resources):
                night = Night(RunDirectory(config, progress))
                run_evening(night)
                results = night.run.state["results"]
                results["consolidation"] = {"tokens": tokens}
                for rate in rates:
                    config.fixed_capacity.learning_rate = rate
                    figures = run_baseline(night, "fine_tuning")["figures"]
                    before = results["before"]["before"]
                    rows.append({"seed": seed, "rate": rate, **figures, "before": before})
                    rows[-1]["trade_off"] = traded(figures, before)
                night.close()
    means = {rate: fmean(r["trade_off"] for r in rows if r["rate"] == rate) for rate in rates}
    best = max(means, key=means.__getitem__)
    return {
        "command": "python benchmarks/night.py --tune",
        "tokens": tokens,
        "best": best,
        "means": means,
        "rows": rows,
    }


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"One night, seeds {', '.join(map(str, result['seeds']))} (mean ± 95 %)")
    table.add_column("", no_wrap=True)
    for figure in FIGURES:
        table.add_column(figure, justify="right", no_wrap=True)
    for state, figures in result["states"].items():
        cells = [
            f"{figures[f]['mean']:.2f} ± {figures[f]['half_width']:.2f}"
            if f == "perplexity"
            else f"{figures[f]['mean']:.1%} ± {figures[f]['half_width']:.1%}"
            for f in FIGURES
        ]
        table.add_row(state.replace("_", " "), *cells)
    console.print(table)
    for state, (mean, half) in result["trade_off"].items():
        line = f"trade-off, {state.replace('_', ' ')}: {mean:.3f} ± {half:.3f}"
        if state in result["ahead_of"]:
            ahead, by, p = result["ahead_of"][state]
            line += f"; the night is ahead by {ahead:.3f} ± {by:.3f} (paired t-test, p = {p:.2g})"
        console.print(line)
    mean, half = result["wall_seconds"]
    console.print(f"seconds per night, start of Ray to commit: {mean:.0f} ± {half:.0f}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw recall against retention of each state: one dot per seed, and the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {
        "before": ("o", "#767676"),
        "before_with_context": ("^", "#0072b2"),
        "fine_tuned": ("s", "#d55e00"),
        "fine_tuning_pairs": ("v", "#e69f00"),
        "replay": ("P", "#cc79a7"),
        "without_dreams": ("d", "#56b4e9"),
        "after": ("D", "#009e73"),
    }
    names = {
        "before": "before",
        "before_with_context": "before, with the text in context",
        "fine_tuned": "fine-tuned on the text",
        "fine_tuning_pairs": "fine-tuned on its self-study",
        "replay": "the same, and replay",
        "without_dreams": "the night without dreams",
        "after": "after the night",
    }
    figure, axes = plt.subplots(figsize=(8.6, 4.2))
    for state, (marker, colour) in looks.items():
        xs = [night[state]["retention"] * 100 for night in result["nights"]]
        ys = [night[state]["recall"] * 100 for night in result["nights"]]
        axes.scatter(xs, ys, marker=marker, color=colour, alpha=0.35, s=30)
        axes.scatter(fmean(xs), fmean(ys), marker=marker, color=colour, s=110, label=names[state])
    axes.set_xlabel("retention: old world, without context (%)")
    axes.set_ylabel("recall of the new facts (%)")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)  # beside the points
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = path.name  # drawn again it is the same file
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="key=value for every night")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--tune", action="store_true", help="tune the baseline instead")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument(
        "--tokens", type=int, default=230_000, help="what a tuned baseline trains on"
    )
    arguments = parser.parse_args()
    console = Console()
    RESULTS.mkdir(exist_ok=True)
    if arguments.tune:
        result = tune_baseline(
            arguments.rates, arguments.seeds or TUNING_SEEDS, arguments.tokens, arguments.words
        )
        write_json_atomic(RESULTS / "night-tuning.json", result)
        for rate, value in result["means"].items():
            console.print(f"rate {rate:g}: trade-off {value:.3f}")
        return
    result = nights(arguments.seeds or (0, 1, 2), arguments.words, console)
    write_json_atomic(RESULTS / "night.json", result)
    draw(result, RESULTS / "night.svg")
    show(result, console)


if __name__ == "__main__":
    main()
