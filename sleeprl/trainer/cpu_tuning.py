"""Set DeepSpeed and the C library up for a machine without a GPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sleeprl.utils.files import locked

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""glibc's names for them, ``malloc.h``."""


def load_shared_memory_op() -> None:
    """Load (the first time: compile) DeepSpeed's small C++ op for ranks on one host's CPUs.

    torch guards the compile with a file that a killed process leaves behind, and then waits
    for ever, without a word. We hold a lock of our own meanwhile, which dies with its process;
    so a guard that is found here is a dead one's.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    with locked(root / ".sleeprl.lock"):
        for guard in root.rglob("deepspeed_shm_comm/lock"):
            guard.unlink(missing_ok=True)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()


def count_devices_once() -> None:
    """Make DeepSpeed remember how many devices there are.

    It asks once for each bucket of gradients, and on CPUs starts ``numactl`` to find out, whether
    or not it is there: a process for every million gradients of every micro-batch.
    """
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    count = get_accelerator().device_count()

    class Counted(CPU_Accelerator):  # type: ignore[misc]
        def device_count(self) -> int:
            return count

    set_accelerator(Counted())


def keep_memory() -> None:
    """Let this process keep the memory it has been given, for the tensors of the next step.

    glibc gives large blocks back when they are freed, and the kernel clears their pages each time they
    are requested again. Elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
