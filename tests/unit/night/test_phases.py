"""Single phases of a night, with what they call stood in for: what they hand on, and where."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sleeprl.night.orchestrator as night_module
from sleeprl.config import loader as cfg
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, from_batch
from sleeprl.dreaming import launch as phase
from sleeprl.evaluation.questions import Day, Question
from sleeprl.night.orchestrator import Night
from sleeprl.night.run_dir import RunDirectory
from sleeprl.self_study import question_bank as notebook
from sleeprl.self_study.study import Study


def text(uid: str) -> Trajectory:
    return Trajectory(uid, "d", 0, "self_study", [1], [2], [-1.0], [0], "stop")


MET = {"retention": 1, "texts": 1}


def asked(day: Day, *_: Any) -> Day:
    return replace(day, probes=[])


def stated(day: Day, *_: Any) -> Day:
    return replace(day, texts=["a fact"])


def a_night(tmp_path: Path) -> Any:
    """As much of a ``Night`` as writes texts: one transfer of the day, and one level handed on
    before it and after it."""
    before, run = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    run.mkdir()
    selves = SimpleNamespace(
        from_context=1,
        before=lambda index: before,
        lake=lambda index: Lake(tmp_path / f"lake-{index}"),
    )
    return SimpleNamespace(
        config=cfg.load(None, ["dreaming.enabled=false"]),
        selves=selves,
        run=SimpleNamespace(dir=run, result=lambda key: {"wake": MET}[key]),
        lake=Lake(run / "lake"),
        chat=None,
        day=Day(["a text"], [Question("a question", "an answer", "retention")]),
        _engines=lambda: None,
    )


@pytest.mark.parametrize(("index", "asked"), [(0, "of old"), (2, "of tonight")])
def test_a_level_that_hands_on_is_asked_about_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, asked: str
) -> None:
    """Tonight's slot is in a level that hands on after the day's transfer, not before it."""
    self = a_night(tmp_path)
    notebook.save(["of old"], self.selves.before(0))
    notebook.save(["of tonight"], self.run.dir)
    given: list[list[str]] = []

    def rehearse(*_: Any, notebook: list[str]) -> Study:
        given.append(notebook)
        return Study([text("t")])

    monkeypatch.setattr(night_module, "rehearse", rehearse)
    assert Night.recollect(self, index) == {"new": 1, "replay": 0}
    assert given == [[asked]]
    assert [row.uid for row in from_batch(self.selves.lake(index).read("trajectories"))] == ["t"]


def test_self_study_after_a_kill_leaves_no_text_of_the_first_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the lake and the end of the phase, it samples again, and holds out others:
    what was trained on at first may be a probe now."""
    self = a_night(tmp_path)
    attempts = iter([Study([text("a"), text("b")], notebook=["q"]), Study([text("b"), text("c")])])
    monkeypatch.setattr(night_module, "study", lambda *_, **__: next(attempts))

    def killed(study: Study, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as at_first:
        at_first.setattr(Study, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            Night.self_study(self)
    Night.self_study(self)
    uids = [row.uid for row in from_batch(self.lake.read("trajectories"))]
    assert sorted(uids) == ["b", "c"]


def test_a_day_without_old_questions_is_asked_its_own_after_a_kill_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first attempt has put its own into the day: nothing that they ask may be trained on."""
    self, held = a_night(tmp_path), []
    self.run.result = lambda key: {"wake": {"retention": 0, "texts": 0}}[key]

    def study(*_: Any, hold_out: float, **__: Any) -> Study:
        held.append(hold_out)
        return Study([text("a")])

    monkeypatch.setattr(night_module, "study", study)
    monkeypatch.setattr(night_module.figures, "own_retention", asked)
    monkeypatch.setattr(night_module.figures, "own_texts", stated)
    Night.self_study(self)
    assert held == [0.25]
    assert Day.load(self.run.dir / "day.json") == replace(self.day, probes=[], texts=["a fact"])


def test_ones_own_old_questions_stay_where_the_day_has_no_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    self = a_night(tmp_path)
    self.run.result = lambda key: {"wake": {"retention": 1, "texts": 0}}[key]
    monkeypatch.setattr(night_module, "study", lambda *_, **__: Study([text("a")]))
    monkeypatch.setattr(night_module.figures, "own_retention", asked)
    monkeypatch.setattr(night_module.figures, "own_texts", stated)
    asks = self.day.probes
    Night.self_study(self)
    assert Day.load(self.run.dir / "day.json") == replace(self.day, probes=asks, texts=["a fact"])


def test_dreaming_hands_its_actors_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They work in a directory of their own."""
    monkeypatch.chdir(tmp_path)
    asked: list[Path] = []

    class Found(Exception):
        pass

    def load(path: Path, first_version: int) -> None:
        asked.append(path)
        raise Found

    monkeypatch.setattr(phase.Position, "load", load)
    monkeypatch.setattr(phase, "make_tasks", lambda *_: ["a task"])
    fleet: Any = SimpleNamespace(version=3)
    nothing: Any = None
    with pytest.raises(Found):
        phase.run_dreaming(
            cfg.load(None, []), fleet, nothing, Path("expert"), nothing, [], [], Path("runs/n"),
            [], print, nothing,
        )  # fmt: skip
    assert asked == [tmp_path / "runs/n/dreaming-state"]


def test_what_each_attempt_does_adds_up_and_a_finished_phase_is_not_done_again(
    tmp_path: Path,
) -> None:
    done: list[str] = []
    for _ in range(2):  # the second attempt goes on from the first one's directory
        progress: Any = SimpleNamespace(
            **dict.fromkeys(("start", "finish", "skip"), lambda *_: None)
        )
        run = RunDirectory(cfg.load(None, [f"runs={tmp_path}", "name=cut"]), progress)
        run.attempt("prepare", lambda: time.sleep(0.05) or done.append("prepare"), lambda _: "")
        assert run.phase("wake", lambda: done.append("wake") or 7) == 7
        run.close()
    assert done == ["prepare", "wake", "prepare"]
    assert run.state["seconds"]["prepare"] >= 0.1
    assert run.state["wall_seconds"] >= run.state["seconds"]["prepare"]
