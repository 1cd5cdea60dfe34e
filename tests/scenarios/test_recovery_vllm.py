"""Dreaming with real vLLM, two ranks of ZeRO-3 and a staleness of one, while things die: an engine in the
middle of generation (its core, another process), during a weight update and between updates (its
actor), and one rank of the learner while the other is in a step with it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.data.lake import Lake
from sleeprl.dreaming import launch as phase
from sleeprl.dreaming.messages import StepResult
from sleeprl.dreaming.trainer_actor import DreamTrainer
from sleeprl.rollout.engine_pool import LIVENESS_TIMEOUT_S, EnginePool
from sleeprl.rollout.vllm_engine import VLLMEngine
from sleeprl.text.chat import ChatFormatter
from tests.integration.dreaming.test_staleness import DOCUMENTS, PROBES, learner, place, settings  # noqa: F401
from tests.scenarios.test_recovery import init, psutil_children

pytestmark = pytest.mark.slow
GROUPS, SIZE = 2, 4
CORE = "VLLM::EngineCore"


def once(moment: str) -> bool:
    """Whether a file names this moment; it is told once."""
    path = Path(os.environ["MORTAL"]) / moment
    if not path.exists():
        return False
    path.unlink()
    return True


def cores() -> list[int]:
    """Of this Ray's engines, also of those that are dead: they still write into its session's logs."""
    session = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parent.parent
    found = [p for p in psutil.process_iter(["name"]) if p.info["name"] == CORE]
    return [p.pid for p in found if any(session in Path(f.path).parents for f in p.open_files())]


class MortalVLLM(VLLMEngine):
    """Loses its core while requests have some tokens, and itself while weights come."""

    async def start(self) -> float:
        spent = await super().start()
        self.watch = asyncio.ensure_future(self._kill_in_generation())
        return spent

    async def _kill_in_generation(self) -> None:
        while True:
            await asyncio.sleep(0.002)
            some = [self._partial(s.external_req_id).token_ids
                    for s in self.llm.output_processor.request_states.values()]  # fmt: skip
            if self.updates.version >= 2 and any(some) and once("generation"):
                mine = psutil.Process().children(recursive=True)
                (core,) = [each for each in mine if each.name() == CORE]
                core.kill()

    async def load_bucket(self, update_info: dict[str, Any]) -> None:
        await super().load_bucket(update_info)
        if self.updates.pending_version >= 5 and once("update"):
            os.kill(os.getpid(), signal.SIGKILL)


class MortalLearner(DreamTrainer):
    """Its second rank is gone when the first one waits for it in the middle of a step."""

    def step(self, batches: Sequence[Any], redrawn: Sequence[Any] = ()) -> StepResult:
        if self.rank == 1 and self.trainer.steps == 3 and once("step"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(batches, redrawn)


@pytest.mark.parametrize(
    ("updates", "deaths"),
    [
        (5, ("generation", "step")),
        pytest.param(8, ("generation", "update", "between", "step"), marks=pytest.mark.soak),
    ],
)
def test_a_vllm_engine_and_a_rank_of_the_learner_die_and_every_group_is_learned_once(
    place: Path,  # noqa: F811
    updates: int,
    deaths: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments, run = tmp_path / "moments", tmp_path / "run"
    moments.mkdir()
    for moment in deaths:
        (moments / moment).touch()
    monkeypatch.setenv("MORTAL", str(moments))
    monkeypatch.setattr(phase, "DreamTrainer", MortalLearner)
    shutil.copytree(place / "loop" / "lake", run / "lake")
    told: list[str] = []
    learned: dict[int, list[int]] = {}

    def on_step(step: int, metrics: Mapping[str, Any]) -> None:
        learned[step] = metrics["groups"]
        if step == 6 and once("between"):  # two updates
            for pid, title in psutil_children():
                if "MortalVLLM" in title:
                    os.kill(pid, signal.SIGKILL)

    config, chat = settings(place), ChatFormatter(place / "wide")
    config.dreaming.steps, config.dreaming.max_staleness = updates, 1
    config.resources.engine = f"{__name__}.MortalVLLM"
    config.resources.max_failures, config.resources.learner_workers = 6, 2
    init()
    try:
        options = phase.EngineOptions.from_config(config, str(place / "wide"), "float32")
        pool = EnginePool(
            ActorGroup(
                "engine",
                [phase.spawn_engine(0, options, 1, 0, config.resources.engine)],
                silence=LIVENESS_TIMEOUT_S,
            )
        )
        pool.group.call("start")
        context = phase.DreamingContext(
            config, learner(place), place / "born", run, chat, DOCUMENTS, PROBES,
            chat.prompt(DOCUMENTS[0]),
        )  # fmt: skip
        phase.run_dreaming(context, pool, told.append, on_step)
        assert len(cores()) == 1, "a killed engine left its core behind"
        pool.shutdown()
    finally:
        ray.shutdown()
    assert list(moments.iterdir()) == []
    assert sorted(line.partition(" died")[0] for line in told) == (
        ["engine-0"] * (len(deaths) - 1) + ["learner-1"]
    )
    # Every group once: in the updates as the driver told them, and in the lake.
    assert sorted(learned) == list(range(1, updates + 1))
    numbers = [number for step in sorted(learned) for number in learned[step]]
    assert len(numbers) == len(set(numbers)) == updates * GROUPS
    rows = Lake(run / "lake").read("trajectories", ["purpose", "versions"]).to_pylist()
    dreams = [row for row in rows if row["purpose"] == "dream"]
    assert sorted(row["uid"] for row in dreams) == sorted(
        f"dream-{number}-{attempt}" for number in numbers for attempt in range(SIZE)
    )
