"""What changed between two generations: found in real checkpoints, and told in the terminal."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sleeprl import cli
from sleeprl.lineage import LineageStore, Manifest
from sleeprl.memory.checkpoint import WEIGHTS, expert_tensors, mlp_tensors, widen, write_grown
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.growth import growth_named
from sleeprl.memory.slots import Slots
from sleeprl.reporting.lineage_diff import diff_generations
from sleeprl.reporting.lineage_tree import diff_view, lineage_tree

Command = Callable[..., tuple[int, str, str]]
FIGURES = {
    "before": {"recall": 0.05, "two_hop": 0.1, "retention": 0.97, "n": {"recall": 200}},
    "after": {"recall": 0.8, "two_hop": 0.4, "retention": 0.96, "n": {"recall": 200}},
}


def expert(checkpoint: Path, slots: Slots, seed: int) -> dict[str, torch.Tensor]:
    """Random weights for one slot, under the names ``fold`` takes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in mlp_tensors(checkpoint):
        down = name.endswith("down_proj.weight")
        shape = (tensor.shape[0], slots.width) if down else (slots.width, tensor.shape[1])
        found[name] = torch.randn(shape, generator=generator) * 0.02
    return found


@pytest.fixture(scope="module")
def store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LineageStore:
    """Two nights in a row, each of which fills a slot as a real night does; and a stranger."""
    place = tmp_path_factory.mktemp("lineage")
    store = LineageStore(place / "generations")
    checkpoint, parent = place / "wide", None
    slots = widen(tiny_model, checkpoint, count=3, width=8, dtype="float32")
    for number in range(2):
        slot = slots.next_free()
        source, grown = checkpoint, slots.filled(slot)
        parent = store.commit(
            lambda target, source=source, slots=slots, slot=slot: write_grown(
                source, target, slots, ExpertUpdate(slot, expert(source, slots, slot))
            ),
            Manifest(
                f"night-{number}",
                "tiny",
                parent=parent,
                config={"seed": number, "model": {"slots": 3, "name": "tiny"}},
                figures=FIGURES if number else {},
                slots=vars(grown),
            ),
        )
        checkpoint, slots = store.path(parent), grown
    store.set_head(parent)
    return store


def test_a_night_of_low_rank_growth_changes_the_ranks_of_its_slot(
    tiny_model: Path, tmp_path: Path
) -> None:
    store, growth = LineageStore(tmp_path / "generations"), growth_named("low_rank")
    checkpoint, parent = tmp_path / "wide", None
    slots = growth.add_slots(tiny_model, checkpoint, [3], 8, "float32")
    for slot in range(2):
        born = growth.load(checkpoint, slots, torch.float32)
        growth.grow(born, slots.width, seed=slot)
        made = {
            n: t.detach() + 0.1 for n, t in expert_tensors(dict(born.named_parameters())).items()
        }

        def write(
            target: Path, source: Path = checkpoint, slot: int = slot, made: Any = made
        ) -> None:
            growth.write(source, target, Slots.load(source), ExpertUpdate(slot, made))

        night = Manifest(f"night-{slot}", "tiny", parent=parent, slots=vars(slots.filled(slot)))
        parent = store.commit(write, night)
        checkpoint, slots = store.path(parent), slots.filled(slot)
    weights = diff_generations(store, *(m.id for m in store.list())).weights
    changed = {key for key, change in weights.parts.items() if change.changed}
    parts = [f"mlp.{p}_proj.lora_{f}" for p in ("gate", "up", "down") for f in "AB"]
    assert changed == {("slot 1", part) for part in parts}
    assert {where for where, _ in weights.parts} == {"base", "slot 0", "slot 1"}


def test_a_night_of_growth_changes_its_slot_and_nothing_else(store: LineageStore) -> None:
    first, second = (m.id for m in store.list())
    found = diff_generations(store, first[:6], "HEAD")
    assert (found.a.id, found.b.id) == (first, second)
    assert (list(found.emptied), list(found.filled)) == ([], [1])
    changed = {key: c for key, c in found.weights.parts.items() if c.changed}
    assert set(changed) == {("slot 1", f"mlp.{p}_proj") for p in ("gate", "up", "down")}
    assert all(c.changed == c.tensors == 2 and math.isinf(c.relative) for c in changed.values())
    assert found.weights.parts["slot 0", "mlp.up_proj"].relative == 0
    assert found.weights.parts["base", "self_attn.q_proj"].tensors == 2
    assert ("slot 2", "mlp.up_proj") not in found.weights.parts, "empty in both"
    assert (found.weights.only_a, found.weights.only_b) == ([], [])
    assert found.settings == {"seed": (0, 1)}
    assert found.figures["after", "recall"][0] is None
    assert found.figures["after", "recall"][1].value == 0.8


def test_backwards_the_slot_is_emptied(store: LineageStore) -> None:
    first, second = (m.id for m in store.list())
    found = diff_generations(store, second, first)
    assert (list(found.emptied), list(found.filled)) == ([1], [])
    assert found.weights.parts["slot 1", "mlp.down_proj"].relative == pytest.approx(1.0)


def test_the_relative_norm_is_that_of_the_tensors(store: LineageStore, tmp_path: Path) -> None:
    """Against norms taken from the files directly, over both layers of a part."""
    name = "model.layers.{}.self_attn.q_proj.weight"
    tensors = load_file(store.path("HEAD") / WEIGHTS)
    tensors[name.format(1)] *= 1.01
    tensors["new.weight"] = torch.ones(2)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    other = LineageStore(tmp_path / "other")
    slots = vars(Slots.load(store.path("HEAD")))
    a = other.commit(store.path("HEAD"), Manifest("a", "tiny", slots=slots))
    b = other.commit(lambda d: save_file(tensors, d / WEIGHTS), Manifest("b", "tiny", slots=slots))
    found = diff_generations(other, a, b).weights
    assert (found.only_a, found.only_b) == (["lm_head.weight"], ["new.weight"])
    assert {key for key, c in found.parts.items() if c.changed} == {("base", "self_attn.q_proj")}
    part = found.parts["base", "self_attn.q_proj"]
    with safe_open(store.path("HEAD") / WEIGHTS, framework="pt") as file:
        norms = [file.get_tensor(name.format(layer)).norm() for layer in (0, 1)]
    expected = 0.01 * norms[1] / (norms[0] ** 2 + norms[1] ** 2) ** 0.5
    assert part.relative == pytest.approx(float(expected), rel=1e-3)
    assert (part.tensors, part.changed) == (2, 1)
    assert found.layers[0].changed == 0 and found.layers[1].changed == 1


def test_a_wider_model_differs_by_nothing_but_zeros(tiny_model: Path, tmp_path: Path) -> None:
    other = LineageStore(tmp_path)
    one = other.commit(tiny_model, Manifest("narrow", "tiny"))
    two = other.commit(
        lambda d: widen(tiny_model, d / "x", 2, 8, "float32") and _up(d / "x", d),
        Manifest("wide", "tiny"),
    )
    found = diff_generations(other, one, two).weights
    assert not any(change.changed for change in found.parts.values())
    assert len(found.parts) == 12 and not found.only_a and not found.only_b


def _up(source: Path, target: Path) -> None:
    for file in source.iterdir():
        file.rename(target / file.name)
    source.rmdir()


def test_a_generation_with_itself(store: LineageStore) -> None:
    found = diff_generations(store, "HEAD", "HEAD")
    assert not any(change.changed for change in found.weights.parts.values())
    assert not found.settings and not found.filled and not found.emptied


@pytest.fixture
def sleeprl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process: exit status, standard output, standard error."""
    monkeypatch.setattr(cli, "console", Console(width=120))
    monkeypatch.setattr(cli, "errors", Console(width=120, stderr=True))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sleeprl", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_commands(store: LineageStore, sleeprl: Command) -> None:
    first, second = (m.id for m in store.list())
    root = ("--root", str(store.root))
    code, out, _ = sleeprl("lineage", *root)
    assert code == 0
    above, below = (next(x for x in out.splitlines() if i[:8] in x) for i in (first, second))
    assert "from tiny" in above and "slots 1/3" in above and "HEAD" not in above
    assert "HEAD" in below and "recall 5 % → 80 %" in below and "retention 97 % → 96 %" in below
    assert "two-hop 10 % → 40 %" in below and "slots 2/3" in below
    assert below.index(second[:8]) > above.index(first[:8]), "the child hangs below its parent"
    code, out, _ = sleeprl("diff", first[:8], "HEAD", *root)
    assert code == 0
    assert "filled 1" in out and "new (was zero)" in out
    assert "seed" in out and "80.0 (74-85)" in out
    assert "self_attn" not in out, "what is the same is not listed"
    code, out, _ = sleeprl("rollback", first[:8], *root)
    assert code == 0 and first in out and second[:8] in out
    assert store.head() == first
    assert sleeprl("rollback", second, *root)[0] == 0 and store.head() == second


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tree_and_differences_are_whole_at_any_width(tmp_path: Path, width: int) -> None:
    store = LineageStore(tmp_path / "[red]")
    figures = {
        state: {"recall": 1.0, "two_hop": 1.0, "retention": 1.0, "perplexity": 1234.5,
                "n": {"recall": 280, "two_hop": 120, "retention": 300}}
        for state in ("before", "before_with_context", "fine_tuned", "after")
    }  # fmt: skip
    slots = {"used": [0, 1], "count": 12}
    name = "a-long-name-" * 6
    tensor = "self_attention.a_very_long_name_of_a_projection_that_somebody_chose.lora_A"
    parent = None
    for number in range(4):
        place = tmp_path / str(number)
        place.mkdir()
        save_file({f"model.layers.0.{tensor}.weight": torch.full((2, 2), float(number))},
                  place / WEIGHTS)  # fmt: skip
        parent = store.commit(
            place,
            Manifest(str(number), "[i]base", parent=parent, figures=figures, slots=slots,
                     config={"name": f"[bold]{name}{number}", "seed": number}, note="a note in [brackets]"),
        )  # fmt: skip
    ids = [manifest.id for manifest in store.list()]
    views = (lineage_tree(store), diff_view(diff_generations(store, ids[1], ids[2])))
    console = Console(width=width, record=True, file=io.StringIO())
    for view in views:
        console.print(view)
    text = console.export_text()
    assert all(cell_len(line) <= width for line in text.splitlines()) and "…" not in text
    assert text.count("a note in [brackets]") == 4 and "from [i]base" in text
    assert text.count("retention 100 % → 100 %") == 4, "a figure stays in one piece"
    assert text.count("two-hop %") == 4 and text.count(" difference") == 1
    flat = "".join(text.split())
    assert width < 200 or f"[bold]{name}2" in text
    assert "(99-100)" in flat and flat.count("1,234") == 8
    if width == 200:
        assert tensor in text
    piped = Console(width=width, record=True, file=io.StringIO())
    piped.print(lineage_tree(store), soft_wrap=True)
    assert len(piped.export_text().splitlines()) == 5, "in a file, a line for each generation"


@pytest.mark.parametrize("command", ["diff", "rollback"])
def test_a_wrong_id_is_told_with_the_one_that_was_meant(
    store: LineageStore, sleeprl: Command, command: str
) -> None:
    first = store.list()[0].id
    wrong = first[:5] + ("0" if first[5] != "0" else "1") + first[6:8]
    words = (command, wrong, "HEAD") if command == "diff" else (command, wrong)
    code, _, err = sleeprl(*words, "--root", str(store.root))
    assert code == 2
    assert f"no generation '{wrong}'" in err
    assert f"did you mean '{first[:8]}'?" in err


def test_an_empty_lineage(tmp_path: Path, sleeprl: Command) -> None:
    code, out, _ = sleeprl("lineage", "--root", str(tmp_path))
    assert code == 0 and "no generation" in out
    code, _, err = sleeprl("diff", "HEAD", "HEAD", "--root", str(tmp_path))
    assert code == 2 and "no HEAD yet" in err
