"""Speed of weight transfer between processes, against a raw copy of the same bytes.

    python benchmarks/sync.py                             1 M to 500 M parameters: table and JSON
    python benchmarks/sync.py --sizes 1M 17M --no-engine  the transports alone
    python benchmarks/sync.py --quick                     the smallest, transports alone, few times

Checkpoints are random and have the shape of Llama's. They are in float32, as in engines on CPUs,
unless ``--dtype`` says otherwise. *Transport* includes packing, mapping, checking and copying into
place: from the sender's tensors to those of another process, which answers bucket by bucket.
*Mapped* omits the last copy, like an engine that loads straight from the mapping. *Raw* is the
minimum for two processes: one copies flat bytes into shared memory in pieces of a bucket's size,
the other copies them out, with no names, no checks and an empty message for each piece. *Copy* is
``copy_`` of the same tensors within the sender, into allocated memory. All run on one thread, in
turn, so each repeat has its own ratio: of CPU seconds of both processes together (on a busy machine
the wall clock includes other load), and of wall-clock seconds. Intervals are 95 % (Student's t over
repeats). *Into vLLM* is ``EnginePool.publish`` to one engine in a Ray actor: everything up to the
receipt, with vLLM's own loading and repacking. Results go to ``benchmarks/results/sync.json``.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import arguments, save
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import ResourcesConfig
from sleeprl.evaluation.statistics import interval
from sleeprl.memory.checkpoint import all_tensors
from sleeprl.models.resolve import EMBEDDED
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.utils.machine import available_cpus
from sleeprl.weight_sync.base import TransportConfig, WeightTransport
from sleeprl.weight_sync.buckets import Mapped, receive_bucket
from sleeprl.weight_sync.factory import make_transport
from sleeprl.weight_sync.shared_memory import BUCKET_BYTES, Segment
from sleeprl.weight_sync.verification import checksum

TRANSPORTS = ("shared_memory", "disk")
MAPPED = "shared_memory, mapped"
RAW = "raw, two processes"
COPY_BESIDE_DISK = "copy, beside disk"
COPIES = {"disk": COPY_BESIDE_DISK}
SIZES = {
    # hidden, intermediate, layers, heads, vocabulary
    "1M": (128, 352, 4, 4, 1024),
    "17M": (384, 1024, 8, 6, 4096),
    "138M": (768, 2048, 16, 12, 16384),
    "498M": (1280, 3456, 21, 20, 32000),
}
Weights = Mapping[str, Tensor]


def write_checkpoint(size: str, dtype: str, directory: Path) -> None:
    """Write a random checkpoint of a size."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    LlamaForCausalLM(config).save_pretrained(directory)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(directory)  # an engine needs one
    gc.collect()


# --- the transport itself -----------------------------------------------------------


def receiver(pipe: Connection, shapes: Mapping[str, tuple[list[int], torch.dtype]]) -> None:
    """Receive weights in the other process: map each bucket and copy it into tensors of its own."""
    torch.set_num_threads(1)
    place = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    pieces, whole = [], torch.zeros(0, dtype=torch.uint8)
    while True:
        message = pipe.recv()
        if message is None:
            pipe.send({name: checksum(tensor) for name, tensor in place.items()})
            return
        if isinstance(message, list):  # the segments of *raw*, and the total bytes
            pieces = [flat(Mapped(path, BUCKET_BYTES).storage) for path in message[:-1]]
            whole = torch.zeros(message[-1], dtype=torch.uint8)
            continue
        if isinstance(message, int):
            piece = whole[message * BUCKET_BYTES : (message + 1) * BUCKET_BYTES]
            piece.copy_(pieces[message % 2][: len(piece)])
            pipe.send(time.process_time())
            continue
        info, copying = message
        tensors = receive_bucket(info)
        for name, tensor in tensors if copying else ():
            place[name].copy_(tensor)
        pipe.send(time.process_time())


@contextmanager
def receiving(weights: Weights) -> Iterator[Connection]:
    """Start a receiver; at the end, check that it has the weights."""
    here, there = mp.get_context("spawn").Pipe()
    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    process = mp.get_context("spawn").Process(target=receiver, args=(there, shapes))
    process.start()
    try:
        yield here
        here.send(None)
        if here.recv() != {name: checksum(tensor) for name, tensor in weights.items()}:
            raise RuntimeError("the receiver holds other weights than were sent")
    finally:
        process.join(10)
        process.kill()


def sender(
    transport: WeightTransport, weights: Weights, pipe: Connection, *, copying: bool
) -> Callable[[], float]:
    """Return a function that sends the weights; it returns the receiver's CPU seconds so far."""

    def send() -> float:
        """Send the weights once; returns the receiver's CPU seconds so far."""
        transport.begin(1)
        loading = False
        for info in transport.buckets(weights.items()):
            if loading:
                pipe.recv()
            pipe.send((info, copying))
            loading = True
        spent: float = pipe.recv()
        transport.finish()
        return spent

    return send


def flat(storage: torch.UntypedStorage) -> Tensor:
    """View a storage as flat bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def raw_sender(nbytes: int, pipe: Connection) -> Callable[[], float]:
    """Return a function that sends flat bytes; it returns the receiver's CPU seconds so far."""
    segments = [Segment(BUCKET_BYTES) for _ in range(2)]
    pieces = torch.ones(nbytes, dtype=torch.uint8).split(BUCKET_BYTES)
    pipe.send([*(segment.path for segment in segments), nbytes])

    def send() -> float:
        for number, piece in enumerate(pieces):
            flat(segments[number % 2].memory.storage)[: len(piece)].copy_(piece)
            if number:
                pipe.recv()
            pipe.send(number)
        spent: float = pipe.recv()
        return spent

    return send


def seconds(work: Callable[[], Any]) -> float:
    """Time one call, in wall-clock seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_transports(
    weights: Weights, directory: Path, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Measure CPU and wall-clock seconds of each transport and of ``copy``, one pair per repeat.

    Files are measured in rounds and with a copy of their own, because the kernel writes them to
    disk during what comes next.
    """
    target = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}

    def copy() -> None:
        for name, tensor in weights.items():
            target[name].copy_(tensor)

    found: dict[str, list[tuple[float, float]]] = {}
    for kinds in (("copy", "shared_memory", MAPPED, RAW), (COPY_BESIDE_DISK, "disk")):
        with receiving(weights) as pipe:
            works: dict[str, Callable[[], float | None]] = {kinds[0]: copy}
            # One sender, as for an engine: the receiver reuses the mappings of one sender.
            transport = make_transport(TransportConfig(kinds[1], directory=str(directory)))
            for kind in kinds[1:]:
                works[kind] = (
                    raw_sender(sum(tensor.nbytes for tensor in weights.values()), pipe)
                    if kind == RAW
                    else sender(transport, weights, pipe, copying=kind != MAPPED)
                )
            for work in works.values():
                other = work() or 0.0  # the first call allocates pages and starts threads
            found |= {name: [] for name in works}
            for _ in range(repeats):
                for name, work in works.items():
                    wall, cpu, before = time.perf_counter(), time.process_time(), other
                    other = work() or other
                    cpu = time.process_time() - cpu + other - before
                    found[name].append((cpu, time.perf_counter() - wall))
    return found


# --- into vLLM ----------------------------------------------------------------------


def measure_engine(
    checkpoint: Path, weights: Weights, kind: str, dtype: str, repeats: int
) -> list[float]:
    """Measure the seconds of whole updates of one engine."""
    delivery = TransportConfig(kind, directory=str(checkpoint.parent / "engine-weights"))
    options = EngineOptions(
        model=str(checkpoint),
        dtype=dtype,
        max_length=256,
        threads=1,
        memory_gb=1.0,
        gpu=False,
        gpu_utilization=0.4,
        seed=0,
        transport=delivery,
    )
    pool = EnginePool.launch(1, options, 1, 0)

    def update() -> None:
        pool.publish(weights.items())

    try:
        update()
        return [seconds(update) for _ in range(repeats)]
    finally:
        pool.shutdown()


# --- the table ----------------------------------------------------------------------


def row(
    size: str,
    weights: Weights,
    found: Mapping[str, Sequence[tuple[float, float]]],
    engine: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Compute a row of the table for one size."""
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    cpu, wall = (
        {name: [pair[i] for pair in pairs] for name, pairs in found.items()} for i in (0, 1)
    )
    ratio = lambda of, kind: interval(  # noqa: E731
        [copy / ours for copy, ours in zip(of[COPIES.get(kind, "copy")], of[kind], strict=True)]
    )
    return {
        "size": size,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "bytes": nbytes,
        "copy_gb_per_s": interval([nbytes / 1e9 / s for s in cpu["copy"]]),
        "transports": {
            kind: {
                "gb_per_s": interval([nbytes / 1e9 / s for s in cpu[kind]]),
                "of_copy": ratio(cpu, kind),
                "of_copy_wall": ratio(wall, kind),
                "into_vllm_seconds": interval(engine[kind]) if kind in engine else None,
            }
            for kind in (*TRANSPORTS, MAPPED, RAW)
        },
        "cpu_and_wall_seconds": found,
        "into_vllm_seconds": engine,
    }


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="New weights into another process, against a raw copy of the same bytes")
    for heading in (
        "size",
        "MB",
        "copy GB/s",
        "transport",
        "GB/s",
        "of copy",
        "wall clock",
        "into vLLM s",
    ):
        table.add_column(
            heading, justify="left" if heading == "transport" else "right", no_wrap=True
        )
    plus_minus = lambda pair, digits: f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"  # noqa: E731
    for each in rows:
        for kind, figures in each["transports"].items():
            whole = figures["into_vllm_seconds"]
            table.add_row(
                each["size"],
                f"{each['bytes'] / 1e6:,.0f}",
                plus_minus(each["copy_gb_per_s"], 1),
                kind,
                plus_minus(figures["gb_per_s"], 2),
                plus_minus(figures["of_copy"], 2),
                plus_minus(figures["of_copy_wall"], 2),
                plus_minus(whole, 2) if whole else "",
            )
    console.print(table)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9, help="of the transports")
    parser.add_argument("--updates", type=int, default=4, help="of the engine")
    parser.add_argument("--engine", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.repeats, options.engine = [next(iter(SIZES))], 2, False
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    console, rows = Console(width=110), []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="sync-") as work:
            directory = Path(work)
            write_checkpoint(size, options.dtype, directory / "model")
            weights = {name: tensor.clone() for name, tensor in all_tensors(directory / "model")}
            found = measure_transports(weights, directory / "weights", options.repeats)
            engine = {}
            if options.engine:
                with cluster(ResourcesConfig()):
                    for kind in TRANSPORTS:
                        engine[kind] = measure_engine(
                            directory / "model", weights, kind, options.dtype, options.updates
                        )
            rows.append(row(size, weights, found, engine))
            del weights
            show(rows[-1:], console)
    show(rows, console)
    names = ("sizes", "dtype", "repeats", "updates", "engine")
    settings = {name: getattr(options, name) for name in names}
    save("sync", {"settings": settings, "rows": rows, "cores": available_cpus()}, options.output)


if __name__ == "__main__":
    main()
