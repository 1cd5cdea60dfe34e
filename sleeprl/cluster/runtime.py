"""The Ray runtime that a run lives in."""

from __future__ import annotations

import os
import secrets
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.placement_group import remove_placement_group as ray_remove_placement_group

from sleeprl.cluster.failures import ray_temporary_directory
from sleeprl.cluster.waits import WAITS, Watchdog, to_stderr
from sleeprl.cluster.warm import WARM
from sleeprl.config.schema import ConfigError, ResourcesConfig
from sleeprl.utils.leftovers import clear_leftovers, mark
from sleeprl.utils.machine import available_cpus

LEARNER_RESOURCE = "sleeprl_learner"
"""Ray's custom resource of a node that takes learner workers, one for each, where their number is
elastic."""

PLACEMENT_TIMEOUT_S = 600.0
"""How long a cluster may take to make room: one that scales starts machines meanwhile."""


class ResourceError(ConfigError):
    """The cluster does not have what the settings ask for."""


def require_gpus(resources: ResourcesConfig) -> None:
    """Raise ResourceError where a Ray of this machine's own would lack GPUs: it cannot grow."""
    if resources.address is not None or not resources.gpus:
        return
    import torch

    have = torch.cuda.device_count()
    if resources.gpus > have:
        apart = (
            ("teacher", resources.teachers, resources.teacher_gpus),
            ("scorer", resources.scorers, resources.scorer_gpus),
        )
        requests = " + ".join(
            f"{count} {name}(s) x resources.{name}_gpus={each:g}"
            for name, count, each in (
                ("engine", resources.engines, resources.engine_gpus),
                ("learner", resources.learner_workers, resources.learner_gpus),
                max(apart, key=lambda kind: kind[1] * kind[2]),
            )
            if count * each
        )
        raise ResourceError(
            f"{requests} = {resources.gpus:g} GPUs, but this machine has {have}; lower these (0 is the "
            "CPU), or join a cluster with resources.address"
        )


def require_learners(resources: ResourcesConfig) -> None:
    """Raise ResourceError where an elastic learner has fewer nodes than it needs at the least: Ray
    Train would wait for them and say nothing."""
    if not resources.elastic:
        return
    offered = ray.cluster_resources().get(LEARNER_RESOURCE, 0)
    if offered < resources.learner_workers:
        raise ResourceError(
            f"resources.learner_workers={resources.learner_workers}, but the nodes of this cluster "
            f"offer {LEARNER_RESOURCE} for {offered:g}; start them with "
            f"ray start --resources '{{\"{LEARNER_RESOURCE}\": N}}', N workers of each"
        )


def _point_to_own_ray() -> None:
    """Name this worker's Ray: without that, Ray's state API takes any Ray of the machine."""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def _session_of(pid: int, sessions: Path) -> Path:
    """Return the directory of the Ray that a process has started last; its name ends in the pid."""
    return max(sessions.glob(f"session_2*_{pid}"), default=sessions / "none")


class ClusterUnreachable(ConfigError):
    """The Ray cluster at ``resources.address`` cannot be joined."""


def _join_ray(address: str) -> None:
    """Join a Ray cluster.

    Raises:
        ClusterUnreachable: There is none, or it wants another token.
    """
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:  # of many kinds, by version and by what is wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ClusterUnreachable(
            f"resources.address={address!r}: no Ray cluster could be joined there: "
            f"{textwrap.shorten(reason, 200, placeholder=' …')}. Check that `ray status --address "
            f"{address}` works from here. A cluster with token authentication needs "
            "RAY_AUTH_MODE=token and the token of its head in RAY_AUTH_TOKEN_PATH or "
            "~/.ray/auth_token (cluster/README.md)"
        ) from None


def protect_token() -> None:
    """Let nobody but its owner read the token of this account's Ray: Ray makes it with the umask's mode."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # Ray itself reports a home that cannot be written
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            suppress(FileExistsError),
            open(path, "x", encoding="utf-8", opener=_open_private) as file,
        ):
            file.write(secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _start_ray(resources: ResourcesConfig, state_api: bool) -> None:
    """Start a local Ray, or join the cluster at ``resources.address``."""
    if resources.address is not None:
        _join_ray(resources.address)
        return
    protect_token()
    sessions = ray_temporary_directory() / "ray"
    clear_leftovers(sessions)
    # Threads that spin while they wait would take the core from whoever has work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ray.init(
        address="local",  # also where RAY_ADDRESS names a cluster: joining one has to be requested
        num_cpus=resources.cpus or available_cpus(),
        include_dashboard=state_api,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"worker_process_setup_hook": _point_to_own_ray} if state_api else None,
    )
    mark(_session_of(os.getpid(), sessions))


@contextmanager
def cluster(
    resources: ResourcesConfig,
    *,
    state_api: bool = False,
    on_stall: Callable[[str], None] = to_stderr,
) -> Iterator[None]:
    """Run a local Ray as long as the block lasts, or connect to ``resources.address``.

    Args:
        resources: What a night may use.
        state_api: Start the dashboard process too, by which Ray Train learns that a job's owner was
            stopped, and frees what the job held. A night on its own does without.
        on_stall: Called with a message for every wait of this process that is longer than
            ``resources.stall_seconds``.

    Raises:
        ResourceError: a local Ray would lack GPUs, or nodes have no room for the learner.
        ClusterUnreachable: no cluster can be joined at ``resources.address``.
    """
    require_gpus(resources)
    with WAITS.on("Ray", what="ray.init", kind="start"):
        _start_ray(resources, state_api)
    try:
        require_learners(resources)
        with Watchdog(WAITS, resources.stall_seconds, on_stall):
            yield
    finally:
        WARM.clear()
        ray.shutdown()


def create_placement_group(
    count: int, cpus: float, gpus: float, strategy: str, timeout: float = PLACEMENT_TIMEOUT_S
) -> Any | None:
    """Reserve room for like actors, all at once.

    Args:
        count: How many.
        cpus: Cores of each.
        gpus: GPUs of each.
        strategy: Ray's, such as ``PACK``.
        timeout: Seconds that the cluster may take to make room.

    Returns:
        Ray's placement group with a bundle per actor; None where they need nothing.

    Raises:
        ResourceError: there is no room in time.
    """
    needs = {name: float(n) for name, n in (("CPU", cpus), ("GPU", gpus)) if n}
    if not needs or not count:
        return None
    group = placement_group([needs] * count, strategy=strategy)
    if group.wait(timeout):
        return group
    free = {name: n for name, n in ray.available_resources().items() if name in ("CPU", "GPU")}
    ray_remove_placement_group(group)
    raise ResourceError(
        f"no room within {timeout:.0f} s for {count} engine(s) of {needs} each ({strategy}): free are "
        f"{free}; lower resources.engines, engine_cpus or engine_gpus, or add machines"
    )


def remove_placement_group(group: Any | None) -> None:
    """Give back what ``create_placement_group`` reserved. Actors that are still there are killed."""
    if group is not None:
        ray_remove_placement_group(group)
