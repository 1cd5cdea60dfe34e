"""Set up in every Ray worker of a test: opening a batch in the driver is an error."""

from __future__ import annotations

import os

import pyarrow as pa
import ray


class OpenedInDriver(AssertionError):
    pass


def guard() -> None:
    ray.util.register_serializer(pa.RecordBatch, serializer=_close, deserializer=open_batch)


def _close(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def open_batch(data: bytes) -> pa.RecordBatch:
    if os.getpid() == int(os.environ["SLEEPRL_TEST_DRIVER"]):
        raise OpenedInDriver("the driver opened a batch; it may move references only")
    with pa.ipc.open_stream(data) as stream:
        return stream.read_next_batch()


class Puts:
    """Shows that the guard works."""

    def put(self) -> list[ray.ObjectRef]:
        return [ray.put(pa.record_batch({"a": [1]}))]

    def opened(self, refs: list[ray.ObjectRef]) -> int:
        return int(ray.get(refs[0]).num_rows)
