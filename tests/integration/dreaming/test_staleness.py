"""With ``staleness=0`` the pipeline learns, to the bit, what a loop without any concurrency does.

Real ZeRO-3 learner, scorer, reward and curriculum actors; the engine is the one on torch, whose
requests do not depend on what runs beside them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from sleeprl.config import loader as cfg
from sleeprl.config.schema import NightConfig
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, from_batch, to_batch
from sleeprl.dreaming import launch as phase
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.dreaming.messages import PublishResult, RewardResult, ScoreResult, StepResult
from sleeprl.dreaming.trainer_actor import DreamTrainer
from sleeprl.dreaming.types import Dream, algorithm_of, scores
from sleeprl.memory.checkpoint import EXPERT, widen
from sleeprl.memory.slots import Slots
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.rollout.torch_engine import TorchEngine
from sleeprl.rollout.types import RolloutRequest, SamplingParams
from sleeprl.self_study.study import Pair
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.options import TrainerOptions
from tests.support.models import newborn
from tests.support.paths import ROOT

STEPS = 10
DOCUMENTS = ["Ann lives in Oslo.", "Bob has a cat.", "Eve sings."]
PROBES = [Pair(n, f"{name}?", "yes") for n, name in enumerate("abc") for _ in range(2)]


class Letters:
    """Whether there are letters, of which any model writes some: often a group's all or none."""

    def __call__(self, dream: Dream) -> float:
        return float(sum(character.isalpha() for character in dream.text) > 5)


class Noted(TorchEngine):
    """Notes the moment in which it begins to make a token."""

    async def _take_turn(self) -> None:
        await super()._take_turn()
        note(Path(self.options.model), "tokens", time.monotonic())


class Timed(DreamTrainer):
    """Notes from when to when it steps."""

    def step(self, batches: Sequence[Any], redrawn: Sequence[Any] = ()) -> StepResult:
        began = time.monotonic()
        made = super().step(batches, redrawn)
        note(Path(self.job.trainer.checkpoint), "steps", began, time.monotonic())
        return made


def note(beside: Path, name: str, *moments: float) -> None:
    with (beside.parent / name).open("a") as file:
        file.write(" ".join(map(str, moments)) + "\n")


def noted(place: Path, name: str) -> list[list[float]]:
    """What was noted since this was last asked."""
    lines = (place / name).read_text().splitlines()
    (place / name).unlink()
    return [list(map(float, line.split())) for line in lines]


def settings(place: Path, *more: str) -> NightConfig:
    return cfg.load(
        None,
        [
            f"dreaming.steps={STEPS}", "dreaming.tasks_per_step=2", "dreaming.group_size=4",
            "dreaming.max_staleness=0", "dreaming.max_tokens=24", "dreaming.loss.replay_kl=0.1",
            f"dreaming.reward={__name__}.Letters", "resources.engine=torch", "resources.cpus=2",
            f"runs={place}", "seed=3", *more,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can grow, with a newborn expert, and a lake with something to hold on to."""
    place = tmp_path_factory.mktemp("staleness")
    slots = widen(tiny_model, place / "wide", 1, 8, "float32")
    newborn(place / "wide", place / "born", slots, seed=7)
    chat = ChatFormatter(place / "wide")
    replay = [
        Trajectory(
            uid=f"replay-{n}", task_id="answer", attempt=n, purpose="replay",
            prompt_ids=chat.prompt(f"{n}?"), response_ids=chat.response("old"),
            logprobs=[-1.0] * 4, versions=[0] * 4, finish_reason="stop",
        )
        for n in range(6)
    ]  # fmt: skip
    for name in ("pipeline", "loop", "colocated", "turns", "together", "weighed", "facts"):
        Lake(place / name / "lake").append(to_batch(replay), "trajectories")
    return place


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(
        "local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error",
        runtime_env={"env_vars": {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }},
    )  # fmt: skip
    yield
    ray.shutdown()


def engines(place: Path, kind: str = "torch") -> EnginePool:
    options = EngineOptions(str(place / "wide"), "float32", 512, 1, 1.0, False, 0.4, 0)
    return EnginePool.launch(1, options, 0, 0, kind)


def learner(place: Path) -> TrainerOptions:
    slots = Slots.load(place / "wide")
    assert slots is not None
    return TrainerOptions(str(place / "wide"), 0, "float32", 7, 0.03, STEPS)


def context_of(
    place: Path, config: NightConfig, chat: ChatFormatter, name: str
) -> phase.DreamingContext:
    canary = chat.prompt(DOCUMENTS[0])
    return phase.DreamingContext(
        config, learner(place), place / "born", place / name, chat, DOCUMENTS, PROBES, canary
    )


def by_the_pipeline(
    place: Path, config: NightConfig, chat: ChatFormatter, name: str = "pipeline"
) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    pool = engines(place, config.resources.engine)
    phase.run_dreaming(
        context_of(place, config, chat, name), pool, print, lambda _, metrics: told.append(metrics)
    )
    pool.shutdown()
    return told


def by_a_loop(place: Path, config: NightConfig, chat: ChatFormatter) -> list[dict[str, Any]]:
    """The same actors, one call after the other."""
    told = []
    pool = engines(place)
    tasks = phase.make_tasks(DOCUMENTS, PROBES, config)
    job = context_of(place, config, chat, "loop").trainer_job(1)
    actors = phase.launch(config, job, tasks)
    actors.start(DreamingCheckpoint(place / "nowhere"), pool.group)
    of, numbers = {task.id: task for task in tasks}, count()
    for step in range(STEPS):
        batches: list[Any] = []
        redrawn: list[Any] = []
        while len(batches) < 2:
            number = next(numbers)
            (task,) = actors.curriculum.call("next", n=1)[0]
            rng = random.Random(f"{config.seed}-dream-{number}")
            sampling = [SamplingParams(24, 1.0, rng.randrange(2**31)) for _ in range(4)]
            group = RolloutRequest(
                task.id, tuple(f"dream-{number}-{n}" for n in range(4)),
                phase.prompt_builder(config, chat)(task), tuple(sampling),
            )  # fmt: skip
            (wrote,) = pool.group.call("rollout", request=group)
            scored: ScoreResult = actors.scorers.call("score", batch=wrote.batch, tasks=of)[0]
            judged: RewardResult = actors.rewards.call("score", batch=scored.batch, tasks=of)[0]
            aside = not judged.is_informative and len(redrawn) < 2
            (redrawn if aside else batches).append(judged.batch)
        outcome: StepResult = actors.learners.call("step", batches=batches, redrawn=redrawn)[0]
        told.append({**outcome.metrics} | {"redrawn": len(redrawn)})
        actors.learners.call("save", directory=str(place / "loop" / f"version-{step}"), groups={})
        sent: PublishResult = actors.learners.call("publish", engines=pool.group.actors)[0]
        actors.scorers.call("set_expert", expert=sent.expert)
        actors.curriculum.call("observe", outcomes=outcome.outcomes)
    actors.learners.call("finish", output=str(place / "loop" / "dreaming"))
    actors.kill()
    pool.shutdown()
    return told


@pytest.fixture(scope="module")
def piped(place: Path, local_ray: None) -> list[dict[str, Any]]:
    several = settings(place, "resources.scorers=2", "resources.reward_workers=2")
    return by_the_pipeline(place, several, ChatFormatter(place / "wide"))


def test_staleness_zero_is_the_synchronous_loop(place: Path, piped: list[dict[str, Any]]) -> None:
    looped = by_a_loop(place, settings(place), ChatFormatter(place / "wide"))
    assert len(piped) == len(looped) == STEPS
    for one, other in zip(piped, looped, strict=True):
        assert one["staleness_max"] == other["staleness_max"] == 0
        for name in ("redrawn", "reward", "gap", "loss", "dream/pg", "grad_norm", "hold/kl"):
            assert one[name] == other[name], name
    ends: list[dict[str, Tensor]] = [
        load_file(place / name / "dreaming" / EXPERT) for name in ("pipeline", "loop")
    ]
    born = load_file(place / "born" / EXPERT)
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
        assert not torch.equal(tensor, born[name]), name
    texts = [
        Lake(place / name / "lake").read("trajectories", ["purpose", "response_ids"]).to_pylist()
        for name in ("pipeline", "loop")
    ]
    assert texts[0] == texts[1]
    # Another group was drawn for one without a gradient, for as long as that may go on.
    redrawn = [told["redrawn"] for told in piped]
    assert set(redrawn) == {0, 1, 2}
    purposes = [row["purpose"] for row in texts[0]]
    assert purposes.count("redrawn") == 4 * sum(redrawn)
    assert purposes.count("dream") == 4 * 2 * STEPS


@pytest.mark.usefixtures("local_ray")
def test_the_lake_has_each_advantage_as_the_learner_saw_it(place: Path) -> None:
    """Of one update, and not of all that was dreamed."""
    more = ("dreaming.steps=2", "dreaming.algorithm=reinforce_plus_plus")
    config = settings(place, *more)
    by_the_pipeline(place, config, ChatFormatter(place / "wide"), "weighed")
    written = from_batch(Lake(place / "weighed" / "lake").read("trajectories"))
    dreams, algorithm = [t for t in written if t.purpose == "dream"], algorithm_of(config.dreaming)

    def advantages(of: Sequence[Trajectory]) -> list[float | None]:
        return algorithm.advantages(scores(of, config.dreaming.max_tokens))

    assert len(dreams) == 2 * 2 * 4 and len({d.reward for d in dreams}) > 1
    found = [d.advantage for d in dreams]
    assert found == pytest.approx(advantages(dreams[:8]) + advantages(dreams[8:]))
    assert found != pytest.approx(advantages(dreams))


def test_colocated_the_same_is_learned(place: Path, piped: list[dict[str, Any]]) -> None:
    config = settings(place, "resources.layout=colocated")
    turns = by_the_pipeline(place, config, ChatFormatter(place / "wide"), "colocated")
    for one, other in zip(piped, turns, strict=True):
        for name in ("redrawn", "reward", "gap", "loss", "grad_norm"):
            assert one[name] == other[name], name
    ends = [load_file(place / name / "dreaming" / EXPERT) for name in ("pipeline", "colocated")]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("layout", ["colocated", "decoupled"])
@pytest.mark.slow
def test_colocated_no_token_is_made_while_the_learner_steps(
    place: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And decoupled there are many."""
    monkeypatch.setattr(phase, "DreamTrainer", Timed)
    config = settings(
        place, f"resources.layout={layout}", f"resources.engine={__name__}.Noted",
        "dreaming.max_staleness=1", "dreaming.steps=6",
    )  # fmt: skip
    name = "turns" if layout == "colocated" else "together"
    told = by_the_pipeline(place, config, ChatFormatter(place / "wide"), name)
    assert max(metrics["staleness_max"] for metrics in told) == 1
    tokens, steps = noted(place, "tokens"), noted(place, "steps")
    assert len(steps) == 6 and len(tokens) > 6 * 2 * 4
    during = [m for (m,) in tokens for began, ended in steps if began <= m <= ended]
    assert (during == []) == (layout == "colocated")
