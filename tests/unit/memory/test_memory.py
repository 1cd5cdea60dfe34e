"""Growth keeps the function: widening, the training form, the exported form, the slots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sleeprl.memory.checkpoint import (
    WEIGHTS,
    all_tensors,
    expert_tensors,
    fold,
    intermediate_size,
    mlp_tensors,
    pad_columns,
    scatter_columns,
    training_name,
    widen,
    write_grown,
)
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import (
    ModuleWithExpert,
    UnsupportedModel,
    grow,
    load_training_form,
    mlps,
    shrink,
    smaller_self,
)
from sleeprl.memory.slots import FILE, PoolFull, Slots
from tests.support.models import make_tiny_model

BASE, WIDTH, COUNT = 96, 8, 3
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module", params=["gemma", "llama", "mistral", "qwen3"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "plain"
    return make_tiny_model(directory, architecture=request.param, seed=1)


@pytest.fixture(scope="module")
def wide(plain: Path) -> Path:
    target = plain.parent / "wide"
    widen(plain, target, COUNT, WIDTH, "float32")
    return target


def slots_of(directory: Path) -> Slots:
    slots = Slots.load(directory)
    assert slots is not None
    return slots


@torch.no_grad()
def logits(model: nn.Module | Path) -> Tensor:
    if isinstance(model, nn.Module):
        return model(input_ids=IDS).logits
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(IDS).logits


def random_expert(seed: int = 5) -> dict[str, Tensor]:
    """An expert that does something, under checkpoint names."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 64
    shapes = {
        "gate_proj": (WIDTH, hidden),
        "up_proj": (WIDTH, hidden),
        "down_proj": (hidden, WIDTH),
    }
    return {
        f"model.layers.{layer}.mlp.{part}.weight": 0.3 * torch.randn(shape, generator=generator)
        for layer in range(2)
        for part, shape in shapes.items()
    }


def put(model: nn.Module, expert: dict[str, Tensor]) -> None:
    own = expert_tensors(dict(model.named_parameters()))
    assert own.keys() == expert.keys()
    with torch.no_grad():
        for name, tensor in expert.items():
            own[name].copy_(tensor)


# --- widening ---------------------------------------------------------------------


def test_a_widened_model_computes_what_the_plain_one_did(plain: Path, wide: Path) -> None:
    assert intermediate_size(wide) == BASE + COUNT * WIDTH
    assert slots_of(wide) == Slots(BASE, WIDTH, COUNT)
    torch.testing.assert_close(logits(wide), logits(plain), atol=1e-6, rtol=1e-5)
    before, after = load_file(plain / WEIGHTS), load_file(wide / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        kept = after[name][tuple(slice(0, size) for size in tensor.shape)]
        assert torch.equal(kept, tensor)
        assert after[name].abs().sum() == tensor.abs().sum()  # all that is new is zero


def test_a_widened_model_keeps_its_tokenizer_and_its_chat_template(plain: Path, wide: Path) -> None:
    message = [{"role": "user", "content": "Where is Oslo?"}]
    first, second = (AutoTokenizer.from_pretrained(d) for d in (plain, wide))
    assert first.chat_template and first.chat_template == second.chat_template
    assert first.apply_chat_template(message, return_dict=False) == second.apply_chat_template(
        message, return_dict=False
    )


def test_widening_twice_is_a_copy(wide: Path, tmp_path: Path) -> None:
    again = widen(wide, tmp_path / "again", 7, 16, "float32")
    assert again == slots_of(wide) == slots_of(tmp_path / "again")
    assert intermediate_size(tmp_path / "again") == intermediate_size(wide)
    first, second = load_file(wide / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_widening_leaves_the_manifest_of_a_generation_behind(wide: Path, tmp_path: Path) -> None:
    generation = tmp_path / "generation"
    widen(wide, generation, COUNT, WIDTH, "float32")
    (generation / "manifest.json").write_text("{}")
    widen(generation, tmp_path / "copy", COUNT, WIDTH, "float32")
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert (generation / "manifest.json").exists()


def test_widening_in_bfloat16(plain: Path, tmp_path: Path) -> None:
    widen(plain, tmp_path / "half", COUNT, WIDTH, "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.bfloat16}
    model = load_training_form(tmp_path / "half", slots_of(tmp_path / "half"), torch.bfloat16)
    grow(model, WIDTH, 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with smaller_self(model):
        smaller = logits(model)
    assert torch.equal(logits(model), smaller)


def test_a_widening_that_fails_leaves_nothing(tmp_path: Path) -> None:
    gpt2(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModel):
        widen(tmp_path / "gpt2", tmp_path / "target", COUNT, WIDTH, "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]


# --- what cannot grow -------------------------------------------------------------


def gpt2(directory: Path) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=99)
    )
    model.save_pretrained(directory)
    return model


def test_an_architecture_without_gated_mlps_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel") as caught:
        mlps(gpt2(tmp_path / "gpt2"))
    assert "Llama" in str(caught.value) and "Qwen3" in str(caught.value)


def test_biases_in_the_projections_are_refused(plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.zeros(BASE))
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp"):
        mlps(model)


# --- the training form ------------------------------------------------------------


def test_birth_changes_no_bit(wide: Path) -> None:
    bare = load_training_form(wide, slots_of(wide), torch.float32)
    grown = load_training_form(wide, slots_of(wide), torch.float32)
    fresh = grow(grown, WIDTH, seed=3)
    assert torch.equal(logits(grown), logits(bare))
    assert len(fresh) == 2 * 3
    names = {n for n, p in grown.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in grown.named_parameters() if ".expert." in n}
    assert sum(p.numel() for p in fresh) == 2 * 3 * 64 * WIDTH


def test_shrinking_to_the_occupied_columns_keeps_the_logits(plain: Path, wide: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    shrink(model, slots_of(wide).occupied_columns())
    assert all(mlp.get_parameter("gate_proj.weight").shape == (BASE, 64) for _, mlp in mlps(model))
    torch.testing.assert_close(logits(model), logits(wide), atol=1e-6, rtol=1e-5)
    assert torch.equal(logits(model), logits(plain))  # nothing was used, so this is the old model


def test_birth_depends_on_the_seed_alone(wide: Path) -> None:
    def born(seed: int, draws: int) -> list[Tensor]:
        model = load_training_form(wide, slots_of(wide), torch.float32)
        torch.manual_seed(99)
        torch.randn(draws)
        mark = torch.get_rng_state()
        fresh = grow(model, WIDTH, seed)
        assert torch.equal(torch.get_rng_state(), mark)
        return [p.detach().clone() for p in fresh]

    first, same, other = born(1, 0), born(1, 17), born(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


def test_training_moves_the_expert_and_nothing_else(wide: Path) -> None:
    model = load_training_form(wide, slots_of(wide), torch.float32)
    fresh = grow(model, WIDTH, seed=3)
    with smaller_self(model):
        teacher = logits(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if ".expert." not in n}
    born = [p.detach().clone() for p in fresh]
    optimizer = torch.optim.AdamW(fresh, lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(5):
        out = model(input_ids=IDS).logits.log_softmax(-1)
        loss = -out[:, :-1].gather(-1, IDS[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, old) for p, old in zip(fresh, born, strict=True))
    for name, parameter in model.named_parameters():
        if ".expert." not in name:
            assert parameter.grad is None and torch.equal(parameter, frozen[name])
    assert not torch.equal(logits(model), teacher)
    with smaller_self(model):
        assert torch.equal(logits(model), teacher)  # the smaller self, to the bit


def test_smaller_self_is_switched_back_even_after_an_error(wide: Path) -> None:
    model = load_training_form(wide, slots_of(wide), torch.float32)
    grow(model, WIDTH, seed=3)
    put(model, random_expert())
    grown = [m for m in model.modules() if isinstance(m, ModuleWithExpert)]
    assert len(grown) == 2
    larger = logits(model)
    grown[0].enabled = False
    with smaller_self(model), smaller_self(model):
        assert not any(m.enabled for m in grown)
    assert [m.enabled for m in grown] == [False, True]
    grown[0].enabled = True
    with pytest.raises(RuntimeError, match="on purpose"), smaller_self(model):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model), larger)


# --- the exported form ------------------------------------------------------------


def test_the_exported_model_is_a_plain_one_with_the_same_function(
    wide: Path, tmp_path: Path
) -> None:
    slots, expert = slots_of(wide), random_expert()
    model = load_training_form(wide, slots, torch.float32)
    grow(model, WIDTH, seed=0)
    put(model, expert)
    grown = write_grown(wide, tmp_path / "grown", slots, ExpertUpdate(1, expert))
    assert grown.used == (1,) == slots_of(tmp_path / "grown").used
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "grown").eval()
    torch.testing.assert_close(logits(exported), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(exported) - logits(wide)).abs().max() > 0.01  # the expert does something

    # The next night starts from it: the first expert is part of the frozen base.
    second = load_training_form(tmp_path / "grown", grown, torch.float32)
    grow(second, WIDTH, seed=4)
    torch.testing.assert_close(logits(second), logits(model), atol=1e-5, rtol=1e-5)
    put(second, random_expert(seed=6))
    later = write_grown(
        tmp_path / "grown", tmp_path / "later", grown, ExpertUpdate(0, random_expert(seed=6))
    )
    assert later.used == (1, 0)
    torch.testing.assert_close(logits(tmp_path / "later"), logits(second), atol=1e-5, rtol=1e-5)


def test_fold_writes_one_slot_and_sends_whole_groups(wide: Path) -> None:
    slots, expert = slots_of(wide), random_expert()
    before = load_file(wide / WEIGHTS)
    folded = list(fold(wide, slots, ExpertUpdate(2, expert)))
    assert {n for n, _ in folded} == {n for n in before if ".mlp." in n}
    layers = [name.split(".")[2] for name, _ in folded]
    assert layers == sorted(layers)
    taken = slots.columns(2)
    for name, tensor in folded:
        across = tensor if "down_proj" not in name else tensor.T
        old = before[name] if "down_proj" not in name else before[name].T
        piece = expert[name] if "down_proj" not in name else expert[name].T
        assert torch.equal(across[taken], piece)
        assert torch.equal(across[: taken.start], old[: taken.start])
        assert torch.equal(across[taken.stop :], old[taken.stop :])


def test_an_expert_is_taken_out_by_the_tensors_on_disk(wide: Path) -> None:
    on_disk = dict(mlp_tensors(wide))
    whole = dict(all_tensors(wide))
    assert on_disk.keys() == {
        n for n, _ in fold(wide, slots_of(wide), ExpertUpdate(0, random_expert()))
    }
    assert all(torch.equal(on_disk[n], whole[n]) for n in on_disk)
    assert whole.keys() == load_file(wide / WEIGHTS).keys()


def test_names_of_the_training_form_and_of_the_checkpoint(wide: Path) -> None:
    model = load_training_form(wide, slots_of(wide), torch.float32)
    grow(model, WIDTH, seed=0)
    wrapped = {f"model.{n}": p for n, p in model.named_parameters()}  # as inside another module
    names = expert_tensors(wrapped).keys()
    assert names == expert_tensors(dict(model.named_parameters())).keys()
    assert names <= load_file(wide / WEIGHTS).keys()
    assert {training_name(n) for n in names} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_scatter_undoes_the_choice_of_columns(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    used = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    slots = Slots(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3)), count, tuple(used))
    columns = slots.occupied_columns()
    for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        shape = (len(columns), 4) if dim == 0 else (4, len(columns))
        small = torch.randn(shape)
        large = scatter_columns(f"model.layers.3.mlp.{part}.weight", small, slots)
        assert large.shape[dim] == slots.total_width
        assert torch.equal(large.index_select(dim, torch.tensor(columns)), small)
        assert large.abs().sum() == pytest.approx(small.abs().sum().item())
    other = torch.randn(3, 3)
    assert scatter_columns("model.layers.3.self_attn.q_proj.weight", other, slots) is other
    assert scatter_columns("lm_head.weight", other, slots) is other


def test_pad_columns() -> None:
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    assert pad_columns(weight, 2, 0).tolist() == [[1, 1, 1]] * 2 + [[0, 0, 0]] * 2
    assert pad_columns(weight, 1, 1).tolist() == [[1, 1, 1, 0]] * 2
    assert pad_columns(weight, 2, 0).dtype == torch.bfloat16


# --- slots ------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.data())
def test_slots(base: int, width: int, count: int, data: st.DataObject) -> None:
    slots = Slots(base, width, count)
    owned = [set(range(slots.total_width)[slots.columns(i)]) for i in range(count)]
    assert set().union(range(base), *owned) == set(range(slots.total_width))
    assert base + sum(map(len, owned)) == slots.total_width  # no two share a column
    order = data.draw(st.permutations(range(count)))
    for filled, slot in enumerate(order):
        assert slots.next_free() == min(set(range(count)) - set(slots.used))
        columns = slots.occupied_columns()
        assert columns == sorted(set(columns)) and len(columns) == base + filled * width
        assert not set(columns) & owned[slot]
        slots = slots.filled(slot)
        assert slots.used == tuple(order[: filled + 1])
        with pytest.raises(ValueError, match="distinct"):
            slots.filled(slot)
    assert slots.occupied_columns() == list(range(slots.total_width))
    assert slots.occupied_columns([]) == list(range(base))
    with pytest.raises(PoolFull, match=f"all {count} slots"):
        slots.next_free()
    with pytest.raises(ValueError, match="distinct"):
        Slots(base, width, count, (count,))


def test_slots_are_kept_beside_the_checkpoint(tmp_path: Path) -> None:
    assert Slots.load(tmp_path) is None
    slots = Slots(96, 8, 5, (3, 0))
    slots.save(tmp_path)
    assert Slots.load(tmp_path) == slots
    assert json.loads((tmp_path / FILE).read_text())["used"] == [3, 0]
