"""The rollout engines, the real vLLM and the small one on torch: one of each for the whole file,
updated as it goes on. What is asked of one is asked of the other.

Every test leaves the checkpoint's own weights in the engine. Expected log-probabilities
are those of transformers on the same checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sleeprl.data.trajectory import Trajectory, from_batch, to_batch
from sleeprl.memory.checkpoint import (
    WEIGHTS,
    all_tensors,
    expert_tensors,
    fold,
    mlp_tensors,
    widen,
)
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.growth import growth_named, growth_of
from sleeprl.memory.slots import GATED_MLP, LOW_RANK, Slots
from sleeprl.plugins import BUILTIN, resolve
from sleeprl.rollout.base_engine import split_resumable
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.torch_engine import TorchEngine
from sleeprl.rollout.types import Completion, RolloutRequest, SamplingParams
from sleeprl.rollout.vllm_engine import VLLMEngine
from sleeprl.weight_sync import gpu_common, nccl
from sleeprl.weight_sync.base import TransportConfig, TransportError, WeightTransport
from sleeprl.weight_sync.disk import DiskTransport
from sleeprl.weight_sync.shared_memory import SharedMemoryTransport
from sleeprl.weight_sync.verification import Canary, StaleWeights, UpdateReceipt
from tests.support.models import make_tiny_model, plain_logprobs

T = TypeVar("T")
MAX_LENGTH = 512
HALF = 1.0
"""The canary's tolerance in half precision, in nats, as the learner gives it."""
CANARY_IDS = [1, *range(40, 60), 2, *range(100, 130)]


class Rig:
    """The engine, its event loop, and the model that says what is right."""

    def __init__(self, checkpoint: Path, kind: str, dtype: str = "float32") -> None:
        self.checkpoint = checkpoint
        self.loop = asyncio.new_event_loop()
        options = EngineOptions(
            model=str(checkpoint),
            dtype=dtype,
            max_length=MAX_LENGTH,
            threads=1,
            memory_gb=1.0,
            gpu=False,
            gpu_utilization=0.4,
            seed=0,
        )
        self.kind = kind
        self.engine: VLLMEngine | TorchEngine = resolve(kind, "engine")("engine-0", options)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.version = 0
        self.directory = checkpoint.parent / "weights"
        self.shared_memory = SharedMemoryTransport(TransportConfig())

    def transport(self, kind: str, limit: int) -> WeightTransport:
        """Of every kind that runs without a GPU."""
        if kind == "disk":
            return DiskTransport(TransportConfig(directory=str(self.directory)), limit)
        self.shared_memory.limit = limit  # one for the whole file, as a learner has
        return self.shared_memory

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def expected(self, ids: list[int], weights: Mapping[str, Tensor] | None = None) -> list[float]:
        return plain_logprobs(self.model, ids, weights)

    def canary(self, weights: Mapping[str, Tensor], tolerance: float = 1e-4) -> Canary:
        fresh = self.expected(CANARY_IDS)
        return Canary(CANARY_IDS, self.expected(CANARY_IDS, weights), tolerance, fresh)

    async def update(
        self,
        weights: Mapping[str, Tensor],
        canary: Canary | None,
        limit: int = 1 << 16,
        kind: str = "shared_memory",
        damage: str = "",
    ) -> UpdateReceipt:
        """As ``EnginePool.publish`` does: a bucket is packed while the one before it is loaded.

        damage: a tensor of which a bit is turned on its way.
        """
        self.version += 1
        transport = self.transport(kind, limit)
        transport.begin(self.version)
        await self.engine.begin_update(self.version)
        loading: asyncio.Future[None] | None = None
        for info in transport.buckets(weights.items()):
            if damage in json.loads(info["layout"])["names"]:
                turn_a_bit(info, damage)
            if loading is not None:
                await loading
            loading = asyncio.ensure_future(self.engine.load_bucket(info))
            await asyncio.sleep(0)
        if loading is not None:
            await loading
        transport.finish()
        return await self.engine.finish_update(canary)

    def restore(self) -> None:
        whole = dict(all_tensors(self.checkpoint))
        certificate = self.run(self.update(whole, self.canary(whole)))
        assert certificate.verified, certificate


class Deaf(TorchEngine):
    """Loses updates without a word: it ends each as if it had loaded it."""

    deaf = False

    async def _load(self, update_info: dict[str, Any]) -> None:
        if not self.deaf:
            await super()._load(update_info)


def turn_a_bit(info: dict[str, Any], name: str) -> None:
    layout = json.loads(info["layout"])
    with open(info["file"]["path"], "r+b") as file:
        file.seek(layout["offsets"][layout["names"].index(name)])
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module", params=sorted(BUILTIN["engine"]))
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("engine")
    make_tiny_model(directory / "plain", architecture="qwen3", seed=2)
    widen(directory / "plain", directory / "wide", 2, 8, "float32")
    kept = dict(os.environ)
    rig = Rig(directory / "wide", request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rig.run(rig.engine.start())
        yield rig
        rig.run(rig.engine.shutdown())
    finally:
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(kept)
        rig.loop.close()


@pytest.fixture
def rig(started: Rig) -> Iterator[Rig]:
    yield started
    if started.run(started.engine.version()) != 0:
        started.restore()
    left = list(started.directory.glob("*"))
    assert not left, f"buckets left behind: {left}"


def prompts(count: int, length: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, 250, (count, length), generator=generator).tolist()


def sampling(count: int, tokens: int, **changes: Any) -> list[SamplingParams]:
    return [replace(SamplingParams(tokens, 1.0, seed=1000 + i), **changes) for i in range(count)]


def group(
    task: str, uids: list[str], prompt: list[int], how: list[SamplingParams]
) -> RolloutRequest:
    return RolloutRequest(task, tuple(uids), prompt, tuple(how))


def grown(rig: Rig, seed: int = 1, scale: float = 0.4) -> dict[str, Tensor]:
    """The MLPs with a random expert in slot 0: what growth sends."""
    slots = Slots.load(rig.checkpoint)
    assert slots is not None
    generator = torch.Generator().manual_seed(seed)
    expert = {}
    for name, tensor in mlp_tensors(rig.checkpoint):
        shape = [64, slots.width] if "down_proj" in name else [slots.width, 64]
        expert[name] = scale * torch.randn(shape, generator=generator, dtype=tensor.dtype)
    return dict(fold(rig.checkpoint, slots, ExpertUpdate(0, expert)))


def shaken(rig: Rig, seed: int = 1) -> dict[str, Tensor]:
    """All tensors changed so much that keys and values of the old weights are plainly wrong."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        if "norm" in name
        else tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(rig.checkpoint / WEIGHTS).items()
    }


# --- generation -------------------------------------------------------------------


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside_it(rig: Rig) -> None:
    asked, how = prompts(8), sampling(8, 24)
    first = rig.run(rig.engine.generate(asked, how))
    alone = [rig.run(rig.engine.generate([p], [s]))[0] for p, s in zip(asked, how, strict=True)]
    assert [c.token_ids for c in alone] == [c.token_ids for c in first]
    other = rig.run(rig.engine.generate(asked, [replace(s, seed=(s.seed or 0) + 1) for s in how]))
    assert [c.token_ids for c in other] != [c.token_ids for c in first]
    group = rig.run(rig.engine.generate([asked[0]] * 4, how[:4]))
    assert len({tuple(c.token_ids) for c in group}) == 4
    for completion in first:
        assert completion.versions == [0] * len(completion.token_ids)
        ended = completion.token_ids[-1] == 0
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == 24
        assert 0 not in completion.token_ids[:-1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_of_the_distribution_sampled_from(rig: Rig, temperature: float) -> None:
    asked = prompts(6)
    made = rig.run(rig.engine.generate(asked, sampling(6, 20, temperature=temperature)))
    for prompt, completion in zip(asked, made, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            raw = rig.model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        chosen = torch.tensor(completion.token_ids)[:, None]
        right = raw.log_softmax(-1).gather(-1, chosen)[:, 0]
        assert completion.logprobs == pytest.approx(right.tolist(), abs=1e-4)


def test_greedy_is_the_likeliest_token(rig: Rig) -> None:
    asked = prompts(2)
    made = rig.run(rig.engine.generate(asked, [SamplingParams(6, temperature=0.0)] * 2))
    for prompt, completion in zip(asked, made, strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            with torch.no_grad():
                assert int(rig.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_scores_agree_with_transformers(rig: Rig) -> None:
    sequences = [*prompts(3, 40), prompts(1, 200)[0], [5, 6], [5]]
    for ids, found in zip(sequences, rig.run(rig.engine.logprobs(sequences)), strict=True):
        assert len(found) == len(ids) - 1
        assert found == pytest.approx(rig.expected(ids), abs=1e-4)


def test_only_what_is_asked_for_is_scored_also_where_texts_begin_alike(rig: Rig) -> None:
    """Texts share 100 tokens, of which 70 are not asked for; two of them are the same."""
    begin, ends = prompts(1, 100)[0], prompts(3, 30)
    sequences = [[*begin, *end] for end in (*ends, ends[0])] * 2
    starts = [70, 100, 101, 110] * 2
    for _ in range(2):  # the second time, an engine's cache has all of them
        found = rig.run(rig.engine.logprobs(sequences, starts))
        for ids, start, scores in zip(sequences, starts, found, strict=True):
            assert scores == pytest.approx(rig.expected(ids)[start - 1 :], abs=1e-4)
    weights = grown(rig)
    rig.run(rig.update(weights, rig.canary(weights)))
    for ids, scores in zip(
        sequences, rig.run(rig.engine.logprobs(sequences, [100] * 8)), strict=True
    ):
        assert scores == pytest.approx(rig.expected(ids, weights)[99:], abs=1e-4)


def test_a_sequence_as_long_as_the_engine_takes_is_scored(rig: Rig) -> None:
    (ids,) = prompts(1, MAX_LENGTH - 1)  # vLLM wants room for one token more
    (found,) = rig.run(rig.engine.logprobs([ids]))
    assert found == pytest.approx(rig.expected(ids), abs=1e-4)


# --- weight updates ---------------------------------------------------------------


def test_an_update_in_flight_loses_nothing_and_verifies(rig: Rig) -> None:
    """32 long requests are running when the expert arrives; all end, each token accounted for."""
    asked, weights = prompts(32), grown(rig)
    canary = rig.canary(weights)

    async def scenario() -> tuple[list[Completion], UpdateReceipt]:
        long = 400 if rig.kind == "vllm" else 48
        running = asyncio.ensure_future(rig.engine.generate(asked, sampling(32, long)))
        # When this short one has ended, the others are some tokens in.
        await rig.engine.generate(asked[:1], sampling(1, 12))
        assert not running.done(), "too fast to be in flight"
        certificate = await rig.update(weights, canary)
        assert not running.done(), "nothing was left to run under the new weights"
        return await running, certificate

    made, certificate = rig.run(scenario())
    assert certificate.verified and certificate.error is None
    assert certificate.difference is not None and certificate.difference < 1e-4
    assert certificate.version == rig.version == rig.run(rig.engine.version())
    assert certificate.seconds > 0
    assert len(made) == 32
    for completion in made:
        assert completion.finish_reason in ("stop", "length")
        assert len(completion.token_ids) == len(completion.versions) == len(completion.logprobs)
        assert completion.versions == sorted(completion.versions)
        assert set(completion.versions) <= {rig.version - 1, rig.version}
    both = [c for c in made if set(c.versions) == {rig.version - 1, rig.version}]
    assert len(both) > 8
    for prompt, completion in zip(asked, made, strict=True):
        # Up to the change the tokens are those of the old weights, to the digit.
        old = completion.versions.count(rig.version - 1)
        right = rig.expected(prompt + completion.token_ids[:old])[len(prompt) - 1 :]
        assert completion.logprobs[:old] == pytest.approx(right, abs=1e-4)
    # What is asked now is written by the new weights from its first token.
    later = rig.run(rig.engine.generate(asked[:4], sampling(4, 16)))
    for prompt, completion in zip(asked, later, strict=False):
        assert set(completion.versions) == {rig.version}
        right = rig.expected(prompt + completion.token_ids, weights)[len(prompt) - 1 :]
        assert completion.logprobs == pytest.approx(right, abs=1e-4)


def test_an_expert_can_be_taken_out_again(rig: Rig) -> None:
    (probe,) = prompts(1, 30)
    before = rig.run(rig.engine.logprobs([probe]))[0]
    weights = grown(rig, seed=2)
    assert rig.run(rig.update(weights, rig.canary(weights))).verified
    changed = rig.run(rig.engine.logprobs([probe]))[0]
    assert max(abs(a - b) for a, b in zip(before, changed, strict=True)) > 0.01
    original = dict(mlp_tensors(rig.checkpoint))
    assert rig.run(rig.update(original, rig.canary({}))).verified
    assert rig.run(rig.engine.logprobs([probe]))[0] == pytest.approx(before, abs=1e-6)


def test_every_tensor_of_the_model_can_be_replaced(rig: Rig) -> None:
    weights = shaken(rig, seed=3)
    certificate = rig.run(rig.update(weights, rig.canary(weights)))
    assert certificate.verified, certificate


def test_the_size_of_the_buckets_does_not_matter(rig: Rig) -> None:
    """Down to one tensor each: gate and up of a layer then arrive in different buckets."""
    weights = grown(rig, seed=4)
    certificate = rig.run(rig.update(weights, rig.canary(weights), limit=1))
    assert certificate.verified, certificate


def test_a_wrong_canary_leaves_the_engine_stale(rig: Rig) -> None:
    weights = grown(rig, seed=5)
    certificate = rig.run(rig.update(weights, rig.canary({})))  # expects the old weights
    assert not certificate.verified
    assert certificate.difference is not None and certificate.difference > 1e-2
    assert certificate.error and "STALE" in str(certificate)
    for work in (
        rig.engine.generate(prompts(1), sampling(1, 4)),
        rig.engine.logprobs(prompts(1)),
        rig.engine.rollout(group("task", ["uid"], prompts(1)[0], sampling(1, 4))),
    ):
        with pytest.raises(StaleWeights, match=r"engine-0 is STALE .*differ from the sender"):
            rig.run(work)
    # It is not stuck: the same update with the right canary verifies.
    assert rig.run(rig.update(weights, rig.canary(weights))).verified
    assert rig.run(rig.engine.generate(prompts(1), sampling(1, 4)))[0].versions


def test_half_of_a_fused_layer_is_caught(rig: Rig) -> None:
    """vLLM packs gate and up together; sent only one, it reports success and computes nonsense."""
    if rig.kind != "vllm":
        pytest.skip("packs nothing")
    name = "model.layers.1.mlp.gate_proj.weight"
    weights = {name: grown(rig, seed=6)[name]}
    certificate = rig.run(rig.update(weights, rig.canary(weights)))
    assert not certificate.verified, certificate
    # With all of the layer it is right again.
    layer = {n: t for n, t in grown(rig, seed=6).items() if n.startswith("model.layers.1.mlp.")}
    assert rig.run(rig.update(layer, rig.canary(layer))).verified


def test_nothing_sent_and_nothing_expected(rig: Rig) -> None:
    certificate = rig.run(rig.update({}, rig.canary({})))
    assert certificate.verified, certificate
    certificate = rig.run(rig.update({}, None))
    assert certificate.verified and certificate.difference is None


def test_cached_prefixes_of_old_weights_are_never_used(rig: Rig) -> None:
    (prompt,) = prompts(1, 400)  # several cache blocks
    how = SamplingParams(1, temperature=0.0)
    weights = shaken(rig, seed=7)
    first = rig.run(rig.engine.generate([prompt], [how]))[0]
    assert first.logprobs == pytest.approx(rig.expected(prompt + first.token_ids)[-1:], abs=1e-4)
    assert rig.run(rig.update(weights, rig.canary(weights))).verified
    after = rig.run(rig.engine.generate([prompt], [how]))[0]
    right = rig.expected(prompt + after.token_ids, weights)[-1:]
    assert after.logprobs == pytest.approx(right, abs=1e-4)


def test_what_prompts_of_a_group_have_in_common_is_read_once(rig: Rig) -> None:
    if not isinstance(rig.engine, VLLMEngine):
        pytest.skip("reads every prompt whole")
    from vllm import SamplingParams, TokensPrompt

    llm = rig.engine.llm
    prompt = TokensPrompt(prompt_token_ids=list(range(200, 270)))

    async def cached(name: str) -> int | None:
        async for output in llm.generate(prompt, SamplingParams(max_tokens=1), name):
            found = output.num_cached_tokens
        return found

    # By whole blocks: with vLLM's own 128 tokens to a block there would be none.
    assert [rig.run(cached(name)) for name in ("first", "second")] == [0, 64]


def test_a_request_that_arrives_during_an_update_gets_only_the_new_weights(rig: Rig) -> None:
    (prompt,) = prompts(1, 400)
    how = SamplingParams(1, temperature=0.0)
    weights = shaken(rig, seed=8)
    canary = rig.canary(weights)

    async def scenario() -> tuple[Completion, UpdateReceipt]:
        await rig.engine.generate([prompt], [how])  # its blocks are cached now
        rig.version += 1
        await rig.engine.begin_update(rig.version)
        asked = asyncio.ensure_future(rig.engine.generate([prompt], [how]))
        for info in rig.transport("shared_memory", 1 << 24).buckets(weights.items()):
            await rig.engine.load_bucket(info)
        await asyncio.sleep(0.1)
        assert not asked.done(), "an engine that is paused must not generate"
        certificate = await rig.engine.finish_update(canary)
        return (await asked)[0], certificate

    completion, certificate = rig.run(scenario())
    assert certificate.verified
    assert completion.versions == [rig.version]
    right = rig.expected(prompt + completion.token_ids, weights)[-1:]
    assert completion.logprobs == pytest.approx(right, abs=1e-4)


def test_what_a_failed_update_cached_is_not_used_when_its_version_comes_again(rig: Rig) -> None:
    (prompt,) = prompts(1, 400)  # several cache blocks
    how = SamplingParams(1, temperature=0.0)
    wrong, weights = shaken(rig, seed=27), shaken(rig, seed=28)
    expected, canary = rig.canary({}), rig.canary(weights)

    async def fail() -> UpdateReceipt:
        """A request that comes during the update reads its prompt with the wrong weights."""
        rig.version += 1
        await rig.engine.begin_update(rig.version)
        late = asyncio.ensure_future(rig.engine.generate([prompt], [how]))
        for info in rig.transport("shared_memory", 1 << 24).buckets(wrong.items()):
            await rig.engine.load_bucket(info)
        receipt = await rig.engine.finish_update(expected)
        with pytest.raises(StaleWeights):
            await late
        return receipt

    assert not rig.run(fail()).verified
    rig.version -= 1
    assert rig.run(rig.update(weights, canary)).verified
    (after,) = rig.run(rig.engine.generate([prompt], [how]))
    right = rig.expected(prompt + after.token_ids, weights)[-1:]
    assert after.logprobs == pytest.approx(right, abs=1e-4)


def test_a_group_goes_on_from_its_tokens(rig: Rig) -> None:
    """Cut in the middle and handed to an engine again, it keeps what it had, and ends as a whole."""
    (prompt,), how, uids = prompts(1), sampling(3, 60), [f"dream-7-{n}" for n in range(3)]
    how[0] = replace(how[0], max_tokens=4)  # this one has ended when the others are cut

    async def cut() -> list[Trajectory]:
        writing = asyncio.create_task(rig.engine.generate_group(group("task", uids, prompt, how)))
        while True:
            await asyncio.sleep(0)
            found = [from_batch(batch) for batch in rig.engine.partial_groups().values()]
            if found and min(len(t.response_ids) for t in found[0]) >= 4:
                writing.cancel()
                return found[0]

    was = rig.run(rig.engine.version())
    begun = rig.run(cut())
    assert rig.engine.partial_groups() == {}
    assert [t.finish_reason for t in begun] == ["length", "running", "running"]
    rig.run(rig.update(grown(rig), None))  # the rest is written with other weights
    whole = from_batch(
        rig.run(rig.engine.generate_group(group("task", uids, prompt, how), kept(begun)))
    )
    for before, after, asked in zip(begun, whole, how, strict=True):
        had = len(before.response_ids)
        assert 4 <= had < 60 and len(after.response_ids) <= asked.max_tokens
        assert after.finish_reason in ("stop", "length")
        assert after.response_ids[:had] == before.response_ids
        assert after.logprobs[:had] == before.logprobs
        assert after.versions == [was] * had + [rig.version] * (len(after.response_ids) - had)
        expected = rig.expected(prompt + after.response_ids, grown(rig))[len(prompt) - 1 :]
        assert after.logprobs[had:] == pytest.approx(expected[had:], abs=1e-4)
    assert whole[0].response_ids == begun[0].response_ids


def kept(begun: list[Trajectory]) -> dict[str, Completion]:
    return split_resumable(to_batch(begun), 0)[0]


def test_what_was_being_written_when_an_update_fails_is_handed_back(rig: Rig) -> None:
    """As far as it is right: another, or the same when it is verified again, goes on from there."""
    weights, (prompt,) = shaken(rig, seed=23), prompts(1)
    length = 300 if rig.kind == "vllm" else 60
    how, uids = sampling(3, length), [f"dream-9-{n}" for n in range(3)]
    how[0] = replace(how[0], max_tokens=4)

    async def scenario() -> tuple[list[Trajectory], list[Trajectory]]:
        await rig.update(weights, rig.canary(weights))
        writing = asyncio.ensure_future(rig.engine.generate_group(group("task", uids, prompt, how)))
        while True:
            await asyncio.sleep(0)
            (batch,) = rig.engine.partial_groups().values()
            before = from_batch(batch)
            if min(len(t.response_ids) for t in before) >= 4:
                break
        assert not (await rig.update(shaken(rig, seed=24), rig.canary({}))).verified
        return before, from_batch(await writing)

    before, found = rig.run(scenario())
    assert [t.finish_reason for t in found] == ["length", "running", "running"]
    for early, late in zip(before, found, strict=True):
        assert late.response_ids[: len(early.response_ids)] == early.response_ids
        assert len(late.response_ids) < length and set(late.versions) == {rig.version - 1}
        right = rig.expected(prompt + late.response_ids, weights)[len(prompt) - 1 :]
        assert late.logprobs == pytest.approx(right, abs=1e-4)
    assert rig.run(rig.update(weights, rig.canary(weights))).verified
    whole = from_batch(
        rig.run(rig.engine.generate_group(group("task", uids, prompt, how), kept(found)))
    )
    for late, t in zip(found, whole, strict=True):
        assert t.response_ids[: len(late.response_ids)] == late.response_ids
        assert t.finish_reason in ("stop", "length")


def test_a_dream_that_is_over_and_too_old_is_written_anew() -> None:
    """What goes on, or has one token that may be learned from, is kept."""
    dreams = [
        Trajectory(f"dream-1-{n}", "t", n, "dream", [1], versions, [-1.0] * len(versions), versions, end)
        for n, (versions, end) in enumerate(
            [([2, 3, 3], "stop"), ([3, 4], "length"), ([2, 2], "running"), ([], "running")]
        )
    ]  # fmt: skip
    kept, over = split_resumable(to_batch(dreams), 4)
    assert list(kept) == ["dream-1-1", "dream-1-2", "dream-1-3"]
    assert kept["dream-1-2"].versions == [2, 2]
    assert from_batch(over) == [replace(dreams[0], purpose="outdated", uid="dream-1-0@3")]
    assert split_resumable(None, 4)[0] == {}


def test_the_torch_engine_goes_on_to_the_bit(rig: Rig) -> None:
    if rig.kind != "torch":
        pytest.skip("vLLM cannot set a request's generator forward")
    (prompt,), how, uids = prompts(1), sampling(2, 40), ["dream-1-0", "dream-1-1"]
    whole = rig.run(rig.engine.generate_group(group("task", uids, prompt, how)))
    half = [
        replace(t, response_ids=t.response_ids[:9], logprobs=t.logprobs[:9],
                versions=t.versions[:9], finish_reason="running")
        for t in from_batch(whole)
    ]  # fmt: skip
    assert rig.run(rig.engine.generate_group(group("task", uids, prompt, how), kept(half))) == whole


# --- sleep ------------------------------------------------------------------------


def test_asleep_it_writes_nothing_and_awake_as_if_it_had_not_slept(rig: Rig) -> None:
    """What runs is frozen, what is asked waits; then all go on to the same tokens."""
    asked, how = prompts(6), sampling(6, 200 if rig.kind == "vllm" else 40)
    uids = [f"dream-5-{n}" for n in range(4)]

    def written() -> list[int]:
        batches = rig.engine.partial_groups().values()
        return [len(t.response_ids) for batch in batches for t in from_batch(batch)]

    async def whole() -> tuple[Any, ...]:
        first = await rig.engine.generate_group(group("task", uids, asked[0], how[:4]))
        return first, await rig.engine.generate(asked[4:], how[4:])

    async def cut() -> tuple[Any, ...]:
        running = asyncio.ensure_future(
            rig.engine.generate_group(group("task", uids, asked[0], how[:4]))
        )
        while min(written(), default=0) < 4:
            await asyncio.sleep(0)
        await rig.engine.sleep()
        await rig.engine.sleep()
        await asyncio.sleep(0.1)  # what was made before may still be on its way
        before = written()
        late = asyncio.ensure_future(rig.engine.generate(asked[4:], how[4:]))
        score = asyncio.ensure_future(rig.engine.logprobs([CANARY_IDS]))
        await asyncio.sleep(0.4)
        assert not (running.done() or late.done() or score.done())
        assert written() == before and max(before) < how[0].max_tokens
        await rig.engine.wake_up()
        await rig.engine.wake_up()
        assert (await score)[0] == pytest.approx(rig.expected(CANARY_IDS), abs=1e-4)
        return await running, await late

    for once, again in zip(rig.run(whole()), rig.run(cut()), strict=True):
        if isinstance(once, list):
            assert [c.token_ids for c in once] == [c.token_ids for c in again]
        else:
            assert once.column("response_ids") == again.column("response_ids")


def test_an_update_wakes_a_sleeper(rig: Rig) -> None:
    """Also what it froze goes on, under the new weights."""
    weights = grown(rig, seed=15)
    canary = rig.canary(weights)

    async def scenario() -> list[Completion]:
        running = asyncio.ensure_future(rig.engine.generate(prompts(4), sampling(4, 48)))
        await rig.engine.generate(prompts(1), sampling(1, 4))
        await rig.engine.sleep()
        assert not running.done(), "too fast to be in flight"
        assert (await rig.update(weights, canary)).verified
        return await running

    for completion in rig.run(scenario()):
        assert completion.versions == sorted(completion.versions)
        assert set(completion.versions) <= {rig.version - 1, rig.version}
        assert len(completion.versions) == len(completion.token_ids) > 0


# --- every transport, every mode --------------------------------------------------


@pytest.mark.parametrize("limit", [1, 100_000, 1 << 28], ids=["single", "some", "all"])
@pytest.mark.parametrize("kind", ["shared_memory", "disk"])
def test_every_transport_delivers_every_tensor(rig: Rig, kind: str, limit: int) -> None:
    """``single``: the parts of a fused layer come in buckets that share memory with others."""
    weights = shaken(rig, seed=limit % 97)
    certificate = rig.run(rig.update(weights, rig.canary(weights), limit, kind))
    assert certificate.verified, certificate
    assert rig.run(rig.update(grown(rig, seed=9), None, limit, kind)).verified
    both = weights | grown(rig, seed=9)
    assert rig.run(rig.update({}, rig.canary(both), limit, kind)).verified


@pytest.mark.parametrize("kind", ["shared_memory", "disk"])
def test_a_damaged_tensor_is_named_and_leaves_the_engine_stale(rig: Rig, kind: str) -> None:
    weights = grown(rig, seed=10)
    first = next(iter(weights))  # of the first in a bucket there is always a checksum
    certificate = rig.run(rig.update(weights, rig.canary(weights), kind=kind, damage=first))
    assert not certificate.verified
    assert certificate.error is not None
    assert f"{first} did not arrive as it was sent" in certificate.error
    with pytest.raises(StaleWeights, match="did not arrive as it was sent"):
        rig.run(rig.engine.generate(prompts(1), sampling(1, 4)))
    assert rig.run(rig.update(weights, rig.canary(weights), kind=kind)).verified


def test_trap_9_a_failure_half_way_leaves_the_engine_stale(rig: Rig) -> None:
    """The second half of an update is not to be had; whatever the engine is now, it is not well."""
    weights = shaken(rig, seed=11)
    canary = rig.canary(weights)

    async def half() -> UpdateReceipt:
        rig.version += 1
        await rig.engine.begin_update(rig.version)
        infos = rig.transport("disk", 1 << 17)
        infos.begin(rig.version)
        for number, info in enumerate(infos.buckets(weights.items())):
            if number == 1:
                Path(info["file"]["path"]).unlink()
            await rig.engine.load_bucket(info)
        assert number > 1
        infos.finish()
        return await rig.engine.finish_update(canary)

    certificate = rig.run(half())
    assert not certificate.verified and certificate.difference is None
    assert certificate.error is not None and "not on this host" in certificate.error
    with pytest.raises(StaleWeights):
        rig.run(rig.engine.generate(prompts(1), sampling(1, 4)))
    assert rig.run(rig.update(weights, canary)).verified


def test_trap_8_an_update_that_never_arrived_is_caught(rig: Rig) -> None:
    """An adapter that binds no module: no error anywhere, the new version, the old weights."""
    certificate = rig.run(rig.update({}, rig.canary(grown(rig, seed=12))))
    assert not certificate.verified and certificate.version == rig.version


@pytest.fixture
def halves(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Starts engines in half precision on one checkpoint, by the kind of its growth; the sender
    computes in float32, so the two differ by as much as rounding makes."""
    make_tiny_model(tmp_path / "plain", seed=2)
    made = []

    def start(growth: str = GATED_MLP, dtype: str = "bfloat16") -> Rig:
        directory = tmp_path / growth
        if not directory.is_dir():
            growth_named(growth).add_slots(tmp_path / "plain", directory, [2], 8, "float32")
        made.append(Rig(directory, f"{__name__}.Deaf", dtype))
        made[-1].run(made[-1].engine.start())
        return made[-1]

    threads = torch.get_num_threads()
    yield start
    torch.set_num_threads(threads)
    for rig in made:
        rig.loop.close()


def half_update(rig: Rig, weights: Mapping[str, Tensor], *, lost: bool = False) -> UpdateReceipt:
    rig.engine.deaf = lost  # type: ignore[union-attr]
    return rig.run(rig.update(weights, rig.canary(weights, HALF)))


def test_an_update_lost_in_half_precision_is_caught(halves: Callable[..., Rig]) -> None:
    """Its tolerance is wide: by that alone the old weights would pass for the new ones."""
    rig = halves()
    for version in range(4):
        weights = grown(rig, seed=version, scale=0.1)
        lost = half_update(rig, weights, lost=True)
        assert lost.difference is not None and lost.difference < HALF
        assert not lost.verified and "the update was lost" in str(lost.error), lost
        with pytest.raises(StaleWeights, match="the update was lost"):
            rig.run(rig.engine.generate(prompts(1), sampling(1, 4)))
        right = half_update(rig, weights)
        assert right.verified and right.difference is not None and right.difference > 1e-3, right
    # One that is started again holds the checkpoint, and never had the versions before this.
    other = halves()
    other.version = rig.version
    assert not half_update(other, weights, lost=True).verified
    assert half_update(other, weights).verified
    back = dict(mlp_tensors(rig.checkpoint))
    assert not half_update(other, back, lost=True).verified
    assert half_update(other, back).verified


def test_small_updates_that_are_all_lost_add_up(halves: Callable[..., Rig]) -> None:
    """Each changes less than the noise; those that arrive are never taken for lost."""
    there, deaf = halves(), halves()
    caught = None
    for step in range(1, 21):
        weights = grown(there, scale=0.002 * step)
        right = half_update(there, weights)
        assert right.verified, right
        lost = half_update(deaf, weights, lost=True)
        assert lost.difference is not None and lost.difference < HALF
        if caught is None and not lost.verified:
            caught = step
    assert caught is not None and 2 < caught < 20


@pytest.mark.parametrize("growth", [GATED_MLP, LOW_RANK])
def test_trap_8_every_kind_of_expert_arrives_or_is_missed(
    halves: Callable[..., Rig], growth: str
) -> None:
    """What is sent are dense weights; what is expected is what the training form computes."""
    rig = halves(growth, "float32")
    slots = Slots.load(rig.checkpoint)
    assert slots is not None
    kind = growth_of(slots)
    model = kind.load(rig.checkpoint, slots, torch.float32)
    for parameter in kind.grow(model, slots.width, 3, 0):
        torch.nn.init.normal_(parameter.data, 0.0, 0.1)
    expert = expert_tensors(dict(model.named_parameters()))
    weights = dict(kind.fold(rig.checkpoint, slots, ExpertUpdate(0, expert)))
    assert weights.keys() == {name for name, _ in mlp_tensors(rig.checkpoint)}
    right = Canary(CANARY_IDS, plain_logprobs(model, CANARY_IDS), 1e-4)
    rig.engine.deaf = True  # type: ignore[union-attr]
    assert not rig.run(rig.update(weights, right)).verified
    rig.engine.deaf = False  # type: ignore[union-attr]
    assert rig.run(rig.update(weights, right)).verified


def test_what_cannot_be_judged_leaves_the_engine_stale(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is not answered, since nobody vouches for the weights that wrote it."""
    weights = grown(rig, seed=16)
    score, resume = rig.engine._score, rig.engine._resume

    async def failing(ids: list[int]) -> list[float]:
        if ids == CANARY_IDS:
            raise RuntimeError("no room for the prompt's log-probabilities")
        return await score(ids)

    async def stuck(*, ending: bool) -> None:
        await resume(ending=ending)
        raise RuntimeError("it will not wake")

    async def scenario() -> UpdateReceipt:
        running = asyncio.ensure_future(rig.engine.generate(prompts(4), sampling(4, 48)))
        await rig.engine.generate(prompts(1), sampling(1, 4))
        assert not running.done()
        certificate = await rig.update(weights, rig.canary(weights))
        with pytest.raises(StaleWeights):
            await running
        return certificate

    for name, broken, why in (("_score", failing, "no room"), ("_resume", stuck, "will not wake")):
        with monkeypatch.context() as patch:
            patch.setattr(rig.engine, name, broken)
            certificate = rig.run(scenario())
        assert not certificate.verified and why in str(certificate.error)
        with pytest.raises(StaleWeights, match=why):
            rig.run(rig.engine.logprobs([CANARY_IDS]))
        assert rig.run(rig.update(weights, rig.canary(weights))).verified


def test_what_runs_when_an_update_fails_is_not_answered(rig: Rig) -> None:
    weights = shaken(rig, seed=13)

    async def scenario() -> None:
        running = asyncio.ensure_future(rig.engine.generate(prompts(4), sampling(4, 300)))
        await rig.engine.generate(prompts(1), sampling(1, 8))
        assert not running.done()
        assert not (await rig.update(weights, rig.canary({}))).verified
        # Nor when the next has put things right before anybody looks.
        assert (await rig.update(weights, rig.canary(weights))).verified
        with pytest.raises(StaleWeights):
            await running

    rig.run(scenario())


def test_what_was_written_on_wrong_weights_is_not_answered_however_late(rig: Rig) -> None:
    """Whoever is told of the failed update only when the engine is verified again, hands back the same."""
    weights, (prompt,) = shaken(rig, seed=25), prompts(1)
    one = rig.engine._generate_one

    async def late(*asked: Any) -> Completion:
        made = await one(*asked)
        await right.wait()
        return made

    async def scenario() -> list[Trajectory]:
        await rig.update(weights, rig.canary(weights))
        writing = asyncio.ensure_future(
            rig.engine.generate_group(
                group("task", ["dream-4-0"], prompt, sampling(1, 200 if rig.kind == "vllm" else 60))
            )
        )
        while not any(
            t.response_ids for b in rig.engine.partial_groups().values() for t in from_batch(b)
        ):
            await asyncio.sleep(0)
        assert not (await rig.update(shaken(rig, seed=26), rig.canary({}))).verified
        assert (await rig.update(weights, rig.canary(weights))).verified
        right.set()
        return from_batch(await writing)

    right = asyncio.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig.engine, "_generate_one", late)
        (found,) = rig.run(scenario())
    assert found.finish_reason == "running" and set(found.versions) == {rig.version - 2}
    expected = rig.expected(prompt + found.response_ids, weights)[len(prompt) - 1 :]
    assert found.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", ["keep", "drain", "abort"])
def test_no_mode_loses_a_token(rig: Rig, mode: str) -> None:
    """Each token is there once, with the version of the weights that wrote it."""
    asked, weights = prompts(16), shaken(rig, seed=14)
    canary, before = rig.canary(weights), rig.version
    length = 300 if rig.kind == "vllm" else 48
    plain = rig.engine.options

    async def scenario() -> list[Completion]:
        running = asyncio.ensure_future(rig.engine.generate(asked, sampling(16, length)))
        await rig.engine.generate(asked[:1], sampling(1, 12))
        assert not running.done(), "too fast to be in flight"
        late: list[asyncio.Future[list[Completion]]] = []

        async def ask_late() -> None:
            await asyncio.sleep(0.01)
            late.append(asyncio.ensure_future(rig.engine.generate(asked[:2], sampling(2, 8))))

        _, certificate = await asyncio.gather(ask_late(), rig.update(weights, canary))
        assert certificate.verified, certificate
        assert [set(c.versions) for c in await late[0]] == [{rig.version}] * 2
        return await running

    rig.engine.options = replace(plain, transport=TransportConfig(mode=mode))
    try:
        made = rig.run(scenario())
    finally:
        rig.engine.options = plain
    assert len(made) == 16
    crossed = 0
    for prompt, completion in zip(asked, made, strict=True):
        ids, old = completion.token_ids, completion.versions.count(before)
        assert len(ids) == len(completion.versions) == len(completion.logprobs)
        assert completion.versions == [before] * old + [rig.version] * (len(ids) - old)
        ended = ids[-1] == 0
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(ids) == length
        assert 0 not in ids[:-1]
        crossed += 0 < old < len(ids)
        first = len(prompt) - 1
        right = rig.expected(prompt + ids[:old])[first:]
        assert completion.logprobs[:old] == pytest.approx(right, abs=1e-4)
        if mode == "abort":  # nothing of what the old weights cached is left
            right = rig.expected(prompt + ids, weights)[first + old :]
            assert completion.logprobs[old:] == pytest.approx(right, abs=1e-4)
    assert crossed == 0 if mode == "drain" else crossed > 4


def test_what_vllm_s_own_engines_are_told_fits_their_interface() -> None:
    """As far as it goes without a GPU: their dataclasses take our messages."""
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    infos = nccl.connect_infos("10.0.0.1", 29500, 2)
    parsed = [nccl_engine.NCCLWeightTransferInitInfo(**info) for info in infos]
    assert [info.rank_offset for info in parsed] == [1, 2]
    assert {info.world_size for info in parsed} == {3} and all(info.packed for info in parsed)
    of_two_ranks = nccl.connect_infos("10.0.0.1", 29500, 2, ranks=2)
    assert [(info["rank_offset"], info["world_size"]) for info in of_two_ranks] == [(1, 5), (3, 5)]
    told = gpu_common.describe_tensors([("w", torch.ones(2, 3, dtype=torch.bfloat16))])
    update = nccl_engine.NCCLWeightTransferUpdateInfo(**told)
    assert (update.names, update.dtype_names, update.shapes) == (["w"], ["bfloat16"], [[2, 3]])
    handles = [{"GPU-0": (None,)}]
    assert ipc_engine.IPCWeightTransferUpdateInfo(**told, ipc_handles=handles).names == ["w"]
    assert ipc_engine.IPCWeightTransferInitInfo(packed=False) is not None


def test_trap_6_after_a_timeout_no_other_thread_is_in_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dead engine: the broadcast hangs, until its communicator is aborted. As far as it goes
    without a GPU: the communicator is none."""
    from vllm.distributed.weight_transfer import packed_tensor

    class Group:
        def __init__(self) -> None:
            self.aborted = threading.Event()

        def destroy(self) -> None:
            assert hanging.is_set()
            self.aborted.set()

    def broadcast(tensors: Iterator[Any], group: Group, **_: Any) -> None:
        hanging.set()
        group.aborted.wait(60)
        hanging.clear()

    hanging, group = threading.Event(), Group()
    monkeypatch.setattr(gpu_common, "require_gpu", lambda kind: None)
    monkeypatch.setattr(gpu_common, "COLLECTIVE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(packed_tensor, "packed_nccl_broadcast_producer", broadcast)
    transport = nccl.NcclTransport(TransportConfig("nccl"))
    transport._group = group
    transport.begin(1)
    buckets = transport.buckets([("w", torch.ones(4))])
    assert next(buckets)["names"] == ["w"]
    with pytest.raises(TimeoutError, match="waited 0 s for a broadcast of weights"):
        next(buckets)
    assert group.aborted.is_set() and not hanging.is_set()
    with pytest.raises(TransportError, match="was aborted after a timeout"):
        transport.begin(2)
    transport.close()
