"""The gate of a night: decides whether the model may be committed, and commits it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sleeprl.config import loader as cfg
from sleeprl.config.schema import GateConfig
from sleeprl.evaluation.measure import list_forgotten
from sleeprl.lineage import LineageStore, Manifest
from sleeprl.memory.checkpoint import EXPERT, WAKE
from sleeprl.memory.growth import update
from sleeprl.night.model_stages import ModelStages
from sleeprl.night.run_dir import ANSWERS, RunDirectory
from sleeprl.self_study import question_bank

Figures = Mapping[str, Any]
MIN_QUESTIONS = 20
"""Fewest questions for which retention decides. On fewer, one slip would undo a night, so the
perplexity decides; the verdict then states the number of questions."""


def check_gate(before: Figures, after: Figures, config: GateConfig) -> dict[str, Any]:
    """Decide whether a generation may be committed: it must retain the knowledge of its parent.

    Every measured figure must stay within its limit. Retention on few questions counts only where
    there is no perplexity. If neither was measured, the gate refuses.

    Args:
        before: Figures before the night: ``retention`` as a share, None without questions;
            ``perplexity`` of the held-out texts, None without texts; and ``n``, the number of
            questions.
        after: The same after the night.
        config: How far each may fall or rise.

    Returns:
        ``passed``; ``refused``, the reasons, empty where it passes; ``lost`` and ``rise``, the
        compared differences; ``tolerance``, None where retention did not decide; and the figures
        themselves.
    """
    lost = rise = None
    refused = []
    judges = before["n"]["retention"] >= MIN_QUESTIONS or before["perplexity"] is None
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


def commit_generation(run: RunDirectory, stages: ModelStages) -> dict[str, Any]:
    """Commit the grown model as a generation if it passes the gate; otherwise discard it.

    Returns:
        ``gate``, the result of ``check_gate`` with the forgotten questions; ``generation``, the id
        or None; and ``verdict`` in words.
    """
    before, after = run.result("before")["before"], run.result("after")["after"]
    gate = check_gate(before, after, run.config.gate)
    answers = run.dir / ANSWERS
    gate["forgotten"] = list_forgotten(answers / "before.jsonl", answers / "after.jsonl")
    questions = before["n"]["retention"]
    few = f"; questions on retention: {questions}" if questions < MIN_QUESTIONS else ""
    if not gate["passed"]:
        verdict = f"rolled back: {gate['refused']}{few}"
        return {"gate": gate, "generation": None, "verdict": verdict}
    generation = _write_generation(run, stages)
    verdict = f"committed as {generation[:8]}{few}"
    return {"gate": gate, "generation": generation, "verdict": verdict}


def _write_generation(run: RunDirectory, stages: ModelStages) -> str:
    """Commit the model after the last step, and make it HEAD; returns its id."""
    config, plan, last = run.config, run.result("plan"), stages.last_step
    slots, transfer = stages.slots_before(last), stages.transfer(last)
    expert, gradients = load_file(stages.expert_directory() / EXPERT), stages.wake_gradients(last)
    applied = any(map(stages.applies_wake_gradients, range(len(stages.steps))))
    waiting = None if applied else stages.accumulated_gradients
    store, parent = LineageStore(config.generations), plan["parent"]

    def build(target: Path) -> None:
        update(stages.checkpoint_before(last), target, slots, transfer, expert, gradients)
        question_bank.save(question_bank.load(run.dir), target)
        (target / WAKE).unlink(missing_ok=True)
        if waiting is not None:  # not applied yet: level 1's boundary is still ahead
            shutil.copyfile(waiting, target / WAKE)

    generation = store.commit(
        build,
        Manifest(
            transaction=f"{run.dir.resolve()} {run.state['id']}",
            base_model=store.get(parent).base_model if parent else config.model.name,
            parent=parent,
            config=cfg.to_dict(config),
            seeds={"night": config.seed},
            figures={**run.result("before"), **run.result("after")},
            slots=vars(transfer.after(slots)),
            clock=plan["clock"],
            steps=plan["steps"],
        ),
    )
    store.set_head(generation)
    return generation
