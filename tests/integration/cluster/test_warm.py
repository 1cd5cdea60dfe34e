"""Processes that are started before their work: they become an actor, and say what went wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.failures import ActorFailure, FailureKind
from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.cluster.runtime import cluster
from sleeprl.cluster.warm import WarmPool
from sleeprl.config.schema import ResourcesConfig


class Adder(RemoteActor):
    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError(f"start={start}")
        self.start = start

    def add(self, number: int) -> int:
        return self.start + number


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with cluster(ResourcesConfig(cpus=1)):
        yield


def prestarted(pool: WarmPool, count: int, note: Path) -> list[int]:
    """Pids of so many processes that have prepared."""

    def prepare(note: Path = note) -> None:
        with note.open("a") as file:
            file.write(f"{os.getpid()}\n")

    pool.prestart(Adder, count, prepare)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        pids = [int(line) for line in note.read_text().split()] if note.exists() else []
        if len(pids) == count:
            return pids
        time.sleep(0.1)
    raise TimeoutError


def test_an_actor_is_a_process_that_was_prestarted_and_then_one_of_its_own(tmp_path: Path) -> None:
    pool = WarmPool()
    pids = prestarted(pool, 2, tmp_path / "pids")
    group = ActorGroup("adder", [pool.spawn(Adder, start, cpus=1) for start in (1, 2, 3)])
    assert group.call("add", number=10) == [11, 12, 13]
    assert group.call("pid")[:2] == pids and group.call("pid")[2] not in pids
    # Only the last one reserves the core that there is.
    assert ray.available_resources().get("CPU", 0) == 0
    group.kill()


def test_a_constructor_that_fails_is_told_by_every_call(tmp_path: Path) -> None:
    pool = WarmPool()
    prestarted(pool, 1, tmp_path / "pids")
    group = ActorGroup("adder", [pool.spawn(Adder, -1)])
    for _ in range(2):
        with pytest.raises(ActorFailure, match="start=-1") as failed:
            group.call("add", number=1)
        assert failed.value.failure.kind is FailureKind.FATAL
    group.kill()


def test_what_nobody_needed_is_ended(tmp_path: Path) -> None:
    pool = WarmPool()
    (pid,) = prestarted(pool, 1, tmp_path / "pids")
    pool.clear()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
