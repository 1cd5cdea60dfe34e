"""An expert's own gate: nothing at birth, no more than a plain checkpoint at the end, and it
is taught to close on replayed text, the same on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sleeprl.config import loader as cfg
from sleeprl.config.methods import METHODS, REPLAY
from sleeprl.config.schema import ConfigError
from sleeprl.consolidation.methods import loss_weights
from sleeprl.memory.checkpoint import ROUTER, expert_tensors, widen, write_grown
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import grow, load_training_form, measure_activity, smaller_self
from sleeprl.memory.growth import growth_named
from sleeprl.memory.slots import LOW_RANK, Slots
from sleeprl.trainer.trainer import Trainer
from tests.support.models import make_tiny_model
from tests.support.ranks import LOSS, PARTS, Notes, launch, options, rows
from tests.unit.memory.test_growth import CLOSE, far, logits, randomise

WIDTH, SLOT = 8, 1
QUIET = {**PARTS, REPLAY: replace(PARTS[REPLAY], activity_penalty=20.0)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gate")
    make_tiny_model(place / "plain", seed=3)
    widen(place / "plain", place / "wide", 3, WIDTH, "float32")
    return place / "wide"


def routed(wide: Path) -> tuple[torch.nn.Module, list[torch.nn.Parameter], Slots]:
    slots = Slots.load(wide)
    assert slots is not None
    model = load_training_form(wide, slots, torch.float32)
    return model, grow(model, WIDTH, 5, SLOT, gated=True), slots


def test_at_birth_nothing_is_different_to_the_bit(wide: Path) -> None:
    model, _, slots = routed(wide)
    assert torch.equal(logits(model), logits(load_training_form(wide, slots, torch.float32)))


def test_a_plain_checkpoint_computes_the_same(wide: Path, tmp_path: Path) -> None:
    model, fresh, slots = routed(wide)
    randomise(fresh, 2)
    expert = expert_tensors(dict(model.named_parameters()))
    assert not any(name.endswith(ROUTER) for name in expert)
    write_grown(wide, tmp_path / "grown", slots, ExpertUpdate(SLOT, expert))
    torch.testing.assert_close(logits(model), logits(tmp_path / "grown"), **CLOSE)
    for name, parameter in model.named_parameters():
        if name.endswith(ROUTER):
            parameter.data.zero_()
    assert far(logits(model), logits(tmp_path / "grown"))  # it was the gate that was folded in
    with smaller_self(model):
        assert torch.equal(logits(model), logits(load_training_form(wide, slots, torch.float32)))


def test_what_is_heard(wide: Path) -> None:
    model, fresh, _ = routed(wide)
    randomise(fresh, 2)
    ids = torch.arange(3, 15).reshape(2, 6)
    weights = torch.tensor([[0.5, 0.0, 0.25, 0.0, 0.0, 0.0], [0.0] * 6])
    seen: list[tuple[Tensor, Tensor]] = []
    experts = [m for m in model.modules() if hasattr(m, "meter")]
    hooks = [
        module.register_forward_hook(
            lambda module, x, y: seen.append((module.base(x[0]), module.expert(x[0])))
        )
        for module in experts
    ]
    with measure_activity(model, weights) as listener:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(experts) == model.config.num_hidden_layers  # type: ignore[union-attr]
    by_hand = sum(
        0.5 * expert[0, 0].norm() ** 2 / base[0, 0].norm() ** 2
        + 0.25 * expert[0, 2].norm() ** 2 / base[0, 2].norm() ** 2
        for base, expert in seen
    ) / len(seen)
    torch.testing.assert_close(listener.total, by_hand)
    heard = float(listener.total.detach())
    model(input_ids=ids)
    assert float(listener.total.detach()) == heard  # nobody listens outside
    listener.total.backward()
    assert all(parameter.grad is not None for parameter in fresh)


def quiet_steps(directory: Path, notes: Notes) -> None:
    """Three steps with and without the penalty."""
    for name, parts in (("quiet", QUIET), ("loud", PARTS)):
        learner = Trainer(options(directory, gated_expert=True))
        told = [learner.step(rows(number), parts, LOSS) for number in range(8)]
        notes.numbers[name] = told
        notes.tensors(f"{name}-{learner.world}", learner.gather_expert())


def test_the_gate_learns_to_close_at_any_world_size(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "wide").symlink_to(wide)
    (one,) = launch(1, tmp_path, [quiet_steps])
    two, _ = launch(2, tmp_path, [quiet_steps])
    assert one.errors == two.errors == {}
    for name in ("quiet", "loud"):
        alone = load_file(tmp_path / f"{name}-1.safetensors")
        shared = load_file(tmp_path / f"{name}-2.safetensors")
        for key, tensor in alone.items():
            torch.testing.assert_close(tensor, shared[key], atol=1e-5, rtol=1e-4)
    for told, same in zip(one.numbers["quiet"], two.numbers["quiet"], strict=True):
        assert told["activity_penalty"] == pytest.approx(
            same["activity_penalty"], rel=1e-4, abs=1e-9
        )
    assert all("activity_penalty" not in step for step in one.numbers["loud"])
    assert loudness(wide, tmp_path / "quiet-1.safetensors") < 0.5 * loudness(
        wide, tmp_path / "loud-1.safetensors"
    )


def loudness(wide: Path, file: Path) -> float:
    """How loud a trained expert is on the replayed rows' tokens."""
    slots = Slots.load(wide)
    assert slots is not None
    model = load_training_form(wide, slots, torch.float32)
    fresh = dict(model.named_parameters())
    grow(model, WIDTH, 0, SLOT)
    fresh = expert_tensors(dict(model.named_parameters()))
    with torch.no_grad():
        for name, tensor in load_file(file).items():
            fresh[name].copy_(tensor)
    total = 0.0
    for row in [row for number in range(8) for row in rows(number) if row.part == REPLAY]:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        with (
            torch.no_grad(),
            measure_activity(model, torch.ones(ids.shape) / ids.numel()) as listener,
        ):
            model(input_ids=ids)
        total += float(listener.total)
    return total


def test_only_where_there_is_a_gate_to_close() -> None:
    config = cfg.load(None, ["consolidation.expert_gate=0.5"])
    parts = {
        name: loss_weights(method, method.objective(config.consolidation), 0)
        for name, method in METHODS.items()
    }
    assert parts["seeding"][REPLAY].activity_penalty == 0.5
    assert (
        parts["no_growth"][REPLAY].activity_penalty
        == parts["replay"][REPLAY].activity_penalty
        == 0.0
    )
    words = ["consolidation.expert_gate=0.5", "memory.growth=low_rank"]
    with pytest.raises(ConfigError, match=r"expert_gate=0\.5.*memory\.growth=low_rank"):
        cfg.load(None, words)
    with pytest.raises(ValueError, match="low-rank"):
        growth_named(LOW_RANK).grow(torch.nn.Linear(2, 2), 1, 0, gated=True)
