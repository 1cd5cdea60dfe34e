"""The Ray runtime that a run lives in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from sleeprl.settings import ResourcesConfig, available_cpus


@contextmanager
def cluster(resources: ResourcesConfig, *, state_api: bool = False) -> Iterator[None]:
    """A local Ray for the time being, or a connection to ``resources.address``.

    state_api: with the dashboard process, by which Ray Train learns that a job's owner
        was stopped, and frees what the job held. A night on its own does without.
    """
    if resources.address is None:
        # Threads that spin while they wait would take the core from whoever has work.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        ray.init(
            address="local",  # also where RAY_ADDRESS names a cluster: joining one is asked for
            num_cpus=resources.cpus or available_cpus(),
            include_dashboard=state_api,
            log_to_driver=False,
            logging_level="error",
        )
    else:
        ray.init(address=resources.address, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()
