"""Import large libraries without the packages that they import only because those are installed.

A process that trains or scores imports for some five seconds of CPU time, and a night starts several.
DeepSpeed's autotuner, which nobody here runs, takes two more where MLflow is installed; a loss of
transformers for pictures takes half a second for SciPy.
"""

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


def import_transformers() -> None:
    """Import what a process with a model in transformers needs."""
    with hide("scipy"):
        import transformers.modeling_utils  # noqa: F401


def import_deepspeed() -> None:
    """Import what a process that trains needs. ``DS_ACCELERATOR`` must be set."""
    import_transformers()
    with hide("mlflow"):
        import deepspeed  # noqa: F401
