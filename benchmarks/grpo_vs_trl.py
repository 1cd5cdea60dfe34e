"""Compares GRPO on sleepRL's parts with TRL's GRPOTrainer: seconds per step, and to a reward.

    pip install --no-deps --target trl trl datasets pandas dill multiprocess xxhash httpx \\
        httpcore h11 anyio fsspec
    PYTHONPATH=trl python benchmarks/grpo_vs_trl.py         table, JSON (two idle cores; 35 minutes)
    PYTHONPATH=trl python benchmarks/grpo_vs_trl.py --full  all answers have 64 tokens (25 minutes)

All runs train all parameters of the embedded model in float32 on the same prompts in the same
order. The prompts are those of dreaming: write a question and its answer about a given document.
A step has 4 prompts with 8 answers each of at most 64 tokens, temperature 1, advantages scaled
by group, a mean over the batch's tokens, no KL term, AdamW at the same constant rate, and one
optimiser step per batch. The reward of an answer is the share of its tokens whose id is even,
which the untrained model does not favour.

    decoupled    an ``EnginePool`` of one vLLM engine, a ``Trainer`` on ZeRO-3 in the driver, and
                 ``publish`` with its canary after each step, while the engine already writes the
                 next step's answers: all or part of their tokens are one update old.
                 Each side has a core
    synchronous  the same, taking turns on both cores; policies are never stale
    trl          ``GRPOTrainer`` with its defaults on a machine without a GPU: answers by
                 transformers' ``generate`` with its KV cache, no gradient checkpointing; on both
                 cores

Each run is a process of its own. The runs of a seed are compared with each other, and their order
changes from seed to seed. Seconds are wall-clock, from the second step on, which excludes the
start; the CPU seconds of a run's whole process tree are reported beside them. The time to the
reward ends with the first step at which the mean reward of the last five steps has reached it; a
seed counts if both sides reach it. The length of answers varies between runs of either side, and
with it the cost of a step. So steps are also compared by mean length of their answers, and with
``--full`` all answers have full length: the end-of-turn token is one that the model never writes.
Target: at least 2 times faster. Without TRL its column is empty. Results go to
``benchmarks/results/grpo_vs_trl.json``, or to ``grpo_vs_trl-full.json``.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from common import arguments, cpu_seconds, format_ratio, ratio, save
from rich.console import Console
from rich.table import Table

from sleeprl.models.resolve import EMBEDDED
from sleeprl.text.prompts import STUDY_QA, with_experience
from sleeprl.utils.machine import available_cpus
from sleeprl.worlds.people import documents, fresh_people

PROMPTS, GROUP, MAX_TOKENS = 4, 8, 64
# At twice the rate the reward rises faster, but some runs collapse, ours and TRL's.
RATE = 5e-4
REWARD, WINDOW = 0.8, 5
LENGTHS = ((0, 40), (40, 56), (56, 64))
"""Ranges of the mean length of a step's answers in tokens: above, up to."""
CORES, SEEDS = 2, 6


def model_for(full: bool, place: str) -> Path:
    """Return the embedded model; if ``full``, a copy in ``place`` with padding as its end of a turn."""
    if not full:
        return EMBEDDED
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    tokenizer.eos_token = tokenizer.pad_token
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    for part in (model, tokenizer):
        part.save_pretrained(f"{place}/full")
    return Path(place) / "full"


def prompts_of_dreaming() -> list[str]:
    """Return the prompts of dreaming: a question and its answer about a document of two people."""
    found = documents(fresh_people(0, 120), 0, 2)
    return [with_experience(document["text"], STUDY_QA) for document in found]


def reward(token_ids: Sequence[int], end: int) -> float:
    """Compute the share of even token ids, without the end of the turn."""
    content = [token for token in token_ids if token != end]
    return fmean(token % 2 == 0 for token in content) if content else 0.0


class Clock:
    """Records each step: reward, mean length of the answers in tokens, wall and CPU seconds."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = time.monotonic(), cpu_seconds(None)
        self.laps: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Record the wall seconds of a part of the step; for ``generate``, those of waiting for it."""
        self.laps[part] = time.monotonic() - self.last[0] - sum(self.laps.values())

    def tick(self, rewarded: float, tokens: float) -> None:
        """Record the end of a step."""
        now = time.monotonic(), cpu_seconds(None)
        wall, cpu = (b - a for a, b in zip(self.last, now, strict=True))
        self.steps.append(
            {"reward": rewarded, "tokens": tokens, "wall": wall, "cpu": cpu, **self.laps}
        )
        self.last, self.laps = now, {}


def by_sleeprl(seed: int, steps: int, full: bool, ahead: bool) -> list[dict[str, float]]:
    """Train with sleepRL; ``ahead``: generation of the next step overlaps with training on this one."""
    import torch.distributed as dist

    from sleeprl.algorithms.base import RewardBatch
    from sleeprl.algorithms.dapo import DAPO
    from sleeprl.cluster.runtime import cluster
    from sleeprl.config.schema import ResourcesConfig
    from sleeprl.losses.types import LossOptions, LossWeights
    from sleeprl.memory.checkpoint import widen
    from sleeprl.rollout.engine import EngineOptions
    from sleeprl.rollout.engine_pool import EnginePool, PendingResults
    from sleeprl.rollout.types import SamplingParams
    from sleeprl.text.chat import ChatFormatter
    from sleeprl.trainer.batching import TrainingExample
    from sleeprl.trainer.options import TrainerOptions
    from sleeprl.trainer.publish import publish_weights
    from sleeprl.trainer.trainer import Trainer

    with tempfile.TemporaryDirectory() as scratch, cluster(ResourcesConfig()):
        widen(model_for(full, scratch), Path(scratch) / "model", 1, 64, "float32")
        model, threads = f"{scratch}/model", 1 if ahead else CORES
        options = EngineOptions(
            model=model, dtype="float32", max_length=512, threads=threads, memory_gb=1.0,
            gpu=False, gpu_utilization=0.4, seed=seed,
        )  # fmt: skip
        pool = EnginePool.launch(1, options, cpus=0, gpus=0)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=0, world_size=1)
        # With so long a cosine, the rate is constant.
        learner = Trainer(
            TrainerOptions(model, None, "float32", seed, RATE, total_steps=10**9, threads=threads)
        )
        chat, rng = ChatFormatter(model), random.Random(seed)
        prompts = [chat.prompt(message) for message in prompts_of_dreaming()]
        parts, clock = {"grpo": LossWeights(pg=1.0)}, Clock()
        loss = LossOptions(algorithm=DAPO(filter_zero_std=False))

        def ask(step: int) -> tuple[list[list[int]], PendingResults]:
            """Start the generation of a step's answers; each prompt is repeated for its group."""
            numbers = range(step * PROMPTS, (step + 1) * PROMPTS)
            repeated = [prompts[n % len(prompts)] for n in numbers for _ in range(GROUP)]
            sampling = [SamplingParams(MAX_TOKENS, 1.0, rng.randrange(2**31)) for _ in repeated]
            return repeated, pool.generate_later(repeated, sampling)

        asked_now, pending = ask(0)
        for step in range(steps):
            repeated, answers = asked_now, pending.wait()
            if ahead and step + 1 < steps:
                asked_now, pending = ask(step + 1)
            clock.lap("generate")
            rewards = [reward(answer.token_ids, chat.end) for answer in answers]
            groups = [str(n // GROUP) for n in range(len(repeated))]
            lengths = [len(answer.token_ids) for answer in answers]
            advantages = loss.algorithm.advantages(
                RewardBatch(rewards, groups, lengths, MAX_TOKENS)
            )
            rows = [
                TrainingExample(prompt, answer.token_ids, "grpo", None, advantage, answer.logprobs)
                for prompt, answer, advantage in zip(repeated, answers, advantages, strict=True)
            ]
            learner.step(rows, parts, loss)
            clock.lap("learn")
            publish_weights(learner, pool, prompts[0])
            clock.lap("publish")
            clock.tick(fmean(rewards), fmean(lengths))
            if not ahead and step + 1 < steps:
                asked_now, pending = ask(step + 1)
        pool.shutdown()
        dist.destroy_process_group()
        return clock.steps


def by_trl(seed: int, steps: int, full: bool) -> list[dict[str, float]]:
    """Train with TRL; the result is that of ``by_sleeprl``: the entries of a ``Clock``."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(CORES)
    last: list[float] = []

    def rewarded(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        found = [reward(ids, tokenizer.eos_token_id) for ids in completion_ids]
        last[:] = fmean(found), fmean(map(len, completion_ids))
        return found

    clock = Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick(*last)

    with tempfile.TemporaryDirectory() as scratch:
        model = model_for(full, scratch)
        tokenizer = AutoTokenizer.from_pretrained(model)
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=rewarded,
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": message}]} for message in prompts_of_dreaming()]
            ),
            args=GRPOConfig(
                output_dir=scratch, use_cpu=True, bf16=False, seed=seed, max_steps=steps,
                per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
                max_completion_length=MAX_TOKENS, temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
                learning_rate=RATE, lr_scheduler_type="constant", adam_beta2=0.99,
                max_grad_norm=1.0, epsilon=0.2, epsilon_high=0.28, loss_type="dapo",
                shuffle_dataset=False, gradient_checkpointing=False, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            ),
            callbacks=[Ticks()],
        )  # fmt: skip
        trainer.train()
    return clock.steps


RUNS: dict[str, Callable[[int, int, bool], list[dict[str, float]]]] = {
    "decoupled": partial(by_sleeprl, ahead=True),
    "synchronous": partial(by_sleeprl, ahead=False),
    "trl": by_trl,
}


def in_fresh_process(name: str, seed: int, steps: int, full: bool) -> list[dict[str, float]]:
    """Run one training in a fresh process; returns the entries of its ``Clock``."""
    words = [sys.executable, __file__, "--run", name, "--seed", str(seed), "--steps", str(steps)]
    words += ["--full"] * full
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env={**os.environ, **quiet}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}: {done.stderr[-3000:]}")
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def per_step(
    steps: Sequence[dict[str, float]], clock: str, least: float = 0, most: float = MAX_TOKENS
) -> float | None:
    """Compute the mean seconds of steps with answers of such length; None for fewer than three steps."""
    found = [step[clock] for step in steps[1:] if least < step["tokens"] <= most]
    return fmean(found) if len(found) > 2 else None


def to_reward(steps: Sequence[dict[str, float]], clock: str) -> float | None:
    """Compute the seconds until the mean reward of ``WINDOW`` steps reaches ``REWARD``; None if it
    does not."""
    for end in range(WINDOW, len(steps) + 1):
        if fmean(step["reward"] for step in steps[end - WINDOW : end]) >= REWARD:
            return sum(step[clock] for step in steps[1:end])
    return None


def figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute seconds per step and to the reward of each run, wall-clock and CPU, and our speed-up
    over TRL."""
    made: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        for what, of in (
            ("per_step", partial(per_step, clock=clock)),
            *(
                (f"per_step_{a}_to_{b}_tokens", partial(per_step, clock=clock, least=a, most=b))
                for a, b in LENGTHS
            ),
            ("to_reward", partial(to_reward, clock=clock)),
        ):
            row: dict[str, Any] = {name: [of(run[name]) for run in runs] for name in runs[0]}
            pairs = {
                name: [pair for pair in zip(row["trl"], times, strict=True) if None not in pair]
                for name, times in row.items()
                if "trl" in row and name != "trl"
            }
            row["times_faster"] = {
                name: ratio(*zip(*both, strict=True)) for name, both in pairs.items() if both
            }
            made[f"{what}_{clock}"] = row
    return made


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(title="GRPO, seconds (mean over the seeds), times faster than TRL (95 %)")
    for heading in ("", *RUNS):
        table.add_column(heading, justify="right" if heading else "left")
    for what, row in found.items():
        cells = []
        for name in RUNS:
            times = row.get(name, [])
            reached = [seconds for seconds in times if seconds is not None]
            cell = f"{fmean(reached):.2f}" if reached else "-"
            cell += "" if len(reached) in (0, len(times)) else f", {len(reached)} of {len(times)}"
            faster = row["times_faster"].get(name)
            cells.append(f"{cell}\n{format_ratio(faster)}" if faster else cell)
        table.add_row(what.replace("_", " "), *cells)
    console.print(table)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="no answer ends early")
    parser.add_argument("--run", choices=RUNS, help=SUPPRESS)
    parser.add_argument("--seed", type=int, help=SUPPRESS)
    parser.add_argument("--steps", type=int, help="default: 60, of full answers 20")
    given = parser.parse_args()
    if given.run:
        warnings.filterwarnings("ignore")
        print(json.dumps(RUNS[given.run](given.seed, given.steps, given.full)))
        return
    console = Console()
    try:
        names, trl = list(RUNS), version("trl")
    except PackageNotFoundError:
        names, trl = [name for name in RUNS if name != "trl"], None
        console.print("TRL is not installed and is left out; see --help for how to get it")
    if available_cpus() < CORES and not given.quick:
        parser.error(f"this wants {CORES} cores, engine and learner a core each; here is one")
    steps = given.steps or (4 if given.quick else 20 if given.full else 60)
    runs = []
    for seed in range(1 if given.quick else SEEDS):
        turn = names[:: (-1) ** seed]
        runs.append({name: in_fresh_process(name, seed, steps, given.full) for name in turn})
        console.print(f"seed {seed}", figures(runs)["per_step_wall"])
    found = figures(runs)
    show(found, console)
    settings = {
        "prompts": PROMPTS, "group": GROUP, "max_tokens": MAX_TOKENS, "rate": RATE,
        "reward": REWARD, "window": WINDOW, "steps": steps,
    }  # fmt: skip
    result = {
        "settings": settings,
        "figures": found,
        "runs": runs,
        "trl": trl,
        "cores": available_cpus(),
    }
    save("grpo_vs_trl" + "-full" * given.full, result, given.output)


if __name__ == "__main__":
    main()
