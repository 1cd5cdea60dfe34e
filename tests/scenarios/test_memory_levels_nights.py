"""Chains of real nights: the fast level is handed on, and a full one is distilled or merged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import from_batch
from sleeprl.evaluation.grading import is_correct
from sleeprl.evaluation.questions import Day
from sleeprl.lineage import LineageStore
from sleeprl.memory.checkpoint import EXPERT, WAKE, WEIGHTS
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import COLUMN_DIM
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.memory.transfer import Merge, Transfer, from_dict
from sleeprl.self_study import question_bank
from sleeprl.text.chat import ChatFormatter
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
TWO_LEVELS = "memory.levels=[{period: 2, slots: 2}, {period: 4, slots: 2}]"

SMALL = [
    "wake.people=4",
    "self_study.pairs_per_document=32",
    "self_study.facts_per_document=16",
    "self_study.replay_questions=300",
    "consolidation.steps=40",
    "consolidation.checkpoint_every=16",
    "evaluation.retention_questions=60",
    "evaluation.perplexity_texts=10",
    "baselines=[]",
    "dreaming.steps=1",
    "dreaming.tasks_per_step=2",
    "dreaming.group_size=4",
    "resources.cpus=2",
    # 40 steps are for the plumbing; what nights keep is measured in benchmarks.
    "gate.max_retention_drop=0.9",
    "gate.max_perplexity_ratio=5",
    TWO_LEVELS,
]


def sleep(place: Path, name: str, *words: str) -> tuple[dict[str, Any], Path]:
    """One night; its summary and the generation's directory."""
    done = subprocess.run(
        [sys.executable, "-m", "sleeprl.cli", "night", f"name={name}", *SMALL, *words],
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    told = json.loads((place / "runs" / name / "summary.json").read_text())
    return told, LineageStore(place / "generations").path(told["generation"])


def recall(checkpoint: Path, day: Day) -> float:
    """Share of the day's questions that transformers answers with the generation."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    probes = day.of_kind("recall")
    right = 0
    for probe in probes:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": probe.question}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)
        said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right += is_correct(said, probe.answer)
    return right / len(probes)


def changed(before: Path, after: Path) -> set[str]:
    """Tensors of the checkpoints that are not the same to the bit."""
    one, other = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def columns(checkpoint: Path, slots: Slots, slot: int) -> list[Tensor]:
    found = []
    for name, tensor in sorted(load_file(checkpoint / WEIGHTS).items()):
        if ".mlp." in name:
            found.append(
                tensor[:, slots.columns(slot)] if "down" in name else tensor[slots.columns(slot)]
            )
    return found


def slots_of(directory: Path) -> Slots:
    slots = Slots.load(directory)
    assert slots is not None
    return slots


def sleep_twice(place: Path, steps: int, *words: str) -> tuple[dict[str, Any], Path, Path]:
    """Two nights, of which the second hands the fast level on, and what must be true of any such.

    Returns:
        The second night's summary, and the directories of both generations.
    """
    store = LineageStore(place / "generations")
    words = (*words, f"consolidation.steps={steps}", "wake.learning_rate=1e-3")
    _, one = sleep(place, "one", "dreaming.enabled=false", *words)
    assert store.get(one.name).clock == {"unit": "nights", "now": 1}
    assert len(store.get(one.name).steps) == 1

    # Level 1 is due: it is handed on after the second day has come into it.
    told, two = sleep(place, "two", "model.name=HEAD", "seed=7", *words)
    manifest = store.get(two.name)
    assert manifest.parent == one.name and manifest.clock == {"unit": "nights", "now": 2}
    assert list(map(from_dict, manifest.steps)) == [
        Transfer(0, 1, (0,), (0, 1), 1, ()),
        Transfer(1, 2, (0, 1), (2,), 2, (0, 1)),
    ]
    assert told["memory"]["steps"] == manifest.steps
    slots, run = slots_of(two), place / "runs" / "two"
    assert slots.used == (2,)
    assert all(".mlp." in name for name in changed(one, two))
    for fast in (0, 1):
        assert all(not part.any() for part in columns(two, slots, fast))  # plastic again
    assert any(part.any() for part in columns(two, slots, 2))
    # The base is frozen but for what it learned in wake, over both days, at level 1's boundary.
    waited, total = load_file(one / WAKE), load_file(run / WAKE)
    assert waited.keys() == total.keys() and not (two / WAKE).exists()
    assert all(not torch.equal(waited[name], total[name]) for name in total)
    old, new = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    for name, gradient in total.items():
        assert gradient.any()
        dim = COLUMN_DIM[name.split(".")[-2]]
        expected = (old[name] - gradient).narrow(dim, 0, slots.base_width)
        assert torch.equal(new[name].narrow(dim, 0, slots.base_width), expected)
    assert slots_of(run / "smaller-self-1").used == (0, 1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "levels-1"] == [*range(1, steps + 1)]
    synced = [row["canary"] for row in rows if "canary" in row]
    assert synced and max(synced) < 2e-3
    # What was known before the transfer is answered after it, by the slower level alone.
    day = Day.load(run / "day.json")
    assert told["after"]["recall"] == pytest.approx(recall(two, day), abs=0.06)

    # What was asked is kept with the generations, and asked again.
    earlier, later = (set(question_bank.load(generation)) for generation in (one, two))
    asked = {
        tuple(text.prompt_ids)
        for text in from_batch(Lake(run / "lake").read("trajectories"))
        if text.task_id == "answer" and text.purpose == "replay"
    }
    chat = ChatFormatter(one)
    assert earlier < later and {tuple(chat.prompt(question)) for question in earlier} & asked
    return told, one, two


@pytest.mark.timeout(1200)
def test_a_second_night_hands_a_level_on(tmp_path: Path) -> None:
    sleep_twice(
        tmp_path, 12, "wake.people=2", "self_study.pairs_per_document=16",
        "self_study.replay_questions=60", "consolidation.checkpoint_every=8",
        "evaluation.retention_questions=20", "evaluation.perplexity_texts=4",
    )  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_a_chain_of_nights_hands_on_and_makes_room(tmp_path: Path) -> None:
    told, one, two = sleep_twice(tmp_path, 40)
    # What waits beside the weights is not taken for weights: the night begins as the last ended.
    assert told["before"]["retention"] > 0.8
    run, store, slots = tmp_path / "runs" / "two", LineageStore(one.parent), slots_of(two)
    first_day, second_day = (Day.load(tmp_path / "runs" / n / "day.json") for n in ("one", "two"))
    assert recall(one, first_day) > 0.3 and recall(two, first_day) > 0.15
    assert recall(two, second_day) > 0.15
    manifest = store.get(two.name)

    words = [sys.executable, "-m", "sleeprl.cli", "rollback", one.name[:6]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(words, cwd=tmp_path, env=environment).returncode == 0
    assert store.head() == one.name

    # The slowest level is filled up with an expert that does nothing, and is distilled.
    growth = growth_of(slots)
    silent = {n: torch.zeros_like(t) for n, t in load_file(run / "dreaming" / EXPERT).items()}
    full = store.commit(
        lambda target: growth.write(two, target, slots, ExpertUpdate(3, silent)),
        replace(manifest, transaction="filled", parent=two.name),
    )
    store.set_head(full)
    told, three = sleep(tmp_path, "three", "model.name=HEAD", "seed=8", "dreaming.enabled=false")
    manifest = store.get(three.name)
    assert list(map(from_dict, manifest.steps)) == [
        Transfer(2, 2, (2, 3), (2,), 2, (2, 3)),
        Transfer(0, 1, (2,), (2, 0), 0, ()),
    ]
    assert manifest.clock == {"unit": "nights", "now": 3} and manifest.parent == full
    assert manifest.base_model == "embedded"  # not HEAD, which is itself by then
    assert slots_of(three).used == (2, 0)
    assert told["after"]["recall"] > 0.3
    assert recall(three, first_day) + recall(three, second_day) > 0.15

    # Or its oldest is merged into the base, which is wider then; a baseline that grows begins after it.
    told, four = sleep(
        tmp_path, "four", f"model.name={full}", "seed=9", "dreaming.enabled=false",
        "memory.when_full=merge", "baselines=[no_replay]", "consolidation.steps=16",
        "wake.people=2", "self_study.replay_questions=60", "evaluation.retention_questions=20",
        "evaluation.perplexity_texts=4",
    )  # fmt: skip
    assert from_dict(store.get(four.name).steps[0]) == Merge(2)
    assert slots_of(four).base_width == slots.base_width + slots.width
    assert told["baselines"]["no_replay"]["recall"] > 0.1
