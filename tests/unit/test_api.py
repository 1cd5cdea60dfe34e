"""The Python API: what the command does, from Python, with the same settings and errors."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sleeprl
from sleeprl import api, cli
from sleeprl.config import loader, validation
from sleeprl.config.schema import (
    ConfigError,
    DreamingConfig,
    EvaluationConfig,
    ModelConfig,
    NightConfig,
    WakeConfig,
)
from sleeprl.plugins import PluginError
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without runs, on a machine with cores enough."""
    monkeypatch.setattr(validation, "available_cpus", lambda: 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


# --- names ------------------------------------------------------------------------


def test_every_public_name_is_there_for_people_and_for_type_checkers() -> None:
    for name in sleeprl.__all__:
        assert getattr(sleeprl, name) is not None and name in dir(sleeprl)
    tree = ast.parse(Path(sleeprl.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == sleeprl._HOMES
    assert set(sleeprl.__all__) == {*seen, "__version__"}
    for name, module in seen.items():
        assert getattr(import_module(str(module)), name) is getattr(sleeprl, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'run_nigth'"):
        _ = sleeprl.run_nigth  # type: ignore[attr-defined]


# --- settings ---------------------------------------------------------------------


def test_a_model_has_the_same_settings_from_python_and_from_the_command(here: Path) -> None:
    word = "model.name=smollm2-135m"
    done = CliRunner().invoke(cli.app, ["night", "--dry-run", word])
    assert done.exit_code == 0, done.output
    (here / "printed.yaml").write_text(done.stdout.partition("╭")[0])
    config = sleeprl.load_config(overrides=[word])
    assert loader.load("printed.yaml") == config
    assert config.consolidation.steps != NightConfig().consolidation.steps
    assert sleeprl.load_config(**{"model.name": "smollm2-135m"}) == config


def test_values_win_over_words_and_words_over_the_file(here: Path) -> None:
    (here / "my.yaml").write_text("seed: 1\nwake: {people: 4}\ndreaming: {steps: 5}\n")
    notes = here / "notes.txt"
    notes.write_text("a note")
    config = sleeprl.load_config(
        "my.yaml", overrides=["seed=2", "dreaming.steps=6"],
        **{"seed": 3, "wake.inputs": [notes], "dreaming.reward_options": {"scale": 2}},
    )  # fmt: skip
    assert (config.seed, config.dreaming.steps, config.wake.people) == (3, 6, 4)
    assert config.wake.inputs == [str(notes)]
    assert config.dreaming.reward_options == {"scale": 2}
    for wrong, said in (
        ({"sed": 1}, "unknown key 'sed'"),
        ({"seed": "x"}, "seed='x' is not a whole number"),
        ({"wake": 3}, "wake is a section"),
    ):
        with pytest.raises(ConfigError, match=said):
            sleeprl.load_config(**wrong)


def test_a_run_directory_that_is_taken_gets_a_number_unless_it_is_named(here: Path) -> None:
    (here / "runs" / "night").mkdir(parents=True)
    (here / "runs" / "night" / "config.yaml").write_text("seed: 1\n")
    assert sleeprl.load_config().name == "night-2"
    for named in ({"overrides": ["name=night"]}, {"name": "night"}):
        with pytest.raises(ConfigError, match="give another name"):
            sleeprl.load_config(**named)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give another name"):
        sleeprl.run_night(NightConfig())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (NightConfig(dreaming=DreamingConfig(steps=0)), ["dreaming.steps=0"]),
        (NightConfig(seed="x"), ["seed=x"]),  # type: ignore[arg-type]
        (
            NightConfig(dreaming=DreamingConfig(algorithm="grpo", group_size=1)),
            ["dreaming.algorithm=grpo", "dreaming.group_size=1"],
        ),
        (
            NightConfig(model=ModelConfig(max_length=20), evaluation=EvaluationConfig(max_tokens=24)),
            ["model.max_length=20"],
        ),
        (NightConfig(wake=WakeConfig(inputs=["gone.txt"])), ["wake.inputs=[gone.txt]"]),
        (NightConfig(dreaming=3), ["dreaming=3"]),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_configuration_built_in_python_is_checked_as_a_file_is(
    config: NightConfig, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as by_words:
        sleeprl.load_config(overrides=words)
    for function in (sleeprl.run_night, sleeprl.plan_night):
        with pytest.raises(ConfigError) as built:
            function(config)
        assert str(built.value) == str(by_words.value)


def test_a_plan_says_what_a_night_would_do() -> None:
    plan = sleeprl.plan_night(NightConfig(dreaming=DreamingConfig(algorithm="grpo")))
    assert "run directory  runs/night" in str(plan) and "ZeRO-3" in str(plan)
    assert "algorithm: grpo" in plan.yaml and not plan.warnings
    assert not Path("runs").exists()
    with pytest.raises(PluginError, match="did you mean 'grpo'"):
        sleeprl.plan_night(NightConfig(dreaming=DreamingConfig(algorithm="grop")))


def test_there_are_three_styles_of_progress() -> None:
    assert api._make_console("none").quiet and not api._make_console("plain").is_interactive
    with pytest.raises(ValueError, match="progress='loud' must be one of auto, plain, none"):
        api._make_console("loud")  # type: ignore[arg-type]


def test_the_module_is_the_command(here: Path) -> None:
    done = python("-m", "sleeprl", "version", cwd=here)
    assert done.stdout.strip() == sleeprl.__version__, done.stderr


def test_a_config_file_may_have_an_equals_sign_in_its_name(here: Path) -> None:
    (here / "seed=7.yaml").write_text("seed: 7\n")
    path, words = cli._split(["seed=7.yaml", "wake.people=3"])
    assert (path, words) == (Path("seed=7.yaml"), ["wake.people=3"])


# --- results ----------------------------------------------------------------------

SUMMARY = {
    "before": {"recall": 0.0, "two_hop": None, "retention": 0.98, "perplexity": 3.0,
               "n": {"recall": 40, "two_hop": 0, "retention": 300, "perplexity": 900}},
    "before_with_context": {"recall": 0.9, "retention": 0.98, "n": {"recall": 40}},
    "after": {"recall": 0.8, "retention": 0.97, "mine": 0.5, "n": {"recall": 40, "mine": 2}},
    "baselines": {"ewc": {"title": "EWC", "recall": 0.3, "n": {"recall": 40}, "seconds": 4.0}},
    "seconds": {"wake": 1.0, "starting": 9.0},
    "wall_seconds": 200.0,
    "generation": "0123abcd",
    "gate": {"passed": True, "refused": ""},
}  # fmt: skip


def test_a_result_has_its_figures_as_attributes() -> None:
    result = sleeprl.NightResult.from_summary(NightConfig(), SUMMARY)
    assert result.passed and result.generation is not None
    assert result.generation.path == Path("generations/0123abcd")
    assert (result.before.recall, result.after.recall, result.before.two_hop) == (0.0, 0.8, None)
    assert result.after.perplexity is None and result.before.counts["perplexity"] == 900
    assert result.after.metrics == {"recall": 0.8, "mine": 0.5}
    assert result.baselines["ewc"].recall == 0.3
    assert "seconds" not in result.baselines["ewc"].metrics
    assert result.report_path == Path("runs/night/report.html")
    refused = {**SUMMARY, "generation": None, "gate": {"passed": False, "refused": "it forgot"}}
    result = sleeprl.NightResult.from_summary(NightConfig(), refused)
    assert (result.passed, result.generation, result.refused) == (False, None, "it forgot")


def test_a_script_without_a_guard_starts_no_night_in_an_actor(here: Path) -> None:
    (here / "script.py").write_text(
        "from sleeprl import NightConfig, run_night\nrun_night(NightConfig())\nclass Mine: ...\n"
    )
    done = python("-c", "from sleeprl.plugins import resolve; resolve('script.Mine', 'reward')",
                  cwd=here)  # fmt: skip
    assert 'put that below `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


# --- the example ------------------------------------------------------------------


def test_the_quickstart_plans_a_night(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the example but the night itself, whose result is made here."""
    seen: list[NightConfig] = []

    def finish(config: NightConfig, **_: object) -> sleeprl.NightResult:
        seen.append(config)
        return sleeprl.NightResult.from_summary(config, SUMMARY)

    monkeypatch.setattr(api, "run_night", finish)
    monkeypatch.delitem(vars(sleeprl), "run_night", raising=False)
    main = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["main"]
    monkeypatch.delitem(vars(sleeprl), "run_night", raising=False)
    main(["seed=3"])
    assert (seen[0].seed, seen[0].baselines) == (3, [])
    printed = capsys.readouterr().out
    assert "ZeRO-3" in printed and "recall 0% -> 80%" in printed
    assert "generation: generations/0123abcd" in printed
