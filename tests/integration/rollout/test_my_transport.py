"""The transport among the examples carries weights into real engines, which prove that they arrived."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from sleeprl.memory.checkpoint import mlp_tensors
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.rollout.types import SamplingParams
from sleeprl.weight_sync.base import TransportConfig
from sleeprl.weight_sync.verification import Canary
from tests.support.models import plain_logprobs
from tests.support.paths import ROOT

IDS = [1, *range(40, 70)]
TRANSPORT = "examples.my_transport.SafetensorsTransport"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(
        "local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=environment
    )
    yield
    ray.shutdown()


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_a_transport_of_ones_own_ends_verified(engine: str, tiny_model: Path) -> None:
    options = EngineOptions(
        str(tiny_model), "float32", 128, 1, 1.0, False, 0.4, 0, TransportConfig(TRANSPORT)
    )
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in mlp_tensors(tiny_model)
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    new, old = plain_logprobs(model, IDS, weights), plain_logprobs(model, IDS)
    pool = EnginePool.launch(1, options, 1, 0, engine)
    try:
        (receipt,) = pool.publish(weights.items(), Canary(IDS, new, 1e-3, fresh=old))
        assert receipt.verified and receipt.version == pool.version == 1, receipt
        assert receipt.difference is not None and receipt.difference < 1e-4
        assert pool.logprobs([IDS])[0] == pytest.approx(new, abs=1e-4)
        (completion,) = pool.generate([[1, 50, 7]], [SamplingParams(5, seed=0)])
        assert set(completion.versions) == {1}
    finally:
        pool.shutdown()
    assert max(abs(a - b) for a, b in zip(new, old, strict=True)) > 1e-2
    assert not list(Path(tempfile.gettempdir()).glob("sleeprl-weights-*"))
