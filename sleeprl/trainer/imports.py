"""Import DeepSpeed without the packages that it imports only because they are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hide(*packages: str) -> Iterator[None]:
    """Let imports of packages fail as if they were not installed; those already imported stay.

    Args:
        packages: Names of top-level packages.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def import_deepspeed() -> None:
    """Import DeepSpeed; ``DS_ACCELERATOR`` must be set.

    Its autotuner, which nobody here runs, imports MLflow where that is installed, for two seconds of
    CPU time in every process that trains.
    """
    with hide("mlflow"):
        import deepspeed  # noqa: F401
