"""What a dry run says before a night: prompts that do not fit, texts, minutes and memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sleeprl.config import loader as cfg
from sleeprl.config import validation
from sleeprl.config.schema import ConfigError
from sleeprl.models.resolve import EMBEDDED
from sleeprl.night import estimate
from sleeprl.night.estimate import ModelSize, NightEstimate
from sleeprl.night.preview import DayInTokens, preview_night
from tests.support.paths import ROOT

DAY = DayInTokens([100] * 10, [12] * 700, [120] * 700, 100)
SIZE = ModelSize.read(EMBEDDED)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "available_cpus", lambda: 8)
    return tmp_path


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("wake.people_per_document=12", "document 0 of the embedded world"),
        ("model.max_length=110", "self_study.max_tokens=64 may follow"),
        ("dreaming.max_tokens=440", "dreaming.max_tokens=440 may follow"),
        ("evaluation.max_tokens=450", "with its document makes a prompt of"),
        ("wake.people=30000", "the embedded world has 5854 fresh people"),
    ],
)
def test_a_day_that_does_not_fit_is_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        preview_night(cfg.load(None, [word]), EMBEDDED)


def test_documents_and_questions_of_ones_own_are_read(here: Path) -> None:
    (here / "a.txt").write_text("Mara lives in Oslo.")
    (here / "b.txt").write_text("She is a nurse. " * 150)
    (here / "q.jsonl").write_text('{"question": "Where does Mara live?", "answer": "Oslo"}\n')
    words = ["wake.inputs=[a.txt]", "evaluation.questions=q.jsonl"]
    day = preview_night(cfg.load(None, words), EMBEDDED)
    assert day is not None and len(day.documents) == len(day.questions) == 1
    assert day.with_context[0] > day.questions[0] > 0 and day.exact
    guessed = preview_night(cfg.load(None, words), None)
    assert guessed is not None and not guessed.exact and guessed.documents[0] > 0
    assert preview_night(cfg.load(None, ["wake.inputs=['-']"]), EMBEDDED) is None
    question = {"question": "Where " + "or where " * 300, "answer": "Oslo"}
    (here / "q.jsonl").write_text(json.dumps(question))
    with pytest.raises(ConfigError, match="the question 'Where or where"):
        preview_night(cfg.load(None, words), EMBEDDED)


def test_more_texts_than_the_world_has_are_no_error() -> None:
    day = preview_night(cfg.load(None, ["evaluation.perplexity_texts=100000"]), EMBEDDED)
    assert day is not None and day.texts > 100


def test_counts_and_minutes_are_near_those_of_a_measured_night() -> None:
    night = json.loads((ROOT / "benchmarks/results/night.json").read_text())["nights"][0]
    told = NightEstimate(cfg.load(), DAY, SIZE, "float32")
    assert told.new_texts == pytest.approx(night["self_study"]["new"], rel=0.2)
    study, asked, consolidation, dreaming, _ = told.phases()
    assert f"up to {15400:,} texts" in study.what and night["self_study"]["written"] < 15400
    for phase, key in (
        (study, "self_study"),
        (consolidation, "consolidation"),
        (dreaming, "dreaming"),
    ):
        assert phase.seconds is not None
        assert phase.seconds / 2 <= night["seconds"][key] <= phase.seconds * 2
    assert "4 x 700 questions" in asked.describe()
    *_, (name, whole) = told.describe()
    assert name == "in all" and "estimates from nights on two cores" in whole and "GiB" in whole


def test_a_day_that_is_mostly_not_learned_is_warned_of() -> None:
    large = replace(DAY, documents=[100] * 500)
    (warning,) = NightEstimate(cfg.load(), large, SIZE, "float32").warnings()
    assert "steps=150 x batch_size=24 learn 3,600 texts of about" in warning
    steps = int(warning.partition("Set consolidation.steps=")[2].partition(",")[0])
    enough = cfg.load(None, [f"consolidation.steps={steps}"])
    assert not NightEstimate(enough, large, SIZE, "float32").warnings()


def test_a_model_that_does_not_fit_is_refused_and_a_tight_one_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 64 * 2**30)
    seventy = ModelSize(70 * 10**9, 80, 8192)
    with pytest.raises(ConfigError, match=r"takes 522 GiB for its weights .* this machine has 64"):
        NightEstimate(cfg.load(), DAY, seventy, "float32").warnings()
    three = ModelSize(3 * 10**9, 28, 3072)
    memory, scorer = NightEstimate(cfg.load(), DAY, three, "float32").warnings()
    assert "fine_tuning takes about" in memory and "leave the baseline out" in memory
    assert "resources.scorer_gpus=0" in scorer


def test_no_minutes_are_told_without_a_measured_night_like_it() -> None:
    gpus = cfg.load(None, ["resources.engine_gpus=0.5", "resources.learner_gpus=0.5"])
    for night in (
        NightEstimate(gpus, DAY, SIZE, "bfloat16"),
        NightEstimate(cfg.load(), DAY, None, "float32"),
    ):
        text = str(night.describe())
        assert "minutes are not estimated" in text and "tokens" in text and "under 1" not in text


def test_a_bigger_model_takes_longer() -> None:
    rates = [estimate._rates(n) for n in (10**6, 3 * 10**6, 10**8, 10**9, 10**10)]
    assert rates == sorted(rates) and [r[1] for r in rates] == sorted(
        (r[1] for r in rates), reverse=True
    )
