"""A teacher apart from the learner says the same as the learner's own module, and comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, ResourcesConfig
from sleeprl.losses.types import LossWeights
from sleeprl.memory.slots import GATED_MLP
from sleeprl.trainer.batching import Targets, TrainingExample
from sleeprl.trainer.teacher import TeacherActor, Teachers, launch_teachers
from sleeprl.trainer.trainer import Trainer
from tests.integration.night.test_memory_levels import grown
from tests.support.models import make_tiny_model
from tests.support.ranks import LOSS, PARTS, Notes, close, launch, options, rows

TEACHER_ONLY = (0, 1)
"""Slots that only the smaller self has, as when a level is handed on."""
TAUGHT = {**PARTS, "student": LossWeights(kl=0.3)}


def named(seed: int) -> list[TrainingExample]:
    return [replace(row, key=f"text-{seed}-{number}") for number, row in enumerate(rows(seed))]


def changes() -> dict[str, Any]:
    return {"slot": 2, "teacher_only_slots": TEACHER_ONLY}


def both_ways(directory: Path, notes: Notes) -> None:
    """Two steps taught by the learner's own module, and by a teacher apart."""
    made = options(directory, **changes())
    apart: Any = TeacherActor(made.checkpoint, TEACHER_ONLY, made.dtype, 1, False)
    for name, teachers in (("own", None), ("apart", apart)):
        for support in ("teacher", "student"):
            learner = Trainer(made, teachers)
            loss = replace(LOSS, support=support)
            notes.numbers[name, support] = [
                learner.step(named(n), TAUGHT, loss)["loss"] for n in (1, 2)
            ]
            notes.tensors(f"{name}-{support}-taught", learner.smaller_self.cache.state_dict())
            notes.tensors(f"{name}-{support}-expert", learner.gather_expert())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teacher")
    make_tiny_model(place / "plain", seed=5)
    grown(place / "plain", place, GATED_MLP, (2, 2), (3, 0, 1)).rename(place / "wide")
    return place


@pytest.mark.parametrize("world", [1, 2])
def test_both_teach_the_same(place: Path, world: int) -> None:
    notes, *_ = launch(world, place, [both_ways])
    assert notes.errors == {}
    for support in ("teacher", "student"):
        own, apart = (notes.numbers[name, support] for name in ("own", "apart"))
        assert own == pytest.approx(apart, rel=1e-5)
        for what in ("taught", "expert"):
            one, other = (
                load_file(place / f"{name}-{support}-{what}.safetensors")
                for name in ("own", "apart")
            )
            close(one, other, atol=2e-5)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield
    ray.shutdown()


def same(one: list[Targets], other: list[Targets]) -> bool:
    return all(
        torch.allclose(a.float(), b.float(), atol=1e-5)
        for mine, theirs in zip(one, other, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.usefixtures("local_ray")
def test_a_lost_teacher_is_started_again(place: Path) -> None:
    checkpoint, asked = str(place / "wide"), rows(3)
    alone = TeacherActor(checkpoint, TEACHER_ONLY, "float32", 1, False).targets(asked, 8, 4096)
    assert [len(target[0]) for target in alone] == [len(row.response_ids) for row in asked]
    actors = launch_teachers(ResourcesConfig(teachers=2), checkpoint, TEACHER_ONLY, "float32")
    teachers = Teachers(actors)
    assert same(teachers.targets(asked, 8, 64), alone)
    (pid, _) = teachers.group.call("pid")
    os.kill(pid, signal.SIGKILL)
    assert same(teachers.targets(asked, 8, 64), alone)
    assert teachers.group.call("pid")[0] != pid


def test_teachers_need_cores_too() -> None:
    with pytest.raises(ConfigError, match=r"99 teacher\(s\) x teacher_cpus=1"):
        cfg.load(None, ["resources.teachers=99"])
