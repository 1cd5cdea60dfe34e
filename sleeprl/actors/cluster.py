"""The Ray runtime that a run lives in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from sleeprl.config import ResourcesConfig, available_cpus


@contextmanager
def cluster(resources: ResourcesConfig) -> Iterator[None]:
    """A local Ray for the time being, or a connection to ``resources.address``."""
    if resources.address is None:
        ray.init(
            num_cpus=resources.cpus or available_cpus(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    else:
        ray.init(address=resources.address, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()
