"""Several engines as one, in real actors: who ends an update, and who gets work afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sleeprl.cluster import actor_group, health_probe
from sleeprl.cluster.failures import ActorFailure, FailureKind
from sleeprl.cluster.health import HealthState
from sleeprl.cluster.runtime import remove_placement_group
from sleeprl.cluster.waits import WAITS, Watchdog
from sleeprl.config.schema import DreamingConfig
from sleeprl.data.trajectory import Trajectory, to_batch
from sleeprl.dreaming import trainer_actor as learning
from sleeprl.dreaming.metrics import pop_agreement
from sleeprl.memory.checkpoint import WEIGHTS
from sleeprl.rollout.engine import EngineOptions, spawn_engine
from sleeprl.rollout.engine_pool import LIVENESS_TIMEOUT_S, EnginePool, StaleEngine
from sleeprl.rollout.torch_engine import TorchEngine
from sleeprl.rollout.types import SamplingParams
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.publish import publish_from_gpu
from sleeprl.weight_sync.verification import Canary
from tests.support.models import plain_logprobs
from tests.support.paths import ROOT

IDS = [1, *range(40, 70)]
PROMPTS = [[1, 50 + i, 7] for i in range(6)]
SAMPLING = [SamplingParams(5, seed=i) for i in range(6)]


class Forgetful(TorchEngine):
    """Like an engine whose adapter binds no module: of odd versions the last one keeps nothing."""

    async def _load(self, update_info: dict[str, Any]) -> None:
        if self.name == "engine-0" or self.updates.pending_version % 2 == 0:
            await super()._load(update_info)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def options(tiny_model: Path) -> EngineOptions:
    return EngineOptions(str(tiny_model), "float32", 128, 1, 1.0, False, 0.4, 0)


@pytest.fixture
def pool(options: EngineOptions) -> Iterator[EnginePool]:
    pool = EnginePool.launch(2, options, 1, 0, f"{__name__}.Forgetful")
    assert pool.placement.bundle_count == 2 and not ray.available_resources().get("CPU")
    yield pool
    pool.group.kill()
    remove_placement_group(pool.placement)


@pytest.fixture(scope="module")
def weights(tiny_model: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(tiny_model / WEIGHTS).items()
        if "norm" not in name
    }


def canary(directory: Path, weights: Mapping[str, Tensor]) -> Canary:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return Canary(IDS, plain_logprobs(model, IDS, weights), 1e-3)


def states(pool: EnginePool) -> list[HealthState]:
    return [pool.health[i] for i in range(len(pool.health))]


def test_a_stale_engine_gets_no_work_until_an_update_verifies(
    pool: EnginePool, tiny_model: Path, weights: dict[str, Tensor]
) -> None:
    right = canary(tiny_model, weights)
    good, bad = pool.publish(weights.items(), right)
    assert good.verified and not bad.verified and (bad.engine, bad.version) == ("engine-1", 1)
    assert states(pool) == [HealthState.HEALTHY, HealthState.STALE]
    pending = pool.generate_later(PROMPTS, SAMPLING)
    assert list(pending.refs) == [0]
    made = pending.wait()
    assert len(made) == 6 and {v for c in made for v in c.versions} == {1}
    assert pool.logprobs([IDS])[0] == pytest.approx(right.logprobs, abs=1e-4)
    # Whoever does not know and asks it all the same is refused, as by an engine that is gone.
    with pytest.raises(ActorFailure, match="engine-1 is STALE since version 1") as refused:
        pool.group.call("logprobs", sequences=[IDS])
    assert refused.value.failure.kind is FailureKind.RETRYABLE
    certificates = pool.publish(weights.items(), right)
    assert [c.verified for c in certificates] == [True, True]
    assert states(pool) == [HealthState.HEALTHY] * 2
    again = pool.generate_later(PROMPTS, SAMPLING)
    assert list(again.refs) == [0, 1]
    assert [c.token_ids for c in again.wait()] == [c.token_ids for c in made]


def test_a_process_with_gpus_of_its_own_sends_for_one_that_has_none(
    pool: EnginePool, tiny_model: Path, weights: dict[str, Tensor]
) -> None:
    """Here nobody has any; what it does is the same."""
    publish_from_gpu(pool, weights.items(), canary(tiny_model, weights), gpus=0)
    assert pool.version == 1 and states(pool) == [HealthState.HEALTHY, HealthState.STALE]
    publish_from_gpu(pool, weights.items(), canary(tiny_model, weights), gpus=0)
    assert pool.version == 2 and states(pool) == [HealthState.HEALTHY] * 2
    assert {v for c in pool.generate(PROMPTS, SAMPLING) for v in c.versions} == {2}


def test_no_engine_left_is_an_error_that_names_them(
    pool: EnginePool, tiny_model: Path, weights: dict[str, Tensor]
) -> None:
    with pytest.raises(StaleEngine, match=r"engine-0 at version 2: STALE.*engine-1 at version 2"):
        pool.publish(weights.items(), canary(tiny_model, {}), version=2)
    with pytest.raises(StaleEngine, match="engine-0 is stale, engine-1 is stale"):
        pool.generate(PROMPTS, SAMPLING)
    pool.publish(weights.items(), canary(tiny_model, weights), version=4)
    assert len(pool.generate(PROMPTS, SAMPLING)) == 6


def test_an_engine_that_dies_is_left_out(
    pool: EnginePool, tiny_model: Path, weights: dict[str, Tensor]
) -> None:
    right = canary(tiny_model, weights)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(weights.items()):
            if number == 3:
                os.kill(ray.get(pool.group.actors[1].pid.remote()), signal.SIGKILL)
            yield pair

    good, lost = pool.publish(stream(), right, version=2)
    assert good.verified and not lost.verified and lost.engine == "engine-1"
    assert lost.error is not None and "its process is gone" in lost.error
    assert states(pool) == [HealthState.HEALTHY, HealthState.DEAD]
    assert len(pool.generate(PROMPTS, SAMPLING)) == 6
    (alone,) = pool.publish(weights.items(), right, version=4)
    assert alone.engine == "engine-0" and states(pool)[1] is HealthState.DEAD


def test_engines_come_and_go(
    pool: EnginePool, tiny_model: Path, weights: dict[str, Tensor], options: EngineOptions
) -> None:
    right = canary(tiny_model, weights)
    pool.publish(weights.items(), right, version=2)
    made = pool.generate(PROMPTS, SAMPLING)
    group = pool.group
    running = pool.generate_later(PROMPTS, SAMPLING)
    assert group.add(spawn_engine(2, options, 0, 0, f"{__name__}.Forgetful")) == 2
    group.start([2])
    # It has the checkpoint's weights, which are not the others' any more.
    assert states(pool) == [HealthState.HEALTHY] * 2 + [HealthState.STALE]
    assert list(pool.generate_later(PROMPTS, SAMPLING).refs) == [0, 1]
    assert running.wait() == made
    certificates = pool.publish(weights.items(), right, version=4)
    assert [c.engine for c in certificates if c.verified] == ["engine-0", "engine-1", "engine-2"]
    pending = pool.generate_later(PROMPTS, SAMPLING)
    assert list(pending.refs) == [0, 1, 2]
    assert [c.token_ids for c in pending.wait()] == [c.token_ids for c in made]
    lost = pool.generate_later(PROMPTS, [SamplingParams(100, seed=1)] * 6)
    group.remove(0)
    with pytest.raises(ActorFailure, match=r"engine-0\.generate failed \(retryable\)"):
        lost.wait()
    assert states(pool) == [HealthState.RETIRED, HealthState.HEALTHY, HealthState.HEALTHY]
    assert [c.token_ids for c in pool.generate(PROMPTS, SAMPLING)] == [c.token_ids for c in made]
    certificates = pool.publish(weights.items(), right, version=6)
    assert [c.engine for c in certificates if c.verified] == ["engine-1", "engine-2"]


def test_an_engine_that_is_lost_at_work_gets_no_more(
    pool: EnginePool, tiny_model: Path, weights: dict[str, Tensor]
) -> None:
    os.kill(ray.get(pool.group.actors[1].pid.remote()), signal.SIGKILL)
    with pytest.raises(ActorFailure, match=r"engine-1\.generate failed \(retryable\)"):
        pool.generate(PROMPTS, SAMPLING)
    assert states(pool) == [HealthState.HEALTHY, HealthState.DEAD]
    assert len(pool.generate(PROMPTS, SAMPLING)) == 6


def test_an_engine_that_falls_silent_at_work_does_not_hang_who_waits(
    pool: EnginePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_group, "PEER_FAILURE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(health_probe, "PING_TIMEOUT_S", 1.0)
    monkeypatch.setattr(health_probe, "PROBE_INTERVAL_S", 0.2)
    pool.health.dead_after = 2.0
    pid = ray.get(pool.group.actors[1].pid.remote())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ActorFailure, match=r"engine-1\.generate .*answer for 2 s") as silent:
            pool.generate(PROMPTS, SAMPLING)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert silent.value.failure.kind is FailureKind.RETRYABLE
    assert states(pool) == [HealthState.HEALTHY, HealthState.DEAD]
    assert len(pool.generate(PROMPTS, SAMPLING)) == 6


def test_the_dead_and_the_silent_do_not_keep_a_fleet_from_its_end(pool: EnginePool) -> None:
    killed, stopped = ray.get([actor.pid.remote() for actor in pool.group.actors])
    os.kill(killed, signal.SIGKILL)
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    pool.shutdown()
    assert time.monotonic() - began < 30
    while ray.available_resources().get("CPU") != 2:  # what was reserved for them
        assert time.monotonic() - began < 60
        time.sleep(0.1)


def job(model: Path, place: Path) -> learning.DreamTrainerJob:
    return learning.DreamTrainerJob(
        TrainerOptions(str(model), 0, "float32", 7, 0.1, 1), DreamingConfig(max_staleness=1),
        "", str(place / "lake"), 0, 0.5, 8, IDS, 1, 60.0,
    )  # fmt: skip


def test_the_expert_is_gathered_before_the_engines_can_fail(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    """They fail on rank 0 alone, which must not leave the others in a gather that never ends."""
    done: list[str] = []

    def publish(*_: Any) -> None:
        done.append("publish")
        raise StaleEngine("no engine is left")

    actor = learning.DreamTrainer(job(tiny_model, tmp_path), 0, 2)
    actor._trainer = SimpleNamespace(steps=1, gather_expert=lambda: done.append("expert"))  # type: ignore
    monkeypatch.setattr(learning, "publish_weights", publish)
    with pytest.raises(StaleEngine):
        actor.publish([None])
    assert done == ["expert", "publish"] and actor.pool.health.dead_after == LIVENESS_TIMEOUT_S


def test_tokens_that_are_too_old_are_read_and_not_learned_from(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    """In the update from version 6 with a staleness of one, what versions before 5 wrote."""
    learned: list[TrainingExample] = []
    versions = [[4, 4, 5], [5, 6], [3, 4]]
    dreams = [
        Trajectory(f"dream-0-{n}", "t", n, "dream", [1, 2], list(range(7, 7 + len(of))),
                   [-1.0 * v for v in of], of, "stop", reward=float(n), gap=1.0)
        for n, of in enumerate(versions)
    ]  # fmt: skip
    actor = learning.DreamTrainer(job(tiny_model, tmp_path), 0, 1)
    step = lambda rows, *_: learned.extend(rows) or {}  # noqa: E731
    actor._trainer = SimpleNamespace(steps=5, step=step, values=None)  # type: ignore
    monkeypatch.setattr(learning.ray, "get", lambda batches: batches)
    told = actor.step([to_batch(dreams)]).metrics
    assert [row.prompt_ids for row in learned] == [[1, 2, 7, 8], [1, 2]]
    assert [row.response_ids for row in learned] == [[9], [7, 8]]
    assert [row.rollout_logprobs for row in learned] == [[-5.0], [-5.0, -6.0]]
    assert (told["tokens_too_old"], told["staleness_max"]) == (4.0, 1.0)
    assert told["staleness_tokens"] == {"0": 1, "1": 2}
    assert told["reward"] == 1.0  # of all three, as their advantages


def test_how_far_the_sides_are_apart_is_told_by_age() -> None:
    metrics = {
        "dream/age_2/share": 0.25, "dream/age_2/apart": 0.1, "dream/age_2/max": 3.0,
        "dream/age_0/share": 0.75, "dream/age_0/apart": 0.03, "dream/age_0/max": 0.5, "loss": 1.0,
    }  # fmt: skip
    assert pop_agreement(metrics, "dream") == {
        "logprob_difference": {"0": pytest.approx(0.04), "2": pytest.approx(0.4)},
        "logprob_difference_max": {"0": 0.5, "2": 3.0},
    }
    assert metrics == {"loss": 1.0}


def test_trap_10_an_engine_that_hangs_does_not_hang_the_update(
    pool: EnginePool, tiny_model: Path, weights: dict[str, Tensor]
) -> None:
    right = canary(tiny_model, weights)
    pool.publish(weights.items(), right, version=2)
    impatient = EnginePool(pool.group, update_timeout=5.0)
    pid = ray.get(pool.group.actors[1].pid.remote())
    impatient.publish(weights.items(), right, version=4)
    os.kill(pid, signal.SIGSTOP)
    try:
        began, heard = time.monotonic(), list[str]()
        with Watchdog(WAITS, limit_s=2.0, on_stall=heard.append, every_s=0.1):
            good, hung = impatient.publish(weights.items(), right, version=6)
        assert time.monotonic() - began < 60
        assert any("for a weight update with engine: begin_update" in message for message in heard)
        assert good.verified and not hung.verified
        assert hung.error is not None and "GetTimeoutError" in hung.error
        assert states(impatient) == [HealthState.HEALTHY, HealthState.STALE]
    finally:
        os.kill(pid, signal.SIGCONT)
    patient = EnginePool(pool.group)
    assert [c.verified for c in patient.publish(weights.items(), right, version=8)] == [True, True]
