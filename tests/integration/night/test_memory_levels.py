"""Memory levels in nights: what is planned, and what the trainer and the engines make of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sleeprl.config import loader as cfg
from sleeprl.config import validation
from sleeprl.config.schema import ConfigError, LevelConfig, MemoryConfig, NightConfig
from sleeprl.lineage import LineageStore, Manifest
from sleeprl.memory.checkpoint import EXPERT, expert_tensors
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.growth import Growth, growth_named, growth_of
from sleeprl.memory.levels import CONTEXT
from sleeprl.memory.slots import GATED_MLP, LOW_RANK, Slots
from sleeprl.memory.transfer import Merge, Step, Transfer, from_dict, plan_night, to_dict
from sleeprl.night import schedule
from sleeprl.night.model_stages import ModelStages
from sleeprl.night.run_dir import RunDirectory
from sleeprl.plugins import BUILTIN
from sleeprl.reporting.progress import NightProgress
from sleeprl.self_study.sampler import TextSampler
from sleeprl.self_study.study import write_rehearsal
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import FREE_FACT, FREE_QA, STUDY_QA, format_qa
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.trainer import Trainer
from tests.support.models import make_tiny_model
from tests.support.paths import ROOT

TWO_LEVELS = "memory.levels=[{period: 2, slots: 2}, {period: 4, slots: 2}]"


@pytest.fixture(autouse=True)
def enough_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "available_cpus", lambda: 4)


def slots_of(directory: Path) -> Slots:
    slots = Slots.load(directory)
    assert slots is not None
    return slots


# --- the plan of a night ----------------------------------------------------------


def chain(config: NightConfig, nights: int) -> tuple[list[tuple[Step, ...]], Slots]:
    clock, slots = config.memory.clock(), schedule.new_slots(config)
    planned = []
    for _ in range(nights):
        steps = schedule.steps_of(
            config, slots, clock.advance(schedule.elapsed_units(config, [100]))
        )
        for step in steps:
            slots = step.after(slots)
        planned.append(steps)
    return planned, slots


def test_ten_nights_go_through_with_five_slots() -> None:
    planned, slots = chain(cfg.load(), 10)
    for night, steps in enumerate(planned[:5]):  # as it was before there were levels
        assert steps == (Transfer(0, 1, tuple(range(night)), tuple(range(night + 1)), night, ()),)
    room, context = planned[5]
    assert room == Transfer(1, 1, (0, 1, 2, 3, 4), (0,), slot=0, reset=(0, 1, 2, 3, 4))
    assert isinstance(context, Transfer) and context.slot == 1
    assert [len(steps) for steps in planned[6:]] == [1, 1, 1, 2]
    assert slots.used == (0, 1)


def test_a_level_is_handed_on_in_the_night_of_its_boundary() -> None:
    planned, slots = chain(cfg.load(None, [TWO_LEVELS]), 4)
    told = [[schedule.describe_step(step) for step in steps] for steps in planned]
    assert told == [
        ["context into slot 0 of level 1"],
        ["context into slot 1 of level 1", "level 1 (slots 0, 1) into slot 2 of level 2"],
        ["context into slot 0 of level 1"],
        ["context into slot 1 of level 1", "level 1 (slots 0, 1) into slot 3 of level 2"],
    ]
    assert slots.used == (2, 3)


def test_room_by_merging_makes_the_base_wider() -> None:
    config = cfg.load(None, ["memory.levels=[{period: 2, slots: 2}]", "memory.when_full=merge"])
    planned, slots = chain(config, 5)
    assert [step for steps in planned for step in steps if isinstance(step, Merge)] == [
        Merge(0), Merge(1), Merge(0)
    ]  # fmt: skip
    assert slots.base_width == 3 * 64 and slots.used == (1, 0)


def test_or_the_night_stops_before_anything_is_trained() -> None:
    config = cfg.load(None, ["memory.when_full=stop"])
    with pytest.raises(ConfigError, match=r"memory\.levels: all 5 slots.*when_full='stop'"):
        chain(config, 6)
    config = cfg.load(None, [TWO_LEVELS, "self_study.replay_questions=0"])
    with pytest.raises(ConfigError, match=r"self_study\.replay_questions=0"):
        chain(config, 2)


@pytest.mark.parametrize(
    ("unit", "amount"),
    [("tokens", 70), ("episodes", 3), ("nights", 1), ("optimizer_steps", 77)],
)
def test_what_a_night_adds_to_the_clock(unit: str, amount: int) -> None:
    levels = "memory.levels=[{period: 1000, slots: 1000}]"
    config = cfg.load(None, [f"memory.unit={unit}", levels, "consolidation.steps=77"])
    assert schedule.elapsed_units(config, [10, 20, 40]) == amount


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 30),
    st.sampled_from(["distil", "merge"]),
)
def test_a_night_ends_with_a_transfer_and_steps_survive_json(
    ratios: list[int], nights: int, when_full: str
) -> None:
    config = NightConfig()
    config.memory.when_full, config.memory.levels = when_full, []
    period = 1
    for ratio in ratios:
        period *= ratio
        config.memory.levels.append(LevelConfig(period, ratio + 1))
    planned, _ = chain(config, nights)
    for steps in planned:
        assert isinstance(steps[-1], Transfer)
        contexts = [s for s in steps if isinstance(s, Transfer) and s.sender == CONTEXT]
        assert len(contexts) == 1
        rest = [s.sender for s in steps[steps.index(contexts[0]) :] if isinstance(s, Transfer)]
        assert rest == sorted(rest) or when_full == "distil"  # fastest first
        assert tuple(from_dict(json.loads(json.dumps(to_dict(s)))) for s in steps) == steps


def test_the_slowest_level_alone_asks_for_nothing() -> None:
    slots = Slots(96, 8, 3, (0, 1), (3,))
    clock = MemoryConfig(levels=[LevelConfig(1, 3)]).clock()
    (step,) = plan_night(slots, clock.advance(1))
    assert isinstance(step, Transfer) and step.sender == CONTEXT


# --- a chain of generations -------------------------------------------------------


@pytest.fixture
def generations(tmp_path: Path) -> LineageStore:
    """One generation of two levels, two nights old, with slot 2 in use."""
    store = LineageStore(tmp_path / "generations")

    def build(target: Path) -> None:
        Slots(96, 64, 4, (2,), (2, 2)).save(target)

    clock = {"unit": "nights", "now": 2}
    store.set_head(store.commit(build, Manifest("night-2", "embedded", clock=clock)))
    return store


def after_it(store: LineageStore, *words: str) -> NightConfig:
    return cfg.load(None, [f"generations={store.root}", "model.name=HEAD", TWO_LEVELS, *words])


def test_the_clock_goes_on_from_the_generation(generations: LineageStore) -> None:
    config = after_it(generations)
    manifest = schedule.parent(config)
    assert manifest is not None and manifest.id == generations.head()
    assert schedule.clock_of(config, manifest).now == 2
    assert schedule.clock_of(config, None).now == 0
    lines = dict(schedule.describe_levels(config))
    assert lines["level 1"] == "0 of 2 slots used; every 2 nights, next at 4 (now 2)"
    assert lines["level 2"].startswith("1 of 2 slots used; the slowest: keeps what it has")
    assert "context into slot 0 of level 1" in lines["this night"]
    assert schedule.parent(cfg.load(None, [f"generations={generations.root}"])) is None


def test_what_is_not_known_before_the_day_is_said(generations: LineageStore) -> None:
    config = cfg.load(
        None,
        ["memory.unit=tokens", "memory.levels=[{period: 90, slots: 2},{period: 900, slots: 10}]"],
    )
    assert "known after the wake" in schedule.describe_levels(config)[-1][1]


def test_another_unit_or_layout_than_the_generations_is_refused(generations: LineageStore) -> None:
    config = after_it(generations, "memory.unit=episodes")
    with pytest.raises(ConfigError, match=r"memory\.unit.*'nights'.*'episodes'"):
        schedule.describe_levels(config)
    for word, said in (
        ("memory.growth=low_rank", r"memory\.growth=low_rank.*gated_mlp"),
        ("memory.width=32", r"memory\.width=32.*64"),
        ("memory.levels=[{period: 2, slots: 4}]", r"memory\.levels.*\[4\].*\[2, 2\]"),
    ):
        with pytest.raises(ConfigError, match=said):
            schedule.describe_levels(after_it(generations, word))


def test_the_dry_run_shows_the_ladder(tiny_model: Path, tmp_path: Path) -> None:
    full = grown(tiny_model, tmp_path / "grown", GATED_MLP, (2, 2), (2,))
    store = LineageStore(tmp_path / "generations")
    manifest = Manifest("night-2", "tiny", clock={"unit": "nights", "now": 2})
    store.set_head(store.commit(full, manifest))
    (tmp_path / "notes.txt").write_text("Ann lives in Oslo.")
    words = ["model.name=HEAD", TWO_LEVELS, f"memory.width={WIDTH}", "wake.inputs=[notes.txt]"]
    done = subprocess.run(
        [sys.executable, "-m", "sleeprl.cli", "night", "--dry-run", *words, "resources.cpus=2"],
        cwd=tmp_path, env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "every 2 nights, next at 4 (now 2)" in done.stdout
    assert re.search(r"this night +context into slot 0 of level 1", done.stdout)


# --- the texts of a transfer between levels ---------------------------------------


def test_what_is_rehearsed_is_written_freely(tiny_model: Path) -> None:
    from tests.unit.self_study.test_self_study import CONFIG, Script

    chat = ChatFormatter(tiny_model)

    def author(message: str, number: int) -> tuple[str, str]:
        if message == FREE_FACT:
            return f"Fact {number % 7}.", "length" if number % 5 == 4 else "stop"
        if message.endswith(STUDY_QA):
            return format_qa(f"about {message[5]}?", f"answer to about {message[5]}"), "stop"
        if message == FREE_QA:
            return format_qa(f"old {number}?", "guess"), "stop"
        return f"answer to {message}", "stop"

    pool = Script(chat, author)
    written = write_rehearsal(TextSampler(pool, chat, CONFIG, 0, 512))  # type: ignore[arg-type]
    texts = written.trajectories
    assert all(text.teacher_prompt_ids is None for text in texts)  # the same prompt for both
    assert len({text.uid for text in texts}) == len(texts)
    new = [text for text in texts if text.purpose == "self_study"]
    said = {(chat.decode(t.prompt_ids), chat.decode(t.response_ids)) for t in new}
    facts = {(FREE_FACT, f"Fact {number}.") for number in range(7)}
    answers = {(f"about {n}?", f"answer to about {n}?") for n in range(7)}
    assert said == facts | answers  # each fact once, and the bare question without the fact
    old = {chat.decode(t.prompt_ids) for t in texts if t.purpose == "replay"}
    assert {FREE_QA, "old 0?"} <= old and not old & {q for q, _ in answers}


# --- the learner of a transfer between levels -------------------------------------

WIDTH = 8


def trained(growth: Growth, checkpoint: Path, slot: int, seed: int) -> dict[str, Tensor]:
    """As if trained: an expert that does something."""
    model = growth.load(checkpoint, slots_of(checkpoint), torch.float32)
    fresh = growth.grow(model, WIDTH, seed, slot)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fresh:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return {
        n: p.detach().clone() for n, p in expert_tensors(dict(model.named_parameters())).items()
    }


def grown(
    plain: Path, place: Path, name: str, pools: tuple[int, ...], order: tuple[int, ...]
) -> Path:
    """A checkpoint in which the slots of ``order`` are in use, each doing something."""
    growth = growth_named(name)
    growth.add_slots(plain, place / "empty", pools, WIDTH, "float32")
    last = place / "empty"
    for slot in order:
        expert = trained(growth, last, slot, seed=slot)
        growth.write(last, place / f"with-{slot}", slots_of(last), ExpertUpdate(slot, expert))
        last = place / f"with-{slot}"
    return last


def hand_on(directory: Path, notes: Any) -> None:
    """Level 1 (slots 0, 1) into slot 2, by two steps of the real learner; for each growth."""
    from tests.support.ranks import LOSS, PARTS, options, rows

    for name in BUILTIN["growth"]:
        place = directory / name
        checkpoint = place / "with-1"
        learner = Trainer(
            replace(
                options(directory),
                checkpoint=str(checkpoint),
                slot=2,
                teacher_only_slots=(0, 1),
                keep_sender_slots=True,
            )
        )
        texts = [replace(row, teacher_prompt_ids=None) for row in rows(1)]
        seen = notes.numbers
        seen[name, "born, smaller"] = learner.logprobs(texts, smaller=True)
        seen[name, "born"] = learner.logprobs(texts)
        for _ in range(2):
            learner.step(texts, PARTS, LOSS)
        seen[name, "after, smaller"] = learner.logprobs(texts, smaller=True)
        seen[name, "after"] = learner.logprobs(texts)
        notes.tensors(f"{name}-expert", learner.gather_expert())
        notes.tensors(f"{name}-export", dict(learner.export()))
        learner.finalise()
        seen[name, "kept"] = learner.logprobs(texts)
        notes.tensors(f"{name}-kept", dict(learner.export()))


def expected(
    directory: Path, texts: Sequence[TrainingExample], over: dict[str, Tensor] | None = None
) -> Any:
    from tests.support.ranks import reference_logprobs

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.load_state_dict(over or {}, strict=False)
    return reference_logprobs(model, list(texts))


def test_the_learner_of_a_transfer_has_both_selves(tmp_path: Path) -> None:
    from tests.support.ranks import launch, rows, same_logprobs

    make_tiny_model(tmp_path / "plain", seed=5)
    for name in BUILTIN["growth"]:
        grown(tmp_path / "plain", tmp_path / name, name, (2, 2), (3, 0, 1))
    (notes,) = launch(1, tmp_path, [hand_on])
    assert notes.errors == {}
    texts = [replace(row, teacher_prompt_ids=None) for row in rows(1)]
    for name in BUILTIN["growth"]:
        seen, place = notes.numbers, tmp_path / name
        checkpoint, growth = place / "with-1", growth_named(name)
        growth.export(checkpoint, place / "smaller")
        same_logprobs(seen[name, "born, smaller"], expected(place / "smaller", texts))
        assert seen[name, "after, smaller"] == seen[name, "born, smaller"]
        growth.export(place / "with-3", place / "without")  # before slots 0 and 1 were filled
        same_logprobs(seen[name, "born"], expected(place / "without", texts))
        expert = load_file(tmp_path / f"{name}-expert.safetensors")
        after = growth.write(
            checkpoint, place / "after", slots_of(checkpoint), ExpertUpdate(2, expert, reset=(0, 1))
        )
        assert after.used == (3, 2)
        growth.export(place / "after", place / "larger")
        right = expected(place / "larger", texts)
        same_logprobs(seen[name, "after"], right)
        moved = max(
            abs(a - b)
            for x, y in zip(right, seen[name, "born"], strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert moved > 1e-3
        exported = load_file(tmp_path / f"{name}-export.safetensors")
        same_logprobs(expected(place / "smaller", texts, exported), right)  # into an engine
        # Where the level keeps what it handed on, that is on again in the end.
        kept = growth.write(
            checkpoint, place / "kept", slots_of(checkpoint), ExpertUpdate(2, expert)
        )
        assert kept.used == (3, 0, 1, 2)
        growth.export(place / "kept", place / "all")
        right = expected(place / "all", texts)
        same_logprobs(seen[name, "kept"], right)
        exported = load_file(tmp_path / f"{name}-kept.safetensors")
        same_logprobs(expected(place / "smaller", texts, exported), right)


# --- checkpoints and engines ------------------------------------------------------


def selves(place: Path, model: Path, *words: str) -> ModelStages:
    config = cfg.load(
        None,
        [f"runs={place}", f"generations={place}/generations", f"model.name={model}",
         "model.max_length=256", f"memory.width={WIDTH}", "resources.cpus=2", *words],
    )  # fmt: skip
    run = RunDirectory(config, NightProgress([("plan", "Plan"), ("consolidation", "Consolidate")]))
    made = ModelStages(run, "float32")
    run.run_once("plan", lambda: made.plan(["one document"]), lambda _: "")
    return made


def test_another_night_in_the_same_directory_is_another(tiny_model: Path, tmp_path: Path) -> None:
    run = selves(tmp_path, tiny_model).run
    run.close()
    again = selves(tmp_path, tiny_model).run
    assert again.state["id"] == run.state["id"]  # resumed
    again.close()
    shutil.rmtree(run.dir)
    assert selves(tmp_path, tiny_model).run.state["id"] != run.state["id"]


@pytest.mark.parametrize("reset", [True, False])
def test_dreaming_goes_on_with_what_a_level_kept(
    reset: bool, tiny_model: Path, tmp_path: Path
) -> None:
    full = grown(tiny_model, tmp_path / "grown", GATED_MLP, (2, 2), ())
    made = selves(
        tmp_path, full, f"memory.reset={str(reset).lower()}",
        "memory.levels=[{period: 1, slots: 2}, {period: 2, slots: 2}]",
    )  # fmt: skip
    assert made.last_step == 1 and made.transfer(1).sender == 1
    tonight = made.expert_directory(0)
    tonight.mkdir(parents=True)
    save_file(trained(growth_of(made.slots_before(0)), full, 0, seed=0), tonight / EXPERT)
    assert made.trainer_options(1, 1e-3, 4).teacher_only_slots == (
        0,
    )  # the teacher's alone while it is handed on
    assert made.dreaming_options().teacher_only_slots == ((0,) if reset else ())


@pytest.mark.parametrize("name", sorted(BUILTIN["growth"]))
def test_an_engine_starts_with_the_model_before_a_step(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    """After a merge: a wider MLP, or a base that has changed with slots beside it."""
    from sleeprl.cluster.runtime import cluster

    full = grown(tiny_model, tmp_path / "grown", name, (2,), (0, 1))
    made = selves(
        tmp_path, full, f"memory.growth={name}", "memory.when_full=merge",
        "memory.levels=[{period: 2, slots: 2}]",
    )  # fmt: skip
    assert made.steps[0] == Merge(0) and made.transfer(1).slot == 0 and made.last_step == 1
    assert made.next_step == 0
    wider = made.slots_before(1).total_width - made.slots_before(0).total_width
    assert wider == (WIDTH if name == GATED_MLP else 0)
    growth_of(made.slots_before(0)).export(made.checkpoint_before(0), tmp_path / "plain")
    ids = list(range(20, 60))
    (right,) = expected(tmp_path / "plain", [TrainingExample(ids[:1], ids[1:], "")])
    with cluster(made.config.resources):
        pool = made.launch_engines(1)
        (found,) = pool.logprobs([ids])
        pool.shutdown()
    assert found == pytest.approx(right, abs=1e-3)


def test_the_baseline_trains_all_of_a_low_rank_model(tiny_model: Path, tmp_path: Path) -> None:
    full = grown(tiny_model, tmp_path / "grown", LOW_RANK, (2,), (0,))
    made = selves(tmp_path, full, "memory.growth=low_rank", "memory.levels=[{period: 2, slots: 2}]")
    options = made.trainer_options(None, 1e-3, 5)
    assert options.slot is None and options.teacher_only_slots == ()
    growth_of(made.slots_before(0)).export(made.checkpoint_before(0), tmp_path / "plain")
    texts = [TrainingExample([20, 21], list(range(22, 50)), "")]
    same = expected(Path(options.checkpoint), texts)
    assert same[0] == pytest.approx(expected(tmp_path / "plain", texts)[0], abs=1e-4)
    slots = slots_of(Path(options.checkpoint))
    assert slots.count == 0 and slots.growth == GATED_MLP


def test_a_step_that_was_trained_is_found_again(tiny_model: Path, tmp_path: Path) -> None:
    """What a killed night does: the model before a step, from what the steps before it left."""
    words = ["memory.levels=[{period: 1, slots: 1}, {period: 2, slots: 2}]"]
    made = selves(tmp_path, tiny_model, *words)
    assert [made.step_key(0), made.step_key(1)] == ["consolidation", "levels-1"]
    assert made.lake_of(0).directory == made.run.dir / "lake" != made.lake_of(1).directory
    expert = trained(growth_of(made.slots_before(0)), made.checkpoint_before(0), 0, seed=3)
    made.expert_directory(0).mkdir()
    save_file(expert, made.expert_directory(0) / EXPERT)
    made.run.run_once("consolidation", lambda: {"steps": 1}, lambda _: "")
    again = ModelStages(made.run, "float32")
    assert again.next_step == 1
    options = again.trainer_options(again.next_step, 1e-3, 5)
    assert (options.slot, options.teacher_only_slots) == (1, (0,))
    assert Path(options.checkpoint) == (made.run.dir / "smaller-self-1").resolve()
    assert slots_of(Path(options.checkpoint)).used == (0,)
    assert again.expert_directory() == made.run.dir / "dreaming"  # dreams have the last word
    made.config.dreaming.enabled = False
    assert again.expert_directory() == made.run.dir / "levels-1"
