"""Buckets in shared memory, and the canary that proves what arrived."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sleeprl.weights import shared_memory
from sleeprl.weights.shared_memory import ALIGNMENT, as_update_info, discard, pack, unpack
from sleeprl.weights.verify import Canary, Certificate, largest_difference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def buckets_on_disk() -> set[str]:
    return {p.name for p in shared_memory.directory().glob("sleeprl-weights-*")}


@st.composite
def named_tensors(draw: st.DrawFn) -> list[tuple[str, Tensor]]:
    tensors = []
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(1, 5), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        tensor = (100 * torch.randn(shape, generator=generator)).to(draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()) and tensor.dim() > 1:
            tensor = tensor.transpose(0, 1)  # not contiguous
        tensors.append((f"layer.{number}.weight", tensor))
    return tensors


@settings(deadline=None, max_examples=80)
@given(named_tensors(), st.integers(1, 600))
def test_round_trip_and_bucket_limit(tensors: list[tuple[str, Tensor]], limit: int) -> None:
    before = buckets_on_disk()
    arrived: list[tuple[str, Tensor]] = []
    for bucket in pack(tensors, limit):
        assert os.path.getsize(bucket.path) == bucket.nbytes
        assert bucket.nbytes <= limit or len(bucket.names) == 1
        assert all(offset % ALIGNMENT == 0 for offset in bucket.offsets)
        arrived += [(name, tensor.clone()) for name, tensor in unpack(bucket)]
        discard(bucket)
    assert [name for name, _ in arrived] == [name for name, _ in tensors]
    for (_, sent), (_, got) in zip(tensors, arrived, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape
        assert torch.equal(got, sent)
    assert buckets_on_disk() == before


def test_buckets_are_filled_and_made_one_at_a_time() -> None:
    tensors = [(str(i), torch.full((16,), float(i))) for i in range(6)]  # 64 bytes each
    stream = pack(iter(tensors), limit=128)
    before = buckets_on_disk()
    first = next(stream)
    assert first.names == ["0", "1"]
    assert len(buckets_on_disk() - before) == 1
    discard(first)
    rest = list(stream)
    assert [bucket.names for bucket in rest] == [["2", "3"], ["4", "5"]]
    for bucket in rest:
        discard(bucket)


def test_tensors_are_copied_so_a_gather_may_close() -> None:
    source = torch.arange(8.0)
    (bucket,) = pack([("w", source[2:6])])
    source.zero_()
    ((_, got),) = unpack(bucket)
    assert got.tolist() == [2.0, 3.0, 4.0, 5.0]
    discard(bucket)


def test_a_generator_may_reuse_its_storage_between_buckets() -> None:
    scratch = torch.empty(16)

    def gathered() -> list[tuple[str, Tensor]]:
        return [(str(i), scratch.clone().fill_(i)) for i in range(3)]

    for expected, bucket in enumerate(pack(gathered(), limit=64)):
        ((_, got),) = unpack(bucket)
        assert (got == expected).all()
        discard(bucket)


def test_views_survive_the_file_and_share_its_memory() -> None:
    (bucket,) = pack([("a", torch.ones(4)), ("b", torch.full((4,), 2.0))])
    first, second = unpack(bucket), unpack(bucket)
    first[0][1].fill_(7.0)
    assert second[0][1].tolist() == [7.0] * 4  # one memory, mapped twice
    discard(bucket)
    assert not Path(bucket.path).exists()
    assert second[1][1].tolist() == [2.0] * 4  # the mapping outlives the name
    discard(bucket)  # twice is no error


def test_a_bucket_is_plain_data() -> None:
    (bucket,) = pack([("w", torch.ones(2, 3, dtype=torch.bfloat16))])
    info = as_update_info(bucket)["bucket"]
    assert info == {
        "path": bucket.path,
        "names": ["w"],
        "dtypes": ["bfloat16"],
        "shapes": [[2, 3]],
        "offsets": [0],
        "nbytes": ALIGNMENT,
    }
    discard(bucket)


def test_nothing_to_send_is_no_bucket() -> None:
    assert list(pack([])) == []


# --- canary -----------------------------------------------------------------------


def test_largest_difference() -> None:
    assert largest_difference([-1.0, -2.0, -3.0], [-1.0, -2.5, -3.1]) == pytest.approx(0.5)
    assert largest_difference([], []) == 0.0
    with pytest.raises(ValueError, match="2 log-probabilities, the engine gave 1"):
        largest_difference([-1.0, -2.0], [-1.0])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_number_that_is_none_is_never_close(place: int) -> None:
    """NaN anywhere, as broken weights give, must not pass for agreement."""
    found = [-1.0, -2.0, -3.0]
    found[place] = math.nan
    assert not largest_difference([-1.0, -2.0, -3.0], found) <= 1e-3


def test_canary_round_trip(tmp_path: Path) -> None:
    canary = Canary([1, 2, 3], [-0.5, -1.25], 2e-3)
    canary.save(tmp_path / "canary.json")
    assert Canary.load(tmp_path / "canary.json") == canary


def test_certificate_says_how_it_ended() -> None:
    good = str(Certificate("engine-0", 3, True, 1e-6, 2e-3, 0.05))
    assert "engine-0 at version 3: verified" in good and "1.0e-06" in good
    bad = str(Certificate("engine-1", 3, False, 0.6, 2e-3, 0.05, "it differs"))
    assert "STALE (it differs)" in bad
    assert "unchecked" in str(Certificate("engine-2", 3, True, None, None, 0.05))
