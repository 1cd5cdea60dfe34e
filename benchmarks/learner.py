"""Tokens per second of the learner against a bare PyTorch loop, and the scaling to a second rank.

    python benchmarks/learner.py                    table, JSON (5 GB of memory; 20 minutes)
    python benchmarks/learner.py --quick            the embedded model alone, few steps

The bare loop uses no framework: the model from transformers, ``zero_grad``, forward, loss,
``backward``, ``clip_grad_norm_``, AdamW. Both sides train the same parameters in the same number
format with the same loss function (GRPO's policy gradient) on the same padded batches; the
benchmark checks that their losses agree at all steps. Each row has a prompt of its own:
``grpo_vs_trl.py`` measures what the learner saves on shared prompts.

    one rank   ``Trainer`` on DeepSpeed ZeRO-3 beside the bare loop, a process each with one
               thread; they alternate step by step, and the first two steps are not counted.
               Compared is their CPU time, so other load on the machine does not count. Target
               on the 135 M model: at least 0.95 of the bare loop's tokens per second.
    two ranks  two processes with one thread on a core of their own, against one rank with the
               whole batch, turn by turn, in wall time; 1.0 is twice as fast as one rank. It
               needs two idle cores, and is skipped on one.

135 M is SmolLM2-135M (``sleeprl models``), downloaded on first use. ``all`` trains every parameter
but tied embeddings, ``expert`` a newly initialised expert of width 64. Results go to
``benchmarks/results/learner.json``.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import arguments, format_ratio, ratio, save
from rich.console import Console
from rich.table import Table

from sleeprl.losses.combined import chunked_combined_loss, token_counts
from sleeprl.losses.types import LossOptions, LossWeights
from sleeprl.memory.checkpoint import widen
from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.models.catalogue import CATALOGUE, fetch
from sleeprl.models.resolve import EMBEDDED
from sleeprl.trainer.batching import TrainingExample, make_loss_batch
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.packing import padded
from sleeprl.trainer.response_model import ResponseModel
from sleeprl.trainer.trainer import Trainer
from sleeprl.utils.machine import available_cpus

PARTS = {"dream": LossWeights(pg=1.0)}
LOSS = LossOptions()
PROMPT, RESPONSE = 32, 64
WARM_UP = 2
"""Steps that are not counted: in the first, ZeRO-3 traces the model's modules; in the second, it
plans its prefetching from the trace."""


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    model: str
    trained: str
    rows: int
    pairs: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * (PROMPT + RESPONSE)


FULL = (
    Setting("embedded", "all", 64, 10),
    Setting("smollm2-135m", "all", 16, 4),
    Setting("smollm2-135m", "expert", 16, 4),
)
QUICK = (Setting("embedded", "all", 8, 3),)


def batch(
    setting: Setting, vocabulary: int, prompt: int = PROMPT, response: int = RESPONSE
) -> list[TrainingExample]:
    """Draw random rows of one length; without padding, both sides count the same tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [
        TrainingExample(draw(prompt), draw(response), "dream", None, (-1.0) ** n, [-8.0] * response)
        for n in range(setting.rows)
    ]


def options(checkpoint: str, setting: Setting) -> TrainerOptions:
    """Build the options of both sides."""
    slot = None if setting.trained == "all" else 0
    return TrainerOptions(checkpoint, slot, "float32", 0, 1e-4, total_steps=10**9)


class Bare:
    """The training loop without a framework."""

    def __init__(self, options: TrainerOptions) -> None:
        self.device = torch.device("cuda" if options.gpu else "cpu")
        directory = Path(options.checkpoint)
        slots = Slots.load(directory)
        assert slots is not None
        growth = growth_of(slots)
        model: Any = growth.load(directory, slots, getattr(torch, options.dtype)).to(self.device)
        if options.slot is None:
            if model.config.tie_word_embeddings:
                model.model.embed_tokens.weight.requires_grad_(False)
            self.trained = [p for p in model.parameters() if p.requires_grad]
        else:
            self.trained = growth.grow(model, slots.width, options.seed, options.slot)
            model.to(self.device)
        self.model = ResponseModel(model)
        self.options = options
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )

    def step(self, rows: Sequence[TrainingExample]) -> float:
        """Do one step, in micro-batches of as many rows as fit; all rows have one length."""
        counts_P3 = token_counts(
            PARTS, ["dream"] * len(rows), [len(row.response_ids) for row in rows]
        )
        at_once = max(1, self.options.micro_batch_tokens // rows[0].student_length())
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for start in range(0, len(rows), at_once):
            micro = rows[start : start + at_once]
            within = partial(
                chunked_combined_loss,
                batch=make_loss_batch(micro, self.device),
                parts=PARTS,
                counts_P3=counts_P3,
                options=LOSS,
            )
            inputs = padded([row.prompt_ids for row in micro], [row.response_ids for row in micro])
            loss, _ = self.model(within, *(part.to(self.device) for part in inputs))
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained, self.options.grad_clip)
        self.optimizer.step()
        return float(total)


class Zero:
    """A rank of the learner."""

    def __init__(self, options: TrainerOptions) -> None:
        self.learner = Trainer(options)

    def step(self, rows: Sequence[TrainingExample]) -> float:
        return self.learner.step(rows, PARTS, LOSS)["loss"]


def serve(
    pipe: Any, kind: type[Bare | Zero], made: TrainerOptions, rows: Sequence[TrainingExample],
    address: str, rank: int, world: int, core: int | None,
) -> None:  # fmt: skip
    """Do one step for each message; send back wall seconds, CPU seconds and loss. Runs in a process."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    backend = "nccl" if made.gpu else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world)
    contestant = kind(made)
    pipe.send("ready")
    while pipe.recv():
        wall, cpu = time.monotonic(), time.process_time()
        loss = contestant.step(rows)
        if made.gpu:
            torch.cuda.synchronize()
        pipe.send((time.monotonic() - wall, time.process_time() - cpu, loss))
    if made.gpu:
        pipe.send(torch.cuda.max_memory_allocated())


class Team:
    """The processes of one side, which step together."""

    def __init__(
        self, kind: type[Bare | Zero], made: TrainerOptions, rows: Sequence[TrainingExample],
        cores: Sequence[int | None] = (None,),
    ) -> None:  # fmt: skip
        spawn, self.gpu = mp.get_context("spawn"), made.gpu
        # Rendezvous by file: a port that is free now may be taken when the processes have started.
        self.meeting = tempfile.TemporaryDirectory()
        address = f"file://{self.meeting.name}/ranks"
        pairs = [spawn.Pipe() for _ in cores]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            spawn.Process(
                target=serve,
                args=(theirs, kind, made, rows, address, rank, len(cores), core),
                daemon=True,
            )
            for rank, (core, (_, theirs)) in enumerate(zip(cores, pairs, strict=True))
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()  # else recv would not raise EOFError when a process dies
        assert all(pipe.recv() == "ready" for pipe in self.pipes)

    def step(self) -> tuple[float, float, float]:
        """Do one step; returns wall seconds, CPU seconds of all processes, and the loss."""
        for pipe in self.pipes:
            pipe.send(True)
        try:
            wall, cpu, loss = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        except EOFError:
            self.processes[0].join(5)
            codes = [process.exitcode for process in self.processes]
            raise RuntimeError(f"a process ended; exit codes: {codes}") from None
        return max(wall), sum(cpu), loss[0]

    def end(self) -> int | None:
        """End the processes; returns the peak GPU memory of the first in bytes, if it has a GPU."""
        for pipe in self.pipes:
            pipe.send(False)
        most: int | None = self.pipes[0].recv() if self.gpu else None
        for process in self.processes:
            process.join()
        self.meeting.cleanup()
        return most


def compare(
    ours: Team, theirs: Team, pairs: int, tolerance: float = 0.02
) -> dict[str, list[float]]:
    """Run steps of both sides in turn; the first side alternates, and the first steps are not counted.

    Args:
        ours: One side.
        theirs: The other side.
        pairs: Number of counted steps of each.
        tolerance: Largest absolute difference of their losses.

    Returns:
        Wall seconds, CPU seconds and losses of each side.

    Raises:
        RuntimeError: The losses differ.
    """
    found: dict[str, list[float]] = {
        f"{who}_{what}": [] for who in ("ours", "theirs") for what in ("wall", "cpu", "loss")
    }
    for number in range(pairs + WARM_UP):
        turn = [("ours", ours), ("theirs", theirs)]
        for who, team in turn[:: (-1) ** number]:
            for what, value in zip(("wall", "cpu", "loss"), team.step(), strict=True):
                if number >= WARM_UP:
                    found[f"{who}_{what}"].append(value)
    for one, other in zip(found["ours_loss"], found["theirs_loss"], strict=True):
        if not math.isclose(one, other, rel_tol=0.05, abs_tol=tolerance):
            raise RuntimeError(f"the two do not compute the same: losses {one} and {other}")
    return found


def measure(setting: Setting, checkpoint: str, cores: Sequence[int]) -> dict[str, Any]:
    """Measure a row of the table."""
    import json

    vocabulary = json.loads((Path(checkpoint) / "config.json").read_text())["vocab_size"]
    rows, made = batch(setting, vocabulary), options(checkpoint, setting)
    learner, bare = Team(Zero, made, rows), Team(Bare, made, rows)
    steps = compare(learner, bare, setting.pairs)
    bare.end()
    learner.end()
    result: dict[str, Any] = {
        **vars(setting),
        "tokens_per_step": setting.tokens,
        "one_rank": steps,
        "speed_of_bare": ratio(steps["theirs_cpu"], steps["ours_cpu"]),
        "speed_of_bare_wall": ratio(steps["theirs_wall"], steps["ours_wall"]),
    }
    if len(cores) > 1:
        one, two = Team(Zero, made, rows, cores[:1]), Team(Zero, made, rows, cores[:2])
        steps = compare(two, one, setting.pairs)
        one.end()
        two.end()
        halves = [seconds / 2 for seconds in steps["theirs_wall"]]
        result |= {"two_ranks": steps, "efficiency": ratio(halves, steps["ours_wall"])}
    return result


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="The learner against a bare loop (95 % intervals)")
    for heading in ("model", "trained", "tokens/step", "bare tok/s", "ours tok/s"):
        table.add_column(heading, justify="right" if "tok" in heading else "left")
    table.add_column("of bare", justify="right")
    table.add_column("two ranks, of ideal", justify="right")
    for row in rows:
        speeds = [
            row["tokens_per_step"] * len(spent) / sum(spent)
            for spent in (row["one_rank"]["theirs_cpu"], row["one_rank"]["ours_cpu"])
        ]
        table.add_row(
            row["model"], row["trained"], f"{row['tokens_per_step']:,}",
            *(f"{speed:,.0f}" for speed in speeds), format_ratio(row["speed_of_bare"]),
            format_ratio(row["efficiency"]) if "efficiency" in row else "",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = arguments(__doc__)
    given = parser.parse_args()
    console, rows = Console(), []
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="sleeprl-benchmark-") as scratch:
        for setting in QUICK if given.quick else FULL:
            embedded = setting.model == "embedded"
            source = EMBEDDED if embedded else fetch(CATALOGUE[setting.model], console)
            wide = Path(scratch) / setting.model
            if not wide.exists():
                widen(source, wide, 1, 64, "float32")
            rows.append(measure(setting, str(wide), cores))
            console.print(
                rows[-1]["model"], rows[-1]["trained"], format_ratio(rows[-1]["speed_of_bare"])
            )
    show(rows, console)
    save("learner", {"rows": rows, "cores": available_cpus()}, given.output)


if __name__ == "__main__":
    main()
