"""Rewards as people have them: classes, functions of three kinds, coroutines, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sleeprl import plugins
from sleeprl.dreaming.reward_forms import make_reward
from sleeprl.dreaming.types import Dream, Task
from sleeprl.plugins import PluginError

DREAM = Dream(Task("t", 0, "Read this.", (("Where?", "Oslo"),)), "In Oslo.", [1, 2], None, 0.5)


class Late:
    async def __call__(self, dream: Dream) -> float:
        return len(dream.text)


class Several:
    def __call__(self, dream: Dream) -> dict[str, float]:
        return {"score": 2.0, "format": 9.0}


def of_a_dream(dream: Dream, weight: float = 1.0) -> float:
    return weight * len(dream.token_ids)


async def late_of_a_dream(dream: Dream) -> float:
    return 3.0


def of_completions(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(columns["prompts"][0])) for _ in completions]


def of_completions_alone(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(completions == ["In Oslo."]) for _ in prompts]


def of_a_solution(
    data_source: str, solution_str: str, ground_truth: list[str], extra_info: Any = None
) -> dict[str, float]:
    return {"score": float(ground_truth[0] in solution_str and extra_info["gain"] == 0.5)}


def too_many(completions: list[str]) -> list[float]:
    return [1.0, 2.0]


def of_columns(completions: list[str], ground_truth: list[str], **columns: Any) -> list[float]:
    return [1.0 if ground_truth else 0.0]


def of_a_solution_and_more(solution_str: str, tokenizer: Any) -> float:
    return float(bool(tokenizer))


def of_something(answer: str) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("name", "options", "reward"),
    [
        ("Late", {}, 8.0),
        ("Several", {}, 2.0),
        ("of_a_dream", {}, 2.0),
        ("of_a_dream", {"weight": 3.0}, 6.0),
        ("late_of_a_dream", {}, 3.0),
        ("of_completions", {}, 10.0),
        ("of_completions_alone", {}, 1.0),
        ("of_a_solution", {}, 1.0),
        ("of_columns", {"ground_truth": ["Oslo"]}, 1.0),
        ("of_a_solution_and_more", {"tokenizer": "t"}, 1.0),
    ],
)
def test_every_form_is_checked_and_scores_a_dream(
    name: str, options: dict[str, Any], reward: float
) -> None:
    for place in (__name__ + ".", f"{__file__}:"):
        plugins.check(place + name, "reward", options)
        assert make_reward(place + name, options)(DREAM) == reward


def test_what_has_no_form_is_refused_with_those_that_work() -> None:
    with pytest.raises(PluginError, match=r"a function of `dream`, of `completions, \*\*columns`"):
        plugins.check(f"{__name__}.of_something", "reward", {})
    with pytest.raises(PluginError, match="unexpected keyword argument 'wait'"):
        plugins.check(f"{__name__}.of_a_dream", "reward", {"wait": 1})
    with pytest.raises(TypeError, match="return a list of one reward"):
        make_reward(f"{__name__}.too_many", {})(DREAM)


@pytest.mark.parametrize(
    ("name", "lacks", "given"),
    [
        ("of_columns", "ground_truth", "prompts, completions, completion_ids"),
        ("of_a_solution_and_more", "tokenizer", "data_source, solution_str, ground_truth, extra"),
    ],
)
def test_what_a_function_lacks_is_told_before_a_dream(name: str, lacks: str, given: str) -> None:
    with pytest.raises(PluginError, match=f"missing a required .*'{lacks}'.* is given {given}"):
        plugins.check(f"{__name__}.{name}", "reward", {})


def test_a_file_of_a_plug_in_is_named_with_its_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def good(dream): return 1\n")
    Path("bad.py").write_text("1 / 0\n")
    assert plugins.importable_name("./mine.py:good", "reward") == f"{tmp_path / 'mine.py'}:good"
    for name, said in (
        ("./mine.py:other", "mine.py has no 'other'"),
        ("bad.py:x", "bad.py cannot be imported: division by zero"),
        ("gone.py:x", "gone.py cannot be imported: .*No such file"),
    ):
        with pytest.raises(PluginError, match=said):
            plugins.check(name, "reward", {})
