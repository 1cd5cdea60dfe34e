"""Whole parameters out of real ZeRO-3, on two ranks: the traps of doing so, each under its name.

The numbers are those of the lists of traps that trainers with ZeRO-3 fell into. Those of the
transports are in ``test_weights``, of the engines in ``test_engine``, of the pool in ``test_fleet``.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sleeprl.memory.checkpoint import WEIGHTS
from sleeprl.trainer.gather import gather_whole
from sleeprl.trainer.trainer import Trainer
from tests.support.ranks import Notes, launch, options, write_checkpoints

LIMIT = 60_000  # bytes of one gather; the model has 600,000


def exporting(directory: Path, notes: Notes) -> None:
    import deepspeed

    whole = Trainer(options(directory, checkpoint=str(directory / "grown"), slot=None))
    seen = notes.numbers
    named = [(n, p) for n, p in whole.engine.module.named_parameters() if p.requires_grad]
    seen["numel"] = {name: parameter.numel() for name, parameter in named}
    seen["ds_numel"] = {name: parameter.ds_numel for name, parameter in named}
    seen["ds_shape"] = {name: list(parameter.ds_shape) for name, parameter in named}
    seen["bytes"] = {n: p.ds_numel * p.element_size() for n, p in named}
    # Nothing went through the model before this.
    exported = dict(whole.export())
    seen["given"] = len(exported)
    notes.tensors("cold", exported)

    gathers: list[tuple[int, int]] = []
    of_deepspeed = deepspeed.zero.GatheredParameters

    class Counted(of_deepspeed):  # type: ignore[misc, valid-type]
        def __init__(self, parameters: Any, *args: Any, **kwargs: Any) -> None:
            sizes = [p.ds_numel * p.element_size() for p in parameters]
            gathers.append((len(sizes), sum(sizes)))
            threads.add(threading.get_ident())
            super().__init__(parameters, *args, **kwargs)

        def __enter__(self) -> None:
            super().__enter__()
            self.whole = [(p, p.data) for p in self.params]

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            # DeepSpeed lets go of this memory; here somebody else writes into it at once.
            for parameter, data in self.whole:
                if parameter.data_ptr() != data.data_ptr():
                    data.fill_(math.nan)
                    seen["freed"] += 1

    seen["freed"] = 0
    threads: set[int] = set()
    deepspeed.zero.GatheredParameters = Counted
    try:
        alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        most, shapes = 0, {}
        for name, tensor in gather_whole(named, LIMIT):
            alive.add(tensor)
            most = max(most, sum(t.numel() * t.element_size() for t in alive))
            shapes[name] = list(tensor.shape)
            del tensor
        seen["gathers"], seen["most"], seen["shapes"] = list(gathers), most, shapes
        seen["threads"] = threads == {threading.get_ident()}
        gathers.clear()
        kept = dict(gather_whole(named, LIMIT))
        seen["left"] = [n for n, p in named if p.numel() != seen["numel"][n]]
        gathers.clear()
        seen["of no interest"] = len(list(gather_whole(named, LIMIT, keep=False)))
        seen["of no interest, gathers"] = len(gathers)
    finally:
        deepspeed.zero.GatheredParameters = of_deepspeed
    notes.tensors("kept", {n.removeprefix("model."): t for n, t in kept.items()})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    write_checkpoints(directory)
    return directory


@pytest.fixture(scope="module")
def ranks(directory: Path) -> Iterator[list[dict[str, Any]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    notes = launch(2, directory, (exporting,))
    assert not [n.errors for n in notes if n.errors], notes[0].errors or notes[1].errors
    yield [n.numbers for n in notes]
    torch.set_num_threads(threads)


def test_trap_1_one_gather_takes_many_tensors(ranks: list[dict[str, Any]]) -> None:
    counts = [count for count, _ in ranks[0]["gathers"]]
    assert sum(counts) == len(ranks[0]["ds_numel"])
    assert len(counts) < sum(counts) / 2


def test_trap_2_gathers_are_bounded_by_what_a_parameter_really_has(
    ranks: list[dict[str, Any]],
) -> None:
    """By ``numel()`` the whole model would be one gather."""
    seen = ranks[0]
    matrices = [name for name, shape in seen["ds_shape"].items() if len(shape) == 2]
    assert matrices and {seen["numel"][name] for name in matrices} == {0}
    assert len(seen["gathers"]) > 5
    for count, nbytes in seen["gathers"]:
        assert nbytes <= LIMIT or count == 1


def test_trap_3_shapes_are_those_of_the_whole_tensors(ranks: list[dict[str, Any]]) -> None:
    seen = ranks[0]
    assert seen["shapes"] == seen["ds_shape"]
    assert all(math.prod(shape) == seen["ds_numel"][n] for n, shape in seen["shapes"].items())


def test_trap_4_what_was_gathered_outlives_the_gather(
    ranks: list[dict[str, Any]], directory: Path
) -> None:
    assert ranks[0]["left"] == [], "still gathered"
    assert ranks[0]["freed"] > 8, "no memory of a gather was used again"
    kept = load_file(directory / "kept.safetensors")
    cold = load_file(directory / "cold.safetensors")
    attention = [name for name in kept if "self_attn" in name or "embed" in name]
    assert len(attention) > 8
    assert all(torch.equal(kept[name], cold[name]) for name in attention)


def test_trap_5_the_whole_model_is_never_in_one_place(ranks: list[dict[str, Any]]) -> None:
    seen = ranks[0]
    largest = max(seen["bytes"].values())
    assert seen["most"] <= max(LIMIT, largest) + largest < sum(seen["bytes"].values()) / 2
    # And the ranks that do not send keep nothing, though they take part in every gather.
    assert ranks[1]["given"] == 0 and ranks[1]["of no interest"] == 0
    assert ranks[1]["of no interest, gathers"] == len(ranks[1]["gathers"])


def test_trap_6_all_gathers_are_in_the_callers_thread(ranks: list[dict[str, Any]]) -> None:
    assert all(seen["threads"] for seen in ranks)


def test_trap_7_an_export_before_the_first_forward_is_the_checkpoint(
    ranks: list[dict[str, Any]], directory: Path
) -> None:
    cold = load_file(directory / "cold.safetensors")
    assert len(cold) == ranks[0]["given"]
    right = load_file(directory / "grown" / WEIGHTS)
    different = [name for name, tensor in cold.items() if not torch.equal(tensor, right[name])]
    assert not different
