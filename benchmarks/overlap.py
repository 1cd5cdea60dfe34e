"""Idle time of dreaming's actors, decoupled against synchronous, with a core for each side.

    python benchmarks/overlap.py                    table, JSON (two idle cores; 10 minutes)
    python benchmarks/overlap.py --quick            one pair of few updates, on any machine

It runs the real pipeline on the embedded model: vLLM writes dreams, the scorer tries them, the
ZeRO-3 learner steps and publishes, for 16 updates. With ``staleness=0`` engine and learner take
turns; with ``staleness=1`` the next dreams are written while the learner trains on the last ones. A
pair has the same tasks and seeds and runs back to back; the order changes from pair to pair. The
engine has the first core, together with the scorer and the rewards, which are on its side of the
queue; the learner has the second.

    idle      share of the phase's wall time in which an actor has nothing to do, by what it
              waits for: ``Waits.idle()``, as in a night's report
    speed     updates per second, decoupled over synchronous, with its 95 % interval

The gain is bounded: it saves at most the shorter of the two sides' time per update. The start and a
first batch of the engine are excluded. Results go to ``benchmarks/results/overlap.json``.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from common import arguments, format_ratio, ratio, save
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.runtime import cluster
from sleeprl.cluster.waits import WAITS
from sleeprl.config import loader as cfg
from sleeprl.config.schema import NightConfig
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, to_batch
from sleeprl.dreaming import launch as phase
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.evaluation.statistics import interval
from sleeprl.memory.checkpoint import EXPERT, expert_tensors, widen
from sleeprl.memory.gated_mlp import grow, load_training_form
from sleeprl.models.resolve import EMBEDDED
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.rollout.types import SamplingParams
from sleeprl.self_study.study import Pair
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.options import TrainerOptions
from sleeprl.utils.machine import available_cpus
from sleeprl.worlds.people import documents, fresh_people, questions

ACTORS = ("engine", "scorer", "learner")
SLOT_SEED = 7


def prepare(place: Path) -> None:
    """Write the embedded model with a newly initialised expert, and a lake with replay texts."""
    slots = widen(EMBEDDED, place / "model", 1, 64, "float32")
    model = load_training_form(place / "model", slots, torch.float32)
    grow(model, slots.width, SLOT_SEED, 0)
    named = expert_tensors({n: p.detach() for n, p in model.named_parameters()})
    (place / "born").mkdir()
    save_file({n: t.contiguous() for n, t in named.items()}, place / "born" / EXPERT)
    chat = ChatFormatter(place / "model")
    replay = []
    for number, question in enumerate(questions(fresh_people(1, 20))):
        response = chat.response(question.answer)
        replay.append(
            Trajectory(
                uid=f"replay-{number}", task_id="answer", attempt=number, purpose="replay",
                prompt_ids=chat.prompt(question.text), response_ids=response,
                logprobs=[-1.0] * len(response), versions=[0] * len(response),
                finish_reason="stop",
            )
        )  # fmt: skip
    Lake(place / "lake").append(to_batch(replay), "trajectories")


def pin(pids: Collection[int], core: int) -> None:
    """Pin every thread of these processes and of their descendants to a core."""
    for pid in pids:
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            for thread in each.threads():
                os.sched_setaffinity(thread.id, {core})


def dream(
    config: NightConfig, pool: EnginePool, place: Path, run_dir: Path, cores: Sequence[int]
) -> dict[str, Any]:
    """Run one phase of dreaming on fresh learners; returns seconds, and idle seconds by actor and kind."""
    people = fresh_people(0, 20)
    day = documents(people, 0, 2)
    home = {name: number for number, each in enumerate(day) for name in each["people"]}
    probes = [Pair(home[q.person], q.text, q.answer) for q in questions(people)]
    texts = [each["text"] for each in day]
    tasks = phase.make_tasks(texts, probes, config)
    dreaming, chat = config.dreaming, ChatFormatter(place / "model")
    options = TrainerOptions(
        str(place / "model"), 0, "float32", SLOT_SEED, dreaming.learning_rate, dreaming.steps
    )
    context = phase.DreamingContext(
        config, options, place / "born", place, chat, texts, probes, chat.prompt(texts[0])
    )
    job = context.trainer_job(pool.version + 1)
    engines = pool.lease(phase.max_groups_in_flight(dreaming))
    actors = phase.launch(config, job, tasks)
    try:
        position = DreamingCheckpoint.load(run_dir, job.first_version)
        actors.start(position, engines)
        beside: list[ActorGroup] = [actors.scorers, actors.rewards, actors.curriculum]
        pin([pid for group in beside for pid in group.call("pid")], cores[0])
        pin(actors.learners.call("pid"), cores[-1])
        pipeline = phase.build_pipeline(context, actors, engines, tasks, position, print)
        steps: list[dict[str, float]] = []
        WAITS.take_idle()
        began = time.monotonic()
        pipeline.run(lambda _, metrics: steps.append(metrics))
        seconds = time.monotonic() - began
        pool.record_update(pool.version + dreaming.steps + 1)
    finally:
        actors.kill()
    idle = WAITS.take_idle()
    return {
        "seconds": seconds,
        "idle": {name: idle.get(name, {}) for name in ACTORS},
        "idle_share": {name: sum(idle.get(name, {}).values()) / seconds for name in ACTORS},
        "staleness": fmean(metrics["staleness"] for metrics in steps),
    }


def measure(
    updates: int, pairs: int, cores: Sequence[int], console: Console
) -> list[dict[str, Any]]:
    """Measure pairs; each has ``synchronous`` and ``decoupled``."""
    found = []
    with tempfile.TemporaryDirectory(prefix="sleeprl-benchmark-") as scratch:
        place = Path(scratch)
        prepare(place)
        words = [f"dreaming.steps={updates}", f"runs={place}", f"resources.cpus={2}"]
        with cluster(cfg.load(None, words).resources):
            options = EngineOptions(
                model=str(place / "model"), dtype="float32", max_length=512, threads=1,
                memory_gb=1.0, gpu=False, gpu_utilization=0.4, seed=0,
            )  # fmt: skip
            pool = EnginePool.launch(1, options, cpus=1, gpus=0)
            pin(pool.group.call("pid"), cores[0])
            pool.generate([[5, 6, 7]] * 24, [SamplingParams(64)] * 24)  # the first batch is slow
            for number in range(pairs):
                pair = {}
                for staleness in (0, 1)[:: (-1) ** number]:
                    config = cfg.load(
                        None, [*words, f"dreaming.max_staleness={staleness}", f"seed={number}"]
                    )
                    name = "decoupled" if staleness else "synchronous"
                    run_dir = place / f"{name}-{number}"
                    pair[name] = dream(config, pool, place, run_dir, cores)
                    console.print(number, name, pair[name])
                found.append(pair)
            pool.shutdown()
    return found


def show(pairs: Sequence[dict[str, Any]], speed: dict[str, Any], console: Console) -> None:
    table = Table(title="Idle share of each actor (mean over the pairs, half-width of 95 %)")
    table.add_column("")
    for name in ACTORS:
        table.add_column(name, justify="right")
    table.add_column("seconds", justify="right")
    for mode in ("synchronous", "decoupled"):
        cells = []
        for name in ACTORS:
            mean, half = interval([pair[mode]["idle_share"][name] for pair in pairs])
            cells.append(f"{mean:.0%}" + (f" ± {half:.0%}" if len(pairs) > 1 else ""))
        table.add_row(mode, *cells, f"{fmean(pair[mode]['seconds'] for pair in pairs):.1f}")
    console.print(table)
    console.print(f"speed, decoupled over synchronous: {format_ratio(speed)}")


def main() -> None:
    parser = arguments(__doc__)
    given = parser.parse_args()
    console, cores = Console(), sorted(os.sched_getaffinity(0))
    if len(cores) < 2 and not given.quick:
        parser.error("engine and learner need a core each; this process has one")
    updates, count = (3, 1) if given.quick else (16, 5)
    pairs = measure(updates, count, cores, console)
    seconds = {mode: [pair[mode]["seconds"] for pair in pairs] for mode in pairs[0]}
    speed = ratio(seconds["synchronous"], seconds["decoupled"])
    show(pairs, speed, console)
    result = {"updates": updates, "pairs": pairs, "speed": speed, "cores": available_cpus()}
    save("overlap", result, given.output)


if __name__ == "__main__":
    main()
