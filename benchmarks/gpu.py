"""Measurements on a GPU: utilisation by the learner, the losses, weight updates and roll-outs.

    python benchmarks/gpu.py                        all of it, on one GPU of 80 GB
    python benchmarks/gpu.py --parts learner losses

    limits     limits of the card: a bfloat16 matrix product, a copy on it, a copy onto it
    learner    ``Trainer`` on ZeRO-3 in bfloat16 (float32 master weights) beside the bare loop of
               ``learner.py``, whose weights and optimiser are bfloat16 alone; both in turn. The
               model FLOPs of a step, by its wall time, as a share of the measured matrix product
    losses     ``seeding_memory.py``'s variants in bfloat16: bytes allocated at the peak, seconds,
               and the deviation of the loss from float32
    updates    ``EnginePool.publish`` of a whole model into a vLLM engine, up to its receipt with a
               canary that both sides score, against a raw copy of the same bytes: onto the GPU
               for weights in the host's memory, within it for ``ipc``
    rollout    ``rollout.py``'s comparison, by wall time: engine and ``AsyncLLM`` side by side

The models have the shapes of Qwen2.5-0.5B and Llama-3.2-1B, with random weights. Model FLOPs
exclude recomputation: 6 per token and trained matrix parameter, 4 per frozen one (it needs no
gradient), the same for the head over response tokens alone, and causal attention. Intervals are
95 %. Results go to ``benchmarks/results/gpu.json``, line by line; lines of parts that do not run
stay there. Starting an engine takes a minute or more, including compilation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import rollout
import seeding_memory
import torch
from common import RESULTS, format_ratio, ratio, save
from learner import Bare, Setting, Team, Zero, batch, compare
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import ResourcesConfig
from sleeprl.evaluation.statistics import interval
from sleeprl.memory.checkpoint import all_tensors, widen
from sleeprl.models.resolve import EMBEDDED
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.trainer.options import TrainerOptions
from sleeprl.weight_sync.base import TransportConfig
from sleeprl.weight_sync.verification import Canary, UpdateReceipt

SHAPES: dict[str, dict[str, int]] = {
    "0.5B": {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "1.2B": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
PROMPT, RESPONSE, ROWS = 512, 512, 32
PAIRS, UPDATES = 8, 5
WIDTH = 64


def make_model(name: str, directory: Path, seed: int = 0) -> Path:
    """Write a model with random bfloat16 weights; embeddings and head are tied as in the original."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (directory / "config.json").is_file():
        torch.manual_seed(seed)
        config = LlamaConfig(
            **SHAPES[name], tie_word_embeddings=True, max_position_embeddings=2048,
            bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            LlamaForCausalLM(config).save_pretrained(directory)
            torch.set_default_dtype(torch.float32)
        AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(directory)
        torch.cuda.empty_cache()
    return directory


def seconds(work: Callable[[], Any], repeats: int = 10) -> list[float]:
    """Time each repeat, after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found[1:]


def products() -> list[float]:
    """Measure the TFLOP/s of a bfloat16 matrix product on random numbers."""
    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return [2 * n**3 / 1e12 / s for s in seconds(lambda: left @ right)]


# --- the parts ------------------------------------------------------------------------


def limits(_: Path) -> Iterator[dict[str, Any]]:
    """Measure the limits of the card."""
    nbytes = 2 << 30
    there = torch.empty(2, nbytes, device="cuda", dtype=torch.uint8)
    here = torch.zeros(nbytes, dtype=torch.uint8)
    yield {
        "card": torch.cuda.get_device_name(),
        "matmul_tflops": interval(products()),
        "copy_gb_per_s": interval(
            [nbytes / 1e9 / s for s in seconds(lambda: there[0].copy_(there[1]))]
        ),
        "onto_gb_per_s": interval(
            [nbytes / 1e9 / s for s in seconds(lambda: there[0].copy_(here))]
        ),
    }


def model_flops(config: dict[str, int], rows: int, trained: bool) -> float:
    """Count the model FLOPs of one step.

    Args:
        config: Shape of the model.
        rows: Number of texts.
        trained: Whether all parameters but the tied embeddings are trained; else an expert alone.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    wide = config["intermediate_size"] + WIDTH
    shared = 1 + config["num_key_value_heads"] / config["num_attention_heads"]
    body = layers * (hidden * hidden * 2 * shared + 3 * hidden * wide)
    grown = body if trained else layers * 3 * hidden * WIDTH
    length = PROMPT + RESPONSE
    # Scores and weighted values, 2 FLOPs each, over half the square; twice that for the gradient.
    attention = 3 * layers * 2 * 2 * hidden * length / 2
    head = 4 * hidden * config["vocab_size"]
    return rows * (length * (4 * body + 2 * grown + attention) + RESPONSE * head)


def learner(work: Path) -> Iterator[dict[str, Any]]:
    """Measure steps of the learner and of the bare loop, in turn."""
    peak = max(products()) * 1e12
    for name, trained in (("0.5B", "all"), ("0.5B", "expert"), ("1.2B", "all"), ("1.2B", "expert")):
        wide = work / f"wide-{name}"
        if not wide.exists():
            widen(make_model(name, work / name), wide, 1, WIDTH, "bfloat16")
        setting = Setting(name, trained, ROWS, PAIRS)
        rows = batch(setting, SHAPES[name]["vocab_size"], PROMPT, RESPONSE)
        made = TrainerOptions(
            str(wide), None if trained == "all" else 0, "bfloat16", 0, 1e-5,
            total_steps=10**9, gpu=True, micro_batch_tokens=ROWS * (PROMPT + RESPONSE) // 4,
        )  # fmt: skip
        ours, theirs = Team(Zero, made, rows), Team(Bare, made, rows)
        # The bare loop has no float32 master weights, so the losses diverge slowly.
        steps = compare(ours, theirs, PAIRS, tolerance=0.1)
        flops = model_flops(SHAPES[name], ROWS, trained == "all")
        tokens = ROWS * (PROMPT + RESPONSE)
        yield {
            "model": name,
            "trained": trained,
            "tokens_per_step": tokens,
            "micro_batch_tokens": made.micro_batch_tokens,
            "model_tflop_per_step": flops / 1e12,
            "matmul_tflops": peak / 1e12,
            "of_matmul": interval([flops / s / peak for s in steps["ours_wall"]]),
            "bare_of_matmul": interval([flops / s / peak for s in steps["theirs_wall"]]),
            "tokens_per_s": interval([tokens / s for s in steps["ours_wall"]]),
            "speed_of_bare": ratio(steps["theirs_wall"], steps["ours_wall"]),
            "peak_bytes": ours.end(),
            "bare_peak_bytes": theirs.end(),
            "steps": steps,
        }


def losses(_: Path) -> Iterator[dict[str, Any]]:
    """Measure memory, time and error of the distillation losses."""
    options = Namespace(positions=8192, hidden=1536, beta=0.5)
    known = seeding_memory.trl_version() is not None
    for vocabulary in (32_000, 151_936):
        rows: dict[str, dict[str, Any]] = {}
        for variant in seeding_memory.VARIANTS:
            if known or not variant.startswith("trl"):
                rows[variant] = one_loss(variant, vocabulary, options)
        for variant, row in rows.items():
            naive = rows[seeding_memory.BASE.get(variant, "naive")]
            row["off"] = abs(row["loss"] / naive["exact"] - 1)
            if row["off"] > 2e-2 and not variant.startswith("trl"):
                raise RuntimeError(f"{variant} computes another loss: {row} against {naive}")
            row["peak_of_naive"] = row["peak_bytes"] / naive["peak_bytes"]
            row["seconds_of_naive"] = ratio(row["seconds"], naive["seconds"])
            yield {"variant": variant, "vocabulary": vocabulary, **row}


def one_loss(variant: str, vocabulary: int, options: Namespace) -> dict[str, Any]:
    """Measure one variant of the loss: peak bytes, seconds, the loss, and its float32 reference."""
    loss = seeding_memory.maker(variant)(options.beta)
    student, teacher, head, top = seeding_memory.inputs(
        options.positions, options.hidden, vocabulary, variant.endswith("top-k"),
        device="cuda", dtype=torch.bfloat16,
    )  # fmt: skip
    value = torch.zeros(())

    def run() -> None:
        nonlocal value
        student.grad = None
        value = loss(student, teacher, head, top)
        value.backward()

    run()
    # The reference value, without bfloat16's rounding of the logits.
    student_NH, teacher_NH, head_VH = (part.detach().float() for part in (student, teacher, head))
    exact = float(seeding_memory.chunked(options.beta)(student_NH, teacher_NH, head_VH, top))
    del student_NH, teacher_NH, head_VH
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spent = seconds(run)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "seconds": spent,
        "loss": float(value.detach()),
        "exact": exact,
    }


@contextmanager
def an_engine(checkpoint: Path, delivery: TransportConfig) -> Iterator[EnginePool]:
    """Start one engine on half of the GPU."""
    options = EngineOptions(
        model=str(checkpoint), dtype="bfloat16", max_length=512, threads=2, memory_gb=1.0, gpu=True,
        gpu_utilization=0.3, seed=0, transport=delivery,
    )  # fmt: skip
    with cluster(ResourcesConfig()):
        pool = EnginePool.launch(1, options, 1, 0.5)
        try:
            yield pool
        finally:
            pool.shutdown()


def updates(work: Path) -> Iterator[dict[str, Any]]:
    """Time weight updates; the engine starts with other weights, so the canary detects a failed update."""
    first, second = make_model("0.5B", work / "0.5B"), make_model("0.5B", work / "other", seed=1)
    canary = a_canary(second)
    here = dict(all_tensors(second))
    there = {name: tensor.cuda() for name, tensor in here.items()}
    target = {name: torch.empty_like(tensor) for name, tensor in there.items()}
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in here.values())
    for kind, weights in (("shared_memory", here), ("ipc", there)):

        def copy(weights: dict[str, Tensor] = weights) -> None:
            for name, tensor in weights.items():
                target[name].copy_(tensor)

        with an_engine(first, TransportConfig(kind)) as pool:
            was = pool.logprobs([canary.token_ids])[0]
            certificates: list[UpdateReceipt] = []

            def publish(
                pool: EnginePool = pool,
                weights: dict[str, Tensor] = weights,
                certificates: list[UpdateReceipt] = certificates,
            ) -> None:
                certificates += pool.publish(weights.items(), canary)

            spent = seconds(publish, UPDATES)
        if not all(one.verified for one in certificates):
            raise RuntimeError("; ".join(map(str, certificates)))
        yield {
            "transport": kind,
            "bytes": nbytes,
            "seconds": interval(spent),
            "copy_seconds": interval(copied := seconds(copy)),
            "of_copy": fmean(copied) / fmean(spent),
            "canary": [one.difference for one in certificates],
            "canary_before": max(abs(a - b) for a, b in zip(was, canary.logprobs, strict=True)),
        }


@torch.no_grad()
def a_canary(checkpoint: Path) -> Canary:
    """Compute a canary of a checkpoint with transformers."""
    from transformers import AutoModelForCausalLM

    ids = list(range(100, 164))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).cuda()
    logits_TV = model(torch.tensor([ids], device="cuda")).logits[0, :-1].float()
    logprobs = logits_TV.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
    return Canary(ids, logprobs, 1.0)


def rollouts(work: Path) -> Iterator[dict[str, Any]]:
    """Measure roll-outs through the actor group and with vLLM alone."""
    checkpoint = make_model("0.5B", work / "0.5B")
    setting = rollout.Setting("0.5B", "bfloat16", 256, 256, PAIRS, gpu=True)
    with cluster(ResourcesConfig()):
        yield rollout.measure(setting, checkpoint)


PARTS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "limits": limits,
    "learner": learner,
    "losses": losses,
    "updates": updates,
    "rollout": rollouts,
}


# --- the tables -----------------------------------------------------------------------


def show(found: dict[str, Any], console: Console) -> None:
    pair = lambda of, digits=2: f"{of[0]:.{digits}f} ± {of[1]:.{digits}f}"  # noqa: E731
    if "limits" in found:
        (limit,) = found["limits"]
        console.print(
            f"{limit['card']}: matrix product {pair(limit['matmul_tflops'], 0)} TFLOP/s, copy "
            f"{pair(limit['copy_gb_per_s'], 0)} GB/s, onto it {pair(limit['onto_gb_per_s'], 1)} GB/s"
        )
    if "learner" in found:
        table = Table(title="The learner in bfloat16 (95 % intervals)")
        for heading in ("model", "trained", "tokens/s", "of the matrix product", "bare loop's",
                        "speed of bare", "GB", "bare GB"):  # fmt: skip
            table.add_column(heading)
        for row in found["learner"]:
            table.add_row(
                row["model"], row["trained"], pair(row["tokens_per_s"], 0), pair(row["of_matmul"]),
                pair(row["bare_of_matmul"]), format_ratio(row["speed_of_bare"]),
                *(f"{row[key] / 1e9:.1f}" for key in ("peak_bytes", "bare_peak_bytes")),
            )  # fmt: skip
        console.print(table)
    if "losses" in found:
        table = Table(title="Distillation losses, forward and backward")
        for heading in (
            "vocabulary",
            "variant",
            "MiB",
            "of naive",
            "ms",
            "of naive's time",
            "loss off by",
        ):
            table.add_column(heading)
        for row in found["losses"]:
            table.add_row(
                f"{row['vocabulary']:,}", row["variant"], f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['peak_of_naive']:.2f}", f"{interval(row['seconds'])[0] * 1e3:.1f}",
                format_ratio(row["seconds_of_naive"]), f"{row['off']:.1%}",
            )  # fmt: skip
        console.print(table)
    if "updates" in found:
        table = Table(title="New weights into a vLLM engine")
        for heading in ("transport", "MB", "seconds", "raw copy", "of copy", "canary", "before"):
            table.add_column(heading)
        for row in found["updates"]:
            table.add_row(
                row["transport"], f"{row['bytes'] / 1e6:,.0f}", pair(row["seconds"], 3),
                pair(row["copy_seconds"], 4), f"{row['of_copy']:.2f}",
                f"{max(row['canary']):.2f}", f"{row['canary_before']:.2f}",
            )  # fmt: skip
        console.print(table)
    if "rollout" in found:
        for row in found["rollout"]:
            speed = sum(p["vllm"]["tokens"] for p in row["pairs"]) / sum(
                p["vllm"]["wall"] for p in row["pairs"]
            )
            console.print(
                f"rollout, {row['model']}: vLLM alone {speed:,.0f} tokens/s, "
                f"dreams through the actor group {format_ratio(row['of_vllm_wall']['dreams'])} of it"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="directory of the JSON")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is to be seen; this measures what only a GPU shows")
    console = Console(width=120)
    place = (given.output or RESULTS) / "gpu.json"
    found: dict[str, Any] = json.loads(place.read_text()) if place.is_file() else {}
    found = {name: found[name] for name in PARTS if name in found}
    failed = []
    with tempfile.TemporaryDirectory(prefix="sleeprl-benchmark-") as work:
        for name in given.parts:
            rows: list[dict[str, Any]] = []
            try:
                for row in PARTS[name](Path(work)):
                    rows.append(row)
                    found[name] = rows
                    save("gpu", found, given.output)
            except Exception:  # the other parts are independent
                traceback.print_exc()
                failed.append(name)
            torch.cuda.empty_cache()
            show({name: rows} if rows else {}, console)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
