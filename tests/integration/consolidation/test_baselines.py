"""Sleep's ablations and the baselines: the table, what each reads, EWC, and a real night of three."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from sleeprl.config import loader as cfg
from sleeprl.config.methods import METHODS, NEW, PASSAGE, REPLAY, STUDENT
from sleeprl.config.schema import ConfigError, ConsolidationConfig, FixedCapacityConfig
from sleeprl.consolidation import student_rollouts
from sleeprl.consolidation.data_mix import DataMix, trained_tokens
from sleeprl.consolidation.methods import loss_weights
from sleeprl.consolidation.ray_job import limit_to_budget
from sleeprl.consolidation.train_loop import Job
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, to_batch
from sleeprl.losses.ewc import diagonal_fisher, ewc_gradient, ewc_penalty
from sleeprl.losses.types import LossWeights
from sleeprl.memory.checkpoint import scatter_columns
from sleeprl.memory.gated_mlp import load_training_form
from sleeprl.night.phases import phases_of
from sleeprl.reporting.report import write_report
from sleeprl.reporting.summary_table import BeforeAfterTable
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.trainer import Trainer
from tests.support.ranks import (
    CE,
    LOSS,
    SLOTS,
    Notes,
    close,
    launch,
    options,
    rows,
    texts,
    write_checkpoints,
)

DEFAULT = ConsolidationConfig()
GROWS = {"seeding", "no_imitation", "no_semantic", "no_replay"}
# What each method weighs with the default settings: alpha 0.7, lambda 0.5, ce 0.5, replay 2.5.
WEIGHTS: dict[str, dict[str, LossWeights]] = {
    "seeding": {
        NEW: LossWeights(kl=0.35, ce=0.5),
        REPLAY: LossWeights(kl=0.875, ce=1.25),
        STUDENT: LossWeights(pg=0.3, kl=0.35),
    },
    "no_imitation": {
        NEW: LossWeights(kl=0.5, ce=0.5),
        REPLAY: LossWeights(kl=1.25, ce=1.25),
        STUDENT: LossWeights(kl=0.5),
    },
    "no_semantic": {
        NEW: LossWeights(kl=0.35, ce=0.5),
        REPLAY: LossWeights(kl=0.875, ce=1.25),
        STUDENT: LossWeights(pg=0.3, kl=0.35),
    },
    "no_replay": {NEW: LossWeights(kl=0.35, ce=0.5),
        STUDENT: LossWeights(pg=0.3, kl=0.35)},
    "no_growth": {
        NEW: LossWeights(kl=0.35, ce=0.5),
        REPLAY: LossWeights(kl=0.875, ce=1.25),
        STUDENT: LossWeights(pg=0.3, kl=0.35),
    },
    "fine_tuning": {PASSAGE: LossWeights(ce=1.0)},
    "fine_tuning_pairs": {NEW: LossWeights(ce=1.0)},
    "ewc": {NEW: LossWeights(ce=1.0)},
    "replay": {NEW: LossWeights(ce=1.0),
        REPLAY: LossWeights(ce=2.5)},
    "self_distillation": {STUDENT: LossWeights(kl=1.0)},
    "grpo": {STUDENT: LossWeights(pg=1.0)},
}  # fmt: skip


def text(number: int, purpose: Any, prompt: int = 3, response: int = 5) -> Trajectory:
    return Trajectory(
        uid=f"{purpose}-{number}", task_id="answer", attempt=number, purpose=purpose,
        prompt_ids=[1] * prompt, response_ids=[number % 200] * response,
        logprobs=[-0.5] * response, versions=[0] * response, finish_reason="stop",
        teacher_prompt_ids=[2] * 20 if purpose == "self_study" else None,
    )  # fmt: skip


def study(new: int = 6, replay: int = 9, **lengths: int) -> list[Trajectory]:
    made = [text(n, "self_study", **lengths) for n in range(new)]
    return made + [text(n, "replay", **lengths) for n in range(replay)]


PASSAGES = [[number] * 30 for number in range(4)]


def feed(name: str, config: ConsolidationConfig = DEFAULT, **given: Any) -> DataMix:
    method = METHODS[name]
    settings = {"texts": study(), "passages": PASSAGES, "seed": 3} | given
    return DataMix(method, config=method.objective(config), **settings)


# --- the table --------------------------------------------------------------------


def test_the_configuration_knows_the_methods_of_the_table() -> None:
    assert set(METHODS) == set(WEIGHTS)
    titles = [method.title for method in METHODS.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_weighs_and_trains(name: str) -> None:
    method = METHODS[name]
    parts = loss_weights(method, method.objective(DEFAULT), 0)
    assert parts.keys() == WEIGHTS[name].keys()
    for part, weights in WEIGHTS[name].items():
        for stream in ("pg", "ce", "kl"):
            expected = pytest.approx(getattr(weights, stream))
            assert getattr(parts[part], stream) == expected, f"{part}.{stream}"
    assert method.grows == (name in GROWS)
    assert method.anchored == (name == "ewc")


@pytest.mark.parametrize("name", [*METHODS])
def test_only_sleep_begins_with_the_divergence_alone(name: str) -> None:
    method = METHODS[name]
    config = method.objective(ConsolidationConfig(seed_steps=40))
    first, later = (loss_weights(method, config, step) for step in (0, 40))
    sleeps = method.grows or name == "no_growth"
    assert (first == later) == (not sleeps or name == "no_imitation")


def test_an_ablation_is_sleep_but_for_one_thing() -> None:
    assert METHODS["seeding"].objective(DEFAULT) == DEFAULT
    assert METHODS["no_semantic"].objective(DEFAULT) == replace(DEFAULT, semantic=0.0)
    assert METHODS["no_imitation"].objective(DEFAULT) == replace(DEFAULT, distillation=1.0)
    assert METHODS["no_replay"].objective(DEFAULT) == DEFAULT
    assert METHODS["no_growth"].objective(DEFAULT) == DEFAULT


def test_rates_are_of_the_kind_unless_the_method_has_its_own() -> None:
    fixed = FixedCapacityConfig(learning_rate=2e-4, learning_rates={"grpo": 3e-5})
    rates = {name: METHODS[name].learning_rate(name, DEFAULT, fixed) for name in METHODS}
    assert {name for name, rate in rates.items() if rate == DEFAULT.learning_rate} == GROWS
    assert rates["grpo"] == 3e-5 and rates["ewc"] == 2e-4


# --- what is read -----------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_step_has_the_texts_of_the_method(name: str) -> None:
    fed = feed(name)
    drawn = fed.rows(2)
    counts = {part: sum(r.part == part for r in drawn) for part in (NEW, REPLAY, PASSAGE, STUDENT)}
    expected = {NEW: 24, REPLAY: 60, PASSAGE: 24}
    assert counts == {p: expected.get(p, 0) * (p in METHODS[name].texts) for p in counts}
    assert {row.part for row in drawn} <= set(fed.parts(2))
    assert drawn == feed(name).rows(2)
    assert not drawn or drawn != fed.rows(3)
    for row in drawn:
        if row.part == PASSAGE:
            assert row.prompt_ids + row.response_ids in PASSAGES and len(row.prompt_ids) == 1
        else:
            purpose = "self_study" if row.part == NEW else "replay"
            source = text(row.response_ids[0], purpose)
            assert (row.prompt_ids, row.response_ids) == (source.prompt_ids, source.response_ids)
            assert row.teacher_prompt_ids == source.teacher_prompt_ids and row.key == source.uid


@settings(max_examples=40, deadline=None)
@given(
    new=st.integers(1, 12), replay=st.integers(1, 12), batch=st.integers(1, 9),
    ratio=st.floats(0.0, 3.0), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_text_comes_once_per_pass(
    new: int, replay: int, batch: int, ratio: float, seed: int
) -> None:
    config = ConsolidationConfig(batch_size=batch, replay_ratio=ratio)
    fed = feed("seeding", config, texts=study(new, replay), seed=seed)
    # After new * replay steps both streams have gone through a whole number of passes.
    drawn = [row for step in range(new * replay) for row in fed.rows(step)]
    per_pass = {NEW: batch * replay, REPLAY: round(batch * ratio) * new}
    for part, total in ((NEW, new), (REPLAY, replay)):
        times = [
            sum(r.part == part and r.key.endswith(f"-{n}") for r in drawn) for n in range(total)
        ]
        assert times == [per_pass[part]] * total
    tokens = trained_tokens(drawn) / (new * replay)
    rollouts = config.rollout_prompts * config.group_size / config.rollout_every * 8
    assert fed.tokens_per_step() == pytest.approx(tokens + rollouts)


@given(
    batch=st.integers(1, 64), every=st.integers(1, 20), group=st.integers(1, 16),
    name=st.sampled_from(["grpo", "self_distillation"]),
)  # fmt: skip
def test_roll_outs_alone_fill_the_batch(batch: int, every: int, group: int, name: str) -> None:
    given = ConsolidationConfig(batch_size=batch, rollout_every=every, group_size=group)
    config = METHODS[name].objective(replace(given, rollout_prompts=0))
    rollouts = config.rollout_prompts * config.group_size
    assert 0 <= rollouts - batch * every < config.group_size
    assert feed(name, given).tokens_per_step() == pytest.approx(8 * rollouts / every)


@pytest.mark.parametrize("name", ["grpo", "self_distillation"])
def test_the_student_gets_the_bare_question(name: str) -> None:
    import random

    fed = feed(name)
    for drawn in student_rollouts.draw(fed.new, 20, fed.config, random.Random(0)):
        assert drawn.prompt == drawn.source.prompt_ids
        assert drawn.rest == drawn.source.response_ids


def test_roll_outs_go_on_from_old_texts_only_where_these_are_read() -> None:
    assert feed("seeding").replay_share == pytest.approx(2.5 / 3.5)
    assert feed("seeding", texts=study(replay=0)).replay_share == 0.0
    for name in ("no_replay", "grpo", "self_distillation"):
        assert feed(name).replay_share == 0.0


def test_what_was_written_with_a_document_in_sight_is_replayed_and_not_its_own() -> None:
    texts = study()
    texts.append(replace(texts[-1], uid="seen", task_id="study-0"))
    assert len(feed("seeding", texts=texts).replay) == 10
    assert len(feed("ewc", texts=texts).free_texts) == 9
    with pytest.raises(ValueError, match="there is no replay"):
        feed("ewc", texts=[*study(replay=0), texts[-1]])


def test_what_a_method_cannot_do_without_is_named() -> None:
    for name in set(METHODS) - {"fine_tuning"}:
        with pytest.raises(ValueError, match=r"study\.json"):
            feed(name, texts=study(new=0))
    with pytest.raises(ValueError, match=r"self_study\.replay_questions above 0"):
        feed("ewc", texts=study(replay=0))
    assert len(feed("fine_tuning", texts=[]).rows(0)) == 24


@settings(max_examples=15, deadline=None)
@given(budget=st.integers(1, 20_000), name=st.sampled_from(sorted(METHODS)))
def test_the_steps_are_what_the_budget_buys(
    tmp_path_factory: pytest.TempPathFactory, budget: int, name: str
) -> None:
    place = tmp_path_factory.mktemp("lake")
    Lake(place).append(to_batch(study()), "trajectories")
    job = Job(
        name, options(place, warmup=10), DEFAULT, FixedCapacityConfig(), 3, str(place), "", [1], 1,
        PASSAGES,
    )  # fmt: skip
    bought = limit_to_budget(job, budget)
    steps, per_step = bought.learner.total_steps, feed(name).tokens_per_step()
    assert bought.tokens == budget
    assert steps * per_step >= budget > (steps - 1) * per_step
    assert bought.learner.warmup == min(10, steps // 4)


# --- elastic weight consolidation, pure -------------------------------------------


def test_the_penalty_by_hand() -> None:
    value, anchor = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, -2.0, 2.5])
    fisher = torch.tensor([3.0, 100.0, 0.25])
    # 1/2 * (3*1 + 100*0 + 0.25*4)
    assert float(ewc_penalty(value, anchor, fisher)) == 2.0
    assert ewc_gradient(value, anchor, fisher).tolist() == [3.0, 0.0, -0.5]


numbers = st.floats(-10, 10, width=32)


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 10, width=32)), min_size=1, max_size=8))
def test_the_gradient_is_that_of_the_penalty(values: list[tuple[float, float, float]]) -> None:
    value, anchor, fisher = torch.tensor(values, dtype=torch.float64).unbind(-1)
    theta = value.clone().requires_grad_(True)
    penalty = ewc_penalty(theta, anchor, fisher)
    assert float(penalty.detach()) >= 0
    (gradient,) = torch.autograd.grad(penalty, theta)
    torch.testing.assert_close(ewc_gradient(value, anchor, fisher), gradient)
    assert float(ewc_penalty(anchor, anchor, fisher)) == 0.0


def test_the_fisher_by_hand() -> None:
    """A fair coin: whichever side is drawn, the score is (1/2, -1/2) or its negative."""
    coin, unused = torch.zeros(2, requires_grad=True), torch.ones(3, requires_grad=True)
    passes = [coin[None, :].clone() for _ in range(5)]
    mine, other = diagonal_fisher([coin, unused], passes, torch.Generator().manual_seed(0))
    assert mine.tolist() == [0.25, 0.25] and other.tolist() == [0.0, 0.0, 0.0]
    # Two positions that add up to both drawn heads, both tails or nothing: 1/2 * E[(s1+s2)^2] = 1/4.
    passes = [coin[None, :].expand(2, 2) for _ in range(2000)]
    (two,) = diagonal_fisher([coin], passes, torch.Generator().manual_seed(1))
    assert two.tolist() == pytest.approx([0.25, 0.25], abs=0.03)


def test_the_fisher_of_a_softmax_is_p_times_one_minus_p() -> None:
    logits = torch.tensor([1.0, 0.0, -2.0], requires_grad=True)
    passes = [logits[None, :].clone() for _ in range(2000)]
    (fisher,) = diagonal_fisher([logits], passes, torch.Generator().manual_seed(2))
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(fisher, p * (1 - p), atol=0.03, rtol=0.0)


# --- in the learner: one rank, two ranks, plain torch ------------------------------

STRENGTH = 40.0
WHOLE: dict[str, Any] = {
    "slot": None, "warmup": 0, "grad_clip": 1e6, "weight_decay": 0.0, "learning_rate": 1e-3,
}  # fmt: skip


def whole(directory: Path, **changes: Any) -> Trainer:
    return Trainer(options(directory, checkpoint=str(directory / "grown"), **{**WHOLE, **changes}))


def pulled(directory: Path, notes: Notes) -> None:
    learner = whole(directory)
    learner.add_ewc_penalty(texts(5), STRENGTH)
    prefix = f"{dist.get_world_size()}-"
    for step in (1, 2, 3):
        notes.numbers[f"pulled, step-{step}"] = learner.step(texts(step), CE, LOSS)
    notes.tensors(f"{prefix}pulled", dict(learner.export()))
    free = whole(directory)
    for step in (1, 2, 3):
        free.step(texts(step), CE, LOSS)
    notes.tensors(f"{prefix}free", dict(free.export()))


def taught_by_the_past(directory: Path, notes: Notes) -> None:
    learner, seen = whole(directory, learning_rate=1e-2), notes.numbers
    same = {"new": LossWeights(kl=1.0)}
    batch = [replace(r, part="new", teacher_prompt_ids=None) for r in rows(1)]
    seen["past, at birth"] = learner.logprobs(batch, smaller=True)
    seen["past, step-1"] = learner.step(batch, same, LOSS)
    learner.step(texts(2), CE, LOSS)
    seen["past, step-3"] = learner.step(batch, same, LOSS)
    seen["past, after"] = learner.logprobs(batch, smaller=True)
    seen["past, now"] = learner.logprobs(batch)


def a_grown_model_is_not_anchored(directory: Path, notes: Notes) -> None:
    learner = Trainer(options(directory))
    with pytest.raises(ValueError, match="slot=None"):
        learner.add_ewc_penalty(texts(5), STRENGTH)
    notes.numbers["refused"] = True


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("anchored")
    write_checkpoints(directory)
    one = launch(1, directory, (pulled, taught_by_the_past, a_grown_model_is_not_anchored))
    two = launch(2, directory, (pulled, taught_by_the_past))
    for notes in (*one, *two):
        assert not notes.errors, "\n".join(notes.errors.values())
    return directory, one[0].numbers, two[0].numbers


def plain_ewc(directory: Path) -> tuple[dict[str, Tensor], list[float]]:
    """The same three steps in plain torch, the penalty in the loss and through autograd."""
    slots = SLOTS.filled(1)

    def load() -> Any:
        return load_training_form(directory / "grown", slots, torch.float32)

    def logits(model: Any, row: TrainingExample) -> Tensor:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        first = len(row.prompt_ids) - 1
        return model(input_ids=ids).logits[0, first : first + len(row.response_ids)]

    model, origin = load(), load()
    generator = torch.Generator().manual_seed(options(directory).seed)
    fisher = diagonal_fisher(
        list(origin.parameters()), (logits(origin, row) for row in texts(5)), generator
    )
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.0)
    penalties = []
    for done in range(3):
        optimiser.param_groups[0]["lr"] = 1e-3 * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done / 10))
        )
        batch = texts(done + 1)
        chosen = [
            logits(model, row).log_softmax(-1).gather(-1, torch.tensor(row.response_ids)[:, None])
            for row in batch
        ]
        penalty = torch.stack(
            [
                ewc_penalty(value, anchor.detach(), matters)
                for value, anchor, matters in zip(
                    model.parameters(), origin.parameters(), fisher, strict=True
                )
            ]
        ).sum()
        optimiser.zero_grad()
        (-torch.cat(chosen).mean() + STRENGTH * penalty).backward()
        optimiser.step()
        penalties.append(STRENGTH * float(penalty.detach()))
    named = dict(model.named_parameters())
    return {n: scatter_columns(n, p.detach(), slots) for n, p in named.items()}, penalties


def test_ewc_is_the_penalty_in_the_loss(saw: Any) -> None:
    directory, one, two = saw
    tensors, penalties = plain_ewc(directory)
    assert penalties[0] == 0.0 and penalties[2] > 1e-3
    for seen in (one, two):
        told = [seen[f"pulled, step-{step}"]["ewc"] for step in (1, 2, 3)]
        assert told == pytest.approx(penalties, rel=1e-3, abs=1e-6)
    for world in (1, 2):
        close(load_file(directory / f"{world}-pulled.safetensors"), tensors, atol=3e-5)


def test_ewc_holds_the_model_back(saw: Any) -> None:
    directory, _, _ = saw
    base = load_file(directory / "grown" / "model.safetensors")
    moved = {
        name: sum(
            float((tensor - base[key]).pow(2).sum())
            for key, tensor in load_file(directory / f"1-{name}.safetensors").items()
        )
        for name in ("pulled", "free")
    }
    assert 0 < moved["pulled"] < moved["free"]


def test_a_model_trained_in_full_is_taught_by_what_it_was(saw: Any) -> None:
    _, one, two = saw
    for seen in (one, two):
        assert seen["past, step-1"]["new/kl"] == pytest.approx(0.0, abs=1e-6)
        assert seen["past, step-3"]["new/kl"] > 1e-5
        assert seen["past, after"] == seen["past, at birth"]
        assert seen["past, now"][0] != pytest.approx(seen["past, after"][0], abs=1e-3)
    assert two["past, step-3"]["new/kl"] == pytest.approx(one["past, step-3"]["new/kl"], rel=0.02)


# --- settings and reports -----------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("baselines=[fine_tunning]", "did you mean 'fine_tuning'?"),
        ("baselines=[gpro]", "did you mean 'grpo'?"),
        ("baselines=[zzz]", "known: seeding, no_imitation"),
        ("fixed_capacity.learning_rates.ewk=1e-4", "did you mean 'ewc'?"),
        ("fixed_capacity.learning_rates.ewc=0", "must be greater than 0"),
        ("fixed_capacity.ewc=-1", "must be at least 0"),
    ],
)
def test_a_wrong_baseline_is_named_with_the_nearest(word: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cfg.load(None, [word, "resources.cpus=2"])
    assert told in str(caught.value) and word.partition("=")[0].split(".l")[0] in str(caught.value)


def test_each_baseline_is_a_phase_before_the_gate() -> None:
    default = cfg.load(None, ["resources.cpus=2"])
    assert [phase.key for phase in phases_of(default)][-3:] == ["after", "fine_tuning", "commit"]
    two = cfg.load(None, ["baselines=[ewc,grpo]", "resources.cpus=2"])
    keys = [phase.key for phase in phases_of(two)]
    assert keys[-4:] == ["after", "ewc", "grpo", "commit"] and "fine_tuning" not in keys


def test_the_tables_have_a_row_for_each_baseline(tmp_path: Path) -> None:
    def block(recall: float) -> dict[str, Any]:
        counts = {"recall": 100, "two_hop": 50, "retention": 200, "perplexity": 900}
        return {"recall": recall, "two_hop": 0.5, "retention": 0.75, "perplexity": 3.0, "n": counts}

    tuned = {"title": "Plain fine-tuning", **block(0.31), "tokens": 26_000, "seconds": 41.5}
    anchored = {"title": "EWC, self-study", **block(0.42), "tokens": 25_990, "seconds": 61.0}
    told = {
        "before": block(0.01), "fine_tuned": tuned, "after": block(0.9),
        "baselines": {"fine_tuning": tuned, "ewc": anchored, "grpo": None},
    }  # fmt: skip
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(BeforeAfterTable(told))
    lines = [line for line in console.export_text().splitlines() if " (" in line]
    labels = ["Before", "Plain fine-tuning", "EWC, self-study", "After the night"]
    assert [line.strip().startswith(label) for line, label in zip(lines, labels, strict=True)] == (
        [True] * 4
    )
    assert "42 (33-52)" in lines[2]
    (tmp_path / "summary.json").write_text(json.dumps(told))
    html = write_report(tmp_path).read_text()
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    assert table.count("<tr") == 4
    assert [table.index(label) for label in labels] == sorted(map(table.index, labels))
    assert "25,990 tokens, 1 min 01 s" in table and "26,000 tokens, 41.5 s" in table
