"""What vLLM's own transports between GPUs share on the sender's side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from sleeprl.weight_sync.base import NamedTensor, StuckTransport, TransportError

BUCKET_BYTES = 256 << 20
COLLECTIVE_TIMEOUT_S = 300.0
"""Seconds in which all engines must have taken part in a collective."""
ABORT_TIMEOUT_S = 10.0
"""Seconds in which a collective that was aborted must have ended."""
T = TypeVar("T")


def require_gpu(kind: str) -> None:
    """Raise TransportError where this process sees no GPU."""
    if not torch.cuda.is_available():
        raise TransportError(
            f"resources.transport={kind} needs a GPU and this process sees none; set "
            "resources.transport=shared_memory, or resources.learner_gpus and engine_gpus"
        )


def describe_tensors(group: Iterable[NamedTensor]) -> dict[str, Any]:
    """Return vLLM's update info of tensors, without their data."""
    pairs = list(group)
    return {
        "names": [name for name, _ in pairs],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in pairs],
        "shapes": [list(tensor.shape) for _, tensor in pairs],
    }


def run_with_timeout(
    seconds: float, what: str, work: Callable[[], T], abort: Callable[[], None] | None = None
) -> T:
    """Run ``work`` on a thread of its own, which a dead peer may hang for ever.

    The thread is a daemon: it does not keep the process.

    Args:
        seconds: How long ``work`` may take.
        what: What is waited for, in messages.
        work: A collective; its value is returned and its error raised.
        abort: Ends what the thread is in, so that this process may go on.

    Raises:
        TimeoutError: ``work`` took too long, and was ended.
        StuckTransport: it took too long, and goes on.
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
        message = f"waited {seconds:.0f} s for {what}; an engine may be dead"
        if abort is not None:
            abort()
        thread.join(ABORT_TIMEOUT_S)
        if not ended:
            raise StuckTransport(
                f"{message}, and the wait could not be ended: this process is of no more use. "
                "Go on with `sleeprl night --resume`, or set resources.transport=shared_memory"
            )
        raise TimeoutError(message)
    value, error = ended[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
