"""Trajectories to Arrow and Parquet and back, the lake under crashes, packing."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeprl.data import Lake, Trajectory, from_batch, to_batch
from sleeprl.data.lake import LakeError
from sleeprl.data.padding import pad_batch, token_budget_batches
from sleeprl.data.trajectory import (
    NAME_KEY,
    TRAJECTORY_SCHEMA,
    VERSION_KEY,
    SchemaError,
    with_ref_logprobs,
    with_rewards,
)
from sleeprl.utils.files import atomic_directory, atomic_path, sha256_file, write_json_atomic
from tests.support.paths import ROOT

ids = st.integers(0, 2**31 - 1)
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
float64 = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    n = draw(st.integers(0, 5))

    def per_token(items: st.SearchStrategy) -> st.SearchStrategy:
        return st.lists(items, min_size=n, max_size=n)

    scored = draw(st.sampled_from(["not yet", "reward", "unscored"]))
    return Trajectory(
        uid=draw(st.text(min_size=1)),
        task_id=draw(st.text()),
        attempt=draw(st.integers(0, 2**31 - 1)),
        purpose=draw(st.sampled_from(["self_study", "replay", "rollout", "dream", "eval"])),
        prompt_ids=draw(st.lists(ids)),
        response_ids=draw(per_token(ids)),
        logprobs=draw(per_token(float32)),
        versions=draw(per_token(ids)),
        finish_reason=draw(st.text()),
        teacher_prompt_ids=draw(st.none() | st.lists(ids)),
        reward=draw(float32) if scored == "reward" else None,
        unscored=draw(st.text()) if scored == "unscored" else None,
        ref_logprobs=draw(st.none() | per_token(float32)),
        advantage=draw(st.none() | float32),
        gain=draw(st.none() | float64),
        gap=draw(st.none() | float64),
        parsed=draw(st.none() | st.text()),
        meta=json.dumps(draw(st.dictionaries(st.text(), st.integers() | st.text()))),
    )


def make(uid: str = "t/0", **changes) -> Trajectory:
    base = Trajectory(
        uid, "t", 0, "rollout", [1, 2], [3, 4, 5], [-0.5, -1.0, -2.0], [7, 7, 8], "stop"
    )
    return replace(base, **changes)


# --- the data type ------------------------------------------------------------------


@given(st.lists(trajectories(), max_size=4, unique_by=lambda t: t.uid))
@settings(max_examples=60, deadline=None)
def test_round_trip_through_arrow_and_parquet(tmp_path_factory, items):
    batch = to_batch(items)
    batch.validate(full=True)
    assert from_batch(batch) == items
    lake = Lake(tmp_path_factory.mktemp("lake"))
    lake.append(batch, "trajectories")
    assert from_batch(lake.read("trajectories")) == items
    assert from_batch(lake.scan("trajectories").to_table()) == items


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uid": ""}, "uid ''"),
        ({"purpose": "fun"}, "purpose 'fun'"),
        ({"attempt": -1}, "attempt -1"),
        ({"logprobs": [-1.0]}, "logprobs has 1 entries for the 3 of response_ids"),
        ({"versions": [1, 2]}, "versions has 2 entries"),
        ({"ref_logprobs": []}, "ref_logprobs has 0 entries"),
        ({"logprobs": [-1.0, math.nan, -1.0]}, "logprobs has nan"),
        ({"reward": math.inf}, "reward inf"),
        ({"reward": math.nan}, "reward nan"),
        ({"reward": 1e39}, "reward 1e"),  # finite, but not as float32
        ({"reward": 0.0, "unscored": "no"}, "reward 0.0 and unscored 'no'"),
        ({"meta": "[]"}, "meta '\\[\\]'"),
        ({"meta": "{"}, "meta '{'"),
    ],
)
def test_invariants_name_field_and_value(changes, message):
    with pytest.raises(SchemaError, match=message):
        make(**changes)


def test_scorers_add_columns():
    batch = to_batch([make("a"), make("b")])
    batch = with_rewards(batch, [0.0, None], [None, "deadline"])
    batch = with_ref_logprobs(batch, [[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0]])
    first, second = from_batch(batch)
    assert (first.reward, first.unscored) == (0.0, None)
    assert (second.reward, second.unscored) == (None, "deadline")
    assert second.ref_logprobs == [-2.0, -2.0, -2.0]
    with pytest.raises(SchemaError, match=r"'b'.*exactly one"):
        with_rewards(batch, [0.0, None], [None, None])
    with pytest.raises(SchemaError, match=r"'a'.*exactly one"):
        with_rewards(batch, [0.0, 1.0], ["why", None])
    with pytest.raises(SchemaError, match="reward nan"):
        with_rewards(batch, [math.nan, 1.0], [None, None])
    with pytest.raises(SchemaError, match="'b': ref_logprobs of length 1 for 3"):
        with_ref_logprobs(batch, [[-1.0, -1.0, -1.0], [-2.0]])


def test_versions_of_the_schema():
    batch = to_batch([make()])
    old = batch.drop_columns(["ref_logprobs"])
    assert from_batch(old)[0].ref_logprobs is None
    newer = {**batch.schema.metadata, VERSION_KEY: b"99"}
    with pytest.raises(SchemaError, match=r"version 99.*upgrade"):
        from_batch(batch.replace_schema_metadata(newer))
    with pytest.raises(SchemaError, match=r"lacks the columns \['logprobs'\]"):
        from_batch(batch.drop_columns(["logprobs"]))
    with pytest.raises(SchemaError, match="nothing of sleepRL"):
        from_batch(batch.replace_schema_metadata(None))
    with pytest.raises(SchemaError, match="unknown columns"):
        from_batch(batch.append_column("more", pa.array([1])))
    nulls = batch.set_column(0, TRAJECTORY_SCHEMA.field("uid"), pa.nulls(1, pa.string()))
    with pytest.raises(SchemaError, match="'uid' has 1 null"):
        from_batch(nulls)


def test_importing_trajectories_needs_neither_ray_nor_torch():
    code = (
        "import sys, sleeprl.utils.files, sleeprl.wake.ingest, sleeprl.data.padding, "
        "sleeprl.lineage; assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the lake -----------------------------------------------------------------------


def test_append_is_ordered_and_a_retry_counts_once(tmp_path):
    lake = Lake(tmp_path)
    assert lake.read("trajectories").num_rows == 0
    assert lake.scan("trajectories").count_rows() == 0
    assert lake.append(to_batch([]), "trajectories") is None
    lake.append(to_batch([make("b"), make("a")]), "trajectories")
    lake.append(to_batch([make("a", attempt=5), make("c")]), "trajectories")
    table = lake.read("trajectories")
    assert [t.uid for t in from_batch(table)] == ["b", "a", "c"]
    assert from_batch(table)[1].attempt == 5  # the last row of a uid is the one
    assert lake.read("trajectories", ["reward"]).column_names == ["uid", "reward"]
    assert lake.uids("trajectories") == {"a", "b", "c"}
    picked = from_batch(lake.pick("trajectories", ["c", "a"]))
    assert [(t.uid, t.attempt) for t in picked] == [("c", 0), ("a", 5)]
    assert from_batch(lake.pick("trajectories", [])) == []
    assert lake.scan("trajectories").count_rows() == 4
    assert [file.name[:9] for file in lake.files("trajectories")] == ["00000000-", "00000001-"]
    lake.rewrite(to_batch([make("d")]), "trajectories")
    assert lake.uids("trajectories") == {"d"}
    with pytest.raises(LakeError, match="no kind 'dreams'"):
        lake.read("dreams")


def test_files_of_other_versions(tmp_path):
    lake = Lake(tmp_path)
    file = lake.append(to_batch([make("old")]), "trajectories")
    table = pq.read_table(file)
    # Version 1 had a column for what top-p and top-k left to choose from, and no advantages.
    masks = pa.array([None], pa.list_(pa.list_(pa.int32())))
    later = ["ref_logprobs", "advantage", "gain", "gap", "parsed"]
    first = table.drop_columns(later).append_column("sampling_mask", masks)
    pq.write_table(version(first, 1), file)
    lake.append(to_batch([make("new", ref_logprobs=[0.0, 0.0, 0.0])]), "trajectories")
    for read in (lake.read("trajectories"), lake.scan("trajectories").to_table()):
        assert [t.ref_logprobs for t in from_batch(read)] == [None, [0.0, 0.0, 0.0]]
    assert from_batch(version(first, 1)) == [make("old")]
    pq.write_table(version(table, 99), file)
    for read in (lake.read, lake.scan):
        with pytest.raises(SchemaError, match=f"{file.name}.*version 99"):
            read("trajectories")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_gain_and_gap_of_older_versions_are_read_from_meta(tmp_path, number):
    """Versions before 4 had them there; what such a file holds stays as it is."""
    lake = Lake(tmp_path)
    metas = ['{"gain": 0.125, "gap": 1.5}', '{"gain": null, "gap": 0.25}', "{}"]
    old = [make(f"old/{n}", meta=meta) for n, meta in enumerate(metas)]
    table = pa.Table.from_batches([to_batch(old)]).drop_columns(["gain", "gap", "parsed"])
    file = lake.append(to_batch(old), "trajectories")
    pq.write_table(version(table, number), file)
    lake.append(to_batch([make("new", gain=2.0, gap=3.0, parsed='["q", "a"]')]), "trajectories")
    expected = [
        (0.125, 1.5, None),
        (None, 0.25, None),
        (None, None, None),
        (2.0, 3.0, '["q", "a"]'),
    ]
    rows = from_batch(lake.read("trajectories"))
    assert [(t.gain, t.gap, t.parsed) for t in rows] == expected
    assert [t.meta for t in rows] == [*metas, "{}"]
    (batch,) = version(table, number).to_batches()
    assert [(t.gain, t.gap, t.parsed) for t in from_batch(batch)] == expected[:3]


def version(table: pa.Table, number: int) -> pa.Table:
    return table.replace_schema_metadata(
        {NAME_KEY: b"trajectory", VERSION_KEY: str(number).encode()}
    )


@pytest.mark.parametrize("damage", ["truncated", "empty", "one byte"])
def test_a_damaged_file_is_named(tmp_path, damage):
    lake = Lake(tmp_path)
    lake.append(to_batch([make("good")]), "trajectories")
    many = [make(str(i), response_ids=[i, i, i]) for i in range(500)]
    file = lake.append(to_batch(many), "trajectories")
    content = bytearray(file.read_bytes())
    content[200] ^= 0xFF  # in the data, which the footer does not show
    changed = {"truncated": content[:-100], "empty": b"", "one byte": content}
    file.write_bytes(changed[damage])
    with pytest.raises(LakeError, match=f"{file.name} is truncated or corrupt.*move it out"):
        lake.read("trajectories")
    file.unlink()
    assert lake.uids("trajectories") == {"good"}


APPEND_AND_DIE = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from tests.unit.data.test_trajectory import make
from sleeprl.data import Lake, to_batch

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def batches():
    yield to_batch([make("new/0")])
    if sys.argv[2] == "between batches":
        die()
    yield to_batch([make("new/1")])

if sys.argv[2] == "before the rename":
    os.replace = die
Lake(sys.argv[1]).append(batches(), "trajectories")
die()
"""


@pytest.mark.parametrize(
    ("when", "rows"),
    [("between batches", 1), ("before the rename", 1), ("after the rename", 3)],
)
def test_sigkill_during_an_append(tmp_path, when, rows):
    lake = Lake(tmp_path)
    lake.append(to_batch([make("old")]), "trajectories")
    done = subprocess.run([sys.executable, "-c", APPEND_AND_DIE, tmp_path, when, ROOT])
    assert done.returncode == -signal.SIGKILL
    assert lake.read("trajectories").num_rows == rows
    lake.append(to_batch([make("new/0"), make("new/1")]), "trajectories")  # the retry
    assert lake.uids("trajectories") == {"old", "new/0", "new/1"}
    assert lake.read("trajectories").num_rows == 3


def test_an_iterator_that_raises_appends_nothing(tmp_path):
    def batches():
        yield to_batch([make()])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        Lake(tmp_path).append(batches(), "trajectories")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


# --- files --------------------------------------------------------------------------


def test_atomic_directory(tmp_path):
    final = tmp_path / "run"
    with atomic_directory(final) as directory:
        (directory / "a").write_text("1")
        assert not final.exists()
    with pytest.raises(FileExistsError, match="run exists"), atomic_directory(final):
        pass
    with (
        pytest.raises(RuntimeError),
        atomic_directory(final, overwrite=True) as directory,
    ):
        raise RuntimeError
    assert (final / "a").read_text() == "1"
    with atomic_directory(final, overwrite=True) as directory:
        (directory / "b").write_text("2")
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "b"]


def test_atomic_files(tmp_path):
    file = tmp_path / "deep" / "x.json"
    value = {"a": np.float32(0.5), "b": math.nan, "c": (1, Path("p")), 3: np.int64(4), "d": True}
    write_json_atomic(file, value)
    assert json.loads(file.read_text()) == {
        "a": 0.5, "b": None, "c": [1, "p"], "3": 4, "d": True,
    }  # fmt: skip
    before = sha256_file(file)
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert sha256_file(file) == before
    assert os.listdir(file.parent) == ["x.json"]


# --- packing ------------------------------------------------------------------------


def test_pad_batch():
    ids_BT, mask_BT = pad_batch([[1, 2, 3], [], [4]], pad_id=9)
    assert ids_BT.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert mask_BT.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert pad_batch([], 0)[0].shape == (0, 0)


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(50, 400), st.integers(1, 5))
@settings(deadline=None)
def test_token_budget_batches(lengths, max_tokens, ranks):
    batches = token_budget_batches(lengths, max_tokens, ranks=ranks)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) % ranks == 0
    for batch in batches:
        assert len(batch) * max((lengths[i] for i in batch), default=0) <= max_tokens
    for start in range(0, len(batches), ranks):
        step = batches[start : start + ranks]
        assert max(map(len, step)) - min(map(len, step)) <= 1
        longest = [max((lengths[i] for i in batch), default=0) for batch in step]
        assert longest == sorted(longest, reverse=True)
    assert all(batches) or len(lengths) < len(batches)
    assert batches == token_budget_batches(lengths, max_tokens, ranks=ranks)


def test_token_budget_errors_name_the_sequence():
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, more than max_tokens=8"):
        token_budget_batches([3, 9], 8)
    with pytest.raises(ValueError, match="ranks=0"):
        token_budget_batches([3], 8, ranks=0)
