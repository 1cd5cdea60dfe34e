"""Engines of several ranks: what a model must be for it, and a real one beside one of one rank."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.memory.checkpoint import WEIGHTS
from sleeprl.rollout.engine import EngineOptions, require_shards
from sleeprl.rollout.engine_pool import EnginePool, StaleEngine
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.weight_sync import shared_memory
from sleeprl.weight_sync.buckets import Bucket
from sleeprl.weight_sync.verification import Canary
from tests.support.models import make_tiny_model, plain_logprobs

IDS = [1, *range(40, 70)]
PROMPTS = [[1, 50 + i, 7] for i in range(6)]
GREEDY = [SamplingParams(12, temperature=0.0)] * 6


def test_a_night_s_settings_reach_the_engine(tmp_path: Path) -> None:
    config = NightConfig()
    config.resources.engine_tensor_parallel = config.resources.engine_cpus = 2
    options = EngineOptions.from_config(config, str(make_tiny_model(tmp_path / "model")), "float32")
    assert (options.tensor_parallel, options.transport.ranks, options.threads) == (2, 2, 2)
    config.resources.engine_tensor_parallel = 4
    with pytest.raises(ConfigError, match=r"tensor_parallel=4 cannot share num_attention_heads=2"):
        EngineOptions.from_config(config, str(tmp_path / "model"), "float32")


@pytest.mark.parametrize(
    ("heads", "shared", "width", "ranks", "refused"),
    [
        (8, 8, 96, 4, None),
        (8, 2, 96, 4, None),  # each pair of ranks holds the same key and value heads
        (8, 8, 96, 3, "num_attention_heads=8"),
        (12, 8, 96, 3, "num_key_value_heads=8"),
        (8, 8, 97, 2, "intermediate_size=97"),
        (7, 7, 97, 1, None),
    ],
)
def test_ranks_must_divide_what_they_share(
    tmp_path: Path, heads: int, shared: int, width: int, ranks: int, refused: str | None
) -> None:
    told = {
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "intermediate_size": width,
    }
    (tmp_path / "config.json").write_text(json.dumps(told))
    if refused is None:
        require_shards(tmp_path, ranks)
    else:
        with pytest.raises(ConfigError, match=f"{refused}.*set it to a divisor"):
            require_shards(tmp_path, ranks)


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield
    ray.shutdown()


def answers(directory: Path, ranks: int) -> tuple[EnginePool, list[Completion]]:
    options = EngineOptions(
        str(directory), "float32", 128, ranks, 1.0, False, 0.4, 0, tensor_parallel=ranks
    )
    pool = EnginePool.launch(1, options, ranks, 0)
    return pool, pool.generate(PROMPTS, GREEDY)


def same(found: list[Completion], right: list[Completion]) -> None:
    assert [c.token_ids for c in found] == [c.token_ids for c in right]
    for one, other in zip(found, right, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def canary(directory: Path, weights: Mapping[str, Tensor]) -> Canary:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return Canary(IDS, plain_logprobs(model, IDS, weights), 1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_two_ranks_answer_and_are_updated_as_one(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank maps the sender's memory, checks what is in it, and keeps its shard."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(tiny_model / WEIGHTS).items()
    }
    right = canary(tiny_model, weights)
    alone, before = answers(tiny_model, 1)
    (certificate,) = alone.publish(weights.items(), right)
    assert certificate.verified, certificate
    after = alone.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    alone.shutdown()

    together, found = answers(tiny_model, 2)
    try:
        same(found, before)
        (certificate,) = together.publish(weights.items(), right)
        assert certificate.verified, certificate
        made = together.generate(PROMPTS, GREEDY)
        same(made, after)
        assert {version for c in made for version in c.versions} == {1}
        # All ranks refuse what was damaged, and the next update finds them in step.
        with monkeypatch.context() as patch:
            patch.setattr(shared_memory, "plan_bucket", damaged)
            with pytest.raises(StaleEngine, match=r"rank 0: CorruptedWeights: .* checksum differs"):
                together.publish(weights.items(), right)
        for _ in range(2):
            (certificate,) = together.publish(weights.items(), right)
            assert certificate.verified, certificate
        same(together.generate(PROMPTS, GREEDY), after)
        # A canary that disagrees is found by what all ranks compute together.
        with pytest.raises(StaleEngine, match="log-probabilities differ"):
            together.publish(weights.items(), canary(tiny_model, {}))
    finally:
        together.shutdown()


def damaged(group: Any, version: int) -> Bucket:
    """What a sender would tell of other tensors than those that arrive."""
    from sleeprl.weight_sync.buckets import plan_bucket

    return plan_bucket([(name, tensor + 1.0) for name, tensor in group], version)
