"""What the ranks of ``test_trainer`` do. Each scene is on its own: an error in one is written down
and the next one plays.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sleeprl.trainer import batching as batches
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.publish import publish_weights
from sleeprl.trainer.trainer import Trainer
from sleeprl.weight_sync.verification import UpdateReceipt
from tests.support.ranks import CE, LOSS, PARTS, Notes, options, rows, texts

# --- what one rank does -------------------------------------------------------------
# Each scene is on its own: an error in one is written down and the next one plays.


def first_steps(directory: Path, notes: Notes) -> None:
    learner = Trainer(options(directory))
    seen = notes.numbers
    batch = rows(1)
    notes.tensors("born", learner.gather_expert())
    seen["at birth"] = learner.logprobs(batch)
    seen["at birth, smaller"] = learner.logprobs(batch, smaller=True)
    seen["step-1"] = learner.step(batch, PARTS, LOSS)
    notes.tensors("expert-1", learner.gather_expert())
    seen["step-2"] = learner.step(rows(2), PARTS, LOSS)
    notes.tensors("state-2", learner.state_dict())
    notes.tensors("expert-2", learner.gather_expert())
    notes.tensors("export-2", dict(learner.export()))
    seen["after two"] = learner.logprobs(batch)
    seen["after two, smaller"] = learner.logprobs(batch, smaller=True)
    canary = learner.make_canary(list(range(20, 50)))
    seen["canary"] = (canary.token_ids, canary.logprobs, canary.fresh)
    seen["step-3"] = learner.step(rows(3), PARTS, LOSS)
    notes.tensors("state-3", learner.state_dict())
    seen["step-4"] = learner.step(rows(4), PARTS, LOSS)


def one_text(directory: Path, notes: Notes) -> None:
    learner = Trainer(options(directory))
    started: list[str] = []
    sys.addaudithook(lambda what, of: started.append(of[0]) if what == "subprocess.Popen" else None)
    notes.numbers["one text"] = learner.step(rows(1)[:1], PARTS, LOSS)
    notes.numbers["started by a step"] = list(started)
    notes.tensors("expert-one-text", learner.gather_expert())


def micro_batches(directory: Path, notes: Notes) -> None:
    other = Trainer(options(directory, micro_batch_tokens=40))
    notes.numbers["small micro-batches"] = other.step(rows(1), PARTS, LOSS)
    notes.tensors("expert-1-micro", other.gather_expert())


def resuming(directory: Path, notes: Notes) -> None:
    seen = notes.numbers
    resumed = Trainer(options(directory, seed=8))
    notes.tensors("born-8", resumed.gather_expert())
    resumed.load_state_dict(load_file(directory / "state-2.safetensors"))
    seen["resumed"] = resumed.steps
    seen["resumed, after two"] = resumed.logprobs(rows(1))
    seen["resumed, step-3"] = resumed.step(rows(3), PARTS, LOSS)
    notes.tensors("state-3-resumed", resumed.state_dict())


def resuming_after_a_step(directory: Path, notes: Notes) -> None:
    resumed = Trainer(options(directory, seed=8))
    resumed.step(rows(4), PARTS, LOSS)
    resumed.load_state_dict(load_file(directory / "state-2.safetensors"))
    resumed.step(rows(3), PARTS, LOSS)
    notes.tensors("state-3-warm", resumed.state_dict())


def state_before_the_first_step(directory: Path, notes: Notes) -> None:
    learner = Trainer(options(directory))
    state = learner.state_dict()
    fresh = Trainer(options(directory, seed=8))
    fresh.load_state_dict(state)
    notes.numbers["restarted"] = fresh.steps
    fresh.step(rows(1), PARTS, LOSS)
    notes.tensors("expert-1-restarted", fresh.gather_expert())


def placing(directory: Path, notes: Notes) -> None:
    placed = Trainer(options(directory, seed=9))
    placed.set_expert(load_file(directory / "expert-2.safetensors"))
    notes.numbers["placed"] = placed.logprobs(rows(1))
    notes.tensors("expert-placed", placed.gather_expert())
    placed.step(rows(2), PARTS, LOSS)
    notes.tensors("expert-placed-1", placed.gather_expert())


def bfloat16(directory: Path, notes: Notes) -> None:
    half = Trainer(options(directory, dtype="bfloat16"))
    notes.numbers["half sums in"] = str(half.optimizer.gradient_accumulation_dtype)
    half.step(rows(1), PARTS, LOSS)
    half.step(rows(2), PARTS, LOSS)
    state = half.state_dict()
    half.step(rows(3), PARTS, LOSS)
    notes.tensors("half-3", half.state_dict())
    again = Trainer(options(directory, dtype="bfloat16", seed=8))
    again.load_state_dict(state)
    again.step(rows(3), PARTS, LOSS)
    notes.tensors("half-3-resumed", again.state_dict())


def offloading(directory: Path, notes: Notes) -> None:
    """Here the host's memory is the only one, so nothing moves; but DeepSpeed goes the other way."""
    for what in ("optimizer", "parameters"):
        learner = Trainer(options(directory, offload=what))
        stage = learner.optimizer
        notes.numbers[f"offload {what}"] = (stage.offload_optimizer, stage.offload_param)
        notes.numbers[f"offload {what}, step-1"] = learner.step(rows(1), PARTS, LOSS)
        learner.step(rows(2), PARTS, LOSS)
        notes.tensors(f"offload-{what}-2", learner.state_dict())
        again = Trainer(options(directory, seed=8, offload=what))
        again.load_state_dict(load_file(directory / f"offload-{what}-2.safetensors"))
        again.step(rows(3), PARTS, LOSS)
        notes.tensors(f"offload-{what}-3", again.state_dict())


def every_parameter(directory: Path, notes: Notes) -> None:
    whole = Trainer(options(directory, checkpoint=str(directory / "grown"), slot=None))
    ids = list(range(20, 50))
    notes.numbers["full, canaries"] = [whole.make_canary(ids)]
    notes.tensors("full-export-0", dict(whole.export()))
    notes.numbers["full, step-1"] = whole.step(texts(1), CE, LOSS)
    notes.tensors("full-export-1", dict(whole.export()))
    notes.numbers["full, after one"] = whole.logprobs(texts(1))
    notes.numbers["full, canaries"] += [whole.make_canary(ids), whole.make_canary(ids[:9])]


def low_rank(directory: Path, notes: Notes) -> None:
    learner = Trainer(options(directory, checkpoint=str(directory / "low"), slot=0))
    learner.step(rows(1), PARTS, LOSS)
    learner.step(rows(2), PARTS, LOSS)
    notes.tensors("low-export-2", dict(learner.export()))
    notes.numbers["low, after two"] = learner.logprobs(rows(1))


def nothing_to_learn_from(directory: Path, notes: Notes) -> None:
    learner = Trainer(options(directory))
    learner.step(rows(1), PARTS, LOSS)
    notes.numbers["nothing"] = learner.step([], PARTS, LOSS)
    learner.step(rows(2), PARTS, LOSS)
    notes.tensors("expert-nothing", learner.gather_expert())


def remembering(directory: Path, notes: Notes) -> None:
    """The same texts twice, under a name and without one."""
    for name, key in (("named", "text-{}"), ("unnamed", "")):
        learner = Trainer(options(directory))
        asked: list[int] = []
        learner.engine.module.register_forward_hook(
            lambda *_, asked=asked: None if torch.is_grad_enabled() else asked.append(1)
        )
        batch = [replace(r, key=key.format(i)) for i, r in enumerate(rows(1))]
        notes.numbers[f"{name}, first"] = learner.step(batch, PARTS, LOSS)
        notes.numbers[f"{name}, asked"] = len(asked)
        notes.numbers[f"{name}, second"] = learner.step(batch, PARTS, LOSS)
        notes.numbers[f"{name}, asked again"] = len(asked) - notes.numbers[f"{name}, asked"]
        notes.tensors(f"expert-{name}", learner.gather_expert())


# --- what two ranks do --------------------------------------------------------------


def two_first_steps(directory: Path, notes: Notes) -> None:
    seen = notes.numbers
    learner = Trainer(options(directory))
    notes.tensors("two-born", learner.gather_expert())
    seen["step-1"] = learner.step(rows(1), PARTS, LOSS)
    notes.tensors("two-expert-1", learner.gather_expert())
    seen["step-2"] = learner.step(rows(2), PARTS, LOSS)
    notes.tensors("two-state-2", learner.state_dict())
    notes.tensors("two-export-2", dict(learner.export()))
    seen["after two"] = learner.logprobs(rows(1))
    seen["after two, smaller"] = learner.logprobs(rows(1), smaller=True)
    seen["step-3"] = learner.step(rows(3), PARTS, LOSS)
    notes.tensors("two-state-3", learner.state_dict())


def two_resuming(directory: Path, notes: Notes) -> None:
    dist.barrier()  # rank 0 has written the state
    resumed = Trainer(options(directory, seed=8))
    resumed.load_state_dict(load_file(directory / "two-state-2.safetensors"))
    resumed.step(rows(3), PARTS, LOSS)
    notes.tensors("two-state-3-resumed", resumed.state_dict())


def moving(directory: Path, notes: Notes) -> None:
    moved = Trainer(options(directory, seed=8))
    moved.load_state_dict(load_file(directory / "state-2.safetensors"))  # of one rank
    notes.numbers["moved, step-3"] = moved.step(rows(3), PARTS, LOSS)
    notes.tensors("two-state-3-moved", moved.state_dict())


def uneven(directory: Path, notes: Notes) -> None:
    """One text for two ranks: one of them has nothing to do but to take part."""
    learner = Trainer(options(directory))
    notes.numbers["uneven"] = learner.step(rows(1)[:1], PARTS, LOSS)
    notes.tensors("two-uneven", learner.gather_expert())


def two_remembering(directory: Path, notes: Notes) -> None:
    """In the second step only one rank's texts are known: the teacher is asked by both or none."""
    for name, key in (("named", "text-{}"), ("unnamed", "")):
        learner = Trainer(options(directory))
        known = [replace(r, key=key.format(i)) for i, r in enumerate(rows(1))]
        learner.step(known, PARTS, LOSS)
        # The longest goes to rank 0, so the other gets a text that it has learned from before.
        longest = [replace(r, prompt_ids=[5] * 40) for r in rows(2)[:1]]
        mine = batches.micro_batches(known, TrainingExample.student_length, 8192, rank=1, ranks=2)[
            0
        ]
        learner.step([*longest, mine[0]], PARTS, LOSS)
        notes.tensors(f"two-expert-{name}", learner.gather_expert())


class Drains:
    """In the place of a pool: its engines take a while to come to rest."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def begin(self, version: int | None) -> None:
        time.sleep(1.0)
        self.notes.numbers["at rest"] = time.monotonic()

    def send(self, update: None, tensors: Iterator[Any], canary: Any) -> list[UpdateReceipt]:
        self.notes.numbers["sent"] = len(list(tensors))
        return [UpdateReceipt("engine-0", 1, True, 0.0, canary.tolerance, 0.0)]


def two_publishing(directory: Path, notes: Notes) -> None:
    learner: Any = Trainer(options(directory))
    exported = learner.export

    def export() -> Iterator[Any]:
        notes.numbers["gathering"] = time.monotonic()
        yield from exported()

    learner.export = export
    notes.numbers["published"] = publish_weights(learner, Drains(notes), list(range(20, 50)))  # type: ignore[arg-type]


ONE_RANK = (
    first_steps,
    one_text,
    micro_batches,
    resuming,
    resuming_after_a_step,
    state_before_the_first_step,
    placing,
    bfloat16,
    offloading,
    every_parameter,
    low_rank,
    nothing_to_learn_from,
    remembering,
)
TWO_RANKS = (two_first_steps, two_resuming, moving, uneven, two_remembering, two_publishing)
