"""vLLM's own transports between GPUs: NCCL, and CUDA IPC where both share one GPU.

The receiving side is vLLM's; this is the sender's, on vLLM's own functions. **Neither has been
run by the tests, which have no GPU**: they check that the calls fit vLLM's interface. vLLM's
receivers take no checksums, so the canary alone verifies these updates. By IPC an engine has one GPU,
the sender's; by NCCL each rank of a tensor-parallel engine has its own and gets all of the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from sleeprl.weight_sync.base import NamedTensor, StuckTransport, TransportError, split

BUCKET_BYTES = 256 << 20
COLLECTIVE_TIMEOUT_S = 300.0
GRACE = 10.0
"""Seconds in which a collective that was aborted must have ended."""
T = TypeVar("T")


class NcclTransport:
    """A ``WeightTransport`` by broadcast, the sender being rank 0 of a group of its own.

    ranks: of each engine. After a timeout the group is gone, and only ``connect`` makes another.
    """

    backend = "nccl"

    def __init__(self, ranks: int = 1, limit: int = BUCKET_BYTES) -> None:
        _need_gpu("nccl")
        self.ranks, self.limit = ranks, limit
        self._group: Any = None

    def connect(self, engines: int) -> Iterator[list[dict[str, Any]]]:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        from vllm.utils.network_utils import get_ip, get_open_port

        address, port = get_ip(), get_open_port()
        yield join_infos(address, port, engines, self.ranks)
        world = 1 + engines * self.ranks
        where = {"master_address": address, "master_port": port, "world_size": world}
        self._group = within(
            COLLECTIVE_TIMEOUT_S, "the engines to join", lambda: trainer_init(where)
        )

    def begin(self, version: int) -> None:
        if self._group is None:
            raise TransportError(
                "the group that weights are broadcast in was aborted after a timeout; "
                "Fleet.disconnect() lets the next update connect again, once the dead are replaced"
            )

    def buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, Any]]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        for group in split(tensors, self.limit):
            there = [(name, tensor.cuda()) for name, tensor in group]
            yield metadata(there)  # the engines now wait for what follows
            send = lambda there=there: packed_nccl_broadcast_producer(  # noqa: E731
                iter(there), self._group, src=0, post_iter_func=lambda named: named[1]
            )
            within(COLLECTIVE_TIMEOUT_S, "a broadcast of weights", send, self.close)
            torch.cuda.synchronize()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        """Aborts what is under way in the group; vLLM waits 5 s for that."""
        group, self._group = self._group, None
        if group is not None:
            group.destroy()


class IpcTransport:
    """A ``WeightTransport`` by handles to the sender's own GPU memory."""

    backend = "ipc"

    def __init__(self, limit: int = BUCKET_BYTES) -> None:
        _need_gpu("ipc")
        self.limit = limit
        self._held: list[list[NamedTensor]] = []

    def connect(self, engines: int) -> Iterator[list[dict[str, Any]]]:
        yield [{"packed": False}] * engines

    def begin(self, version: int) -> None:
        pass

    def buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, Any]]:
        from torch.multiprocessing.reductions import reduce_tensor

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        for group in split(tensors, self.limit):
            there = [(name, tensor.cuda().contiguous()) for name, tensor in group]
            self._held = [*self._held[-1:], there]  # a handle keeps nothing alive
            handles = [{uuid: reduce_tensor(tensor)[1]} for _, tensor in there]
            torch.cuda.synchronize()
            yield {**metadata(there), "ipc_handles": handles}

    def finish(self) -> None:
        self._held = []
        torch.cuda.ipc_collect()

    def close(self) -> None:
        self._held = []


def join_infos(address: str, port: int, engines: int, ranks: int = 1) -> list[dict[str, Any]]:
    """What each engine joins the sender's NCCL group with: its own first rank is 1 + i * ranks;
    vLLM adds the number of a rank within the engine."""
    from vllm.distributed.weight_transfer.nccl_common import (
        NCCLWeightTransferInitInfo,
        worker_init_payload,
    )

    return [
        worker_init_payload(
            NCCLWeightTransferInitInfo(
                master_address=address,
                master_port=port,
                rank_offset=1 + number * ranks,
                world_size=1 + engines * ranks,
                packed=True,
            )
        )
        for number in range(engines)
    ]


def metadata(group: Iterable[NamedTensor]) -> dict[str, Any]:
    """vLLM's update info of these tensors, without their data."""
    pairs = list(group)
    return {
        "names": [name for name, _ in pairs],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in pairs],
        "shapes": [list(tensor.shape) for _, tensor in pairs],
    }


def within(
    seconds: float, what: str, work: Callable[[], T], abort: Callable[[], None] | None = None
) -> T:
    """``work`` on a thread of its own; TimeoutError where a dead peer would hang it for ever.

    abort: ends what the thread is in, so that this process may go on. Raises StuckTransport where
    it does not. The thread is a daemon: it does not keep the process.
    """
    ended: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name=f"sleeprl: {what}")
    thread.start()
    thread.join(seconds)
    if not ended:
        told = f"waited {seconds:.0f} s for {what}; an engine may be dead"
        if abort is not None:
            abort()
        thread.join(GRACE)
        if not ended:
            raise StuckTransport(
                f"{told}, and the wait could not be ended: this process is of no more use. "
                "Go on with `sleeprl night --resume`, or set resources.transport=shared_memory"
            )
        raise TimeoutError(told)
    value, error = ended[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _need_gpu(kind: str) -> None:
    if not torch.cuda.is_available():
        raise TransportError(
            f"resources.transport={kind} needs a GPU and this process sees none; set "
            "resources.transport=shared_memory, or resources.learner_gpus and engine_gpus"
        )
