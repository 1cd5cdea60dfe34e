"""Dreaming with the real learner, scorer and rewards, and engines on torch, while things die.

With ``staleness=0`` a group's dreams depend on its number alone, so whatever died, each group is
learned from once and the expert is, to the bit, that of a run in which nothing did.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import count_stale_tokens, from_batch
from sleeprl.dreaming import launch as phase
from sleeprl.dreaming.checkpoint import DreamingCheckpoint, read_group
from sleeprl.dreaming.types import build_request
from sleeprl.memory.checkpoint import EXPERT
from sleeprl.night.replay import _generate_and_score, replay_trainer
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.rollout.torch_engine import TorchEngine
from sleeprl.text.chat import ChatFormatter
from sleeprl.utils.files import sha256_file
from tests.integration.dreaming.test_staleness import (  # noqa: F401
    DOCUMENTS,
    PROBES,
    engines,
    learner,
    place,
    settings,
)
from tests.support.guard import Puts
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # all of it against one unbroken run
UPDATES, GROUPS, SIZE = 12, 2, 4
RAY: dict[str, Any] = {
    "address": "local", "num_cpus": 4, "include_dashboard": False, "log_to_driver": False,
    "logging_level": "error",
}  # fmt: skip


Outcome = tuple[str, dict[str, list[str]]]


def init() -> None:
    """A Ray in which a batch that is opened in this process raises."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    os.environ["SLEEPRL_TEST_DRIVER"] = str(os.getpid())
    hook = "tests.support.guard.guard"
    ray.init(**RAY, runtime_env={"env_vars": variables, "worker_process_setup_hook": hook})


def dream(
    place: Path,  # noqa: F811
    run: Path,
    on_step: Callable[[int, Mapping[str, Any]], None] = lambda *_: None,
    pool: EnginePool | None = None,
    failures: int = 0,
    told: Callable[[str], None] = print,
    staleness: int = 0,
    updates: int = UPDATES,
) -> None:
    """One phase, or the rest of one, in ``run``."""
    config, chat = settings(place), ChatFormatter(place / "wide")
    config.dreaming.steps, config.dreaming.max_staleness = updates, staleness
    config.resources.max_failures = failures
    if not (run / "lake").is_dir():
        shutil.copytree(place / "loop" / "lake", run / "lake")
    pool = pool or engines(place)
    context = phase.DreamingContext(
        config, learner(place), place / "born", run, chat, DOCUMENTS, PROBES,
        chat.prompt(DOCUMENTS[0]),
    )  # fmt: skip
    phase.run_dreaming(context, pool, told, on_step)
    pool.shutdown()


def outcome(run: Path) -> Outcome:
    """Hash of the expert, and the uids of what was learned from and what was set aside, in order."""
    rows = Lake(run / "lake").read("trajectories", ["purpose"]).to_pylist()
    uids = {kind: [row["uid"] for row in rows if row["purpose"] == kind]
            for kind in ("dream", "redrawn")}  # fmt: skip
    return sha256_file(run / "dreaming" / EXPERT), uids


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(place: Path, unbroken: Path) -> Outcome:  # noqa: F811
    """What an unbroken run comes to; its driver has not opened one batch."""
    return unbroken_outcome(place, unbroken, UPDATES)


def unbroken_outcome(place: Path, run: Path, updates: int) -> Outcome:  # noqa: F811
    init()
    dream(place, run, updates=updates)
    found = outcome(run)
    puts = ray.remote(Puts).remote()
    refs = ray.get(puts.put.remote())
    assert ray.get(puts.opened.remote(refs)) == 1
    with pytest.raises(Exception, match="references only"):
        ray.get(refs[0])
    ray.shutdown()
    learned, aside = found[1]["dream"], found[1]["redrawn"]
    assert len(learned) == updates * GROUPS * SIZE and aside
    count = (len(learned) + len(aside)) // SIZE
    assert set(learned + aside) == {f"dream-{g}-{n}" for g in range(count) for n in range(SIZE)}
    return found


class Mortal(TorchEngine):
    """Kills itself, or its learner, at the moments that files name; each once."""

    def __init__(self, name: str, options: Any) -> None:
        super().__init__(name, options)
        self.place = Path(os.environ["MORTAL"])

    def _once(self, moment: str) -> bool:
        path = self.place / moment
        if path.exists():
            path.unlink()
            return True
        return False

    async def _take_turn(self) -> None:
        await super()._take_turn()
        tokens = sum(len(made.token_ids) for made in self._growing.values())
        if self.updates.version == 3 and tokens > 20 and self._once("generation"):
            os.kill(os.getpid(), signal.SIGKILL)

    async def load_bucket(self, update_info: dict[str, Any]) -> None:
        await super().load_bucket(update_info)
        if self.updates.pending_version == 5 and self._once("update"):
            os.kill(os.getpid(), signal.SIGKILL)


def test_the_driver_opens_no_batch(whole: Outcome) -> None:
    """``whole`` would have raised where one was opened; that it would is shown there."""
    assert len(whole[1]["dream"]) == UPDATES * GROUPS * SIZE


def test_engines_and_learner_are_replayed_alone(
    place: Path,  # noqa: F811
    unbroken: Path,
    whole: Outcome,
    tmp_path: Path,
) -> None:
    config, chat = settings(place), ChatFormatter(place / "wide")
    position = DreamingCheckpoint.load(unbroken / "dreaming-state")
    canary = chat.prompt(DOCUMENTS[0])
    context = phase.DreamingContext(
        config, learner(place), place / "born", unbroken, chat, DOCUMENTS, PROBES, canary
    )
    job = context.trainer_job(position.first_version)
    init()
    try:
        found = replay_trainer(config, job, tmp_path, unbroken / "dreaming")
        pool = engines(place)  # the newborn expert is zero, so they have its weights
        tasks = {task.id: task for task in phase.make_tasks(DOCUMENTS, PROBES, config)}
        requests = [
            build_request(
                config.dreaming, config.seed, number, tasks[task], phase.prompt_builder(config, chat)
            )
            for number, task in enumerate(position.task_ids[:6])
        ]  # fmt: skip
        wrote = _generate_and_score(config, pool, job, tasks, requests, tmp_path)
        pool.shutdown()
    finally:
        ray.shutdown()
    assert (found.groups, found.work) == (UPDATES * GROUPS, UPDATES)
    assert found.expert == whole[0] and found.same_expert
    texts = [
        Lake(run / "lake").read("trajectories", ["purpose", "response_ids"]).to_pylist()
        for run in (unbroken, tmp_path)
    ]
    recorded, again = (
        {r["uid"]: r["response_ids"] for r in rows if r["purpose"] in ("dream", "redrawn")}
        for rows in texts
    )
    assert len(again) == 6 * SIZE and wrote.work == sum(map(len, again.values()))
    # Before the first update both were written with the same weights, after it not any more.
    first = {f"dream-{group}-{n}" for group in range(GROUPS) for n in range(SIZE)}
    alike = {uid for uid, ids in again.items() if recorded[uid] == ids}
    assert first <= alike < set(again)


def test_engines_and_a_learner_worker_die_and_the_same_is_learned(
    place: Path,  # noqa: F811
    whole: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine in the middle of generation, during a weight update, and between updates; then a
    learner worker in the middle of a step."""
    moments = tmp_path / "moments"
    moments.mkdir()
    for moment in ("generation", "update"):
        (moments / moment).touch()
    monkeypatch.setenv("MORTAL", str(moments))
    told: list[str] = []
    victims: list[str] = []

    def kill(name: str) -> None:
        for actor in [a for a in psutil_children() if name in a[1]]:
            os.kill(actor[0], signal.SIGKILL)
            victims.append(name)

    def on_step(step: int, metrics: Mapping[str, Any]) -> None:
        if step == 6:
            kill("Mortal")  # between two updates: nothing has been admitted yet
        if step == 7:  # while the next step is under way
            threading.Timer(0.5, kill, ["DreamTrainer"]).start()

    config = settings(place)
    config.resources.engine = "tests.scenarios.test_recovery.Mortal"
    monkeypatch.setattr(sys.modules[__name__], "settings", lambda _: config)
    init()
    try:
        options = phase.EngineOptions.from_config(config, str(place / "wide"), "float32")
        first = phase.spawn_engine(0, options, 1, 0, "tests.scenarios.test_recovery.Mortal")
        pool = EnginePool(ActorGroup("engine", [first]))
        pool.group.call("start")
        dream(place, tmp_path / "run", on_step, pool, failures=4, told=told.append)
    finally:
        ray.shutdown()
    assert list(moments.iterdir()) == [] and victims == ["Mortal", "DreamTrainer"]
    assert [line.partition(" died")[0] for line in told] == ["engine-0"] * 3 + ["learner-0"]
    assert outcome(tmp_path / "run") == whole


def psutil_children() -> list[tuple[int, str]]:
    """Process ids and titles of this session's Ray actors."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found.append((process.pid, " ".join(process.cmdline())))
        except psutil.Error:
            continue
    return [each for each in found if each[1].startswith("ray::")]


def driver(
    place: Path,  # noqa: F811
    run: Path,
    staleness: int = 0,
    updates: int = UPDATES,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, __file__, str(place), str(run), str(staleness), str(updates)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=(run / "stderr").open("ab"), start_new_session=True,
    )  # fmt: skip


def cut(process: subprocess.Popen[bytes], run: Path, after: float) -> None:
    """Kill a driver so many seconds after the first update that it keeps."""

    def version() -> int:
        return DreamingCheckpoint.load(run / "dreaming-state").version

    before, deadline = version(), time.monotonic() + 300
    while version() == before:
        assert process.poll() is None, (run / "stderr").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    moment = time.monotonic() + after
    while time.monotonic() < moment and version() < before + 2:
        time.sleep(0.005)
    assert process.poll() is None, "the run was over before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what its Ray leaves behind


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("count", "updates"), [(1, UPDATES), pytest.param(10, 24, marks=pytest.mark.soak)]
)
def test_a_driver_killed_at_random_moments_learns_the_same(
    place: Path,  # noqa: F811
    whole: Outcome,
    count: int,
    updates: int,
    tmp_path: Path,
) -> None:
    """Each kill comes at a random moment of the update after the first that the driver has done."""
    expected = whole if updates == UPDATES else unbroken_outcome(place, tmp_path / "all", updates)
    rng, run, kills = random.Random(11), tmp_path / "cut", []
    run.mkdir()
    (run / "stderr").touch()
    for _ in range(count):
        cut(driver(place, run, 0, updates), run, rng.uniform(0, 0.6))
        kills.append(DreamingCheckpoint.load(run / "dreaming-state").version)
    finished = driver(place, run, 0, updates).wait(timeout=300)
    assert finished == 0, (run / "stderr").read_text()[-3000:]
    assert len(kills) == count and kills == sorted(kills) and kills[-1] < updates
    assert outcome(run) == expected
    told = {json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()}
    # A kill may come after an update was kept and before it was told.
    every = set(range(1, updates + 1))
    assert every - set(kills) <= told <= every


@pytest.mark.timeout(900)
def test_what_engines_had_written_when_the_driver_was_killed_is_gone_on_from(
    place: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """With a staleness of one an update finds engines in the middle of the next groups: their tokens
    are kept with the position, and are the beginning of what is written in the end. With a staleness
    of none by then, what is too old of it is read, and not learned from."""
    (tmp_path / "stderr").touch()
    kept: dict[str, list[int]] = {}
    for after in (0.0, 0.1):
        cut(driver(place, tmp_path, 1), tmp_path, after)
        position = DreamingCheckpoint.load(tmp_path / "dreaming-state")
        for stage, path in position.group_files().values():
            rows = from_batch(read_group(str(path))) if stage == "generating" else ()
            running = [row for row in rows if row.response_ids and row.finish_reason == "running"]
            kept |= {row.uid: row.response_ids for row in running}
    assert driver(place, tmp_path, 0).wait(300) == 0, (tmp_path / "stderr").read_text()[-3000:]
    rows = from_batch(Lake(tmp_path / "lake").read("trajectories"))
    ended = {row.uid: row.response_ids for row in rows if row.purpose in ("dream", "redrawn")}
    assert kept and all(ended[uid][: len(ids)] == ids for uid, ids in kept.items())
    dreams = [row for row in rows if row.purpose == "dream"]
    assert len(dreams) == UPDATES * GROUPS * SIZE
    over = [row.uid.partition("@") for row in rows if row.purpose == "outdated"]
    assert all(uid in ended and of for uid, _, of in over)
    told = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    last, before = [s for s in told if s["step"] > position.version], position.version
    old = [
        count_stale_tokens(row.versions, position.first_version + before + n // (GROUPS * SIZE))
        for n, row in enumerate(dreams[before * GROUPS * SIZE :])
    ]
    assert sum(step["tokens_too_old"] for step in last) == sum(old)
    assert max(step["staleness_max"] for step in last) == 0 < max(s["staleness_max"] for s in told)


if __name__ == "__main__":
    init()
    steps = Path(sys.argv[2]) / "steps.jsonl"

    def tell(step: int, metrics: Mapping[str, Any]) -> None:
        told = {name: metrics[name] for name in ("tokens_too_old", "staleness_max")}
        with steps.open("a") as file:
            file.write(json.dumps({"step": step, **told}) + "\n")

    staleness, updates = map(int, sys.argv[3:])
    dream(Path(sys.argv[1]), Path(sys.argv[2]), tell, staleness=staleness, updates=updates)
