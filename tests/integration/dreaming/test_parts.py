"""The parts of dreaming, each alone: curricula, rewards, trials, the pipeline's counts."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, DreamingConfig, NightConfig
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, from_batch, to_batch
from sleeprl.dreaming import launch as phase
from sleeprl.dreaming.admission import order_groups
from sleeprl.dreaming.checkpoint import write_group
from sleeprl.dreaming.curricula import Uniform, WeakSpots
from sleeprl.dreaming.launch import _samples, make_tasks
from sleeprl.dreaming.metrics import task_outcomes
from sleeprl.dreaming.reward_actor import RewardActor
from sleeprl.dreaming.reward_process import LikelihoodGain
from sleeprl.dreaming.scorer import LearningGainScorer
from sleeprl.dreaming.stage_counts import StageCounts
from sleeprl.dreaming.types import Dream, Outcome, Task
from sleeprl.memory.checkpoint import expert_tensors, widen
from sleeprl.plugins import PluginError
from sleeprl.self_study.study import Pair
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import STUDY_QA, format_qa, with_experience
from sleeprl.trainer.options import TrainerOptions

TASKS = [Task(f"t{i}", i, f"message {i}", (("Who?", f"Ann{i}"),)) for i in range(5)]


# --- curricula --------------------------------------------------------------------

events = st.lists(
    st.one_of(
        st.integers(1, 7),
        st.tuples(st.sampled_from([t.id for t in TASKS]), st.floats(0.0, 5.0)),
    ),
    max_size=12,
)


def play(curriculum: Any, moves: list[Any]) -> list[str]:
    """Ask and tell, as the moves say; what was chosen."""
    chosen: list[str] = []
    for move in moves:
        if isinstance(move, int):
            chosen += [task.id for task in curriculum.next(move)]
        else:
            curriculum.observe([Outcome(move[0], [0.5], move[1])])
    return chosen


@pytest.mark.parametrize("kind", [Uniform, WeakSpots])
@settings(deadline=None, max_examples=60)
@given(before=events, after=events, seed=st.integers(0, 9))
def test_the_state_restores_the_exact_next_choices(
    kind: type[Uniform], before: list[Any], after: list[Any], seed: int
) -> None:
    after = [*after, 5]
    first, other = kind(TASKS, seed), kind(TASKS, seed + 1)
    play(first, before)
    state = json.loads(json.dumps(first.state_dict()))  # it survives a file
    expected = play(first, after)
    play(other, [3])
    other.load_state_dict(state)
    assert play(other, after) == expected


@pytest.mark.parametrize("kind", [Uniform, WeakSpots])
def test_a_curriculum_is_deterministic_by_seed(kind: type[Uniform]) -> None:
    moves: list[Any] = [3, ("t1", 2.0), 1, 1, 9]
    assert play(kind(TASKS, 1), moves) == play(kind(TASKS, 1), moves)
    assert any(play(kind(TASKS, 1), [20]) != play(kind(TASKS, s), [20]) for s in range(2, 5))


@pytest.mark.parametrize("kind", [Uniform, WeakSpots])
@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1], TASKS[:2]])
def test_a_curriculum_gives_as_many_as_asked(kind: type[Uniform], tasks: list[Task]) -> None:
    curriculum = kind(tasks, 0)
    for n in (1, 3, 5, 12):
        chosen = curriculum.next(n)
        assert len(chosen) == n and set(chosen) <= set(tasks)


def test_uniform_takes_each_task_once_per_pass() -> None:
    curriculum = Uniform(TASKS, 0)
    for _ in range(3):
        assert {t.id for _ in TASKS for t in curriculum.next(1)} == {t.id for t in TASKS}


def test_weak_spots_come_more_often_and_no_task_is_lost() -> None:
    curriculum = WeakSpots(TASKS, 0)
    curriculum.observe([Outcome(t.id, [], 0.0) for t in TASKS[1:]] + [Outcome("t0", [], 1.0)])
    drawn = Counter(t.id for _ in range(1000) for t in curriculum.next(1))
    assert drawn["t0"] > 800  # 1.0 against four floors of 0.02
    assert all(drawn[t.id] > 0 for t in TASKS)
    curriculum.observe([Outcome("t0", [], 0.0), Outcome("t3", [], 4.0)])
    assert (
        Counter(t.id for _ in range(300) for t in curriculum.next(1)).most_common(1)[0][0] == "t3"
    )


def test_a_task_that_was_never_tried_counts_as_the_weakest() -> None:
    curriculum = WeakSpots(TASKS, 0)
    curriculum.observe([Outcome("t0", [], 3.0), Outcome("t1", [], 0.1)])
    drawn = Counter(t.id for _ in range(2000) for t in curriculum.next(1))
    assert min(drawn[f"t{i}"] for i in (0, 2, 3, 4)) > 5 * drawn["t1"]


def test_one_request_repeats_no_task_before_all_had_a_turn() -> None:
    curriculum = WeakSpots(TASKS, 0)
    curriculum.observe([Outcome("t0", [], 100.0)])
    assert {t.id for t in curriculum.next(len(TASKS))} == {t.id for t in TASKS}


def test_make_tasks_gives_each_document_its_own_probes() -> None:
    probes = [Pair(n % 2 * 2, f"q{n}", f"a{n}") for n in range(20)]
    tasks = make_tasks(["zero", "one", "two"], probes, NightConfig(seed=1))
    assert [t.id for t in tasks] == ["document-0", "document-2"]
    assert set(tasks[0].probes) == {(f"q{n}", f"a{n}") for n in range(0, 20, 2)}
    assert set(tasks[1].probes) == {(f"q{n}", f"a{n}") for n in range(1, 20, 2)}
    assert tasks[0].message == with_experience("zero", STUDY_QA)
    assert tasks == make_tasks(["zero", "one", "two"], probes, NightConfig(seed=1))
    other = make_tasks(["zero", "one", "two"], probes, NightConfig(seed=2))
    assert tasks[0].probes != other[0].probes
    with pytest.raises(ConfigError, match=r"self_study\.held_out_share.*dreaming\.enabled=false"):
        make_tasks(["zero"], [], NightConfig(seed=1))


# --- rewards ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[None]:
    """An object store: scorer and reward leave their batches there."""
    ray.init(
        "local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dreaming") / "wide"
    widen(tiny_model, directory, 2, 8, "float32")
    return directory


@pytest.fixture(scope="module")
def chat(wide: Path) -> ChatFormatter:
    return ChatFormatter(wide)


def dream(
    chat: ChatFormatter,
    number: int,
    text: str,
    *,
    task: str = "t0",
    finish: str = "stop",
    **meta: Any,
) -> Trajectory:
    ids = chat.response(text) if finish == "stop" else chat.text(text)
    return Trajectory(
        uid=f"dream-0-{number}",
        task_id=task,
        attempt=number,
        purpose="dream",
        prompt_ids=chat.prompt("message"),
        response_ids=ids,
        logprobs=[-1.0] * len(ids),
        versions=[0] * len(ids),
        finish_reason=finish,
        meta=json.dumps(meta),
    )


def test_samples_are_the_best_and_the_worst_dreams_and_no_others_are_read(
    chat: ChatFormatter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(tmp_path / "lake")
    dreams = [replace(dream(chat, n, f"text {n}"), reward=float(n)) for n in range(20)]
    others = [
        dream(chat, 20, "unscored"),
        replace(dreams[0], uid="set-aside", purpose="redrawn", reward=99.0),
        replace(dreams[0], uid="replay-0", purpose="replay", reward=None),
    ]
    lake.append(to_batch([*dreams, *others]), "trajectories")
    made: list[str] = []
    monkeypatch.setattr(Trajectory, "__post_init__", lambda one: made.append(one.uid))
    told = _samples(tmp_path, chat)
    assert [s["note"] for s in told] == [f"reward +{n}.000" for n in (19, 18, 17, 16, 3, 2, 1, 0)]
    assert told[0]["text"] == "text 19" and told[0]["prompt"] == chat.decode(dreams[0].prompt_ids)
    assert made == [f"dream-0-{n}" for n in (19, 18, 17, 16, 3, 2, 1, 0)]
    # What is done again after a crash counts as it was done at last; and there may be few.
    lake.rewrite(to_batch([*dreams[:2], *others]), "trajectories")
    lake.append(to_batch([replace(dream(chat, 0, "anew"), reward=5.0)]), "trajectories")
    assert [s["text"] for s in _samples(tmp_path, chat)] == ["anew", "text 1"]


def test_likelihood_gain() -> None:
    reward = LikelihoodGain(scale=10.0)
    made = Dream(TASKS[0], "text", [1], ["q", "a"], gain=0.03)
    assert reward(made) == pytest.approx(0.3)
    assert reward(replace(made, gain=-0.02)) == pytest.approx(-0.2)
    assert reward(replace(made, parsed=None, gain=None)) == 0.0  # malformed: worth nothing
    assert reward(replace(made, gain=None)) is None  # not tried: not known


USERS = """
import collections, ctypes, itertools, math, os, re, sys, time

def fixed(value):
    return lambda dream: value

def raises():
    def reward(dream):
        raise KeyError("no such thing")
    return reward

def leaves():
    def reward(dream):
        sys.exit(3)
    return reward

class TwoArguments(Exception):  # cannot be unpickled
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

def raises_its_own():
    def reward(dream):
        raise TwoArguments("salt", "pepper")
    return reward

def never_made(how):
    if how == "raises":
        raise OSError("the judge's weights are not there")
    os._exit(3)

class StageCounts:
    '''How many dreams this very object has judged.'''

    def __init__(self, pids=os.devnull):
        with open(pids, "a") as file:
            print(os.getpid(), file=file)
        time.sleep(0.5)  # longer than its deadline
        self.judged = 0

    def __call__(self, dream):
        self.judged += 1
        {
            "sleeps": lambda: time.sleep(60),
            "matches": lambda: re.match("(a+)+$", "a" * 60 + "b"),
            "loops in C": lambda: collections.deque(itertools.repeat(0), maxlen=0),
            "exits": lambda: os._exit(3),
            "crashes": lambda: ctypes.string_at(0),
        }.get(dream.text, lambda: None)()
        return self.judged

def times_out_itself():
    def reward(dream):
        raise TimeoutError("the judge did not answer")
    return reward

def looks():
    def reward(dream):
        return float(len(dream.text)) if dream.parsed else -1.0
    return reward
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_rewards.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "users_rewards", raising=False)
    return "users_rewards"


def reward_config(
    name: str, options: dict[str, Any], timeout_s: float = 5.0, **others: Any
) -> DreamingConfig:
    return DreamingConfig(reward=name, reward_options=options, reward_timeout_s=timeout_s, **others)


@pytest.fixture
def rewarding(wide: Path) -> Iterator[Callable[..., RewardActor]]:
    """Makes a RewardActor in this process."""
    made: list[RewardActor] = []

    def make(name: str, timeout_s: float = 5.0, **options: Any) -> RewardActor:
        made.append(RewardActor(str(wide), reward_config(name, options, timeout_s)))
        return made[-1]

    yield make
    for actor in made:
        actor.reward.close()


def scored(actor: RewardActor, batch: pa.RecordBatch) -> list[Trajectory]:
    return from_batch(ray.get(actor.score(batch, {t.id: t for t in TASKS}).batch))


@pytest.mark.usefixtures("store")
def test_a_reward_sees_the_dream_and_scores_each_row(
    rewarding: Callable[..., RewardActor], chat: ChatFormatter, users: str
) -> None:
    pair = format_qa("Who?", "Ann")
    batch = to_batch(
        [
            replace(dream(chat, 0, pair), gain=0.5, parsed=json.dumps(["Who?", "Ann"])),
            dream(chat, 1, "no pair at all"),
            dream(chat, 2, pair, finish="length"),
        ]
    )
    looks = scored(rewarding(f"{users}.looks"), batch)
    assert [t.reward for t in looks] == [float(len(pair)), -1.0, -1.0]
    assert [t.unscored for t in looks] == [None] * 3
    builtin = scored(rewarding("likelihood_gain", scale=2.0), batch)
    assert [t.reward for t in builtin] == [1.0, 0.0, 0.0]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("factory", "options", "reason"),
    [
        ("raises", {}, "no such thing"),
        ("raises_its_own", {}, "TwoArguments: salt and pepper"),
        ("leaves", {}, "SystemExit"),
        ("fixed", {"value": None}, "None"),
        ("fixed", {"value": math.nan}, "nan"),
        ("fixed", {"value": math.inf}, "inf"),
        ("fixed", {"value": 1e300}, "1e+300"),  # more than the column can hold
        ("fixed", {"value": "high"}, "high"),
        ("fixed", {"value": [0.5]}, "0.5"),
        ("times_out_itself", {}, "the judge did not answer"),
    ],
)
def test_what_cannot_be_scored_is_unscored_with_the_reason(
    rewarding: Callable[..., RewardActor],
    chat: ChatFormatter,
    users: str,
    factory: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    actor = rewarding(f"{users}.{factory}", **options)
    (row,) = scored(actor, to_batch([dream(chat, 0, format_qa("Who?", "Ann"))]))
    assert row.reward is None
    assert row.unscored is not None and reason in row.unscored
    assert f"reward '{users}.{factory}'" in row.unscored


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("sleeps", "gave nothing within dreaming.reward_timeout_s=0.4 s"),
        ("matches", "gave nothing within dreaming.reward_timeout_s=0.4 s"),
        ("loops in C", "gave nothing within dreaming.reward_timeout_s=0.4 s"),
        ("exits", "ended its process (exit code 3)"),
        ("crashes", f"ended its process (exit code {-signal.SIGSEGV})"),
    ],
)
def test_what_ends_a_rewards_process_costs_one_dream(
    rewarding: Callable[..., RewardActor], chat: ChatFormatter, users: str, how: str, reason: str
) -> None:
    actor = rewarding(f"{users}.StageCounts", 0.4)

    def judged(*texts: str) -> list[Trajectory]:
        return scored(actor, to_batch([dream(chat, n, text) for n, text in enumerate(texts)]))

    began = time.monotonic()
    (first,) = judged(how)
    assert first.reward is None
    assert time.monotonic() - began < 2.5
    # Each process has a reward of its own, whose making takes longer than the deadline.
    rows = judged("quick", "quick", how, "quick", how, how, "quick", "quick")
    assert [row.reward for row in rows] == [1, 2, None, 1, None, None, 1, 2]
    told = {row.unscored for row in (first, *rows)} - {None}
    assert told == {f"reward '{users}.StageCounts' {reason}"}


@pytest.mark.usefixtures("store")
def test_a_rewards_process_may_end_between_two_dreams(
    rewarding: Callable[..., RewardActor], chat: ChatFormatter, users: str, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    actor = rewarding(f"{users}.StageCounts", pids=str(pids))
    batch = to_batch([dream(chat, n, "quick") for n in range(2)])
    for wait in (0.0, 0.5):  # before it is noticed, and after
        assert [row.reward for row in scored(actor, batch)] == [1, 2]
        os.kill(int(pids.read_text().split()[-1]), signal.SIGKILL)
        time.sleep(wait)
    assert [row.reward for row in scored(actor, batch)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("never_made", {"how": "raises"}, "OSError: the judge's weights are not there"),
        ("never_made", {"how": "exits"}, "its process ended while it was made"),
        ("fixed", {"valeu": 1}, "unexpected keyword argument 'valeu'"),
        ("nowhere", {}, "has no 'nowhere'"),
    ],
)
def test_a_reward_that_cannot_be_made_is_told(
    wide: Path, users: str, name: str, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(PluginError, match=problem) as told:
        RewardActor(str(wide), reward_config(f"{users}.{name}", options))
    assert f"reward '{users}.{name}'" in str(told.value)


@pytest.mark.usefixtures("store")
def test_several_rewards_judge_at_once(
    wide: Path, chat: ChatFormatter, users: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process of its own; one that is held up holds up nobody else."""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def beside(actor: Any, *arguments: Any, count: int = 1, gpus: float = 0.0) -> list[Any]:
        env = {"env_vars": {"PYTHONPATH": path}}
        of_kind = ray.remote(actor).options(num_cpus=0, runtime_env=env)
        return [of_kind.remote(*arguments) for _ in range(count)]

    monkeypatch.setattr(phase, "spawn_unreserved", beside)
    pids = tmp_path / "pids"
    config = cfg.load(
        None,
        ["resources.reward_workers=2", f"dreaming.reward={users}.StageCounts", "dreaming.reward_timeout_s=6",
         f"dreaming.reward_options={{pids: {pids}}}"],
    )  # fmt: skip
    scorers, rewards = phase.spawn_scorers_and_rewards(
        config, TrainerOptions(str(wide), 0, "float32", 7, 0.1, 1)
    )
    scorers.kill()
    rewards.call("ping")
    assert len(set(pids.read_text().split())) == 2
    for number, text in enumerate(("sleeps", "quick")):
        batch = to_batch([dream(chat, number, text)])
        assert rewards.submit("score", text, batch=batch, tasks={t.id: t for t in TASKS})
    ended: list[str] = []
    while len(ended) < 2:
        ended += [result.tag for result in rewards.ready_or_raise(1.0)]
    rewards.kill()
    assert ended == ["quick", "sleeps"]


def ends(process: psutil.Process) -> bool:
    """Within 5 seconds; else it is killed."""
    gone, left = psutil.wait_procs([process], timeout=5)
    for one in left:
        one.kill()
    return bool(gone)


@pytest.mark.usefixtures("store")
def test_a_rewards_process_ends_with_its_actor(
    wide: Path, chat: ChatFormatter, users: str, tmp_path: Path
) -> None:
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    actor: Any = ray.remote(RewardActor).options(
        num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": path}}
    )
    pids = tmp_path / "pids"
    actor = actor.remote(
        str(wide), reward_config(f"{users}.StageCounts", {"pids": str(pids)}, 60.0)
    )
    parent = ray.get(actor.pid.remote())
    running = actor.score.remote(to_batch([dream(chat, 0, "loops in C")]), {t.id: t for t in TASKS})
    assert ray.wait([running], timeout=2)[1] == [running]
    process = psutil.Process(int(pids.read_text()))
    assert process.ppid() == parent
    os.kill(parent, signal.SIGKILL)
    assert ends(process)


JUDGES = """
import sys
from sleeprl.dreaming.reward_process import RewardProcess
from sleeprl.dreaming.types import Dream, Task

judge = RewardProcess("users_rewards.StageCounts", {"pids": sys.argv[1]}, 60.0, 1e9)
print("made", flush=True)
judge(Dream(Task("t0", 0, "message", ()), "loops in C", [1], None, None))
"""


@pytest.mark.usefixtures("users")
def test_a_rewards_process_needs_nobody_to_end_it(tmp_path: Path) -> None:
    """Ray's raylet kills what a dead actor leaves behind, but may have died with it."""
    pids = tmp_path / "pids"
    command = [sys.executable, "-c", JUDGES, str(pids)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as actor:
        assert actor.stdout is not None and actor.stdout.readline() == b"made\n"
        process = psutil.Process(int(pids.read_text()))
        time.sleep(1)  # it judges by now
        actor.kill()
    assert ends(process)


@pytest.mark.usefixtures("store")
def test_a_group_is_equal_where_the_algorithm_finds_nothing_to_learn(
    wide: Path, chat: ChatFormatter, users: str, tmp_path: Path
) -> None:
    good, bad = format_qa("Who?", "Ann"), "no pair at all"

    def equal(*dreams: Trajectory, **options: Any) -> bool:
        config = reward_config(f"{users}.looks", {}, algorithm_options=options, max_tokens=40)
        actor = RewardActor(str(wide), config)
        batch = to_batch(list(dreams))
        found = ray.get(actor.score(batch, {t.id: t for t in TASKS}).batch)
        write_group(tmp_path, "0-queued", found)
        (loaded,) = actor.load([str(tmp_path / "0-queued.arrow")])
        assert ray.get(loaded.batch) == found
        informative = actor.score(batch, {t.id: t for t in TASKS}).is_informative
        assert loaded.is_informative == informative
        actor.reward.close()
        return not informative

    same = [replace(dream(chat, n, good), parsed='["Who?", "Ann"]') for n in range(3)]
    assert equal(*same)
    assert not equal(*same, dream(chat, 3, bad))
    # What the algorithm makes of length is part of it.
    short, long = dream(chat, 0, "no"), dream(chat, 1, "n" * 38)
    assert equal(short, long)
    assert not equal(short, long, overlong_buffer_tokens=20)


# --- trials -----------------------------------------------------------------------

PAIRS = (("Where does Ann live?", "Ann lives in Oslo"), ("What is her pet?", "a grey cat"))


def scorer(wide: Path, rate: float = 0.5, probes: int = 8) -> LearningGainScorer:
    config = DreamingConfig(trial_learning_rate=rate, trial_questions=probes)
    return LearningGainScorer(TrainerOptions(str(wide), 0, "float32", 0, 0.1, 1), config)


def task(*probes: tuple[str, str]) -> dict[str, Task]:
    return {"t0": Task("t0", 0, "message", probes)}


def judged(
    actor: LearningGainScorer, dreams: list[Trajectory], tasks: dict[str, Task]
) -> list[Trajectory]:
    return from_batch(ray.get(actor.score(to_batch(dreams), tasks).batch))


@pytest.mark.usefixtures("store")
def test_a_dream_that_is_the_probe_teaches_and_the_step_is_taken_back(
    wide: Path, chat: ChatFormatter
) -> None:
    actor = scorer(wide)
    before = {n: p.detach().clone() for n, p in actor.model.named_parameters()}
    (row,) = judged(actor, [dream(chat, 0, format_qa(*PAIRS[0]), note="kept")], task(PAIRS[0]))
    assert row.gain is not None and row.gain > 1e-3
    assert row.parsed == json.dumps([*PAIRS[0]])
    assert json.loads(row.meta) == {"note": "kept"}
    for name, parameter in actor.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.usefixtures("store")
def test_the_gain_is_what_a_real_step_would_bring(wide: Path, chat: ChatFormatter) -> None:
    """Against plain autograd on the Hugging Face model with the whole slot as the expert."""
    actor = scorer(wide, rate=0.3)
    own = expert_tensors(dict(actor.model.named_parameters()))
    generator = torch.Generator().manual_seed(1)
    expert = {n: 0.2 * torch.randn(p.shape, generator=generator) for n, p in own.items()}
    actor.set_expert(expert)
    (row,) = judged(actor, [dream(chat, 0, format_qa(*PAIRS[1]))], task(*PAIRS))

    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in expert.items():
            columns = slice(96, 104)
            piece = named[name][:, columns] if "down_proj" in name else named[name][columns]
            piece.copy_(tensor)

    def likelihood(*pairs: tuple[str, str]) -> torch.Tensor:
        values = []
        for question, answer in pairs:
            prompt, response = chat.prompt(question), chat.response(answer)
            logp = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            values.append(torch.stack([logp[t, i] for t, i in zip(at, response, strict=True)]))
        return torch.cat(values).mean()

    known = likelihood(*PAIRS).item()
    (-likelihood(PAIRS[1])).backward()
    with torch.no_grad():
        for name in expert:
            gradient = named[name].grad
            assert gradient is not None
            if "down_proj" in name:
                named[name][:, 96:104] -= 0.3 * gradient[:, 96:104]
            else:
                named[name][96:104] -= 0.3 * gradient[96:104]
    assert row.gap == pytest.approx(-known, rel=1e-4)
    assert row.gain == pytest.approx(likelihood(*PAIRS).item() - known, rel=1e-2)


@pytest.mark.usefixtures("store")
def test_what_is_no_pair_is_not_tried(wide: Path, chat: ChatFormatter) -> None:
    rows = judged(
        scorer(wide),
        [
            dream(chat, 0, "nothing of the form"),
            dream(chat, 1, format_qa(*PAIRS[0]), finish="length"),
            dream(chat, 2, format_qa(*PAIRS[0])),
            replace(dream(chat, 3, ""), response_ids=[], logprobs=[], versions=[]),
        ],
        task(PAIRS[0]),
    )
    assert [row.gain is None for row in rows] == [True, True, False, True]
    assert [row.parsed is None for row in rows] == [True, True, False, True]
    assert len({row.gap for row in rows}) == 1


@pytest.mark.usefixtures("store")
def test_the_probes_are_limited_and_may_be_none(wide: Path, chat: ChatFormatter) -> None:
    one = [dream(chat, 0, format_qa(*PAIRS[0]))]
    (few,) = judged(scorer(wide, probes=1), one, task(*PAIRS))
    (alone,) = judged(scorer(wide), one, task(PAIRS[0]))
    assert (few.gain, few.gap) == (alone.gain, alone.gap)
    (none,) = judged(scorer(wide), one, task())
    assert none.gain is None


@pytest.mark.usefixtures("store")
def test_the_reference_is_the_smaller_self_whatever_the_expert_says(
    wide: Path, chat: ChatFormatter
) -> None:
    actor = scorer(wide)
    dreams = [dream(chat, 0, format_qa(*PAIRS[0])), dream(chat, 1, "short")]
    born = judged(actor, dreams, task(PAIRS[0]))
    own = expert_tensors(dict(actor.model.named_parameters()))
    actor.set_expert({n: torch.randn(p.shape) for n, p in own.items()})
    grown = judged(actor, dreams, task(PAIRS[0]))
    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    for made, first, second in zip(dreams, born, grown, strict=True):
        ids = torch.tensor([made.prompt_ids + made.response_ids])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        expected = logp[-len(made.response_ids) :].tolist()
        assert first.ref_logprobs == pytest.approx(expected, abs=1e-4)
        assert second.ref_logprobs == first.ref_logprobs
    assert born[0].gap != grown[0].gap


# --- the line ---------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(0, 5), st.lists(st.booleans(), max_size=40), st.data())
def test_a_group_set_aside_makes_nobody_wait_longer(
    size: int, redraws: int, flags: list[bool], data: st.DataObject
) -> None:
    numbers = range(7, 7 + len(flags))
    equal = {number for number, flag in zip(numbers, flags, strict=True) if flag}
    line, aside = order_groups(numbers, equal, size, redraws)
    assert sorted(line + aside) == list(numbers) and set(aside) <= equal
    edges = [6, *line[size - 1 :: size], 99]
    for low, high in pairwise(edges):
        mine = [number for number in aside if low < number < high]
        assert len(mine) <= redraws
        if len(mine) < redraws:  # then none that teaches nothing was left in line
            assert not [n for n in line if low < n <= high and n in equal]
    if numbers:  # one more is found equal
        more = equal | {data.draw(st.sampled_from(numbers))}
        for end in range(7, 8 + len(flags)):
            before, after = (
                order_groups(range(7, end), e, size, redraws)[0] for e in (equal, more)
            )
            assert len(after) <= len(before)


# --- outcomes and counts ----------------------------------------------------------


def test_outcomes_gather_a_task_s_dreams(chat: ChatFormatter) -> None:
    rows = [
        replace(dream(chat, 0, "x", task="t1"), gap=2.0, reward=0.5),
        replace(dream(chat, 1, "x", task="t0"), gap=1.0, reward=0.25),
        replace(dream(chat, 2, "x", task="t1"), gap=4.0, unscored="late"),
    ]
    assert task_outcomes(rows) == [Outcome("t1", [0.5], 3.0), Outcome("t0", [0.25], 1.0)]


STAGES = ("generating", "scoring", "rewarding", "queued", "learning")


@given(st.lists(st.integers(0, 5), min_size=7, max_size=7), st.integers(-1, 1), st.data())
def test_counts_are_held_against_where_the_groups_are(
    numbers: list[int], off: int, data: st.DataObject
) -> None:
    counts = StageCounts()
    places = (*STAGES, "learned", "redrawn")
    for place, groups in zip(places, numbers, strict=True):
        for _ in range(groups):
            counts.move("admitted", place)
    generating, *rest = numbers
    held = [stage for stage, groups in zip(STAGES[1:], rest, strict=False) for _ in range(groups)]
    counts.check(sum(numbers), generating, held)
    if off:
        with pytest.raises(AssertionError, match="lost or doubled"):
            counts.check(sum(numbers) + off, generating, held)
        with pytest.raises(AssertionError, match="lost or doubled"):
            counts.check(sum(numbers), generating + off, held)
    if held:
        index = data.draw(st.integers(0, len(held) - 1))  # one that nobody moved
        other = data.draw(st.sampled_from([stage for stage in STAGES if stage != held[index]]))
        with pytest.raises(AssertionError, match="lost or doubled"):
            counts.check(sum(numbers), generating, [*held[:index], other, *held[index + 1 :]])


def test_a_group_cannot_be_moved_twice() -> None:
    counts = StageCounts()
    counts.move("admitted", "generating")
    counts.move("generating", "scoring")
    with pytest.raises(AssertionError, match="cannot go from generating to scoring"):
        counts.move("generating", "scoring")
