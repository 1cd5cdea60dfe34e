"""Grown widths that quantisers take: what pads them is zero, stays zero, and costs no training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleeprl.memory.checkpoint import WEIGHTS, widen, write_grown, write_merged
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.gated_mlp import COLUMN_DIM, load_training_form, mlps, projection
from sleeprl.memory.slots import Slots, padding_of
from sleeprl.pretrained import load_model

BASE, WIDTH = 1100, 64
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with MLPs of 1,100 units."""
    target = tmp_path_factory.mktemp("padded") / "plain"
    shutil.copytree(tiny_model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"intermediate_size": BASE}))
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(target / WEIGHTS)
    for name in tensors:
        if ".mlp." in name:
            shape = list(tensors[name].shape)
            shape[COLUMN_DIM[name.split(".")[-2]]] = BASE
            tensors[name] = 0.05 * torch.randn(shape, generator=generator)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    return load_model(directory, torch.float32).eval()(IDS).logits


def width_of(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["intermediate_size"])


def nonzero_padding(directory: Path, slots: Slots) -> float:
    end = slots.base_width + slots.count * slots.width
    return sum(
        float(tensor.narrow(COLUMN_DIM[name.split(".")[-2]], end, slots.padding).abs().sum())
        for name, tensor in load_file(directory / WEIGHTS).items()
        if ".mlp." in name
    )


@pytest.mark.parametrize(
    ("width", "padding"), [(832, 0), (1023, 0), (1024, 0), (1025, 255), (3392, 192), (11328, 192)]
)
def test_wide_mlps_become_a_multiple_of_256(width: int, padding: int) -> None:
    assert padding_of(width) == padding


def test_padding_lasts_through_growth_and_merge(plain: Path, tmp_path: Path) -> None:
    slots = widen(plain, tmp_path / "wide", 2, WIDTH, "float32")
    assert (slots.total_width, slots.padding) == (1280, 1280 - BASE - 2 * WIDTH)
    assert Slots.load(tmp_path / "wide") == slots and width_of(tmp_path / "wide") == 1280
    torch.testing.assert_close(logits(tmp_path / "wide"), logits(plain), atol=1e-5, rtol=1e-4)
    form = load_training_form(tmp_path / "wide", slots, torch.float32)
    assert {projection(m, "up_proj").weight.shape[0] for _, m in mlps(form)} == {BASE}

    generator = torch.Generator().manual_seed(1)
    expert = {}
    for name, tensor in load_file(plain / WEIGHTS).items():
        if ".mlp." in name:
            shape = list(tensor.shape)
            shape[COLUMN_DIM[name.split(".")[-2]]] = WIDTH
            expert[name] = 0.3 * torch.randn(shape, generator=generator)
    grown = write_grown(tmp_path / "wide", tmp_path / "grown", slots, ExpertUpdate(1, expert))
    before = logits(tmp_path / "grown")
    assert (before - logits(plain)).abs().max() > 1e-3
    assert grown.total_width == 1280 and nonzero_padding(tmp_path / "grown", grown) == 0

    merged = write_merged(tmp_path / "grown", tmp_path / "merged", grown, 1)
    assert (merged.base_width, merged.total_width) == (BASE + WIDTH, 1536)
    assert width_of(tmp_path / "merged") == 1536 and merged.used == ()
    assert nonzero_padding(tmp_path / "merged", merged) == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), before, atol=1e-5, rtol=1e-4)


def test_a_layout_without_padding_is_written_as_before(tmp_path: Path) -> None:
    Slots(96, 8, 3).save(tmp_path)
    assert "padding" not in json.loads((tmp_path / "slots.json").read_text())
    assert Slots.load(tmp_path) == Slots(96, 8, 3)
