"""Single phases of a night, with what they call stood in for: what they hand on, and where."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError
from sleeprl.config.validation import validate_plugins
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, from_batch
from sleeprl.dreaming import launch
from sleeprl.evaluation.questions import Day, Question
from sleeprl.night import phases
from sleeprl.night.phases import PHASES, phases_of, rehearse_level, study_day
from sleeprl.night.run_dir import RunDirectory
from sleeprl.plugins import PluginError
from sleeprl.self_study import question_bank
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
    stages = SimpleNamespace(
        context_step=1,
        checkpoint_before=lambda index: before,
        lake_of=lambda index: Lake(tmp_path / f"lake-{index}"),
    )
    return SimpleNamespace(
        config=cfg.load(None, ["dreaming.enabled=false"]),
        stages=stages,
        run=SimpleNamespace(dir=run, result=lambda key: {"wake": MET}[key]),
        lake=Lake(run / "lake"),
        chat=None,
        day=Day(["a text"], [Question("a question", "an answer", "retention")]),
        engines=None,
    )


@pytest.mark.parametrize(("index", "asked"), [(0, "of old"), (2, "of tonight")])
def test_a_level_that_hands_on_is_asked_about_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, asked: str
) -> None:
    """Tonight's slot is in a level that hands on after the day's transfer, not before it."""
    night = a_night(tmp_path)
    question_bank.save(["of old"], night.stages.checkpoint_before(0))
    question_bank.save(["of tonight"], night.run.dir)
    given: list[list[str]] = []

    def rehearse(_: Any, bank: list[str]) -> Study:
        given.append(bank)
        return Study([text("t")])

    monkeypatch.setattr(phases, "write_rehearsal", rehearse)
    assert rehearse_level(night, index) == {"new": 1, "replay": 0}
    assert given == [[asked]]
    rows = from_batch(night.stages.lake_of(index).read("trajectories"))
    assert [row.uid for row in rows] == ["t"]


def test_self_study_after_a_kill_leaves_no_text_of_the_first_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the lake and the end of the phase, it samples again, and holds out others:
    what was trained on at first may be a probe now."""
    night = a_night(tmp_path)
    attempts = iter(
        [Study([text("a"), text("b")], question_bank=["q"]), Study([text("b"), text("c")])]
    )
    monkeypatch.setattr(phases, "write_study", lambda *_, **__: next(attempts))

    def killed(study: Study, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as at_first:
        at_first.setattr(Study, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            study_day(night)
    study_day(night)
    uids = [row.uid for row in from_batch(night.lake.read("trajectories"))]
    assert sorted(uids) == ["b", "c"]


def test_a_day_without_old_questions_is_asked_its_own_after_a_kill_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first attempt has put its own into the day: nothing that they ask may be trained on."""
    night, held = a_night(tmp_path), []
    night.run.result = lambda key: {"wake": {"retention": 0, "texts": 0}}[key]

    def study(*_: Any, hold_out: float, **__: Any) -> Study:
        held.append(hold_out)
        return Study([text("a")])

    monkeypatch.setattr(phases, "write_study", study)
    monkeypatch.setattr(phases, "ask_own_questions", asked)
    monkeypatch.setattr(phases, "write_own_texts", stated)
    study_day(night)
    assert held == [0.25]
    assert Day.load(night.run.dir / "day.json") == replace(night.day, probes=[], texts=["a fact"])


def test_ones_own_old_questions_stay_where_the_day_has_no_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = a_night(tmp_path)
    night.run.result = lambda key: {"wake": {"retention": 1, "texts": 0}}[key]
    monkeypatch.setattr(phases, "write_study", lambda *_, **__: Study([text("a")]))
    monkeypatch.setattr(phases, "ask_own_questions", asked)
    monkeypatch.setattr(phases, "write_own_texts", stated)
    study_day(night)
    assert Day.load(night.run.dir / "day.json") == replace(night.day, texts=["a fact"])


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

    monkeypatch.setattr(launch.DreamingCheckpoint, "load", load)
    monkeypatch.setattr(launch, "make_tasks", lambda *_: ["a task"])
    pool: Any = SimpleNamespace(version=3)
    nothing: Any = None
    with pytest.raises(Found):
        context = launch.DreamingContext(
            cfg.load(None, []), nothing, Path("expert"), Path("runs/n"), nothing, [], [], []
        )
        launch.run_dreaming(context, pool, print, nothing)
    assert asked == [tmp_path / "runs/n/dreaming-state"]


def test_a_phase_of_ones_own_stands_where_it_says() -> None:
    names = ["phases=[examples.my_phase.purposes]"]
    keys = [phase.key for phase in phases_of(cfg.load(None, names))]
    assert keys[keys.index("self_study") + 1] == "purposes"
    assert [key for key in keys if key != "purposes"] == [
        phase.key for phase in phases_of(cfg.load(None, []))
    ]
    with pytest.raises(ConfigError, match="'purposes' of another phase"):
        phases_of(
            cfg.load(None, ["phases=[examples.my_phase.purposes,examples.my_phase.purposes]"])
        )


@pytest.mark.parametrize(
    "word", ["phases=[examples.my_phase.nothing]", "evaluation.metrics=[nowhere.x]"]
)
def test_a_plug_in_that_is_not_there_is_told_before_the_night(word: str) -> None:
    with pytest.raises(PluginError, match=word.partition("=")[0]):
        validate_plugins(cfg.load(None, [word]))


def test_a_phase_after_one_that_the_night_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = replace(PHASES[0], key="lost", after="wake_learning")
    monkeypatch.setattr(phases, "create", lambda *_: lost)
    with pytest.raises(ConfigError, match="after 'wake_learning', which this night does not have"):
        phases_of(cfg.load(None, ["phases=[lost]"]))


def test_what_each_attempt_does_adds_up_and_a_finished_phase_is_not_done_again(
    tmp_path: Path,
) -> None:
    done: list[str] = []
    for _ in range(2):  # the second attempt goes on from the first one's directory
        progress: Any = SimpleNamespace(
            **dict.fromkeys(("start", "finish", "skip", "warn"), lambda *_: None)
        )
        run = RunDirectory(cfg.load(None, [f"runs={tmp_path}", "name=cut"]), progress)
        run.run_always("prepare", lambda: time.sleep(0.05) or done.append("prepare"), lambda _: "")
        assert run.run_once("wake", lambda: done.append("wake") or 7, lambda _: "") == 7
        run.close()
    assert done == ["prepare", "wake", "prepare"]
    assert run.state["seconds"]["prepare"] >= 0.1
    assert run.state["wall_seconds"] >= run.state["seconds"]["prepare"]
