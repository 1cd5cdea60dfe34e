"""However texts lie in tensors, what is made of them is the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sleeprl.losses.combined import chunked_combined_loss, token_counts
from sleeprl.losses.types import LossOptions, LossWeights
from sleeprl.trainer import packing as layout
from sleeprl.trainer.batching import TrainingExample, make_loss_batch
from sleeprl.trainer.packed_attention import PackedSequences
from sleeprl.trainer.packing import inputs, pack, packed, padded
from sleeprl.trainer.response_model import ResponseModel
from sleeprl.trainer.teacher import compute_targets
from tests.support.models import make_tiny_model

CPU = torch.device("cpu")
PARTS = {"dream": LossWeights(pg=1.0, ce=0.3)}


def ids(count: int, seed: int) -> list[int]:
    return [(seed * 31 + n * 7) % 250 + 3 for n in range(count)]


DOCUMENTS = [ids(60, 1), ids(45, 2)]
# Questions about two documents, a prompt of a group, one prompt that goes on from another, strays.
PROMPTS = [
    *(DOCUMENTS[0] + ids(5 + n, 10 + n) for n in range(4)),
    *(DOCUMENTS[1] + ids(9 - n, 20 + n) for n in range(3)),
    *[ids(12, 30)] * 3,
    ids(12, 30) + ids(2, 31),
    ids(3, 40),
    ids(1, 41),
]  # fmt: skip
RESPONSES = [ids(1 + (3 * n) % 8, 50 + n) for n in range(len(PROMPTS))]
ROWS = [
    TrainingExample(prompt, response, "dream", None, (-1.0) ** n, [-5.0] * len(response))
    for n, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
]


def test_what_prompts_begin_with_in_common_is_there_once() -> None:
    groups = pack(PROMPTS, RESPONSES)
    assert groups is not None
    together = {tuple(sorted(group.texts)): group.prefix for group in groups}
    assert together[0, 1, 2, 3] == 60
    assert together[4, 5, 6] == 45
    assert together[7, 8, 9, 10] == 12
    lengths = [len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    ids_1T = packed(PROMPTS, RESPONSES, groups)[0]
    assert ids_1T.shape == (1, sum(lengths) - 3 * 60 - 2 * 45 - 3 * 12)


def test_attention_costs_what_the_texts_do() -> None:
    """Not the length of all together squared."""
    document, answers = ids(100, 1), [ids(60, n) for n in range(16)]
    groups = pack([document] * 16, answers)
    assert groups is not None
    ids_1T, texts, _ = packed([document] * 16, answers, groups)
    pairs = sum(block.seen_NQK.numel() for block in texts.blocks)
    assert ids_1T.numel() == 100 + 16 * 60
    assert pairs < 0.3 * ids_1T.numel() ** 2


def test_nothing_is_packed_where_nothing_is_saved() -> None:
    alike = [ids(20, n) for n in range(4)]
    assert pack(alike, alike) is None
    assert pack([ids(9, 0)], [ids(4, 1)]) is None
    nearly = [ids(95, 0), ids(100, 1), ids(100, 2)]
    assert pack(nearly, [[5]] * 3) is None


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 300), st.integers(1, 40), st.integers(0, 40)
        ),
        min_size=1, max_size=40,
    ),
    st.sampled_from([None, 7, 128]),
)  # fmt: skip
def test_every_token_sees_what_its_text_has_before_it(
    drawn: list[tuple[int, int, int, int]], window: int | None
) -> None:
    prompts = [ids(shared, kind) + ids(own, 9) for kind, shared, own, _ in drawn]
    responses = [ids(count, 7) for *_, count in drawn]
    ids_ST, texts, index_BR = inputs(prompts, responses, CPU)
    if not isinstance(texts, PackedSequences):
        assert pack(prompts, responses) is None
        return
    seen: dict[int, list[int]] = {}  # by the place among all queries
    for block in texts.blocks:
        sees_NQK = block.sees(window)[:, 0]
        assert sees_NQK.any(-1).all()  # the softmax of nothing is not a number
        for keys_K, sees_QK in zip(block.keys_NK, sees_NQK, strict=True):
            for sees_K in sees_QK:
                seen[len(seen)] = keys_K[sees_K].tolist()
    positions_T = texts.positions_1T[0]
    for text, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = prompt + response
        for nth in range(max(1, len(response))):  # what predicts a token of the response
            length = len(prompt) + nth
            places = seen[int(texts.found_T[index_BR[text, nth]])]
            expected = range(length)[-(window or length) :]
            assert ids_ST[0, places].tolist() == [whole[n] for n in expected]
            assert positions_T[places].tolist() == list(expected)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {}), ("qwen3", {}), ("gemma", {"sliding_window": 16})],  # shorter than the texts
)
@pytest.mark.parametrize(("together", "pieces"), [(layout.MIN_OWN_BLOCK, 8), (16, 10)])
def test_loss_and_gradient_are_those_of_texts_on_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    architecture: str, settings: dict[str, int], together: int, pieces: int,
) -> None:  # fmt: skip
    """pieces: of all groups; with the smaller number several texts of a group attend on their own."""
    make_tiny_model(tmp_path, architecture=architecture)
    monkeypatch.setattr(layout, "MIN_OWN_BLOCK", together)
    counts_P3 = token_counts(PARTS, ["dream"] * len(ROWS), [len(r) for r in RESPONSES])
    within = partial(
        chunked_combined_loss,
        batch=make_loss_batch(ROWS, CPU),
        parts=PARTS,
        counts_P3=counts_P3,
        options=LossOptions(),
    )
    groups = pack(PROMPTS, RESPONSES)
    assert groups is not None
    blocks = packed(PROMPTS, RESPONSES, groups)[1].blocks
    assert sum(len(block.queries_NQ) for block in blocks) == pieces
    found: list[Any] = []
    for asked in (padded(PROMPTS, RESPONSES), packed(PROMPTS, RESPONSES, groups)):
        policy = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **settings)
        model = ResponseModel(policy)
        loss, metrics = model(within, *asked)
        loss.backward()
        found.append((loss.detach(), metrics, {n: p.grad for n, p in model.named_parameters()}))
    (loss, metrics, gradients), (other, others, theirs) = found
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-6)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_a_teacher_says_of_packed_texts_what_it_says_of_each(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    model = ResponseModel(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    rows = [
        TrainingExample(ids(3, n), response, "new", teacher_prompt)
        for n, (teacher_prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]
    together = compute_targets(model, rows, 4, CPU)
    for row, (tokens_RK, logprobs_RK1) in zip(rows, together, strict=True):
        ((alone_RK, said_RK1),) = compute_targets(model, [row], 4, CPU)
        torch.testing.assert_close(tokens_RK, alone_RK)
        torch.testing.assert_close(logprobs_RK1, said_RK1, rtol=1e-4, atol=1e-5)
