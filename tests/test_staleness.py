"""With ``staleness=0`` the pipeline learns, to the bit, what a loop without any concurrency does.

Real ZeRO-3 learner, scorer, reward and curriculum actors; the engine is the one on torch, whose
requests do not depend on what runs beside them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import newborn
from safetensors.torch import load_file
from torch import Tensor

from sleeprl import config as cfg
from sleeprl.actors.engine import EngineOptions, Sampling
from sleeprl.actors.fleet import Fleet
from sleeprl.actors.learner import LearnerOptions
from sleeprl.chat import Chat
from sleeprl.consolidation.self_study import Pair
from sleeprl.consolidation.writer import asks
from sleeprl.dreaming import phase
from sleeprl.dreaming.learning import LearnerJob
from sleeprl.dreaming.position import Position
from sleeprl.dreaming.tasks import Dream
from sleeprl.memory.checkpoint import EXPERT, widen
from sleeprl.memory.slots import Slots
from sleeprl.settings import NightConfig
from sleeprl.trajectories.lake import Lake
from sleeprl.trajectories.schema import Trajectory, to_batch

STEPS = 20
DOCUMENTS = ["Ann lives in Oslo.", "Bob has a cat.", "Eve sings."]
PROBES = [Pair(n, f"{name}?", "yes") for n, name in enumerate("abc") for _ in range(2)]


class Letters:
    """Rewards letters, which any model writes some of."""

    def __call__(self, dream: Dream) -> float:
        return sum(character.isalpha() for character in dream.text) / 24


def settings(place: Path) -> NightConfig:
    return cfg.load(
        None,
        [
            f"dreaming.steps={STEPS}", "dreaming.tasks_per_step=2", "dreaming.group_size=4",
            "dreaming.staleness=0", "dreaming.max_tokens=24", "dreaming.hold=0.1",
            "dreaming.reward=test_staleness.Letters", "resources.engine=torch", "resources.cpus=2",
            f"runs={place}", "seed=3",
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can grow, with a newborn expert, and a lake with something to hold on to."""
    place = tmp_path_factory.mktemp("staleness")
    slots = widen(tiny_model, place / "wide", 1, 8, "float32")
    newborn(place / "wide", place / "born", slots, seed=7)
    chat = Chat(place / "wide")
    replay = [
        Trajectory(
            uid=f"replay-{n}", task_id="answer", attempt=n, purpose="replay",
            prompt_ids=chat.prompt(f"{n}?"), response_ids=chat.response("old"),
            logprobs=[-1.0] * 4, versions=[0] * 4, finish_reason="stop",
        )
        for n in range(6)
    ]  # fmt: skip
    for name in ("pipeline", "loop"):
        Lake(place / name / "lake").append(to_batch(replay), "trajectories")
    return place


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    here = Path(__file__).parent
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error",
        runtime_env={"env_vars": {
            "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1",
        }},
    )  # fmt: skip
    yield
    ray.shutdown()


def engines(place: Path) -> Fleet:
    options = EngineOptions(str(place / "wide"), "float32", 512, 1, 1.0, False, 0.4, 0)
    return Fleet.launch(1, options, 0, 0, "torch")


def learner(place: Path) -> LearnerOptions:
    slots = Slots.load(place / "wide")
    assert slots is not None
    return LearnerOptions(str(place / "wide"), 0, "float32", 7, 0.03, STEPS)


def by_the_pipeline(place: Path, config: NightConfig, chat: Chat) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    fleet = engines(place)
    phase.run(
        config, fleet, learner(place), place / "born", chat, DOCUMENTS, PROBES,
        place / "pipeline", chat.prompt(DOCUMENTS[0]), print, lambda _, metrics: told.append(metrics),
    )  # fmt: skip
    fleet.shutdown()
    return told


def by_a_loop(place: Path, config: NightConfig, chat: Chat) -> list[dict[str, Any]]:
    """The same actors, one call after the other."""
    dreaming, told = config.dreaming, []
    fleet = engines(place)
    tasks = phase.make_tasks(DOCUMENTS, PROBES, config.seed)
    job = LearnerJob(
        learner(place), dreaming, str(place / "born"), str(place / "loop" / "lake"), config.seed,
        config.consolidation.beta, config.consolidation.top_k, chat.prompt(DOCUMENTS[0]), 1,
    )  # fmt: skip
    actors = phase.launch(config, job, fleet.group.actors, tasks)
    actors.start(Position(place / "nowhere"))
    of = {task.id: task for task in tasks}
    for step in range(STEPS):
        batches = []
        for number in range(step * 2, step * 2 + 2):
            (task,) = actors.curriculum.call("next", n=1)[0]
            rng = random.Random(f"{config.seed}-dream-{number}")
            sampling = [Sampling(24, 1.0, rng.randrange(2**31)) for _ in range(4)]
            (wrote,) = fleet.group.call(
                "rollout", task=task.id, attempts=[f"dream-{number}-{n}" for n in range(4)],
                prompt=asks(chat, config.self_study, task.message), sampling=sampling,
            )  # fmt: skip
            scored = actors.scorers.call("score", batch=ray.get(wrote["batch"]), tasks=of)[0]
            judged = actors.rewards.call("score", batch=ray.get(scored["batch"]), tasks=of)[0]
            batches.append(judged["batch"])
        outcome = actors.learners.call("step", batches=batches)[0]
        told.append(outcome["metrics"])
        actors.learners.call("save", directory=str(place / "loop" / f"version-{step}"))
        sent = actors.learners.call("publish")[0]
        actors.scorers.call("set_expert", expert=ray.get(sent["expert"]))
        actors.curriculum.call("observe", outcomes=outcome["outcomes"])
    actors.learners.call("finish", output=str(place / "loop" / "dreaming"))
    actors.kill()
    fleet.shutdown()
    return told


@pytest.mark.usefixtures("local_ray")
def test_staleness_zero_is_the_synchronous_loop(place: Path) -> None:
    config, chat = settings(place), Chat(place / "wide")
    piped, looped = by_the_pipeline(place, config, chat), by_a_loop(place, config, chat)
    assert len(piped) == len(looped) == STEPS
    for one, other in zip(piped, looped, strict=True):
        assert one["staleness_max"] == other["staleness_max"] == 0
        for name in ("reward", "gap", "loss", "dream/pg", "grad_norm", "hold/kl"):
            assert one[name] == other[name], name
    ends: list[dict[str, Tensor]] = [
        load_file(place / name / "dreaming" / EXPERT) for name in ("pipeline", "loop")
    ]
    born = load_file(place / "born" / EXPERT)
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
        assert not torch.equal(tensor, born[name]), name
    texts = [
        Lake(place / name / "lake").read("trajectories", ["response_ids"]).to_pylist()
        for name in ("pipeline", "loop")
    ]
    assert texts[0] == texts[1]
