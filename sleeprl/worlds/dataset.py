"""Lessons as packed rows of token ids, made by several processes.

A row holds several lessons; ``segments`` tells them apart (1, 2, ...; 0 is padding), so that
attention and positions never cross from one lesson to the next. ``roles`` gives each token's
share in the loss *as a target*.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from sleeprl.worlds.lessons import Lesson, lessons
from sleeprl.worlds.tokenizer import ASSISTANT, END, USER

IGNORED, CONTEXT, TEXT, ANSWER = range(4)
ROLE_WEIGHTS = (0.0, 0.1, 0.5, 1.0)  # what is only read must not drown what is answered
SHARD = 20_000
_OPEN_ROWS = 24


@dataclass(frozen=True)
class Rows:
    """Packed lessons, each array of shape [rows, row length]."""

    tokens: np.ndarray  # int16
    segments: np.ndarray  # uint8
    roles: np.ndarray  # uint8

    def __len__(self) -> int:
        return len(self.tokens)

    def count(self) -> int:
        """Tokens without padding."""
        return int((self.segments > 0).sum())


def make_rows(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    n: int,
    row_length: int,
    reading_share: float = 0.3,
    processes: int = 0,
) -> Rows:
    """``n`` lessons, packed; the same for any number of processes (0 = one per core)."""
    sizes = [min(SHARD, n - start) for start in range(0, n, SHARD)]
    jobs = [
        (tokenizer, f"{seed}-{i}", size, row_length, reading_share) for i, size in enumerate(sizes)
    ]
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    if processes == 1:
        shards = [_shard(job) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            shards = list(pool.map(_shard, jobs))
    return Rows(*(np.concatenate(part) for part in zip(*shards, strict=True)))


def _shard(
    job: tuple[PreTrainedTokenizerFast, str, int, int, float],
) -> tuple[np.ndarray, ...]:
    tokenizer, seed, n, row_length, reading_share = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    encoded = encode(tokenizer, lessons(seed, n, reading_share))
    return _pack([lesson for lesson in encoded if len(lesson[0]) <= row_length], row_length)


def encode(
    tokenizer: PreTrainedTokenizerFast, batch: list[Lesson]
) -> list[tuple[list[int], list[int]]]:
    """(token ids, roles) of each lesson; ids are those of the chat template."""
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in (END, USER, ASSISTANT)}
    texts = [text for lesson in batch for _, text in lesson]
    pieces = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return [_encode_lesson(lesson, pieces, special) for lesson in batch]


def _encode_lesson(
    lesson: Lesson, pieces: Iterator[Any], special: dict[str, int]
) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    roles: list[int] = []
    for role, _ in lesson:
        ids = next(pieces).ids
        if role == "text":
            tokens += [*ids, special[END]]
            roles += [TEXT] * (len(ids) + 1)
        else:
            answer = role == "assistant"
            tokens += [special[ASSISTANT if answer else USER], *ids, special[END]]
            roles += [CONTEXT, *([ANSWER if answer else CONTEXT] * (len(ids) + 1))]
    return tokens, roles


def _pack(encoded: list[tuple[list[int], list[int]]], row_length: int) -> tuple[np.ndarray, ...]:
    """First fit into a few open rows, in the random order of the lessons."""
    done: list[list[int]] = []
    open_rows: list[tuple[list[int], int]] = []  # (lessons, tokens used)
    for i, (tokens, _) in enumerate(encoded):
        size = len(tokens)
        for slot, (members, used) in enumerate(open_rows):
            if used + size <= row_length:
                members.append(i)
                open_rows[slot] = (members, used + size)
                break
        else:
            if len(open_rows) == _OPEN_ROWS:
                done.append(open_rows.pop(0)[0])
            open_rows.append(([i], size))
    return _fill(done + [members for members, _ in open_rows], encoded, row_length)


def _fill(
    rows: list[list[int]], encoded: list[tuple[list[int], list[int]]], row_length: int
) -> tuple[np.ndarray, ...]:
    tokens = np.zeros((len(rows), row_length), np.int16)
    segments = np.zeros((len(rows), row_length), np.uint8)
    roles = np.zeros((len(rows), row_length), np.uint8)
    for row, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, start=1):
            ids, codes = encoded[i]
            end = start + len(ids)
            tokens[row, start:end], roles[row, start:end] = ids, codes
            segments[row, start:end] = segment
            roles[row, start] = IGNORED  # nothing of its lesson comes before the first token
            start = end
    return tokens, segments, roles
