"""A prompt that several rows have in common is read once, and nothing else is different."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from transformers import AutoModelForCausalLM

from sleeprl.actors.batches import LONGEST_SHARED, Row, inputs, shared, shared_inputs, window
from sleeprl.actors.response import ResponseModel
from sleeprl.losses.streams import LossOptions, Part, chunked_stream_loss, token_counts

CPU = torch.device("cpu")
PARTS = {"dream": Part(pg=1.0, ce=0.3)}


def row(prompt: int, response: int, seed: int) -> Row:
    """The same length of prompt is the same prompt."""
    ids = [(seed * 31 + n * 7) % 250 + 3 for n in range(response)]
    behaviour = [-5.0] * response
    return Row(list(range(10, 10 + prompt)), ids, "dream", None, (-1.0) ** seed, behaviour)


GROUPS = [row(*lengths, seed) for seed, lengths in enumerate(
    [(20, 3), (12, 5), (20, 7), (20, 1), (12, 2), (12, 6), (20, 4), (9, 3)]
)]  # fmt: skip


def test_rows_are_put_together_by_prompt() -> None:
    pieces = shared(GROUPS)
    assert sorted(n for piece in pieces for n in piece) == list(range(len(GROUPS)))
    for piece in pieces:
        assert len({tuple(GROUPS[n].prompt_ids) for n in piece}) == 1
    lengths = [20 + 15, 12 + 13, 9 + 3]
    assert pieces == [[0, 2, 3, 6], [1, 4, 5], [7]]
    assert max(lengths) * len(pieces) < 27 * len(GROUPS)


def test_nothing_is_put_together_where_nothing_is_saved() -> None:
    alone = [row(5 + n, 4, n) for n in range(4)]
    assert shared(alone) == [[0], [1], [2], [3]]
    # One short text beside long ones of their own: together they would make all rows longer.
    assert all(len(piece) == 1 for piece in shared([row(2, 40, 0), row(2, 40, 1), row(3, 40, 2)]))
    long = LONGEST_SHARED // 2
    assert all(len(piece) == 1 for piece in shared([row(long, long // 2 + 1, n) for n in range(9)]))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_loss_and_gradient_are_those_of_rows_on_their_own(
    tmp_path: Path, architecture: str
) -> None:
    make_tiny_model(tmp_path, architecture=architecture)
    counts_P3 = token_counts(PARTS, ["dream"] * 8, [len(r.response_ids) for r in GROUPS])
    within = partial(
        chunked_stream_loss,
        window=window(GROUPS, CPU),
        parts=PARTS,
        counts_P3=counts_P3,
        options=LossOptions(),
    )
    found: list[Any] = []
    for together in (False, True):
        model = ResponseModel(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
        if together:
            ids, mask, index, *where = shared_inputs(GROUPS, shared(GROUPS), CPU)
        else:
            ids, mask, index = inputs([r.prompt_ids for r in GROUPS], GROUPS, CPU)
            where = []
        loss, metrics = model(ids, mask, index, within, *where)
        loss.backward()
        found.append((loss.detach(), metrics, {n: p.grad for n, p in model.named_parameters()}))
    (loss, metrics, gradients), (other, others, theirs) = found
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-6)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)
