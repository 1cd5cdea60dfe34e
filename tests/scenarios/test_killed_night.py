"""A night is a transaction: killed again and again, it ends with the same model, committed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sleeprl.lineage import LineageStore
from sleeprl.utils.files import sha256_file
from tests.support.nights import SMALL, done, kill_when, sleeprl, steps, summary

pytestmark = pytest.mark.slow

# Dreams and roll-outs are written while the learner learns: which version writes a dream, and the
# last bit of a log-probability, depend on the moment. All else does not.
WORDS = [
    *SMALL,
    "wake.people=2",
    "baselines=[]",
    "dreaming.enabled=false",
    "consolidation.steps=32",
    "consolidation.rollout_prompts=0",
    "consolidation.checkpoint_every=8",
]


# By name, whether the moment of a kill has come.
KILLS: dict[str, Callable[[Path], bool]] = {
    "planned": lambda run: done(run, "plan"),
    "studied": lambda run: done(run, "self_study"),
    "half consolidated": lambda run: len(steps(run)) >= 20,
    "committed": lambda run: bool(LineageStore(run.parent.parent / "cut").list()),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(["half consolidated"], id="once"),
        pytest.param([*KILLS], marks=pytest.mark.soak, id="at every turn"),
    ],
)
def test_a_killed_night_ends_as_if_it_was_not(kills: list[str], tmp_path: Path) -> None:
    whole = sleeprl("night", "name=whole", "generations=whole", *WORDS, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]

    run, store = tmp_path / "runs" / "cut", LineageStore(tmp_path / "cut")
    again = ["--resume", "runs/cut"]
    words = ["name=cut", "generations=cut", *WORDS]
    for name in kills:
        kill_when(partial(KILLS[name], run), tmp_path, *words)
        if name != "committed":
            assert not store.list()
            heard = len(steps(run))
        words = again
    committed = [each.id for each in store.list()]
    finished = sleeprl("night", *again, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]

    told, cut = summary(tmp_path, "whole"), summary(tmp_path, "cut")
    assert [each.id for each in store.list()] == [cut["generation"]]
    assert committed == ([cut["generation"]] if "committed" in kills else [])
    assert store.head() == cut["generation"] and store.verify(cut["generation"]) == []
    hashes = [
        sha256_file(tmp_path / name / generation / "model.safetensors")
        for name, generation in (("whole", told["generation"]), ("cut", cut["generation"]))
    ]
    assert hashes[0] == hashes[1]
    for state in ("before", "before_with_context", "after"):
        assert told[state] == cut[state]
    # Workers run ahead of what a killed driver was told, so the sum may even be below 32.
    assert len(steps(run)) < heard + 32, "the consolidation went on from a checkpoint"
