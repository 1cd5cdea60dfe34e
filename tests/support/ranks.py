"""Ranks of ZeRO-3 in processes of their own, what they play, and what they saw."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

from sleeprl.losses.types import LossOptions, LossWeights
from sleeprl.memory.checkpoint import widen, write_grown
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.growth import growth_named
from sleeprl.memory.slots import LOW_RANK, Slots
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.options import TrainerOptions
from tests.support.models import make_tiny_model

# Imported once, by the process that ranks are forked from.
PRELOADED = [
    "deepspeed",
    "transformers.models.llama",
    "sleeprl.trainer.trainer",
    "tests.support.ranks",
]

SLOTS = Slots(96, 8, 3)
PARTS = {
    "new": LossWeights(kl=0.7, ce=0.5),
    "student": LossWeights(pg=0.6, kl=0.3),
    "replay": LossWeights(kl=0.4),
}
LOSS = LossOptions(beta=0.2, top_k=8)
CE = {"text": LossWeights(ce=1.0)}


def rows(seed: int, count: int = 9) -> list[TrainingExample]:
    """Rows of all three parts, of unequal lengths, some with a teacher's own prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    made = []
    for index in range(count):
        part = list(PARTS)[index % 3]
        prompt, response = draw(2, 9), draw(1, 14)
        made.append(
            TrainingExample(
                prompt,
                response,
                part,
                teacher_prompt_ids=draw(10, 20) if part == "new" else None,
                advantage=(-1.0) ** index * 0.5 if part == "student" else 0.0,
                rollout_logprobs=[-5.5] * len(response) if part == "student" else [],
                age=index // 3 if part == "student" else None,
            )
        )
    return made


def texts(seed: int) -> list[TrainingExample]:
    return [replace(r, part="text", teacher_prompt_ids=None) for r in rows(seed)]


def options(directory: Path, **changes: Any) -> TrainerOptions:
    base = TrainerOptions(
        checkpoint=str(directory / "wide"),
        slot=1,
        dtype="float32",
        seed=7,
        learning_rate=1e-2,
        total_steps=10,
        warmup=2,
        weight_decay=0.1,
        grad_clip=1.0,
    )
    return replace(base, **changes)


class Notes:
    """What a rank saw: numbers by name, tensors in one file each, errors by scene."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.numbers: dict[str, Any] = {}
        self.errors: dict[str, str] = {}

    def tensors(self, name: str, values: dict[str, Tensor]) -> None:
        if dist.get_rank() == 0:
            kept = {key: value.clone().contiguous() for key, value in values.items()}
            save_file(kept, self.directory / f"{name}.safetensors")


Scene = Callable[[Path, Notes], None]


def work(rank: int, world: int, port: int, directory: Path, scenes: Sequence[Scene]) -> None:
    """One rank: play the scenes, write down what was seen and what failed."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    notes = Notes(directory)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for scene in scenes:
        try:
            scene(directory, notes)
        except Exception:
            notes.errors[scene.__name__] = traceback.format_exc()
    torch.save((notes.numbers, notes.errors), directory / f"{world}-{rank}.pt")
    dist.barrier()


def launch(world: int, directory: Path, scenes: Sequence[Scene]) -> list[Notes]:
    """Play scenes on so many ranks, each forked from one process that has imported what they need."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [
        context.Process(target=work, args=(rank, world, port, directory, scenes))
        for rank in range(world)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")  # looked at where deepspeed is imported
        for process in processes:
            process.start()
    seen = []
    for rank, process in enumerate(processes):
        process.join(240)
        if process.is_alive():
            process.kill()
        notes, path = Notes(directory), directory / f"{world}-{rank}.pt"
        assert path.is_file(), f"rank {rank} of {world} died: exit code {process.exitcode}"
        notes.numbers, notes.errors = torch.load(path, weights_only=False)
        seen.append(notes)
    return seen


def write_checkpoints(directory: Path) -> None:
    """``plain``, ``wide`` with empty slots, ``grown`` with an expert in slot 1, and ``low`` with
    empty slots of low rank."""
    make_tiny_model(directory / "plain", seed=4)
    growth_named(LOW_RANK).add_slots(directory / "plain", directory / "low", [2], 8, "float32")
    widen(directory / "plain", directory / "wide", SLOTS.count, SLOTS.width, "float32")
    generator = torch.Generator().manual_seed(11)
    expert = {
        f"model.layers.{layer}.mlp.{part}.weight": 0.3 * torch.randn(shape, generator=generator)
        for layer in range(2)
        for part, shape in (("gate_proj", (8, 64)), ("up_proj", (8, 64)), ("down_proj", (64, 8)))
    }
    write_grown(directory / "wide", directory / "grown", SLOTS, ExpertUpdate(1, expert))


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        apart = (tensor - b[name]).abs().max().item()
        assert torch.allclose(tensor, b[name], atol=atol, rtol=1e-3), f"{name} differs by {apart}"


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def reference_logprobs(model: nn.Module, batch: list[TrainingExample]) -> list[list[float]]:
    """One row at a time, no padding, no wrapper."""
    found = []
    for row in batch:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        chosen = logp.gather(-1, ids[0, 1:, None])[:, 0]
        found.append(chosen[len(row.prompt_ids) - 1 :].tolist())
    return found


def same_logprobs(a: list[list[float]], b: list[list[float]], atol: float = 1e-4) -> None:
    assert [len(x) for x in a] == [len(x) for x in b]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, abs=atol)
