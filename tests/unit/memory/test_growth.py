"""Both growths keep every promise of the protocol, and a level's transfer changes only its slots."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleeprl.memory.checkpoint import (
    WEIGHTS,
    expert_tensors,
    intermediate_size,
    scatter_columns,
    training_name,
)
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import (
    ModuleWithExpert,
    grow,
    load_training_form,
    smaller_self,
    switched,
)
from sleeprl.memory.growth import Growth, growth_named, growth_of, update
from sleeprl.memory.levels import CONTEXT
from sleeprl.memory.low_rank import ADAPTER, ADAPTER_WEIGHTS, export_adapter
from sleeprl.memory.slots import GATED_MLP, LOW_RANK, Slots
from sleeprl.memory.transfer import Merge, Transfer, plan
from sleeprl.memory.wake_learning import accumulate, wake_gradient
from sleeprl.plugins import BUILTIN, PluginError
from tests.support.models import make_tiny_model

WIDTH, POOLS = 8, (3, 2)
IDS = torch.arange(3, 43).reshape(2, 20)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@torch.no_grad()
def logits(model: nn.Module | Path) -> Tensor:
    if isinstance(model, nn.Module):
        return model(input_ids=IDS).logits
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(IDS).logits


def far(one: Tensor, other: Tensor) -> bool:
    return (one - other).abs().max().item() > 0.01


def slots_of(directory: Path) -> Slots:
    slots = Slots.load(directory)
    assert slots is not None
    return slots


def fingerprint(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@torch.no_grad()
def randomise(fresh: list[nn.Parameter], seed: int) -> None:
    """As if trained: an expert that does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in fresh:
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def born_and_trained(model: nn.Module, growth: Growth, slot: int, seed: int) -> dict[str, Tensor]:
    randomise(growth.grow(model, WIDTH, seed, slot), seed)
    return {
        n: p.detach().clone() for n, p in expert_tensors(dict(model.named_parameters())).items()
    }


def filled(growth: Growth, checkpoint: Path, target: Path, slot: int, seed: int) -> Path:
    """``checkpoint`` with something in ``slot``."""
    model = growth.load(checkpoint, slots_of(checkpoint), torch.float32)
    expert = born_and_trained(model, growth, slot, seed)
    growth.write(checkpoint, target, slots_of(checkpoint), ExpertUpdate(slot, expert))
    return target


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "plain"
    return make_tiny_model(directory, architecture=request.param, seed=1)


@pytest.fixture(scope="module", params=sorted(BUILTIN["growth"]))
def growth(request: pytest.FixtureRequest) -> Growth:
    return growth_named(request.param)


@pytest.fixture(scope="module")
def empty(plain: Path, growth: Growth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("empty") / "checkpoint"
    growth.add_slots(plain, target, POOLS, WIDTH, "float32")
    return target


@pytest.fixture(scope="module")
def two(empty: Path, growth: Growth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slots 3 (level 2), then 0 and 1 (level 1) in use."""
    place = tmp_path_factory.mktemp("two")
    filled(growth, empty, place / "3", 3, seed=11)
    filled(growth, place / "3", place / "0", 0, seed=12)
    return filled(growth, place / "0", place / "1", 1, seed=13)


# --- conformance ------------------------------------------------------------------


def test_a_prepared_checkpoint_computes_what_the_plain_one_did(
    plain: Path, empty: Path, growth: Growth
) -> None:
    slots = slots_of(empty)
    assert slots.pools == POOLS and slots.used == () and slots.width == WIDTH
    assert type(growth_of(slots)) is type(growth)
    torch.testing.assert_close(logits(empty), logits(plain), **CLOSE)
    assert torch.equal(logits(growth.load(empty, slots, torch.float32)), logits(plain))
    first, second = (AutoTokenizer.from_pretrained(d) for d in (plain, empty))
    assert first.get_vocab() == second.get_vocab()
    assert first.chat_template == second.chat_template


def test_preparing_twice_is_a_copy(two: Path, growth: Growth, tmp_path: Path) -> None:
    again = growth.add_slots(two, tmp_path / "again", (9,), 3, "float32")
    assert again == slots_of(two) == slots_of(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(two)


def test_birth_changes_no_bit(two: Path, growth: Growth) -> None:
    slots = slots_of(two)
    model = growth.load(two, slots, torch.float32)
    before = logits(model)
    fresh = growth.grow(model, WIDTH, seed=3, slot=2)
    assert torch.equal(logits(model), before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    expert = expert_tensors(dict(model.named_parameters()))
    assert trainable == {training_name(name) for name in expert} and len(fresh) == len(trainable)
    assert all(name.startswith("model.layers.") for name in expert)
    wrapped = {f"model.{n}": p for n, p in model.named_parameters()}  # as inside the learner
    assert expert_tensors(wrapped).keys() == expert.keys()


def test_birth_depends_on_the_seed_alone(empty: Path, growth: Growth) -> None:
    def born(seed: int, draws: int) -> list[Tensor]:
        model = growth.load(empty, slots_of(empty), torch.float32)
        torch.randn(draws)
        mark = torch.get_rng_state()
        fresh = growth.grow(model, WIDTH, seed)
        assert torch.equal(torch.get_rng_state(), mark)
        return [p.detach().clone() for p in fresh]

    first, same, other = born(1, 0), born(1, 17), born(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_loading_draws_no_random_numbers(two: Path, growth: Growth) -> None:
    mark = torch.get_rng_state()
    growth.load(two, slots_of(two), torch.float32, teacher_only_slots=(0,))
    assert torch.equal(torch.get_rng_state(), mark)


def test_in_bfloat16(plain: Path, growth: Growth, tmp_path: Path) -> None:
    growth.add_slots(plain, tmp_path / "half", POOLS, WIDTH, "bfloat16")
    filled(growth, tmp_path / "half", tmp_path / "one", 0, seed=5)
    model = growth.load(
        tmp_path / "one", slots_of(tmp_path / "one"), torch.bfloat16, teacher_only_slots=(0,)
    )
    growth.grow(model, WIDTH, 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with smaller_self(model):
        smaller = logits(model)
    assert not torch.equal(logits(model), smaller)
    with smaller_self(model):
        assert torch.equal(logits(model), smaller)


def test_every_written_form_computes_what_was_trained(
    two: Path, growth: Growth, tmp_path: Path
) -> None:
    """The checkpoint, what an engine is sent, and the plain export."""
    slots = slots_of(two)
    model = growth.load(two, slots, torch.float32)
    before = logits(model)
    expert = born_and_trained(model, growth, 2, seed=21)
    trained = logits(model)
    assert far(trained, before)
    with smaller_self(model):
        assert torch.equal(logits(model), before)

    grown = growth.write(two, tmp_path / "grown", slots, ExpertUpdate(2, expert))
    assert grown == slots_of(tmp_path / "grown") == slots.filled(2)
    again = growth.load(tmp_path / "grown", grown, torch.float32)
    torch.testing.assert_close(logits(again), trained, **CLOSE)

    growth.export(tmp_path / "grown", tmp_path / "export")
    torch.testing.assert_close(logits(tmp_path / "export"), trained, **CLOSE)
    assert Slots.load(tmp_path / "export") is None
    assert not (tmp_path / "export" / ADAPTER).exists()

    engine = AutoModelForCausalLM.from_pretrained(two, dtype=torch.float32).eval()
    sent = dict(growth.fold(two, slots, ExpertUpdate(2, expert)))
    layers = [name.split(".")[2] for name in sent]
    assert layers == sorted(layers) and len(sent) == 2 * 3  # whole groups, layer by layer
    engine.load_state_dict(sent, strict=False)
    torch.testing.assert_close(logits(engine), trained, **CLOSE)
    engine.load_state_dict(dict(growth.tensors(two, slots)), strict=False)
    torch.testing.assert_close(logits(engine), before, **CLOSE)


def test_switching_off_is_exact_and_individual(two: Path, growth: Growth) -> None:
    slots = slots_of(two)
    model = growth.load(two, slots, torch.float32, teacher_only_slots=(0, 1))
    growth_seen = {m.slot for m in model.modules() if isinstance(m, ModuleWithExpert)}
    assert {0, 1} <= growth_seen
    kept = growth_seen - {0, 1}  # low-rank slots all have a switch; the gated 3 is in the base
    born_and_trained(model, growth, 4, seed=22)
    seen = {}
    for on in [(), (0,), (1,), (0, 1), (4,), (1, 4)]:
        with switched(model, {*on, *kept}):
            seen[on] = logits(model)
    assert all(far(seen[a], seen[b]) for a in seen for b in seen if a < b)
    assert torch.equal(logits(model), seen[(4,)])  # the larger self at rest
    with smaller_self(model):
        assert torch.equal(logits(model), seen[(0, 1)])
        with pytest.raises(RuntimeError, match="on purpose"), switched(model, kept):
            raise RuntimeError("on purpose")
        assert torch.equal(logits(model), seen[(0, 1)])


def test_a_slot_that_is_not_in_use_cannot_be_held(two: Path, growth: Growth) -> None:
    with pytest.raises(ValueError, match=r"\[0, 2\] are not all in use"):
        growth.load(two, slots_of(two), torch.float32, teacher_only_slots=(0, 2))


# --- compute, consolidate, update -------------------------------------------------


def learn(model: nn.Module, fresh: list[nn.Parameter], steps: int = 4) -> list[float]:
    """A few real steps of the student towards the teacher, its smaller self."""
    optimizer = torch.optim.AdamW(fresh, lr=0.02, weight_decay=0.1)
    with torch.no_grad(), smaller_self(model):
        teacher = model(input_ids=IDS).logits.log_softmax(-1)
    losses = []
    for _ in range(steps):
        student = model(input_ids=IDS).logits.log_softmax(-1)
        loss = (teacher.exp() * (teacher - student)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_fast_level_is_handed_to_the_next_slower_one(
    two: Path, growth: Growth, tmp_path: Path
) -> None:
    """A level is handed on to the next: what is preserved, learned, emptied and left alone."""
    slots = slots_of(two)
    (step,) = plan(slots, sender=1)
    assert step == Transfer(1, 2, (3, 0, 1), (3, 4), slot=4, reset=(0, 1))
    on_disk = fingerprint(two)
    model = growth.load(two, slots, torch.float32, teacher_only_slots=step.reset)
    with smaller_self(model):
        before = logits(model)
    torch.testing.assert_close(before, logits(growth.load(two, slots, torch.float32)), **CLOSE)
    student_at_birth = logits(model)
    fresh = growth.grow(model, WIDTH, seed=4, slot=step.slot)
    assert torch.equal(logits(model), student_at_birth)  # 1: a newborn changes no bit
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    born = [p.detach().clone() for p in fresh]
    losses = learn(model, fresh)
    assert losses[-1] < 0.9 * losses[0]  # it learns from the slots that will go
    assert all(not torch.equal(p, old) for p, old in zip(fresh, born, strict=True))
    for name, parameter in model.named_parameters():  # 2: nothing but the new slot differs
        if name in frozen:
            assert parameter.grad is None and torch.equal(parameter, frozen[name])
    with smaller_self(model):
        assert torch.equal(logits(model), before)  # 3: the teacher stayed what it was
    assert fingerprint(two) == on_disk

    expert = expert_tensors(dict(model.named_parameters()))
    after = update(two, tmp_path / "after", slots, step, expert)
    assert after == slots_of(tmp_path / "after") == step.after(slots)
    assert after.used_in(1) == () and after.used_in(2) == (3, 4)
    student = growth.load(tmp_path / "after", after, torch.float32)
    torch.testing.assert_close(logits(student), logits(model), **CLOSE)
    assert fingerprint(two) == on_disk

    engine = AutoModelForCausalLM.from_pretrained(two, dtype=torch.float32).eval()
    sent = growth.fold(two, slots, ExpertUpdate(step.slot, expert, reset=step.reset))
    engine.load_state_dict(dict(sent), strict=False)
    torch.testing.assert_close(logits(engine), logits(model), **CLOSE)

    # Without the reset the sender is on beside it: what it held is there twice.
    (step,) = plan(slots, sender=1, reset=False)
    assert isinstance(step, Transfer) and step.teacher_only == (0, 1)
    kept = update(two, tmp_path / "kept", slots, step, expert)
    assert kept.used_in(1) == (0, 1) and kept.used_in(2) == (3, 4)
    twice = logits(growth.load(tmp_path / "kept", kept, torch.float32))
    assert (twice - logits(model)).abs().max() > 1e-3


def test_a_reset_gives_the_model_without_those_slots(
    two: Path, empty: Path, growth: Growth, tmp_path: Path
) -> None:
    """4: the student before it learnt is the model that never had the sender's slots."""
    slots = slots_of(two)
    never = filled(growth, empty, tmp_path / "never", 3, seed=11)
    student = growth.load(two, slots, torch.float32, teacher_only_slots=(0, 1))
    assert torch.equal(logits(student), logits(growth.load(never, slots_of(never), torch.float32)))
    newborn = {n: torch.zeros_like(t) for n, t in born_and_trained(student, growth, 4, 1).items()}
    growth.write(two, tmp_path / "reset", slots, ExpertUpdate(4, newborn, reset=(0, 1)))
    growth.export(tmp_path / "reset", tmp_path / "reset-plain")
    growth.export(never, tmp_path / "never-plain")
    first, second = (load_file(tmp_path / f"{n}-plain" / WEIGHTS) for n in ("reset", "never"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_context_goes_into_the_fastest_level(two: Path, growth: Growth, tmp_path: Path) -> None:
    """Mode A: both selves have the same slots, and the context is in the teacher's prompt only."""
    slots = slots_of(two)
    (step,) = plan(slots, CONTEXT)
    assert isinstance(step, Transfer) and step.slot == 2 and step.reset == ()
    model = growth.load(two, slots, torch.float32, teacher_only_slots=step.reset)
    with smaller_self(model):
        teacher = logits(model)
    expert = born_and_trained(model, growth, step.slot, seed=6)
    with smaller_self(model):
        assert torch.equal(logits(model), teacher)
    after = update(two, tmp_path / "after", slots, step, expert)
    assert after.used_in(1) == (0, 1, 2)


def test_only_a_transfer_s_own_columns_change_on_disk(
    two: Path, growth: Growth, tmp_path: Path
) -> None:
    slots = slots_of(two)
    (step,) = plan(slots, sender=1)
    assert isinstance(step, Transfer)
    model = growth.load(two, slots, torch.float32, teacher_only_slots=step.reset)
    expert = born_and_trained(model, growth, step.slot, seed=8)
    update(two, tmp_path / "after", slots, step, expert)
    file = WEIGHTS if slots.growth == GATED_MLP else f"{ADAPTER}/{ADAPTER_WEIGHTS}"
    before, after = load_file(two / file), load_file(tmp_path / "after" / file)
    touched = {u for s in (*step.reset, step.slot) for u in range(10**6)[slots.columns(s)]}
    for name, old in before.items():
        new = after[name]
        key = name.removeprefix("base_model.model.")
        if key not in expert:
            assert torch.equal(new, old)
            continue
        dim = 1 if "down_proj.weight" in name or "lora_B" in name else 0
        kept = torch.tensor([u for u in range(old.shape[dim]) if u not in touched])
        assert torch.equal(new.index_select(dim, kept), old.index_select(dim, kept))
        own = slots.columns(step.slot)
        assert torch.equal(new.narrow(dim, own.start, WIDTH), expert[key])
        for slot in step.reset:
            assert not new.narrow(dim, slots.columns(slot).start, WIDTH).any()
    if slots.growth == LOW_RANK:  # the base is never written
        assert fingerprint(two)[WEIGHTS] == fingerprint(tmp_path / "after")[WEIGHTS]


# --- a full pool ------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(two: Path, growth: Growth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(growth, two, tmp_path_factory.mktemp("full") / "4", 4, seed=14)


def test_a_full_level_is_distilled_into_one_of_its_own_slots(
    full: Path, growth: Growth, tmp_path: Path
) -> None:
    slots = slots_of(full)
    room, then = plan(slots, sender=1, when_full="distil")
    assert isinstance(room, Transfer) and room.reset == (3, 4) and room.slot == 3
    model = growth.load(full, slots, torch.float32, teacher_only_slots=room.reset)
    with smaller_self(model):
        teacher = logits(model)
    torch.testing.assert_close(teacher, logits(growth.load(full, slots, torch.float32)), **CLOSE)
    expert = born_and_trained(model, growth, room.slot, seed=9)
    after = update(full, tmp_path / "after", slots, room, expert)
    assert after.used_in(2) == (3,) and after.used_in(1) == (0, 1)
    result = growth.load(tmp_path / "after", after, torch.float32)
    torch.testing.assert_close(logits(result), logits(model), **CLOSE)
    assert plan(after, sender=1) == (then,)


def test_a_merged_slot_is_base_and_free(full: Path, growth: Growth, tmp_path: Path) -> None:
    slots = slots_of(full)
    room, then = plan(slots, sender=1, when_full="merge")
    assert room == Merge(3)
    before = logits(growth.load(full, slots, torch.float32))
    merged = update(full, tmp_path / "merged", slots, room)
    assert merged == slots_of(tmp_path / "merged") == room.after(slots)
    torch.testing.assert_close(
        logits(growth.load(tmp_path / "merged", merged, torch.float32)), before, **CLOSE
    )
    growth.export(tmp_path / "merged", tmp_path / "plain")
    torch.testing.assert_close(logits(tmp_path / "plain"), before, **CLOSE)
    if merged.growth == GATED_MLP:
        assert intermediate_size(tmp_path / "merged") == merged.total_width
        assert merged.total_width == slots.total_width + WIDTH
    # The slot is really empty: what is written into it now is all that it holds.
    model = growth.load(tmp_path / "merged", merged, torch.float32)
    expert = born_and_trained(model, growth, 3, seed=31)
    grown = growth.write(tmp_path / "merged", tmp_path / "next", merged, ExpertUpdate(3, expert))
    torch.testing.assert_close(
        logits(growth.load(tmp_path / "next", grown, torch.float32)), logits(model), **CLOSE
    )
    assert then == plan(merged, sender=1)[0]


def test_a_gated_slot_next_to_the_base_merges_to_the_bit(plain: Path, tmp_path: Path) -> None:
    growth = growth_named(GATED_MLP)
    growth.add_slots(plain, tmp_path / "empty", (2,), WIDTH, "float32")
    filled(growth, tmp_path / "empty", tmp_path / "one", 0, seed=2)
    filled(growth, tmp_path / "one", tmp_path / "two", 1, seed=3)
    slots = slots_of(tmp_path / "two")
    merged = growth.merge(tmp_path / "two", tmp_path / "merged", slots, 0)
    assert torch.equal(
        logits(growth.load(tmp_path / "merged", merged, torch.float32)),
        logits(growth.load(tmp_path / "two", slots, torch.float32)),
    )


def test_a_transfer_without_what_was_trained_is_refused(two: Path, tmp_path: Path) -> None:
    slots = slots_of(two)
    (step,) = plan(slots, sender=1)
    with pytest.raises(ValueError, match="slot 4 needs the expert"):
        update(two, tmp_path / "after", slots, step)
    assert not (tmp_path / "after").exists()


# --- wake learning of the sender --------------------------------------------------


def wake_gradients(model: nn.Module, slots: Slots) -> dict[str, Tensor]:
    """Two real gradient steps' worth, of the first layer's MLP, at the checkpoint's width."""
    total: dict[str, Tensor] = {}
    names = {
        name.replace(".base", ""): parameter
        for name, parameter in model.named_parameters()
        if "layers.0.mlp" in name and ".expert." not in name
    }
    for seed in (0, 1):
        ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(seed))
        logprobs = model(input_ids=ids).logits.log_softmax(-1)
        loss = -logprobs[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        gradients = torch.autograd.grad(loss, list(names.values()))
        wide = {
            name: scatter_columns(name, g, slots) if slots.growth == GATED_MLP else g
            for name, g in zip(names, gradients, strict=True)
        }
        total = accumulate(total, wide, eta=100.0)
    return total


def test_what_was_accumulated_in_wake_is_computed_then_applied(
    two: Path, growth: Growth, tmp_path: Path
) -> None:
    """The student has the prospective weights, the teacher the old ones; the update applies them."""
    slots = slots_of(two)
    (step,) = plan(slots, sender=1)
    assert isinstance(step, Transfer)
    wake = wake_gradients(growth.load(two, slots, torch.float32).requires_grad_(True), slots)
    assert len(wake) == 3
    without = growth.load(two, slots, torch.float32, teacher_only_slots=step.reset)
    model = growth.load(
        two, slots, torch.float32, teacher_only_slots=step.reset, wake_gradients=wake
    )
    assert far(logits(model), logits(without))
    with smaller_self(model), smaller_self(without):
        assert torch.equal(logits(model), logits(without))  # computed, not applied
    at_birth = logits(model)
    fresh = growth.grow(model, WIDTH, seed=1, slot=step.slot)
    assert torch.equal(logits(model), at_birth)
    randomise(fresh, seed=1)
    expert = expert_tensors(dict(model.named_parameters()))
    assert {training_name(name) for name in expert} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    after = update(two, tmp_path / "after", slots, step, expert, wake)
    student = growth.load(tmp_path / "after", after, torch.float32)
    torch.testing.assert_close(logits(student), logits(model), **CLOSE)
    engine = AutoModelForCausalLM.from_pretrained(two, dtype=torch.float32).eval()
    sent = growth.fold(
        two, slots, ExpertUpdate(step.slot, expert, reset=step.reset, wake_gradients=wake)
    )
    engine.load_state_dict(dict(sent), strict=False)
    torch.testing.assert_close(logits(engine), logits(model), **CLOSE)


def test_what_a_day_adds_is_the_gradient_at_the_weights_as_they_are(
    two: Path, growth: Growth, tmp_path: Path
) -> None:
    texts = [list(range(3, 23)), [7], list(range(40, 52))]
    before = fingerprint(two)
    first = wake_gradient(two, texts[:1], 0.5, {})
    total = wake_gradient(two, texts[1:], 0.25, first)
    assert fingerprint(two) == before
    growth.export(two, tmp_path / "plain")  # of which every column is there
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    by_hand: dict[str, Tensor] = {}
    for text, eta in ((texts[0], 0.5), (texts[2], 0.25)):
        model.zero_grad()
        ids = torch.tensor([text])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        (-logprobs.gather(-1, ids[0, 1:, None]).mean()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if ".mlp." in n}
        by_hand = accumulate(by_hand, grads, eta)  # type: ignore[arg-type]
    assert total.keys() == by_hand.keys() and len(total) == 6
    slots = slots_of(two)
    for name, tensor in total.items():
        if slots.growth == GATED_MLP:  # what is in a slot may be something else by the boundary
            dim, base = 1 if "down_proj" in name else 0, slots.base_width
            assert by_hand[name].narrow(dim, base, slots.width).any()
            assert not tensor.narrow(dim, base, tensor.shape[dim] - base).any()
            tensor, by_hand[name] = (t.narrow(dim, 0, base) for t in (tensor, by_hand[name]))
        torch.testing.assert_close(tensor, by_hand[name], atol=1e-6, rtol=1e-3)


def test_what_does_not_learn_in_wake_is_named(two: Path, growth: Growth, tmp_path: Path) -> None:
    slots = slots_of(two)
    wrong = {"lm_head.weight": torch.zeros(320, 64)}
    with pytest.raises(ValueError, match="lm_head"):
        growth.load(two, slots, torch.float32, wake_gradients=wrong)
    expert = born_and_trained(growth.load(two, slots, torch.float32), growth, 4, seed=1)
    with pytest.raises(ValueError, match="lm_head"):
        list(growth.fold(two, slots, ExpertUpdate(4, expert, wake_gradients=wrong)))


# --- PEFT -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, growth = tmp_path_factory.mktemp("adapted"), growth_named(LOW_RANK)
    growth.add_slots(plain, place / "empty", (3,), WIDTH, "float32")
    filled(growth, place / "empty", place / "one", 2, seed=41)
    return filled(growth, place / "one", place / "two", 0, seed=42)


def peft_logits(base: Path, adapter: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter).eval())


def test_peft_loads_the_checkpoint_s_adapter_as_it_is(plain: Path, adapted: Path) -> None:
    """All slots as one adapter: rank and alpha have the paper's proportion, 64 : 128."""
    config = json.loads((adapted / ADAPTER / "adapter_config.json").read_text())
    assert config["r"] == 3 * WIDTH and config["lora_alpha"] == 2 * config["r"]
    slots = slots_of(adapted)
    ours = logits(growth_of(slots).load(adapted, slots, torch.float32))
    assert far(ours, logits(plain))
    torch.testing.assert_close(peft_logits(plain, adapted / ADAPTER), ours, **CLOSE)
    torch.testing.assert_close(logits(adapted), logits(plain))  # the base alone


@pytest.mark.parametrize("on", [(2,), (0,), (0, 2)])
def test_peft_loads_any_slots_as_an_adapter(
    plain: Path, adapted: Path, tmp_path: Path, on: tuple[int, ...]
) -> None:
    slots = slots_of(adapted)
    export_adapter(adapted, tmp_path / "adapter", on)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = growth_of(slots).load(adapted, slots, torch.float32)
    with switched(model, on):
        ours = logits(model)
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    peft = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert peft.peft_config["default"].r == WIDTH * len(on)
    torch.testing.assert_close(logits(peft), ours, **CLOSE)
    torch.testing.assert_close(logits(peft.merge_and_unload()), ours, **CLOSE)


def test_an_adapter_of_nothing_is_refused(adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        export_adapter(adapted, tmp_path, ())
    with pytest.raises(ValueError, match="not all in use"):
        export_adapter(adapted, tmp_path, (1,))


# --- the rest ---------------------------------------------------------------------


def test_an_unknown_growth_is_named() -> None:
    with pytest.raises(PluginError, match="did you mean 'low_rank'"):
        growth_named("low_rnk")


def test_the_gated_growth_is_what_the_night_has_used_all_along(plain: Path, tmp_path: Path) -> None:
    """An old layout file beside a checkpoint goes on working."""
    gated = growth_named(GATED_MLP)
    gated.add_slots(plain, tmp_path / "empty", POOLS, WIDTH, "float32")
    filled(gated, tmp_path / "empty", tmp_path / "one", 0, seed=1)
    two = filled(gated, tmp_path / "one", tmp_path / "two", 1, seed=2)
    slots = slots_of(two)
    old = shutil.copytree(two, tmp_path / "old")
    values = {k: getattr(slots, k) for k in ("base_width", "width", "count", "used")}
    (old / "slots.json").write_text(json.dumps(values))
    assert slots_of(old).pools == (5,) and slots_of(old).next_free() == 2
    model = load_training_form(old, slots_of(old), torch.float32)
    assert torch.equal(logits(model), logits(load_training_form(two, slots, torch.float32)))
    grow(model, WIDTH, 0)
    assert {n.split(".mlp.")[1] for n, p in model.named_parameters() if p.requires_grad} == {
        f"expert.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")
    }
