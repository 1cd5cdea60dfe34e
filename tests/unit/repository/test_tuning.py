"""The search of hyper-parameters, without its evening and its trials: what it runs, and writes."""

from __future__ import annotations

import importlib.util
import io
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray import tune
from rich.console import Console

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError
from sleeprl.models.catalogue import CATALOGUE
from sleeprl.models.resolve import EMBEDDED
from tests.support.paths import ROOT

SOURCE = ROOT / "tuning" / "search.py"
CHOICE = {
    "consolidation.learning_rate": 0.00001,
    "consolidation.judge": "embedding",
    "consolidation.pointwise_clip": None,
    "consolidation.algorithm_options.clip_high": 0.3,
}
SPEC: dict[str, Any] = {
    "trials": 1,
    "report_every": 4,
    "space": {key: {"choice": [value]} for key, value in CHOICE.items()},
    "night": {"name": "search", "wake": {"people": 8}, "consolidation": {"steps": 9, "ce": 0.1}},
}


def loaded() -> Any:
    found = importlib.util.spec_from_file_location("search", SOURCE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class Search:
    """A search whose evenings and trials are only told of. ran: settings of the trials' nights."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module, self.place = loaded(), place
        self.evenings = 0
        self.ran: list[dict[str, Any]] = []
        tuner = SimpleNamespace(
            choice=tune.choice,
            with_parameters=lambda _, **given: self.ran.append(given["settings"]),
            with_resources=lambda trainable, _: trainable,
            Tuner=lambda *_, **__: SimpleNamespace(fit=self.fit),
            TuneConfig=dict,
            RunConfig=dict,
        )
        monkeypatch.setattr(self.module, "tune", tuner)
        monkeypatch.setattr(self.module, "cluster", lambda *_, **__: nullcontext())
        monkeypatch.setattr(self.module, "find_model", lambda _: EMBEDDED)
        monkeypatch.setattr(self.module, "Night", self.night)
        monkeypatch.setattr(self.module, "run_evening", self.evening)

    def night(self, run: Any) -> SimpleNamespace:
        return SimpleNamespace(engines=None, close=lambda: None, stop_training=lambda: None)

    def evening(self, _: Any) -> None:
        self.evenings += 1

    def fit(self) -> Any:
        best = SimpleNamespace(config=CHOICE, metrics={"score": 1.0})
        results: Any = type("Results", (list,), {"get_best_result": lambda *_, **__: best})([best])
        results.num_errors = 0
        return results

    def __call__(self, *words: str, **changes: Any) -> Path:
        """The path of the best configuration."""
        path = self.place / "search.yaml"
        path.write_text(yaml.safe_dump(SPEC | changes))
        words = (f"runs={self.place / 'runs'}", *words)
        best: Path = self.module.search(path, list(words), Console(file=io.StringIO()))
        return best


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    return Search(tmp_path, monkeypatch)


def of_model(path: Path) -> Any:
    """A night's settings as ``sleeprl night`` reads them."""
    return cfg.load(path, [], {spec.name: spec.night for spec in CATALOGUE.values()})


@pytest.mark.parametrize("model", ["embedded", "smollm2-135m"])
def test_the_best_file_is_the_night_that_was_tuned(search: Search, model: str) -> None:
    best = search(f"model.name={model}", "seed=3", "consolidation.ce=0.2")
    config = of_model(best)
    assert (config.seed, config.consolidation.ce, config.consolidation.steps) == (3, 0.2, 9)
    assert config.wake.people == 8
    trial = cfg.from_dict(search.ran[0], search.module.words_of(CHOICE))
    assert trial.consolidation.algorithm_options == {"clip_high": 0.3}
    assert trial.consolidation.judge == "embedding"
    trial.resources.cpus = config.resources.cpus  # the driver's own core
    assert config == trial


def test_the_settings_of_a_named_model_lie_below_those_of_the_file(search: Search) -> None:
    search("model.name=smollm2-135m", "self_study.few_shot_examples=2")
    config = cfg.from_dict(search.ran[0])
    assert (config.self_study.assistant_prefix, config.self_study.replay_questions) == (
        "Question:",
        300,
    )
    assert (config.self_study.few_shot_examples, config.wake.people) == (2, 8)


def test_the_same_search_goes_on_and_another_is_refused(search: Search) -> None:
    search("seed=1")
    search("seed=1")
    space = {"consolidation.beta": {"choice": [0.0]}}
    for words, changes in (
        (["seed=2"], {}),
        (["seed=1"], {"space": space}),
        (["seed=1"], {"trials": 2}),
    ):
        with pytest.raises(ConfigError, match=r"name='search'.*other settings.*another name="):
            search(*words, **changes)
    assert search.evenings == 2
    search("seed=2", "name=second")
    assert search.evenings == 3


def test_a_search_does_not_go_on_in_a_nights_directory(search: Search) -> None:
    night = search.place / "runs" / "search"
    night.mkdir(parents=True)
    (night / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match="holds a night"):
        search()
    assert not search.evenings


def test_a_wrong_name_is_told_before_anything_starts(search: Search) -> None:
    with pytest.raises(ValueError, match="dapoo"):
        search("consolidation.algorithm=dapoo")
    assert not search.evenings and not (search.place / "runs").exists()


@pytest.mark.parametrize(
    "key",
    ["dreaming.learning_rate", "self_study.replay_questions", "wake.people", "gate.max_retention_drop",
     "resources.engines", "seed", "dreaming.reward_options.scale"],
)  # fmt: skip
def test_what_a_trial_cannot_change_is_not_searched(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is not of the consolidation.*noise"):
        loaded().search_space({key: {"choice": [1]}})


def test_all_of_consolidation_can_be_searched() -> None:
    keys = [
        "consolidation.learning_rate",
        "consolidation.algorithm_options.clip_high",
        "consolidation.judge_options.above",
    ]
    assert list(loaded().search_space({key: {"uniform": [0.1, 0.3]} for key in keys})) == keys
    for key in ("consolidation.stepz", "consolidation.steps.many"):
        with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
            loaded().search_space({key: {"choice": [1]}})


def test_the_search_that_comes_with_it_is_accepted() -> None:
    spec = yaml.safe_load(SOURCE.with_name("consolidation.yaml").read_text())
    assert loaded().search_space(spec["space"])
    assert loaded().night_of(spec["night"], []).name == "search"


@pytest.mark.parametrize(
    ("recall", "retention", "wanted"),
    [
        (0.9, 0.97, 0.9),
        (0.9, 1.0, 0.9),  # more than before is no merit
        (0.9, 0.95, 0.9),  # lost as much as is tolerated
        (0.9, 0.91, 0.5),  # four points beyond it
        (0.2, 0.5, -4.3),
        (None, 0.97, 0.0),
        (None, 0.91, -0.4),
        (0.9, None, -8.6),  # nothing of what there was
    ],
)
def test_the_score_is_recall_less_ten_times_what_was_lost_beyond_the_tolerance(
    recall: float | None, retention: float | None, wanted: float
) -> None:
    figures = {"recall": recall, "retention": retention}
    assert loaded().score(figures, {"retention": 0.97}, 0.02) == pytest.approx(wanted)


@pytest.mark.parametrize("retention", [None, 0.0, 0.9])
def test_where_nothing_old_was_asked_the_score_is_recall(retention: float | None) -> None:
    figures = {"recall": 0.4, "retention": retention}
    assert loaded().score(figures, {"retention": None}, 0.02) == 0.4
