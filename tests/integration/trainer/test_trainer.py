"""The ZeRO-3 learner in real processes: one rank, then two, on the same rows.

Two spawns do all the work (``ONE_RANK``, ``TWO_RANKS``) and leave what they saw in files;
the tests compare. Expected numbers are those of plain torch on the exported model.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sleeprl.losses.divergence import generalised_jsd, on_support, top_k_with_tail
from sleeprl.memory.checkpoint import WEIGHTS, expert_tensors, scatter_columns
from sleeprl.memory.gated_mlp import grow, load_training_form, smaller_self
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.deepspeed_config import deepspeed_config, gather_by_layer
from tests.integration.trainer.scenes import ONE_RANK, TWO_RANKS
from tests.support.ranks import (
    LOSS,
    PARTS,
    SLOTS,
    close,
    distance,
    equal,
    launch,
    reference_logprobs,
    rows,
    same_logprobs,
    texts,
    write_checkpoints,
)


class Saw:
    """The two runs: numbers of ``one`` and ``two`` (rank 0), all ``ranks``, and ``file``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        alone = launch(1, directory, ONE_RANK)
        together = launch(2, directory, TWO_RANKS)
        self.one, self.two = alone[0].numbers, together[0].numbers
        self.ranks = [notes.numbers for notes in together]
        self.errors = alone[0].errors
        for notes in together:
            self.errors |= notes.errors

    def file(self, name: str) -> dict[str, Tensor]:
        path = self.directory / f"{name}.safetensors"
        assert path.is_file(), f"{name} was not reached; these scenes failed: {list(self.errors)}"
        return load_file(path)


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saw]:
    directory = tmp_path_factory.mktemp("learner")
    write_checkpoints(directory)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Saw(directory)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("scene", [scene.__name__ for scene in (*ONE_RANK, *TWO_RANKS)])
def test_every_scene_played_to_its_end(saw: Saw, scene: str) -> None:
    assert scene not in saw.errors, saw.errors[scene]


# --- reading ----------------------------------------------------------------------


def test_the_smaller_self_is_the_checkpoint(saw: Saw) -> None:
    model = AutoModelForCausalLM.from_pretrained(saw.directory / "wide").eval()
    right = reference_logprobs(model, rows(1))
    same_logprobs(saw.one["at birth, smaller"], right)
    assert saw.one["at birth"] == saw.one["at birth, smaller"]  # growth is born silent
    assert saw.one["after two, smaller"] == saw.one["at birth, smaller"]  # and leaves it alone
    same_logprobs(saw.two["after two, smaller"], right)


def test_the_export_is_the_larger_self(saw: Saw) -> None:
    """What the engine will get, loaded by transformers, gives the learner's log-probabilities."""
    tensors = load_file(saw.directory / "wide" / WEIGHTS)
    export = saw.file("export-2")
    assert export.keys() == {name for name in tensors if ".mlp." in name}
    model = AutoModelForCausalLM.from_pretrained(saw.directory / "wide").eval()
    model.load_state_dict(tensors | export)
    right = reference_logprobs(model, rows(1))
    same_logprobs(saw.one["after two"], right)
    moved = zip(chain(*right), chain(*saw.one["at birth"]), strict=True)
    assert max(abs(a - b) for a, b in moved) > 1e-3
    ids, logprobs, fresh = saw.one["canary"]
    assert ids == list(range(20, 50)) and len(logprobs) == 29
    canary = [TrainingExample(ids[:1], ids[1:], "")]
    same_logprobs([logprobs], reference_logprobs(model, canary))
    model.load_state_dict(tensors)  # what an engine that was started since holds
    same_logprobs([fresh], reference_logprobs(model, canary))


def test_the_export_of_a_low_rank_expert_is_the_larger_self(saw: Saw) -> None:
    """Its product is in the dense weights that the engine is sent."""
    tensors, export = load_file(saw.directory / "low" / WEIGHTS), saw.file("low-export-2")
    assert export.keys() == {name for name in tensors if ".mlp." in name}
    assert all(not torch.equal(export[name], tensors[name]) for name in export)
    model = AutoModelForCausalLM.from_pretrained(saw.directory / "low").eval()
    at_birth = reference_logprobs(model, rows(1))
    model.load_state_dict(tensors | export)
    same_logprobs(saw.one["low, after two"], reference_logprobs(model, rows(1)))
    moved = zip(chain(*saw.one["low, after two"]), chain(*at_birth), strict=True)
    assert max(abs(a - b) for a, b in moved) > 1e-3


def test_birth_depends_on_the_seed_and_not_on_the_world(saw: Saw) -> None:
    model = load_training_form(saw.directory / "wide", SLOTS, torch.float32)
    grow(model, SLOTS.width, seed=7)
    born = {n: p.detach() for n, p in expert_tensors(dict(model.named_parameters())).items()}
    equal(saw.file("born"), born)
    equal(saw.file("two-born"), born)
    assert distance(saw.file("born-8"), born) > 0.01


# --- one step against plain torch -------------------------------------------------


def plain_step(directory: Path) -> tuple[float, float, dict[str, Tensor]]:
    """The first step as a few lines of torch: loss, gradient norm and the expert after it."""
    model = load_training_form(directory / "wide", SLOTS, torch.float32)
    fresh = grow(model, SLOTS.width, seed=7)
    batch = rows(1)
    counts = {part: sum(len(r.response_ids) for r in batch if r.part == part) for part in PARTS}
    loss = torch.zeros(())
    for row in batch:
        weight, tokens = PARTS[row.part], torch.tensor(row.response_ids)
        here = slice(len(row.prompt_ids) - 1, -1)
        student = model(input_ids=torch.tensor([row.prompt_ids + row.response_ids])).logits[0, here]
        prompt = row.prompt_ids if row.teacher_prompt_ids is None else row.teacher_prompt_ids
        there = slice(len(prompt) - 1, -1)
        with torch.no_grad(), smaller_self(model):
            teacher = model(input_ids=torch.tensor([prompt + row.response_ids])).logits[0, there]
        logp = student.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        ids, kept = top_k_with_tail(teacher, LOSS.top_k)
        kl = generalised_jsd(kept, on_support(student, ids), LOSS.beta).sum()
        total = weight.kl * kl - weight.ce * logp.sum()
        if weight.pg:
            ratio = (logp.detach() - torch.tensor(row.rollout_logprobs)).exp().clamp(max=2.0)
            total = total - weight.pg * row.advantage * (ratio * logp).sum()
            # In value the ratio learner / proximal is 1, so the term is weight * -A * ratio.
            total = total - weight.pg * row.advantage * (ratio * (1 - logp.detach())).sum()
        loss = loss + total / counts[row.part]
    loss.backward()
    norm = nn.utils.clip_grad_norm_(fresh, 1.0)
    optimizer = torch.optim.AdamW(fresh, lr=0.5e-2, betas=(0.9, 0.99), weight_decay=0.1)
    optimizer.step()
    named = expert_tensors(dict(model.named_parameters()))
    return loss.item(), norm.item(), {n: p.detach() for n, p in named.items()}


def test_the_first_step_is_adamw_s_on_the_written_out_loss(saw: Saw) -> None:
    loss, norm, expert = plain_step(saw.directory)
    metrics = saw.one["step-1"]
    assert metrics["loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["learning_rate"] == pytest.approx(0.5e-2)  # step 1 of 2 of the warm-up
    assert metrics["tokens"] == sum(len(r.response_ids) for r in rows(1))
    assert {"new/kl", "new/ce", "student/pg", "student/mismatch_kl", "replay/kl"} <= set(metrics)
    apart = [
        [abs(found + 5.5) for found in logprobs]
        for row, logprobs in zip(rows(1), saw.one["at birth"], strict=True)
        if row.part == "student"
    ]
    for age, mine in enumerate(apart):
        assert metrics[f"student/age_{age}/max"] == pytest.approx(max(mine), abs=1e-4)
        share = len(mine) / sum(map(len, apart))
        assert metrics[f"student/age_{age}/share"] == pytest.approx(share)
        assert metrics[f"student/age_{age}/apart"] == pytest.approx(
            share * sum(mine) / len(mine), abs=1e-4
        )
    assert distance(saw.file("expert-1"), saw.file("born")) > 1e-3
    # Adam divides by the gradient's size, so a gradient of rounding noise is as loud as any:
    # at birth gate and up have no gradient at all (down is 0), only down moves.
    close(saw.file("expert-1"), expert, atol=2e-4)


def test_the_learning_rate_rises_and_then_falls(saw: Saw) -> None:
    steps = [saw.one[f"step-{n}"] for n in (1, 2, 3, 4)]
    later = 1e-2 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 8)))
    assert [s["learning_rate"] for s in steps] == pytest.approx([0.5e-2, 1e-2, 1e-2, later])


def test_micro_batches_do_not_matter(saw: Saw) -> None:
    small, large = saw.one["small micro-batches"], saw.one["step-1"]
    assert small == pytest.approx(large, abs=1e-4, rel=1e-3)
    close(saw.file("expert-1-micro"), saw.file("expert-1"), atol=2e-4)


def test_a_step_on_nothing_breaks_nothing(saw: Saw) -> None:
    """All dreams unscored and no replay: the loop goes on with what it has."""
    assert saw.one["nothing"]["tokens"] == 0.0
    tensors = saw.file("expert-nothing")
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert distance(tensors, saw.file("expert-1")) > 1e-4  # it learns on afterwards


# --- world size -------------------------------------------------------------------


@pytest.mark.parametrize("step", ["step-1", "step-2", "step-3"])
def test_two_ranks_report_what_one_does(saw: Saw, step: str) -> None:
    assert saw.two[step] == pytest.approx(saw.one[step], abs=1e-3, rel=1e-2)
    assert saw.ranks[1][step] == saw.two[step]  # every rank knows the global means


def test_two_ranks_step_where_one_does(saw: Saw) -> None:
    close(saw.file("two-expert-1"), saw.file("expert-1"), atol=2e-4)
    close(saw.file("two-state-2"), saw.file("state-2"), atol=1e-3)
    close(saw.file("two-export-2"), saw.file("export-2"), atol=1e-3)
    same_logprobs(saw.two["after two"], saw.one["after two"], atol=2e-3)


def test_a_rank_without_rows_steps_along(saw: Saw) -> None:
    assert saw.two["uneven"] == pytest.approx(saw.one["one text"], abs=1e-4, rel=1e-3)
    close(saw.file("two-uneven"), saw.file("expert-one-text"), atol=2e-4)


# --- state ------------------------------------------------------------------------


def test_the_state_is_whole_and_small(saw: Saw) -> None:
    for name in ("state-2", "two-state-2"):
        state = saw.file(name)
        assert int(state.pop("steps")) == 2
        moments = {n for n in state if n.startswith("exp_avg")}
        parameters = set(state) - moments
        assert len(parameters) == 6 and all(".expert." in n for n in parameters)
        assert moments == {f"{m}:{n}" for m in ("exp_avg", "exp_avg_sq") for n in parameters}
        assert all(state[n].numel() == 64 * 8 for n in state)
        assert all(state[n].abs().sum() > 0 for n in moments)


def test_one_rank_goes_on_to_the_bit(saw: Saw) -> None:
    assert saw.one["resumed"] == 2
    assert saw.one["resumed, after two"] == saw.one["after two"]
    assert saw.one["resumed, step-3"] == saw.one["step-3"]
    equal(saw.file("state-3-resumed"), saw.file("state-3"))


def test_a_state_replaces_whatever_was_there(saw: Saw) -> None:
    equal(saw.file("state-3-warm"), saw.file("state-3"))


def test_two_ranks_go_on_to_the_bit(saw: Saw) -> None:
    equal(saw.file("two-state-3-resumed"), saw.file("two-state-3"))


def test_bfloat16_goes_on_to_the_bit(saw: Saw) -> None:
    assert saw.one["half sums in"] == "torch.float32"
    equal(saw.file("half-3-resumed"), saw.file("half-3"))


def test_a_state_moves_from_one_rank_to_two(saw: Saw) -> None:
    assert saw.two["moved, step-3"] == pytest.approx(saw.one["step-3"], abs=1e-4, rel=1e-3)
    close(saw.file("two-state-3-moved"), saw.file("state-3"), atol=2e-4)


def test_the_state_before_the_first_step_can_be_loaded(saw: Saw) -> None:
    assert saw.one["restarted"] == 0
    equal(saw.file("expert-1-restarted"), saw.file("expert-1"))


def test_an_expert_can_be_put_in_place_and_trained_on(saw: Saw) -> None:
    """What dreaming does with the expert of consolidation; also the optimiser's copy is new."""
    equal(saw.file("expert-placed"), saw.file("expert-2"))
    assert saw.one["placed"] == saw.one["after two"]
    step = distance(saw.file("expert-placed-1"), saw.file("expert-2"))
    assert 1e-4 < step < 0.02  # one small step from there, not back to where it was born


def test_no_rank_gathers_while_engines_come_to_rest(saw: Saw) -> None:
    assert all(saw.two["at rest"] <= rank["gathering"] for rank in saw.ranks)
    assert saw.two["published"]["stale_engines"] == 0.0 and saw.ranks[1]["published"] == {}
    assert saw.two["sent"] == len(saw.file("two-export-2"))


# --- offloading -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["optimizer", "parameters"])
def test_what_is_offloaded_learns_the_same(saw: Saw, what: str) -> None:
    assert saw.one[f"offload {what}"] == (True, what == "parameters")
    assert saw.one[f"offload {what}, step-1"] == pytest.approx(saw.one["step-1"], rel=1e-6)
    close(saw.file(f"offload-{what}-2"), saw.file("state-2"), atol=1e-6)
    close(saw.file(f"offload-{what}-3"), saw.file("state-3"), atol=1e-6)


def test_deepspeed_is_told_what_to_offload() -> None:
    def zero(gpu: bool, offload: str) -> dict[str, Any]:
        config = deepspeed_config(dtype="bfloat16", grad_clip=1.0, gpu=gpu, offload=offload)
        assert config["zero_force_ds_cpu_optimizer"] is False  # the optimiser is torch's
        return dict(config["zero_optimization"])

    pinned = {"device": "cpu", "pin_memory": True}
    assert zero(True, "none") == {"stage": 3}
    assert zero(True, "optimizer") == {"stage": 3, "offload_optimizer": pinned}
    both = {"stage": 3, "offload_optimizer": pinned, "offload_param": pinned}
    assert zero(True, "parameters") == both
    assert zero(False, "optimizer")["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    read = DeepSpeedZeroConfig(**both)
    assert read.offload_optimizer.device == read.offload_param.device == "cpu"
    assert read.offload_optimizer.pin_memory and read.offload_param.pin_memory


# --- every parameter --------------------------------------------------------------


def test_full_training_exports_the_checkpoint_at_its_width(saw: Saw) -> None:
    before = load_file(saw.directory / "grown" / WEIGHTS)
    start = saw.file("full-export-0")
    equal(start, before)  # slot 1 is used, 0 and 2 are not: all in their old places
    after = saw.file("full-export-1")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[n], before[n]) for n in before)
    slots = SLOTS.filled(1)
    columns = torch.tensor(slots.occupied_columns())
    for name in (n for n in after if ".mlp." in n):
        kept = after[name].index_select(1 if "down_proj" in name else 0, columns)
        assert torch.equal(after[name], scatter_columns(name, kept, slots))  # free slots stay zero
    model = AutoModelForCausalLM.from_pretrained(saw.directory / "grown").eval()
    model.load_state_dict(after)
    same_logprobs(saw.one["full, after one"], reference_logprobs(model, texts(1)))


def test_full_training_knows_what_it_began_with_if_it_was_asked_then(saw: Saw) -> None:
    born, later, late = saw.one["full, canaries"]
    assert born.fresh == later.fresh == born.logprobs != later.logprobs
    assert late.fresh is None  # a frozen copy of the whole model would have to be loaded for it


def test_full_training_learns_what_plain_torch_does(saw: Saw) -> None:
    model = load_training_form(saw.directory / "grown", SLOTS.filled(1), torch.float32)
    right = reference_logprobs(model, texts(1))
    tokens = sum(map(len, right))
    assert saw.one["full, step-1"]["loss"] == pytest.approx(
        -sum(map(sum, right)) / tokens, abs=1e-4
    )
    assert saw.one["full, step-1"]["text/ce"] == pytest.approx(saw.one["full, step-1"]["loss"])


def test_the_teacher_is_asked_once_about_a_named_text(saw: Saw) -> None:
    assert saw.one["named, asked"] == saw.one["unnamed, asked"] == saw.one["unnamed, asked again"]
    assert saw.one["named, asked"] > 0 and saw.one["named, asked again"] == 0
    for moment in ("first", "second"):
        assert saw.one[f"named, {moment}"] == saw.one[f"unnamed, {moment}"]
    for pair in (("expert-named", "expert-unnamed"), ("two-expert-named", "two-expert-unnamed")):
        named, unnamed = map(saw.file, pair)
        assert named.keys() == unnamed.keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, unnamed[name]), name


def test_a_step_starts_no_process(saw: Saw) -> None:
    assert saw.one["started by a step"] == []


def test_the_guard_of_a_killed_compile_does_not_stop_the_next(tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    built = next(Path(get_default_build_root()).rglob("deepspeed_shm_comm"))
    shutil.copytree(built, tmp_path / built.name)  # compiled already: there is only to load
    (tmp_path / built.name / "lock").touch()
    code = "from sleeprl.trainer.cpu_tuning import load_shared_memory_op as f; f(); print('loaded')"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.endswith("loaded\n"), done.stderr[-2000:]
    assert not (tmp_path / built.name / "lock").exists()


# --- what is gathered at once -------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "at_once"),
    [
        ("", [0, 1]),  # nothing has a gradient to lose
        ("model.embed_tokens model.layers", [0, 1]),
        ("model.layers", [1]),  # as a model that grows: the first layer's input has no gradient
        ("model.layers.1", [0]),
    ],
)
def test_layers_are_gathered_at_once_where_deepspeed_can(
    tiny_model: Path, trained: str, at_once: list[int]
) -> None:
    from deepspeed.utils import get_z3_leaf_modules

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(map(name.startswith, trained.split())))
    gather_by_layer(model)
    assert get_z3_leaf_modules(model) == [model.model.layers[n] for n in at_once]
