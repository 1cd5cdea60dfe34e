"""Transports from one process to itself, checksums, and the canary that proves what arrived.

The same transports into the real engines are in ``test_engine``.
"""

from __future__ import annotations

import gc
import json
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sleeprl.trainer.publish import publish_weights
from sleeprl.weight_sync import gpu_common
from sleeprl.weight_sync.base import (
    StuckTransport,
    TransportConfig,
    TransportError,
    WeightTransport,
    split_tensors,
)
from sleeprl.weight_sync.buckets import ALIGNMENT, receive_bucket
from sleeprl.weight_sync.disk import DiskTransport
from sleeprl.weight_sync.factory import make_transport
from sleeprl.weight_sync.shared_memory import SharedMemoryTransport
from sleeprl.weight_sync.verification import (
    Canary,
    CorruptedWeights,
    UpdateReceipt,
    checksum,
    largest_difference,
    reached,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
Named = tuple[str, Tensor]
Make = Callable[[int], WeightTransport]


def on_disk(directory: Path) -> TransportConfig:
    return TransportConfig("disk", directory=str(directory))


@pytest.fixture(params=["shared_memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """A transport of each kind that runs without a GPU, by its bucket limit."""
    made: list[WeightTransport] = []

    def make(limit: int) -> WeightTransport:
        if request.param == "disk":
            made.append(DiskTransport(on_disk(tmp_path / "weights"), limit))
        else:
            made.append(SharedMemoryTransport(TransportConfig(), limit))
        return made[-1]

    yield make
    for transport in made:
        transport.close()
    assert not list(tmp_path.glob("weights/*"))


@st.composite
def named_tensors(draw: st.DrawFn) -> list[Named]:
    tensors = []
    for number in range(draw(st.integers(0, 6))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        tensor = (100 * torch.randn(shape, generator=generator)).to(draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()) and tensor.dim() > 1:
            tensor = tensor.transpose(0, 1)  # not contiguous
        tensors.append((f"layer.{number}.weight", tensor))
    return tensors


def send(
    transport: WeightTransport, tensors: list[Named], version: int = 1
) -> Iterator[tuple[dict[str, Any], list[Named]]]:
    """Each bucket as an engine takes it, one at a time."""
    transport.begin(version)
    for info in transport.buckets(iter(tensors)):
        yield info, receive_bucket(info)
    transport.finish()


def names(info: dict[str, Any]) -> list[str]:
    found: list[str] = json.loads(info["layout"])["names"]
    return found


def test_what_is_sent_arrives(make: Make) -> None:
    @settings(deadline=None, max_examples=60)
    @given(named_tensors(), st.integers(1, 600), st.integers(0, 9))
    def round_trip(tensors: list[Named], limit: int, version: int) -> None:
        transport = make(limit)
        arrived: list[Named] = []
        for info, part in send(transport, tensors, version):
            offsets = json.loads(info["layout"])["offsets"]
            assert all(offset % ALIGNMENT == 0 for offset in offsets)
            sizes = [tensor.numel() * tensor.element_size() for _, tensor in part]
            assert sum(sizes) <= limit or len(part) == 1
            assert part[0][0] in info["checksums"]
            arrived += [(name, tensor.clone()) for name, tensor in part]
        transport.close()
        assert [name for name, _ in arrived] == [name for name, _ in tensors]
        for (_, sent), (_, got) in zip(tensors, arrived, strict=True):
            assert got.dtype == sent.dtype and got.shape == sent.shape
            assert torch.equal(got, sent)

    round_trip()


def test_trap_1_tensors_travel_in_buckets(make: Make) -> None:
    tensors = [(str(i), torch.full((16,), float(i))) for i in range(6)]  # 64 bytes each
    infos = [info for info, _ in send(make(128), tensors)]
    assert [names(info) for info in infos] == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_trap_4_tensors_are_copied_so_a_gather_may_close(make: Make) -> None:
    source = torch.arange(8.0)
    ((_, ((_, got),)),) = send(make(1 << 10), [("w", source[2:6])])
    source.zero_()
    assert got.tolist() == [2.0, 3.0, 4.0, 5.0]


def test_trap_5_no_more_than_two_buckets_of_a_model_are_held(make: Make) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def gathered() -> Iterator[Named]:
        nonlocal most
        for number in range(40):
            tensor = torch.full((16,), float(number))
            alive.add(tensor)
            most = max(most, len(alive))
            yield str(number), tensor
            del tensor

    transport = make(4 * 64)
    transport.begin(1)
    files = set()
    for info in transport.buckets(gathered()):
        files.add(info["file"]["path"])
        assert len([path for path in files if os.path.exists(path)]) <= 2
    transport.finish()
    gc.collect()
    assert most <= 2 * 4 + 1


def test_trap_6_the_gathers_stay_in_the_callers_thread(make: Make) -> None:
    """They are collectives of the learner's group: from two threads these dead-lock."""
    threads = set()

    def gathered() -> Iterator[Named]:
        for number in range(8):
            threads.add(threading.get_ident())
            yield str(number), torch.ones(16)

    list(make(128).buckets(gathered()))
    assert threads == {threading.get_ident()}


def test_trap_10_a_collective_with_a_dead_peer_ends_in_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_common, "ABORT_TIMEOUT_S", 0.2)
    hanging = threading.Event()
    began = time.monotonic()
    wait = lambda: hanging.wait(60)  # noqa: E731
    for abort in (None, lambda: None):
        with pytest.raises(StuckTransport, match=r"waited 0 s for a broadcast.*--resume"):
            gpu_common.run_with_timeout(0.2, "a broadcast", wait, abort)
    assert time.monotonic() - began < 30
    threads = [t for t in threading.enumerate() if t.name == "sleeprl: a broadcast"]
    assert len(threads) == 2 and all(t.daemon for t in threads), "they would keep the process"
    hanging.clear()
    with pytest.raises(TimeoutError, match="waited 0 s for a broadcast; an engine may be dead"):
        gpu_common.run_with_timeout(0.2, "a broadcast", wait, hanging.set)
    assert gpu_common.run_with_timeout(5.0, "a sum", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        gpu_common.run_with_timeout(5.0, "a fraction", lambda: 1 / 0)


@pytest.mark.parametrize("error", [TimeoutError, StuckTransport])
def test_trap_6_no_gather_beside_a_collective_that_hangs(error: type[Exception]) -> None:
    """Otherwise rank 0 goes on to the end of the gathers, which the other ranks are in."""
    gathers = []

    def export() -> Iterator[Named]:
        for number in range(5):
            gathers.append(number)
            yield str(number), torch.ones(4)

    def send(update: None, tensors: Iterator[Named], canary: Canary) -> None:
        next(tensors)
        raise error("an engine may be dead")

    learner: Any = SimpleNamespace(
        rank=0, export=export, long_barrier=lambda: None, options=SimpleNamespace(gpu=False),
        make_canary=lambda ids: Canary(ids, [], 1.0),
    )  # fmt: skip
    pool: Any = SimpleNamespace(begin=lambda version: None, send=send)
    with pytest.raises(error):
        publish_weights(learner, pool, [1, 2])
    assert gathers == ([0] if error is StuckTransport else [0, 1, 2, 3, 4])


def test_a_bucket_stays_as_it_is_until_the_next_but_one(make: Make) -> None:
    """So that it can be loaded while the next is packed."""
    tensors = [(str(i), torch.full((16,), float(i))) for i in range(5)]
    transport = make(64)
    transport.begin(1)
    before: Tensor | None = None
    for number, info in enumerate(transport.buckets(iter(tensors))):
        ((_, got),) = receive_bucket(info)
        assert (got == number).all()
        assert before is None or (before == number - 1).all()
        before = got
    transport.finish()


def test_shared_memory_is_mapped_in_place_and_written_again() -> None:
    transport = SharedMemoryTransport(TransportConfig(), 64)
    received = list(send(transport, [(str(i), torch.full((16,), float(i))) for i in range(3)]))
    assert received[0][0]["file"] == received[2][0]["file"]
    assert (received[0][1][0][1] == 2).all()  # the same memory, as the third bucket left it
    again = list(send(transport, [("0", torch.full((16,), 7.0))]))
    assert again[0][0]["file"] == received[0][0]["file"], "its pages are made once"


def test_the_views_of_a_layout_are_made_once_and_go_with_their_segment() -> None:
    transport = SharedMemoryTransport(TransportConfig(), 256)
    first, second, other = (
        next(send(transport, [("w", torch.full(shape, 7.0))], version))[1][0][1]
        for version, shape in enumerate([(4, 4), (4, 4), (2, 8)])
    )
    assert first is second and other.shape == (2, 8) and other.data_ptr() == first.data_ptr()
    ((_, ((_, larger),)),) = send(transport, [("w", torch.arange(100.0))])
    assert torch.equal(larger, torch.arange(100.0)), "not in the segment that was too small"


def test_a_tensor_larger_than_a_bucket_has_one_of_its_own(make: Make) -> None:
    tensors = [("small", torch.ones(4)), ("large", torch.arange(100.0)), ("last", torch.ones(4))]
    arrived = [(names(info), part) for info, part in send(make(64), tensors)]
    assert [names for names, _ in arrived] == [["small"], ["large"], ["last"]]
    assert torch.equal(arrived[1][1][0][1], tensors[1][1])


def test_a_segment_leaves_nothing_behind() -> None:
    transport = SharedMemoryTransport(TransportConfig(), 64)
    ((info, _),) = send(transport, [("w", torch.ones(4))])
    path = info["file"]["path"]
    segment = os.stat(path)
    transport.close()
    gc.collect()
    # Another thread may have been given the descriptor's number since.
    assert not (os.path.exists(path) and os.path.samestat(os.stat(path), segment))


def test_weights_that_are_not_on_this_host_are_not_taken_for_zeros(tmp_path: Path) -> None:
    transport = SharedMemoryTransport(TransportConfig(), 64)
    ((info, _),) = send(transport, [("w", torch.ones(4))])
    other = tmp_path / "other"
    for file in ({"path": str(other)}, {"inode": 1}, {"nbytes": 128}):
        with pytest.raises(FileNotFoundError, match=r"resources\.transport=disk"):
            receive_bucket({**info, "file": {**info["file"], **file}})
    assert not other.exists()


def test_disk_removes_what_a_killed_sender_left(tmp_path: Path) -> None:
    first = DiskTransport(on_disk(tmp_path), 64)
    first.begin(1)
    left = next(first.buckets([("w", torch.ones(4))]))
    assert Path(left["file"]["path"]).exists()
    second = DiskTransport(on_disk(tmp_path), 64)
    assert len(list(send(second, [("w", torch.ones(4))], version=2))) == 1
    assert not list(tmp_path.iterdir())


def test_every_kind_is_made_or_says_what_it_needs(tmp_path: Path) -> None:
    assert isinstance(make_transport(TransportConfig()), SharedMemoryTransport)
    assert isinstance(
        make_transport(TransportConfig("disk", directory=str(tmp_path))), DiskTransport
    )
    with pytest.raises(TransportError, match="needs a directory"):
        make_transport(TransportConfig("disk"))
    if not torch.cuda.is_available():
        for kind in ("nccl", "ipc"):
            with pytest.raises(TransportError, match=f"resources.transport={kind} needs a GPU"):
                make_transport(TransportConfig(kind))


def test_split_reads_one_tensor_ahead() -> None:
    read = []

    def tensors() -> Iterator[Named]:
        for number in range(6):
            read.append(number)
            yield str(number), torch.ones(16)

    groups = split_tensors(tensors(), 128)
    assert [name for name, _ in next(groups)] == ["0", "1"]
    assert read == [0, 1, 2]


# --- checksums --------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2048), st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_a_changed_bit_changes_the_checksum(count: int, where: int, dtype: torch.dtype) -> None:
    tensor = torch.zeros(count, dtype=dtype)
    other = tensor.clone()
    raw = other.view(torch.uint8)
    raw[where % len(raw)] ^= 1
    assert checksum(tensor) != checksum(other)
    assert checksum(other) == checksum(other.clone())


def test_a_checksum_knows_dtype_and_shape_and_looks_at_all_of_a_large_tensor() -> None:
    zeros = torch.zeros(4, 6)
    assert len({checksum(zeros), checksum(zeros.T), checksum(zeros.int()), checksum(zeros[0])}) == 4
    large = torch.zeros(10**6)
    for part in range(8):
        other = large.clone()
        other[part * 125_000 : (part + 1) * 125_000] = 1.0
        assert checksum(other) != checksum(large)


def test_in_time_every_tensor_is_checked(make: Make) -> None:
    tensors = [(f"layers.{i}", torch.full((8,), float(i))) for i in range(7)]
    transport, checked = make(1 << 20), []
    for version in range(1, 8):
        transport.begin(version)
        for info in transport.buckets(tensors):
            assert "layers.0" in info["checksums"] and len(info["checksums"]) <= 2
            checked += info["checksums"]
            receive_bucket(info)
        transport.finish()
    assert {name for name, _ in tensors} == set(checked)


def test_a_damaged_tensor_is_named(make: Make) -> None:
    transport = make(1 << 10)
    transport.begin(1)
    for info in transport.buckets([("first", torch.ones(8)), ("second", torch.ones(8))]):
        with open(info["file"]["path"], "r+b") as file:
            file.write(b"x")
        with pytest.raises(CorruptedWeights, match="first did not arrive as it was sent"):
            receive_bucket(info)
    transport.finish()


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


def sized(direction: list[float], size: float) -> list[float]:
    """Of a mean absolute value."""
    mean = sum(map(abs, direction)) / len(direction)
    return [value * size / mean for value in direction]


directions = st.lists(
    st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3), min_size=8, max_size=8
)  # fmt: skip


@given(directions, directions, directions, st.floats(1e-6, 1.0), st.floats(0.0, 0.99))
def test_less_noise_than_the_update_is_large_never_hides_what_became_of_it(
    old: list[float], change: list[float], noise: list[float], way: float, share: float
) -> None:
    """Whatever direction the noise has, also that of the update."""
    step = sized(change, way)
    new = [a + b for a, b in zip(old, step, strict=True)]
    for third in (1, 2):
        off = sized(noise, third * share * way / 3)
        right = reached(old, new, [a + b for a, b in zip(new, off, strict=True)])
        lost = reached(old, new, [a + b for a, b in zip(old, off, strict=True)])
        assert (right, lost) == (True, False) if third == 1 else right is not False and not lost


@given(st.integers(0, 10**6), st.floats(0.0, 3.0), st.floats(1e-3, 3.0))
def test_noise_alone_never_makes_a_right_update_a_lost_one(
    seed: int, change: float, noise: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, step, off = torch.randn(3, 64, generator=generator)
    new = old + change * step
    assert reached(old.tolist(), new.tolist(), (new + noise * off).tolist()) is not False
    assert reached(old.tolist(), old.tolist(), (old + noise * off).tolist()) is None
    broken = [*new.tolist()[:-1], math.nan]
    assert reached(old.tolist(), new.tolist(), broken) is None and reached([], [], []) is None


def test_canary_round_trip(tmp_path: Path) -> None:
    for canary in (
        Canary([1, 2, 3], [-0.5, -1.25], 2e-3),
        Canary([1, 2], [-0.5], 2e-3, fresh=[-2.0]),
    ):
        canary.save(tmp_path / "canary.json")
        assert Canary.load(tmp_path / "canary.json") == canary


def test_certificate_says_how_it_ended() -> None:
    good = str(UpdateReceipt("engine-0", 3, True, 1e-6, 2e-3, 0.05))
    assert "engine-0 at version 3: verified" in good and "1.0e-06" in good
    bad = str(UpdateReceipt("engine-1", 3, False, 0.6, 2e-3, 0.05, "it differs"))
    assert "STALE (it differs)" in bad
    assert "unchecked" in str(UpdateReceipt("engine-2", 3, True, None, None, 0.05))
