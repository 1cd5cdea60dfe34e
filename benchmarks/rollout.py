"""Tokens per second through the actor group against vLLM alone, on the same requests.

    taskset -c 1 python benchmarks/rollout.py       table, JSON (3 GB of memory; 10 minutes)
    python benchmarks/rollout.py                    the same with all cores, in another JSON
    python benchmarks/rollout.py --quick            the small model alone, few requests

    dreams   an ``ActorGroup`` of one ``VLLMEngine`` actor, called as dreaming calls it: once per
             group, whose trajectories (tokens, log-probabilities, policy versions) become an
             Arrow batch, of which the caller gets the reference
    generate the same engine, called as self-study and evaluation call it: from prompts to
             completions in the caller's process
    vllm     the ``AsyncLLM`` that a ``VLLMEngine`` creates (so its arguments are the same), in a
             process of its own, and a loop over its outputs: no Ray, no version, and only the
             token ids of the outputs

Each batch has groups of eight requests for one prompt of 16 to 63 random tokens, unseen before,
with a seed for each request. The models have random weights, in the shapes of the embedded model
and of SmolLM2-135M: speed does not depend on the values, and such a model hardly ever ends a text
before ``max_tokens``. Both engines run side by side with one thread each, and alternate batch by
batch; the same batch on all three is a pair of ratios. On one core, compared are tokens per CPU
second of all processes of a side, for the group including all of Ray: that is the speed on an
otherwise idle machine. With more cores, Ray works beside the engine, and the comparison is in
tokens per wall-clock second; the results have both. Target: at least 0.95. Results go to
``benchmarks/results/rollout.json``, on two cores to ``rollout-2-cores.json``.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ray
from common import arguments, cpu_seconds, format_ratio, ratio, save
from rich.console import Console
from rich.table import Table

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import ResourcesConfig
from sleeprl.data.trajectory import from_batch
from sleeprl.models.resolve import EMBEDDED
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.rollout.types import RolloutRequest, SamplingParams
from sleeprl.rollout.vllm_engine import VLLMEngine
from sleeprl.utils.machine import available_cpus

Batch = tuple[list[list[int]], list[SamplingParams]]
GROUP = 8
OURS = ("dreams", "generate")


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    model: str
    dtype: str
    requests: int
    max_tokens: int
    pairs: int
    gpu: bool = False


FULL = (
    Setting("embedded", "float32", 64, 64, 20),
    Setting("smollm2-135m", "bfloat16", 32, 64, 6),
)
QUICK = (Setting("embedded", "float32", 8, 16, 3),)


def make_model(name: str, directory: Path) -> None:
    """Write a model with random weights in the shape of ``name``, and a tokenizer that is not used."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(EMBEDDED)
    if name == "smollm2-135m":
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
            max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(directory)


def draw(setting: Setting, number: int) -> Batch:
    """Draw the requests of batch ``number``."""
    rng = random.Random(f"batch-{number}")
    prompts = [
        [rng.randrange(3, 3000) for _ in range(rng.randrange(16, 64))]
        for _ in range(setting.requests // GROUP)
    ]
    return [prompt for prompt in prompts for _ in range(GROUP)], [
        SamplingParams(setting.max_tokens, 1.0, rng.randrange(2**31))
        for _ in range(setting.requests)
    ]


def serve(pipe: Any, options: EngineOptions) -> None:
    """Serve vLLM alone: answers each batch with the tokens of its requests."""

    async def one(llm: Any, prompt: list[int], sampling: SamplingParams) -> list[int]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens: list[int] = []
        text = TokensPrompt(prompt_token_ids=prompt)
        async for output in llm.generate(text, parameters, request_id=uuid.uuid4().hex):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    async def serving() -> None:
        engine = VLLMEngine("alone", options)
        await engine.start()
        pipe.send("ready")
        while batch := await asyncio.to_thread(pipe.recv):
            pipe.send(await asyncio.gather(*(one(engine.llm, *each) for each in zip(*batch))))
        await engine.shutdown()

    asyncio.run(serving())


def timed(work: Callable[[], Any], spent: Callable[[], float]) -> dict[str, Any]:
    """Time a call, by the clock and by the CPU seconds that ``spent`` returns."""
    wall, cpu = time.monotonic(), spent()
    written = work()
    return {"wall": time.monotonic() - wall, "cpu": spent() - cpu, "written": written}


def by_rollouts(group: ActorGroup, batch: Batch) -> list[Any]:
    """Generate a batch as dreaming does; returns references to the groups' batches, in order."""
    prompts, sampling = batch
    for start in range(0, len(prompts), GROUP):
        uids = [f"dream-{start}-{number}" for number in range(GROUP)]
        request = RolloutRequest(
            "one", tuple(uids), prompts[start], tuple(sampling[start : start + GROUP])
        )
        sent = group.submit("rollout", str(start), request=request)
        assert sent
    done: dict[int, Any] = {}
    idle = 0.0
    while group.outstanding:
        ended = {int(each.tag): each.value.batch for each in group.ready_or_raise()}
        time.sleep(idle := 0.0 if ended else min(0.02, idle + 0.001))  # polls like the pipeline
        done |= ended
    return [done[start] for start in sorted(done)]


def tokens_of(batches: Sequence[Any]) -> list[list[int]]:
    return [row.response_ids for ref in batches for row in from_batch(ray.get(ref))]


def measure(setting: Setting, checkpoint: Path) -> dict[str, Any]:
    """Measure a row of the table."""
    options = EngineOptions(
        model=str(checkpoint), dtype=setting.dtype, max_length=512, threads=1, memory_gb=1.0,
        gpu=setting.gpu, gpu_utilization=0.4, seed=0,
    )  # fmt: skip
    ours, theirs = get_context("spawn").Pipe()
    alone = get_context("spawn").Process(target=serve, args=(theirs, options))
    alone.start()
    theirs.close()  # else recv would not raise EOFError when it dies
    assert ours.recv() == "ready"  # engines that start at once measure each other's memory
    pool = EnginePool.launch(1, options, cpus=0, gpus=0.5 * setting.gpu)
    group = pool.lease(setting.requests // GROUP)

    def by_generate(batch: Batch) -> list[list[int]]:
        return [completion.token_ids for completion in pool.generate(*batch)]

    def by_us() -> float:
        return cpu_seconds(None, alone.pid)

    def by_vllm(batch: Batch) -> list[list[int]]:
        ours.send(batch)
        answer: list[list[int]] = ours.recv()
        return answer

    pairs: list[dict[str, Any]] = []
    for number in range(setting.pairs + 1):  # the first warms up
        batch = draw(setting, number)
        turns: list[tuple[str, Callable[[], Any], Callable[[], float]]] = [
            ("dreams", partial(by_rollouts, group, batch), by_us),
            ("vllm", partial(by_vllm, batch), lambda: cpu_seconds(alone.pid)),
            ("generate", partial(by_generate, batch), by_us),
        ]
        pair: dict[str, Any] = {
            name: timed(work, spent) for name, work, spent in turns[:: (-1) ** number]
        }
        written = {name: side.pop("written") for name, side in pair.items()}
        written["dreams"] = tokens_of(written["dreams"])
        for name, texts in written.items():
            pair[name]["tokens"] = sum(map(len, texts))
        same = [len({tuple(text) for text in texts}) == 1 for texts in zip(*written.values())]
        if number:
            pairs.append({**pair, "same": sum(same) / len(same)})
    ours.send(None)
    alone.join()
    pool.shutdown()

    def speeds(side: str, clock: str) -> list[float]:
        return [pair[side]["tokens"] / pair[side][clock] for pair in pairs]

    return {
        **vars(setting),
        "of_vllm": {us: ratio(speeds(us, "cpu"), speeds("vllm", "cpu")) for us in OURS},
        "of_vllm_wall": {us: ratio(speeds(us, "wall"), speeds("vllm", "wall")) for us in OURS},
        "pairs": pairs,
    }


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="Parts of the speed of vLLM alone (95 % intervals)")
    table.add_column("model")
    for heading in ("requests", "vllm tok/s", *OURS, *(f"{us}, by wall time" for us in OURS)):
        table.add_column(heading, justify="right")
    for row in rows:
        spent = [pair["vllm"] for pair in row["pairs"]]
        speed = sum(each["tokens"] for each in spent) / sum(each["cpu"] for each in spent)
        ratios = [
            format_ratio(row[kind][us]) for kind in ("of_vllm", "of_vllm_wall") for us in OURS
        ]
        table.add_row(
            f"{row['model']}, {row['dtype']}", str(row["requests"]), f"{speed:,.0f}", *ratios
        )
    console.print(table)


def main() -> None:
    parser = arguments(__doc__)
    given = parser.parse_args()
    console, rows = Console(), []
    with (
        tempfile.TemporaryDirectory(prefix="sleeprl-benchmark-") as scratch,
        cluster(ResourcesConfig()),
    ):
        for setting in QUICK if given.quick else FULL:
            make_model(setting.model, Path(scratch) / setting.model)
            rows.append(measure(setting, Path(scratch) / setting.model))
    show(rows, console)
    cores = available_cpus()
    name = "rollout" if cores == 1 else f"rollout-{cores}-cores"
    save(name, {"rows": rows, "cores": cores}, given.output)


if __name__ == "__main__":
    main()
