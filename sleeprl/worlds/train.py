"""Train the embedded model from scratch: ``python -m sleeprl.worlds.train --out DIR``.

Runs on one GPU (some minutes) or on the CPU (hours; fewer ``--steps`` for a weaker model).
``--seed`` determines the data and the order of the batches. The result is an ordinary Hugging Face
directory in bfloat16, with its tokenizer and a model card that states the measured figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sleeprl.pretrained import load_model, load_tokenizer, save_model
from sleeprl.worlds.card import read_card, write_card
from sleeprl.worlds.dataset import ROLE_WEIGHTS, Rows, make_rows
from sleeprl.worlds.evaluate import Examiner
from sleeprl.worlds.lessons import tokenizer_texts
from sleeprl.worlds.model import new_model
from sleeprl.worlds.tokenizer import train_tokenizer

TOKENIZER_LESSONS = 20_000


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--init", type=Path, help="continue from the model in this directory")
    parser.add_argument("--reading", type=float, default=0.3, help="share of lessons with passages")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=16, help="packed rows in a step")
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--lessons", type=int, default=340_000, help="distinct lessons")
    parser.add_argument("--lr", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="of training at most")
    parser.add_argument("--processes", type=int, default=0, help="making data; 0 = all cores")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--exams", type=int, default=8, help="small evaluations on the way")
    parser.add_argument("--exam-n", type=int, default=64, help="their size")
    parser.add_argument("--final-n", type=int, default=1000, help="size of the last evaluation")
    return parser.parse_args()


# --- one step --------------------------------------------------------------------
def packed_inputs(
    tokens_BT: torch.Tensor, segments_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute positions and attention mask of packed rows.

    Each lesson starts at position 0 and attends only to itself.

    Args:
        tokens_BT: Token ids.
        segments_BT: Number of the lesson of each token.

    Returns:
        (positions_BT, mask_B1TT).
    """
    length = tokens_BT.shape[1]
    index_T = torch.arange(length, device=tokens_BT.device)
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    first_BT = torch.where(starts_BT, index_T, 0).cummax(dim=1).values
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return index_T - first_BT, (same_BTT & (index_T[:, None] >= index_T))[:, None]


def weighted_loss(
    model: LlamaForCausalLM, tokens_BT: torch.Tensor, segments_BT: torch.Tensor,
    weights_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Compute the weighted next-token loss, in nats per token.

    Args:
        model: The model.
        tokens_BT: Token ids.
        segments_BT: Number of the lesson of each token.
        weights_BT: Weight of each token as a target.

    Returns:
        (weighted mean, mean over the tokens of weight 1 without gradient).
    """
    positions_BT, mask = packed_inputs(tokens_BT, segments_BT)
    logits = model(
        input_ids=tokens_BT, position_ids=positions_BT, attention_mask=mask, use_cache=False
    ).logits[:, :-1]
    targets = tokens_BT[:, 1:].flatten()
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    weights = weights_BT[:, 1:].flatten()
    answers = weights == 1.0
    loss = (nats * weights).sum() / weights.sum()
    return loss, (nats * answers).sum().detach() / answers.sum()


def learning_rate_factor(done: float, warmup: float) -> float:
    """Compute the factor of the learning rate: linear warm-up, then a half cosine down to 0.

    Args:
        done: Share of the training that is done.
        warmup: Share of the training that is warm-up.
    """
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms.

    Here Muon learns to read from half as many tokens as AdamW alone, and tokens are the bottleneck
    on a CPU.
    """

    def __init__(self, model: LlamaForCausalLM, args: argparse.Namespace) -> None:
        inner = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
        outer = [p for n, p in model.named_parameters() if ".layers." not in n or p.ndim != 2]
        self.parts = (
            torch.optim.Muon(inner, lr=args.muon_lr, weight_decay=args.weight_decay),
            torch.optim.AdamW(outer, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        )
        self.rates = (args.muon_lr, args.lr)

    def step(self, factor: float) -> None:
        """Update the parameters and clear their gradients.

        Args:
            factor: Multiplies both learning rates.
        """
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad()


# --- the run ---------------------------------------------------------------------
class Batches:
    """Endless batches of rows, reshuffled every epoch, moved to the device one by one."""

    def __init__(self, rows: Rows, size: int, seed: int, device: torch.device) -> None:
        self.rows, self.size, self.device = rows, size, device
        self.rng = np.random.default_rng(seed)
        self.weights = torch.tensor(ROLE_WEIGHTS, device=device)
        self.order = np.empty(0, np.int64)

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the next batch: (tokens_BT, segments_BT, weights_BT)."""
        while len(self.order) < self.size:
            self.order = np.concatenate([self.order, self.rng.permutation(len(self.rows))])
        chosen, self.order = self.order[: self.size], self.order[self.size :]
        tokens, segments, roles = (
            torch.from_numpy(part[chosen].astype(np.int64)).to(self.device, non_blocking=True)
            for part in (self.rows.tokens, self.rows.segments, self.rows.roles)
        )
        return tokens, segments, self.weights[roles]


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> int:
    """Train in place.

    Args:
        model: The model.
        batches: The training data.
        tokenizer: The model's tokenizer, for the evaluations on the way.
        args: What ``parse_args`` returned.

    Returns:
        The number of steps taken; fewer than ``args.steps`` when time runs out.
    """
    device = batches.device
    optimizer = Optimizer(model, args)
    loss_of = torch.compile(weighted_loss) if args.compile else weighted_loss
    start, examined, step = time.monotonic(), 0, 0
    say_every = max(1, args.steps // 100)
    while True:
        seconds = time.monotonic() - start
        done = max(step / args.steps, seconds / (60 * args.minutes))
        if int(done * args.exams) > examined:
            examined = int(done * args.exams)
            exam = Examiner(model, tokenizer, args.exam_n, seed=7).examine()
            print(f"exam at step {step}: {json.dumps(exam)}", flush=True)
        if done >= 1:
            return step
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            loss, answer_loss = loss_of(model, *batches.next())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step(learning_rate_factor(done, args.warmup))
        if step % say_every == 0:
            print(
                f"step {step} of {args.steps}  {seconds:.0f} s  loss {loss.item():.3f}  "
                f"answers {answer_loss.item():.4f}  norm {norm.item():.2f}",
                flush=True,
            )
        step += 1


def has_bfloat16(device: torch.device) -> bool:
    """Decide whether the device computes in bfloat16 natively; emulation would be slower than float32."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_name(device: torch.device) -> str:
    """Describe the device for the model card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} {platform.machine()} CPU threads"


def main() -> None:
    args = parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    if args.init:
        tokenizer = load_tokenizer(args.init)
    else:
        tokenizer = train_tokenizer(tokenizer_texts("tokenizer", TOKENIZER_LESSONS))
    rows = make_rows(
        tokenizer, args.seed, args.lessons, args.row_length, args.reading, args.processes
    )
    tokens = rows.count()
    print(f"data: {args.lessons} lessons, {len(rows)} rows, {tokens / 1e6:.1f} M tokens, "
          f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip

    if args.init:
        model = load_model(args.init, torch.float32).to(device)
    else:
        model = new_model(tokenizer, args.width, args.layers, args.mlp, args.head_dim).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {parameters / 1e6:.2f} M parameters on {device_name(device)}", flush=True)
    training = time.monotonic()
    steps = train(model, Batches(rows, args.rows, args.seed, device), tokenizer, args)
    training = time.monotonic() - training

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.no_padding()  # the exams left it on
    save_model(model.to(torch.bfloat16), tokenizer, args.out)

    # Evaluate the saved bfloat16 checkpoint, not the float32 model in memory.
    saved = load_model(args.out, "auto").to(device)
    exam = Examiner(saved, load_tokenizer(args.out), args.final_n, seed=1).examine()
    run = {
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": parameters,
        "device": device_name(device),
        "cores": os.cpu_count(),
        "tokens_of_data": tokens,
        "tokens_seen": round(tokens / len(rows) * args.rows * steps),
        "steps": steps,
        "training_seconds": round(training),
        "total_seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "figures": exam,
    }
    if args.init:
        run["first_run"] = read_card(args.init)
    write_card(args.out, run)
    print(json.dumps(run, indent=1, default=str))


if __name__ == "__main__":
    main()
