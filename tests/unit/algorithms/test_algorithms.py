"""Each policy-gradient algorithm against a case worked out by hand, in value and in gradient."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sleeprl import algorithms
from sleeprl.algorithms.base import RewardBatch
from sleeprl.algorithms.dapo import DAPO
from sleeprl.algorithms.ppo import PPO
from sleeprl.losses.combined import chunked_combined_loss, combined_loss, token_counts
from sleeprl.losses.off_policy import ImportanceWeight
from sleeprl.losses.reference_kl import ESTIMATORS, reference_kl
from sleeprl.losses.types import LossBatch, LossOptions, LossWeights
from sleeprl.plugins import BUILTIN, PluginError, create
from tests.references import trl_losses

NAMES = list(BUILTIN["algorithm"])
REWARDS = [1.0, 0.0, 0.5, 0.2, 0.2, None, 0.8, None]
GROUPS = ["a", "a", "a", "b", "b", "b", "c", "c"]


def make(name: str, **options: Any) -> Any:
    return create(name, "algorithm", options)


def scores(rewards: list[float | None], groups: list[str], limit: int = 10) -> RewardBatch:
    return RewardBatch(rewards, groups, [4] * len(rewards), limit)


# --- advantages -----------------------------------------------------------------------

SKIP = None
# a: mean 0.5, deviation 0.5; b is all equal and c has one scored row.
SCALED = [1.0, -1.0, 0.0, 0.0, 0.0, None, 0.0, None]
PLAIN = [0.5, -0.5, 0.0, 0.0, 0.0, None, 0.0, None]
# The six scored rows have mean 0.45; their squares about it add up to 0.755, over 5.
BATCH = [0.55, -0.45, 0.05, -0.25, -0.25, None, 0.35, None]
BATCH_SCALED = [None if a is None else a / math.sqrt(0.755 / 5) for a in BATCH]
BY_HAND: dict[str, list[float | None]] = {
    "grpo": SCALED,
    "dr_grpo": PLAIN,
    "dapo": [*SCALED[:3], *[SKIP] * 5],
    "dapo_unscaled": [*PLAIN[:3], *[SKIP] * 5],
    "gspo": SCALED,
    "cispo": SCALED,
    # a: 1 - (0 + 0.5)/2, 0 - (1 + 0.5)/2, 0.5 - (1 + 0)/2; c has nobody to leave in.
    "rloo": [0.75, -0.75, 0.0, 0.0, 0.0, None, None, None],
    "reinforce": BATCH,
    "reinforce_plus_plus": BATCH_SCALED,
    "ppo": REWARDS,
    "rest_em": [1.0, None, 1.0, 1.0, 1.0, None, 1.0, None],
}


def same(found: list[float | None], expected: list[float | None]) -> None:
    assert [a is None for a in found] == [a is None for a in expected]
    assert [a for a in found if a is not None] == pytest.approx(
        [a for a in expected if a is not None]
    )


@pytest.mark.parametrize("name", NAMES)
def test_advantages_by_hand(name: str) -> None:
    same(make(name).advantages(scores(REWARDS, GROUPS)), BY_HAND[name])


def test_options_of_the_advantages() -> None:
    plus = make("reinforce_plus_plus", group_baseline=True, normalise=False)
    same(plus.advantages(scores(REWARDS, GROUPS)), PLAIN)
    em = make("rest_em", threshold=0.5)
    same(em.advantages(scores(REWARDS, GROUPS)), [1.0, *[None] * 5, 1.0, None])


def test_an_overlong_dream_pays_on_a_line() -> None:
    """DAPO's eq. 13: nothing up to limit - overlong, all of the penalty at the limit."""
    dapo = DAPO(overlong_buffer_tokens=4, overlong_penalty=2.0)
    seen = RewardBatch([1.0, 1.0, None, 1.0, 1.0], ["g"] * 5, [5, 6, 9, 8, 10], 10)
    assert dapo.shape_rewards(seen) == [1.0, 1.0, None, 0.0, -1.0]
    assert DAPO().shape_rewards(seen) == list(seen.rewards)
    found = dapo.advantages(seen)
    assert found[0] == found[1] and found[0] > found[3] > found[4]  # type: ignore[operator]


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_what_holds_for_any_rewards(rewards: list, groups: int, rng: Any) -> None:
    names = [str(rng.randrange(groups)) for _ in rewards]
    seen = scores(rewards, names)
    got = {name: make(name).advantages(seen) for name in NAMES}
    for name, advantages in got.items():
        assert len(advantages) == len(rewards)
        unscored = [a for a, r in zip(advantages, rewards, strict=True) if r is None]
        assert all(a is None for a in unscored), f"{name}: unscored is not a zero"
    for group in set(names):
        rows = [i for i, n in enumerate(names) if n == group and rewards[i] is not None]
        centred, scaled, loo = ([got[n][i] for i in rows] for n in ("dr_grpo", "grpo", "rloo"))
        assert sum(centred) == pytest.approx(0.0, abs=1e-9)
        if len({rewards[i] for i in rows}) < 2:
            assert all(a == 0.0 for a in centred + scaled)
            assert all(got["dapo"][i] is None for i in rows)
        else:
            assert sum(a * a for a in scaled) == pytest.approx(len(rows) - 1)
            # RLOO is the centred reward times n / (n - 1).
            assert loo == pytest.approx([a * len(rows) / (len(rows) - 1) for a in centred])
    batch = [a for a in got["reinforce"] if a is not None]
    assert sum(batch) == pytest.approx(0.0, abs=1e-9)


# --- surrogates -----------------------------------------------------------------------


def two_rows(ratios: Tensor) -> tuple[Tensor, LossBatch]:
    """A row of two tokens and one of one, over three words, with these ratios to behaviour."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.tensor([[0, 2], [1, 1]])
    now = logits.detach().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    window = LossBatch(
        tokens_BR=tokens,
        mask_BR=torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
        part=["dream"] * 2,
        advantages_BR=torch.tensor([[1.0], [-3.0]], dtype=torch.float64),
        rollout_logprobs_BR=now - ratios.log(),
    )
    return logits, window


PARTS = {"dream": LossWeights(pg=1.0)}
LIMIT = 4


def loss_of(
    name: str, ratios: Tensor, correction: str, **options: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, slopes of the log-probabilities [2, 2], metrics."""
    logits, window = two_rows(ratios)
    counts = token_counts(PARTS, window.part, [2, 1])
    settings = LossOptions(
        algorithm=make(name, **options),
        max_response_tokens=LIMIT,
        importance_weight=ImportanceWeight(correction),
    )
    loss, metrics = combined_loss(logits, window, PARTS, counts, settings)
    (gradient,) = torch.autograd.grad(loss, logits)
    # d loss / d logits = slope * (onehot - p) of that position.
    onehot = torch.nn.functional.one_hot(window.tokens_BR, 3)
    shape = onehot - logits.detach().softmax(-1)
    slopes = (gradient * shape).sum(-1) / shape.square().sum(-1)
    torch.testing.assert_close(gradient, slopes[..., None] * shape)
    return loss.detach(), slopes, metrics


FAR = torch.tensor([[2.0, 0.5], [1.1, 7.0]], dtype=torch.float64)
NEAR = torch.tensor([[1.0002, 1.0006], [0.9999, 7.0]], dtype=torch.float64)
# Slopes of the loss in each token's log-probability, before the mean's weight.
# A clipped token has slope 0, another -A * ratio.
ROOT = math.sqrt(1.0002 * 1.0006)  # GSPO's ratio of the first row; its tokens share the slope.
SURROGATES: dict[str, tuple[Tensor, list[list[float]], list[list[float]]]] = {
    # name: ratios, value per token, slope per token
    "grpo": (FAR, [[-1.2, -0.5], [3.3, 0]], [[0, -0.5], [3.3, 0]]),
    "dr_grpo": (FAR, [[-1.2, -0.5], [3.3, 0]], [[0, -0.5], [3.3, 0]]),
    "dapo": (FAR, [[-1.28, -0.5], [3.3, 0]], [[0, -0.5], [3.3, 0]]),
    "dapo_unscaled": (FAR, [[-1.28, -0.5], [3.3, 0]], [[0, -0.5], [3.3, 0]]),
    "reinforce_plus_plus": (FAR, [[-1.2, -0.5], [3.3, 0]], [[0, -0.5], [3.3, 0]]),
    "ppo": (FAR, [[-1.2, -0.5], [3.3, 0]], [[0, -0.5], [3.3, 0]]),
    # The row's ratio is 2 * 0.5 = 1: not clipped, and both tokens carry all of it (over length 2
    # in the mean over the sequence).
    "rloo": (FAR, [[-1, -1], [3.3, 0]], [[-2, -2], [3.3, 0]]),
    "gspo": (NEAR, [[-ROOT, -ROOT], [2.9997, 0]], [[-ROOT, -ROOT], [2.9997, 0]]),
}
MEANS = {
    "sequence": [[1 / 4, 1 / 4], [1 / 2, 0]],
    "token": [[1 / 3, 1 / 3], [1 / 3, 0]],
    "constant": [[1 / 8, 1 / 8], [1 / 8, 0]],
}


@pytest.mark.parametrize("name", SURROGATES)
def test_the_clipped_surrogates_by_hand(name: str) -> None:
    ratios, values, slopes = SURROGATES[name]
    weights = torch.tensor(MEANS[make(name).loss_aggregation], dtype=torch.float64)
    loss, found, metrics = loss_of(name, ratios, "off")
    assert loss.item() == pytest.approx(float((torch.tensor(values).double() * weights).sum()))
    assert metrics["dream/pg"] == pytest.approx(loss.item())
    torch.testing.assert_close(found, torch.tensor(slopes).double() * weights)


def test_gspo_clips_a_whole_sequence() -> None:
    """Its root is far beyond 1 + 4e-4 with a positive advantage: no token has a slope."""
    ratios = torch.tensor([[1.1, 0.95], [1.1, 7.0]], dtype=torch.float64)
    _, slopes, _ = loss_of("gspo", ratios, "off")
    assert (slopes[0] == 0).all() and slopes[1, 0] == pytest.approx(3 * 1.1 / 2)


def test_cispo_keeps_every_token_s_gradient() -> None:
    ratios = torch.tensor([[9.0, 0.5], [1.1, 7.0]], dtype=torch.float64)
    _, slopes, _ = loss_of("cispo", ratios, "off")
    expected = torch.tensor([[-5.0, -0.5], [3.3, 0.0]], dtype=torch.float64) / 3
    torch.testing.assert_close(slopes, expected)


@pytest.mark.parametrize("name", ["reinforce", "rest_em"])
def test_what_has_no_ratio_is_log_likelihood(name: str) -> None:
    loss, slopes, _ = loss_of(name, FAR, "off")
    logits, window = two_rows(FAR)
    now = logits.detach().log_softmax(-1).gather(-1, window.tokens_BR[..., None]).squeeze(-1)
    weights = torch.tensor([[-1.0, -1.0], [3.0, 0.0]], dtype=torch.float64) / 3
    assert loss.item() == pytest.approx(float((now * weights).sum()))
    torch.testing.assert_close(slopes, weights)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_all_are_reinforce(name: str) -> None:
    """At ratio 1 every slope is -A, but for the mean: what sets them apart is being off-policy."""
    ones = torch.ones(2, 2, dtype=torch.float64)
    for correction in ("off", "token"):
        _, slopes, _ = loss_of(name, ones, correction)
        weights = torch.tensor(MEANS[make(name).loss_aggregation], dtype=torch.float64)
        if name == "rloo":  # a text is one action: its tokens are added up
            weights = weights * torch.tensor([[2.0], [1.0]])
        expected = torch.tensor([[-1.0, -1.0], [3.0, 0.0]], dtype=torch.float64) * weights
        torch.testing.assert_close(slopes, expected)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_correction_the_ratio_is_taken_to_the_current_policy(name: str) -> None:
    """Then the clip, which compares with the policy that sampled, does not act a second time."""
    _, slopes, _ = loss_of(name, FAR, "token")
    _, plain, _ = loss_of(name, torch.ones(2, 2, dtype=torch.float64), "off")
    truncated = torch.tensor([[2.0, 0.5], [1.1, 0.0]], dtype=torch.float64)
    if name in ("rloo", "gspo"):  # its value is a row's, the slope that of all its tokens' weights
        truncated = truncated.sum(-1, keepdim=True) / torch.tensor([[2.0], [1.0]])
    torch.testing.assert_close(slopes, plain * truncated)


def test_a_mean_over_a_constant_needs_the_constant() -> None:
    with pytest.raises(ValueError, match="max_response_tokens=0"):
        LossOptions(algorithm=make("dr_grpo"))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("grpo", {"clip": 0.1}, r"algorithm 'grpo' with options .*'clip'"),
        ("gspo", {"clip_low": -1.0}, "clip_low=-1.0 must be at least 0"),
        (
            "dapo",
            {"loss_aggregation": "median"},
            "='median' must be one of token, sequence, constant",
        ),
        ("dapo", {"overlong_buffer_tokens": -1}, "overlong_buffer_tokens=-1"),
        ("dapo", {"max_resample_rounds": -1}, "max_resample_rounds=-1 must be a whole number"),
        (
            "dapo_unscaled",
            {"max_resample_rounds": 0.5},
            "max_resample_rounds=0.5 must be a whole number",
        ),
        ("dap", {}, "did you mean 'dapo'"),
    ],
)
def test_a_wrong_option_is_told(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(PluginError, match=told):
        make(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_shows_the_flags(name: str) -> None:
    (row,) = [
        line.split()
        for line in (algorithms.__doc__ or "").splitlines()
        if line.split()[:1] == [name]
    ]
    algorithm, said = make(name), {"yes": True, "no": False}
    assert row[-3] == algorithm.loss_aggregation
    assert said[row[-2]] == algorithm.compares_within_group
    assert said[row[-1]] == algorithm.needs_critic
    assert ("none" in row) == (not algorithm.has_ratio)


@pytest.mark.parametrize("name", NAMES)
@given(
    rewards=st.lists(st.sampled_from([None, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 10), min_size=5, max_size=5),
)
def test_a_group_is_informative_where_it_has_an_advantage(
    name: str, rewards: list[float | None], lengths: list[int]
) -> None:
    """Of algorithms that look at a group or at single rewards; the others need the whole batch."""
    options = {"overlong_buffer_tokens": 4} if name.startswith("dapo") else {}
    algorithm = make(name, **options)
    seen = RewardBatch(rewards, ["g"] * len(rewards), lengths[: len(rewards)], 10)
    if algorithm.compares_within_group or name == "rest_em":
        assert algorithm.is_informative(seen) == any(algorithm.advantages(seen))
    else:
        assert algorithm.is_informative(seen) == any(r is not None for r in rewards)


# --- the critic -----------------------------------------------------------------------


def test_generalised_advantages_by_hand() -> None:
    ppo = PPO(gamma=0.5, gae_lambda=0.5, whiten=False)
    # Values 1, 2, 4, then the end with reward 8: surprises 0.5*2-1 = 0, 0.5*4-2 = 0, 8-4 = 4.
    advantages, returns = ppo.estimate_advantages([8.0], [[1.0, 2.0, 4.0]])
    assert advantages == [[0.25, 1.0, 4.0]]
    assert returns == [[1.25, 3.0, 8.0]]


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(-3, 3))
def test_the_ends_of_lambda(values: list[float], reward: float) -> None:
    """lambda = 1 is the reward minus the value; lambda = 0 one step's surprise."""
    ((whole,), (returns,)) = PPO(gae_lambda=1.0, whiten=False).estimate_advantages(
        [reward], [values]
    )
    assert whole == pytest.approx([reward - v for v in values], abs=1e-9)
    assert returns == pytest.approx([reward] * len(values), abs=1e-9)
    ((one,), _) = PPO(gae_lambda=0.0, whiten=False).estimate_advantages([reward], [values])
    following = [*values[1:], reward]
    assert one == pytest.approx([b - a for a, b in zip(values, following, strict=True)])


def test_whitened_advantages_and_an_unscored_text() -> None:
    advantages, returns = PPO().estimate_advantages([1.0, None, 0.0], [[0.5, 0.5], [0.3], [0.1]])
    flat = torch.tensor([a for row in advantages if row for a in row])
    assert float(flat.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(flat.std()) == pytest.approx(1.0, abs=1e-6)
    assert advantages[1] is None and returns[1] == [0.3]


def test_the_critic_s_loss_by_hand() -> None:
    ppo = PPO(value_clip=0.2)
    now = torch.tensor([[1.0, 0.1, 0.5]], requires_grad=True)
    found = ppo.value_loss(now, torch.tensor([[0.0, 0.0, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]]))
    # Moved 1.0 towards the return but clipped at 0.2: the worse counts. Moved 0.1: itself.
    torch.testing.assert_close(found, torch.tensor([[0.32, 0.405, 0.125]]))
    found.sum().backward()
    assert now.grad is not None
    torch.testing.assert_close(now.grad, torch.tensor([[0.0, -0.9, 0.5]]))


def test_the_critic_s_loss_is_a_stream() -> None:
    logits, window = two_rows(torch.ones(2, 2, dtype=torch.float64))
    window.values_BR = torch.zeros(2, 2, dtype=torch.float64)
    window.returns_BR = torch.tensor([[1.0, 1.0], [0.5, 9.0]], dtype=torch.float64)
    critic = torch.tensor([[0.1, 0.2], [0.1, 9.0]], dtype=torch.float64, requires_grad=True)
    counts = token_counts(PARTS, window.part, [2, 1])
    head = torch.eye(3, dtype=torch.float64)
    options = LossOptions(
        algorithm=PPO(value_weight=0.5), importance_weight=ImportanceWeight("off")
    )
    loss, metrics = chunked_combined_loss(
        logits, head, window, PARTS, counts, options, critic_BR=critic
    )
    expected = (0.9**2 + 0.8**2 + 0.4**2) / 2 / 3
    assert metrics["dream/value"] == pytest.approx(expected)
    assert loss.item() == pytest.approx(metrics["dream/pg"] + 0.5 * expected)
    loss.backward()
    assert critic.grad is not None
    torch.testing.assert_close(
        critic.grad, -0.5 * torch.tensor([[0.9, 0.8], [0.4, 0.0]], dtype=torch.float64) / 3
    )


# --- the KL to the reference ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("k1", 0.5, 0.5),  # the gradient of the KL itself: d, times that of log policy
        ("k2", 0.125, 0.5),
        ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
    ],
)
def test_the_estimators_by_hand(name: str, value: float, slope: float) -> None:
    policy = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    found = reference_kl(policy, torch.tensor([[-1.5]], dtype=torch.float64), name)
    assert found.item() == pytest.approx(value)
    found.backward()
    assert policy.grad is not None and policy.grad.item() == pytest.approx(slope)


@given(st.integers(0, 10**6))
def test_in_expectation_the_estimators_are_the_kl(seed: int) -> None:
    """Over all words, weighed by the policy: k1 and k3 give the KL, k1 and k2 its gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    policy = logits.log_softmax(-1)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for name in ESTIMATORS:
        mean = (policy.exp().detach() * reference_kl(policy, reference, name)).sum()
        (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
        if name != "k2":
            assert mean.item() == pytest.approx(exact.item(), abs=1e-9)
        if name != "k3":
            torch.testing.assert_close(found, slope)


def test_the_kl_joins_the_policy_s_loss() -> None:
    logits, window = two_rows(torch.ones(2, 2, dtype=torch.float64))
    counts = token_counts(PARTS, window.part, [2, 1])
    options = LossOptions(algorithm=make("grpo"), importance_weight=ImportanceWeight("off"))
    plain, _ = combined_loss(logits, window, PARTS, counts, options)
    held = replace(options, reference_kl=0.1, reference_estimator="k2")
    with pytest.raises(ValueError, match=r"weight 0\.1"):
        combined_loss(logits, window, PARTS, counts, held)
    window.reference_logprobs_BR = window.rollout_logprobs_BR - 0.5
    got, metrics = combined_loss(logits, window, PARTS, counts, held)
    assert got.item() == pytest.approx(plain.item() + 0.1 * 0.125)
    assert metrics["dream/reference_kl"] == pytest.approx(math.exp(-0.5) - 0.5)
    with pytest.raises(ValueError, match="'k4' must be one of k1, k2, k3"):
        reference_kl(window.rollout_logprobs_BR, window.rollout_logprobs_BR, "k4")


# --- against TRL ------------------------------------------------------------------------


@pytest.mark.parametrize("name", trl_losses.CASES)
def test_the_loss_is_trl_s(name: str) -> None:
    """Value and gradient, with ratios from 0.74 to 1.35 to the policy that sampled."""
    stored = json.loads(trl_losses.STORED.read_text())[name]
    with contextlib.suppress(ImportError):
        assert trl_losses.run(name) == stored
    made = trl_losses.batch()
    now = made["now"].requires_grad_()
    # Of two words, so that one has any log-probability that is wanted.
    logits = torch.stack([now, torch.log(-torch.expm1(now))], -1)
    window = LossBatch(
        tokens_BR=torch.zeros(4, 5, dtype=torch.long),
        mask_BR=made["mask"],
        part=["dream"] * 4,
        advantages_BR=torch.tensor(trl_losses.ADVANTAGES, dtype=torch.float64)[:, None],
        rollout_logprobs_BR=made["old"],
        reference_logprobs_BR=made["ref"],
    )
    options = LossOptions(
        algorithm=make("grpo" if name == "reference" else name),
        max_response_tokens=trl_losses.LIMIT,
        importance_weight=ImportanceWeight("off"),
        reference_kl=trl_losses.BETA if name == "reference" else 0.0,
    )
    counts = token_counts(PARTS, window.part, trl_losses.LENGTHS)
    loss, _ = combined_loss(logits, window, PARTS, counts, options)
    (slopes,) = torch.autograd.grad(loss, now)
    assert loss.item() == pytest.approx(stored["loss"], abs=1e-12)
    torch.testing.assert_close(slopes, torch.tensor(stored["slopes"], dtype=torch.float64))
