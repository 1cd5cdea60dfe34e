"""Memory and time of the chunked distillation loss, against the naive one and TRL's.

    python benchmarks/seeding_memory.py             table, JSON, picture (Linux, 16 GB; 10 minutes)
    python benchmarks/seeding_memory.py --positions 768 --repeats 1

Every variant gets the same tensors: hidden states of student and teacher and one frozen head,
float32; forward and backward to the student's hidden states. Each measurement is a fresh process on
one thread. The variants alternate, ``--repeats`` times, so each repeat has ratios of its own; the
table has their means with 95 % intervals.

    peak       peak memory beyond the inputs: the process's peak resident size (Linux's VmHWM,
               reset before the pass) minus its size before, with glibc set to give every tensor
               of 1 MiB and more a mapping of its own; the maximum over the repeats
    resident   the same in another pass, where the heap serves allocations below 32 MiB, as glibc
               does by default: it includes memory that the heap retains and cannot reuse
    seconds    CPU time of that second pass, so other load on the machine does not count

    naive            all logits, then JSD(beta) over the full vocabulary, in plain PyTorch
    chunked          ``chunked_values`` with our divergence
    trl-gkd          TRL's GKDTrainer.generalized_jsd_loss, on all logits
    trl-distillation the loss of TRL's DistillationTrainer, which is chunked too
    naive-top-k      all logits, then JSD(beta) on the teacher's top 32 and a tail bin, with the
                     teacher's part given: the loss that the learner trains with
    chunked-top-k    ``chunked_values`` with our divergence

Only this benchmark needs TRL: ``pip install --no-deps trl datasets pandas dill multiprocess xxhash
httpx httpcore h11 anyio fsspec``. Without it the two TRL variants are skipped. Results go to
``benchmarks/results/seeding_memory.json`` and ``.svg``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import RESULTS, format_ratio, ratio, save
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sleeprl.losses.chunked import chunked_values
from sleeprl.losses.divergence import TopK, divergence, top_k_with_tail

M_MMAP_THRESHOLD = -3  # of glibc's mallopt
VARIANTS = ("naive", "chunked", "trl-gkd", "trl-distillation", "naive-top-k", "chunked-top-k")
BASE = {"chunked-top-k": "naive-top-k", "naive-top-k": "naive-top-k"}  # others: naive
Loss = Callable[[Tensor, Tensor, Tensor, TopK | None], Tensor]


def naive(beta: float) -> Loss:
    """Build the naive loss: log-probabilities over the vocabulary, the formula, and autograd."""

    def jsd(teacher_NK: Tensor, student_NK: Tensor) -> Tensor:
        mixture_NK = torch.logaddexp(teacher_NK + math.log(beta), student_NK + math.log1p(-beta))
        of_teacher_N = (teacher_NK.exp() * (teacher_NK - mixture_NK)).sum(-1)
        of_student_N = (student_NK.exp() * (student_NK - mixture_NK)).sum(-1)
        return (beta * of_teacher_N + (1 - beta) * of_student_N).mean()

    def loss(student_NH: Tensor, teacher_NH: Tensor, head_VH: Tensor, top: TopK | None) -> Tensor:
        student_NV = (student_NH @ head_VH.T).float().log_softmax(-1)
        if top is not None:
            rest_NV = student_NV.scatter(-1, top.ids_NK, -math.inf)
            tail_N1 = rest_NV.logsumexp(-1, keepdim=True)
            kept_NK1 = torch.cat([student_NV.gather(-1, top.ids_NK), tail_N1], -1)
            return jsd(top.logprobs_NK1, kept_NK1)
        with torch.no_grad():
            teacher_NV = (teacher_NH @ head_VH.T).float().log_softmax(-1)
        return jsd(teacher_NV, student_NV)

    return loss


def chunked(beta: float) -> Loss:
    """Build our chunked loss."""

    def loss(student_NH: Tensor, teacher_NH: Tensor, head_VH: Tensor, top: TopK | None) -> Tensor:
        def values(logits_nV: Tensor, part: slice) -> list[Tensor]:
            if top is not None:
                teacher = TopK(top.ids_NK[part], top.logprobs_NK1[part])
                return [divergence(teacher, logits_nV, beta=beta)]
            teacher_nV = teacher_NH[part] @ head_VH.T
            return [divergence(teacher_nV, logits_nV, beta=beta, support="full")]

        return chunked_values(student_NH, head_VH, values, [True])[0].mean()

    return loss


def trl_gkd(beta: float) -> Loss:
    """Build TRL's loss on all logits."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def loss(student_NH: Tensor, teacher_NH: Tensor, head_VH: Tensor, top: TopK | None) -> Tensor:
        with torch.no_grad():
            teacher_NV = teacher_NH @ head_VH.T
        labels_1N = torch.zeros(1, len(student_NH), dtype=torch.long, device=head_VH.device)
        logits_NV = student_NH @ head_VH.T
        return GKDTrainer.generalized_jsd_loss(
            logits_NV[None], teacher_NV[None], labels=labels_1N, beta=beta
        )

    return loss


def trl_distillation(beta: float) -> Loss:
    """Build TRL's chunked loss."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(student_NH: Tensor, teacher_NH: Tensor, head_VH: Tensor, top: TopK | None) -> Tensor:
        mask_1N = torch.ones(1, len(student_NH), device=head_VH.device)
        hidden = student_NH[None], teacher_NH[None]
        return _chunked_divergence_loss(*hidden, head_VH, head_VH, mask_1N, beta)[0]

    return loss


MAKERS = {"trl-gkd": trl_gkd, "trl-distillation": trl_distillation}


def maker(variant: str) -> Callable[[float], Loss]:
    """Return the function from beta to a variant's loss."""
    return MAKERS.get(variant, chunked if variant.startswith("chunked") else naive)


def measure(variant: str, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant in this process: bytes, seconds, and the loss and gradient norm."""
    torch.set_num_threads(1)
    loss = maker(variant)(options.beta)
    top_k = variant.endswith("top-k")

    def run(made: tuple[Tensor, Tensor, Tensor, TopK | None]) -> tuple[float, float]:
        hidden = made[0]
        hidden.grad = None
        value = loss(*made)
        value.backward()
        return value.item(), hidden.grad.norm().item()  # type: ignore[attr-defined]

    run(inputs(8, options.hidden, 1000, top_k))  # allocates the libraries' first-use memory
    made = inputs(options.positions, options.hidden, vocabulary, top_k)
    found: dict[str, Any] = {}
    for name, threshold in (("peak_bytes", 2**20), ("resident_bytes", 2**25)):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, threshold)
        ctypes.CDLL(None).malloc_trim(0)  # else free memory might be returned during the pass
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before, began = _status("VmRSS"), time.process_time()
        found["loss"], found["gradient"] = run(made)
        found["seconds"] = time.process_time() - began
        found[name] = _status("VmHWM") - before
    return found


def inputs(
    positions: int,
    hidden: int,
    vocabulary: int,
    top_k: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, TopK | None]:
    """Create the inputs: student_NH with gradient, teacher_NH, head_VH, and the teacher's top 32 or None."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    student, noise = (draw(positions, hidden) for _ in range(2))
    head = draw(vocabulary, hidden).mul_(2.0 / hidden**0.5).to(dtype)
    teacher = (student + 0.3 * noise).to(dtype)
    student = student.to(dtype)
    top = None
    if top_k:
        pieces = [top_k_with_tail(piece @ head.T, 32) for piece in teacher.split(8)]
        ids, logprobs = (torch.cat(kind) for kind in zip(*pieces, strict=True))
        top = TopK(ids, logprobs)
    return student.requires_grad_(), teacher, head, top


def _status(key: str) -> int:
    """Read a size of this process from the kernel, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def in_fresh_process(variant: str, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run ``measure`` in a fresh process."""
    words = [sys.executable, __file__, "--measure", variant, "--vocabularies", str(vocabulary)]
    for name in ("positions", "hidden", "beta"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(
        words,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{variant}, vocabulary {vocabulary}: {done.stderr[-2000:]}")
    return {
        "variant": variant,
        "vocabulary": vocabulary,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def compare(
    variants: Sequence[str], options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Measure all variants, with ratios to the naive form of the same divergence."""
    rows = []
    for vocabulary in options.vocabularies:
        found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for _ in range(options.repeats):
            for variant, runs in found.items():
                runs.append(in_fresh_process(variant, vocabulary, options))
                console.print(runs[-1])
        for variant, runs in found.items():
            naive = found[BASE.get(variant, "naive")]
            for figure in ("loss", "gradient"):
                if abs(runs[0][figure] - naive[0][figure]) > 1e-3 * abs(naive[0][figure]):
                    raise RuntimeError(
                        f"{variant} computes another {figure}: {runs} against {naive}"
                    )
            seconds, base = ([run["seconds"] for run in of] for of in (runs, naive))
            # The maximum of the repeats: memory that is returned during a pass lowers the reading.
            most, base_most = (
                {name: max(run[name] for run in of) for name in ("peak_bytes", "resident_bytes")}
                for of in (runs, naive)
            )
            rows.append(
                {
                    **runs[0],
                    **most,
                    "seconds": seconds,
                    "peak_of_naive": most["peak_bytes"] / base_most["peak_bytes"],
                    "seconds_of_naive": ratio(seconds, base),
                }
            )
    return rows


def trl_version() -> str | None:
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    title = "Distillation loss, forward and backward from hidden states (MiB, CPU seconds)"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for heading in (
        "vocabulary",
        "variant",
        "peak",
        "of naive",
        "resident",
        "seconds",
        "of naive",
    ):
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['vocabulary']:,}",
            row["variant"],
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['peak_of_naive']:.2f}",
            f"{row['resident_bytes'] / 2**20:,.0f}",
            f"{fmean(row['seconds']):.2f}",
            format_ratio(row["seconds_of_naive"]),
        )
    console.print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw peak and time over the vocabulary, one line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = dict(
        zip(
            VARIANTS,
            ("o-#767676", "D-#009e73", "s-#d55e00", "^-#0072b2", "o:#767676", "D:#009e73"),
            strict=True,
        )
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4))
    for variant, look in looks.items():
        mine = [row for row in rows if row["variant"] == variant]
        xs = [row["vocabulary"] / 1000 for row in mine]
        style = {"marker": look[0], "linestyle": look[1], "color": look[2:], "label": variant}
        left.plot(xs, [row["peak_bytes"] / 2**20 for row in mine], **style)
        right.plot(xs, [fmean(row["seconds"]) for row in mine], **style)
    left.set_yscale("log")
    left.set_ylabel("peak memory (MiB)")
    right.set_ylabel("CPU seconds")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("vocabulary (thousands)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = path.name  # drawn again it is the same file
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=576, help="SmolLM2-135M's width")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 150_000])
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(options.measure, options.vocabularies[0], options)))
        return
    console = Console()
    trl = trl_version()
    variants = [v for v in VARIANTS if trl or not v.startswith("trl")]
    if trl is None:
        console.print("TRL is not installed and is left out; see --help for how to get it")
    rows = compare(variants, options, console)
    show(rows, console)
    settings = {k: v for k, v in vars(options).items() if k != "measure"}
    save("seeding_memory", {"settings": settings, "rows": rows, "trl": trl})
    draw(rows, RESULTS / "seeding_memory.svg")


if __name__ == "__main__":
    main()
