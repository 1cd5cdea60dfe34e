"""Baselines in a real night, after its consolidation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.nights import SMALL, sleeprl, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_baselines_in_a_real_night(tmp_path: Path) -> None:
    """Three of them with the real Ray, vLLM and ZeRO-3; grpo with a rate that changes nothing."""
    names = ["ewc", "self_distillation", "grpo"]
    words = [
        *SMALL, "resources.cpus=2", "wake.people=2", "self_study.pairs_per_document=16",
        "self_study.replay_questions=60",
        "consolidation.steps=6", "consolidation.batch_size=8", "consolidation.replay_ratio=1",
        "consolidation.rollout_every=4", "dreaming.enabled=false", "evaluation.retention_questions=20",
        "fixed_capacity.fisher_texts=8", f"baselines=[{','.join(names)}]",
        "fixed_capacity.learning_rates.grpo=1e-12",
    ]  # fmt: skip
    done = sleeprl("night", "name=first", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    told = summary(tmp_path)
    budget = told["trained_tokens"]
    assert list(told["baselines"]) == names and "fine_tuned" not in told
    logged = (tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines()
    for name in names:
        block = told["baselines"][name]
        for figure in ("recall", "two_hop", "retention", "perplexity", "n", "seconds"):
            assert block[figure] is not None
        steps = [row for row in map(json.loads, logged) if row["phase"] == name]
        assert [row["step"] for row in steps] == list(range(1, block["steps"] + 1))
        assert steps[-1]["trained_tokens"] == block["tokens"]
        # The budget, but for the last step and for roll-outs that are shorter than expected.
        assert 0.5 * budget < block["tokens"]
        assert block["tokens"] - block["tokens"] / block["steps"] * 2 < budget
        if len(steps) > 1:
            assert steps[-2]["trained_tokens"] < budget
        if name == "ewc":
            assert steps[0]["ewc"] == 0 and steps[-1]["ewc"] > 0
        else:  # roll-outs are there from the first step on
            assert "student/kl" in steps[0] or "student/pg" in steps[0]
            assert any("imitation_reward" in row for row in steps)
    unchanged = told["baselines"]["grpo"]
    assert unchanged["perplexity"] == pytest.approx(told["before"]["perplexity"], rel=1e-4)
    assert unchanged["recall"] == pytest.approx(told["before"]["recall"], abs=0.02)
    changed = told["baselines"]["self_distillation"]["perplexity"]
    assert changed != pytest.approx(told["before"]["perplexity"], rel=1e-4)
    html = (tmp_path / "runs" / "first" / "report.html").read_text()
    assert all(told["baselines"][name]["title"] in html for name in names)
