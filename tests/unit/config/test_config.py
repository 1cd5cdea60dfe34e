"""Settings: layers, round trips, and one clear message for each way to get them wrong."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sleeprl import cli
from sleeprl.algorithms.base import GroupClipped
from sleeprl.config import loader as cfg
from sleeprl.config import validation
from sleeprl.config.aliases import ALIASES, rename_old_keys
from sleeprl.config.bounds import bounds_of
from sleeprl.config.describe import describe_settings, to_annotated_yaml
from sleeprl.config.schema import (
    ConfigError,
    DreamingConfig,
    LevelConfig,
    NightConfig,
    iter_fields,
    keys,
)
from sleeprl.evaluation.metrics import METRICS
from sleeprl.models.catalogue import CATALOGUE, Spec
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def enough_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "available_cpus", lambda: 4)


def refused(*words: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        cfg.load(path, list(words))
    return str(caught.value)


@pytest.fixture
def error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that is refused; the one line that it prints."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sleeprl", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out, len(err.splitlines())) == (2, "", 1), out + err
        return err

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # for examples/
    return run


# --- layers -----------------------------------------------------------------------


def test_defaults_are_accepted() -> None:
    assert cfg.load() == NightConfig()


def test_words_lie_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "night.yaml"
    path.write_text("seed: 3\nconsolidation:\n  steps: 7\n  batch_size: 8\n")
    config = cfg.load(path, ["consolidation.steps=9", "model.name=some/model", "seed=4"])
    assert (config.seed, config.consolidation.steps, config.consolidation.batch_size) == (4, 9, 8)
    assert config.model.name == "some/model"
    assert config.consolidation.beta == NightConfig().consolidation.beta


def test_settings_of_a_model_lie_below_what_the_user_says(tmp_path: Path) -> None:
    path = tmp_path / "night.yaml"
    path.write_text("model: {name: small}\nconsolidation: {steps: 7}\n")
    of_model = {"small": {"seed": 9, "consolidation": {"steps": 3, "warmup": 2, "batch_size": 4}}}
    config = cfg.load(path, ["consolidation.warmup=1"], of_model)
    seeding = config.consolidation
    assert (config.seed, seeding.steps, seeding.warmup, seeding.batch_size) == (9, 7, 1, 4)
    assert cfg.load(path, ["model.name=embedded"], of_model).seed == 0


@pytest.mark.parametrize("spec", CATALOGUE.values(), ids=lambda spec: spec.name)
def test_the_settings_of_every_named_model_are_accepted(spec: Spec) -> None:
    cfg.load(None, [f"model.name={spec.name}"], {spec.name: spec.night})


def test_values_have_the_types_of_their_fields(tmp_path: Path) -> None:
    document = tmp_path / "day.txt"
    document.write_text("text")
    config = cfg.load(
        None,
        [
            "consolidation.learning_rate=1e-4",
            "dreaming.enabled=false",
            f"wake.inputs=[{document}]",
            "dreaming.reward_options={scale: 3.0}",
            "resources.address=auto",
        ],
    )
    assert config.consolidation.learning_rate == 1e-4
    assert config.dreaming.enabled is False
    assert config.wake.inputs == [str(document)]
    assert config.dreaming.reward_options == {"scale": 3.0}
    assert config.resources.address == "auto"
    assert isinstance(config.dreaming, DreamingConfig)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert cfg.load(tmp_path / "empty.yaml") == NightConfig()


def test_round_trips(tmp_path: Path) -> None:
    config = cfg.load(
        None,
        ["seed=5", "dreaming.reward_options={scale: 2}", "name=other", "gate.max_retention_drop=0"],
    )
    assert cfg.from_dict(cfg.to_dict(config)) == config
    path = tmp_path / "config.yaml"
    path.write_text(cfg.to_yaml(config))
    assert cfg.load(path) == config


def test_old_keys_are_read_from_files_and_words_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "night.yaml"
    path.write_text(
        "dreaming:\n  policy: 0.5\n  correction_level: off\n  steps: 3\n"
        "self_study: {notebook: 7}\ngate: {tolerance: 0.1}\n"
    )
    with caplog.at_level(logging.WARNING):
        config = cfg.load(path, ["dreaming.staleness=0", "dreaming={hold: 4}"])
    dreaming = config.dreaming
    assert (dreaming.loss.policy_gradient, dreaming.loss.replay_kl, dreaming.steps) == (0.5, 4.0, 3)
    assert (dreaming.importance_weight.level, dreaming.max_staleness) == ("off", 0)
    assert (config.self_study.question_bank_size, config.gate.max_retention_drop) == (7, 0.1)
    (line,) = caplog.messages
    assert "\n" not in line and "dreaming.policy is now dreaming.loss.policy_gradient" in line
    assert "dreaming.staleness is now dreaming.max_staleness" in line


def test_a_present_key_says_nothing_and_wins_over_an_old_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg.load(None, ["dreaming.max_staleness=0"])
    assert not caplog.messages
    old = {"dreaming": {"staleness": 3, "max_staleness": 0}}
    assert cfg.from_dict(old).dreaming.max_staleness == 0


def test_a_wrong_value_of_an_old_key_is_named_under_the_present_one() -> None:
    assert "dreaming.max_staleness='x' is not a whole number" in refused("dreaming.staleness=x")
    assert "dreaming.loss=1: dreaming.loss is a section" in refused("dreaming.loss=1")


def test_every_old_key_leads_to_a_present_one() -> None:
    assert not set(ALIASES) & set(keys()) and set(ALIASES.values()) <= set(keys())
    values = {"dreaming": {"staleness": 0, "loss": {"sft": 1}}, "name": "n"}
    renamed, found = rename_old_keys(values)
    assert renamed == {"dreaming": {"max_staleness": 0, "loss": {"sft": 1}}, "name": "n"}
    assert found == ["dreaming.staleness"] and "staleness" in values["dreaming"]


def test_keys_are_all_leaves_of_the_resolved_file() -> None:
    def leaves(node: object, prefix: str = "") -> list[str]:
        if not isinstance(node, dict) or not node:
            return [prefix[:-1]]
        return [leaf for key, value in node.items() for leaf in leaves(value, f"{prefix}{key}.")]

    assert list(keys()) == leaves(yaml.safe_load(cfg.to_yaml(NightConfig())))


def test_every_setting_is_explained() -> None:
    settings = list(describe_settings())
    told = {setting.key: setting.meaning for setting in settings}
    assert list(told) == list(keys()) and all(told.values())
    for key, entry, _ in iter_fields(NightConfig()):
        assert all(f"`{choice}`" in told[key] for choice in bounds_of(entry).choices), key
    assert all(
        word in told["evaluation.questions"] for word in (*(m.key for m in METRICS), "experience")
    )
    assert "HEAD" in told["model.name"] and "sleeprl models" in told["model.name"]


def test_what_is_explained_is_still_the_file(tmp_path: Path) -> None:
    words = [
        "seed=5",
        "dreaming.reward_options={scale: 2}",
        "memory.levels=[{period: 2, slots: 2}]",
    ]
    config = cfg.load(None, words)
    path = tmp_path / "config.yaml"
    path.write_text(to_annotated_yaml(config))
    assert cfg.load(path) == config
    assert "\n  # Dreams per task.\n  group_size: 6\n" in path.read_text()


def test_run_dir() -> None:
    assert cfg.load(None, ["runs=some/where", "name=first"]).run_dir == Path("some/where/first")


# --- refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "named", "meant"),
    [
        ("consolidation.stepz=3", "'consolidation.stepz'", "'consolidation.steps'"),
        ("consolidatio.steps=3", "'consolidatio", "'consolidation"),
        ("steps=3", "'steps'", ".steps'"),
        ("dreaming.learning_rat=1", "'dreaming.learning_rat'", "'dreaming.learning_rate'"),
        ("sed=1", "'sed'", "'seed'"),
        ("consolidation.lr=1", "'consolidation.lr'", "'consolidation.learning_rate'"),
        ("dreaming.lr=1", "'dreaming.lr'", "'dreaming.learning_rate'"),
        ("dreaming.kl=1", "'dreaming.kl'", "'dreaming.reference_kl'"),
    ],
)
def test_a_mistyped_key_is_named_with_the_nearest(word: str, named: str, meant: str) -> None:
    message = refused(word)
    assert named in message and "did you mean" in message and meant in message


def test_an_unheard_of_key_says_where_all_are_listed() -> None:
    assert "--dry-run" in refused("zzzzqqq=1")


def test_a_mistyped_key_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("dreaming:\n  stepps: 3\n")
    message = refused(path=tmp_path / "x.yaml")
    assert f"config file '{tmp_path / 'x.yaml'}': unknown key 'dreaming.stepps'" in message
    assert "did you mean 'dreaming.steps'" in message
    assert "config file" not in refused("dreaming.stepps=3")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("wake.inputs=notes.jsonl", "is a list; write wake.inputs=[notes.jsonl]"),
        ("baselines=ewc,replay", "is a list; write baselines=[ewc,replay]"),
        ("wake.inputs={a: 1}", "wake.inputs is a list"),
        ("model=embedded", "model is a section; did you mean model.name=embedded?"),
        ("model=[embedded]", "model is a section"),
        ("dreaming.reward_options=3", "named values; write dreaming.reward_options.NAME=3"),
        ("dreaming.reward_options=[3]", "dreaming.reward_options holds named values"),
    ],
)
def test_another_kind_of_value_for_a_list_or_a_section(
    word: str, meant: str, tmp_path: Path
) -> None:
    assert meant in refused(word)
    (tmp_path / "x.yaml").write_text("wake: {inputs: notes.jsonl}\n")
    message = refused("seed=1", path=tmp_path / "x.yaml")
    assert "x.yaml': wake.inputs=notes.jsonl" in message
    assert "write wake.inputs=[notes.jsonl]" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(path=tmp_path / "nowhere.yaml")
    assert "wake.inputs" in refused("wake.inputs=[nowhere.jsonl]")
    assert "nowhere.jsonl" in refused("evaluation.questions=nowhere.jsonl")


@pytest.mark.parametrize("text", ["a: [1, 2", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    refused(path=path)


@pytest.mark.parametrize(
    "word", ["consolidation", "=3", "name={", "wake.inputs=[a", "name=${nothing}", "seed=${name}"]
)
def test_a_word_that_is_no_setting(word: str) -> None:
    refused(word)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed=abc", "seed='abc' is not a whole number; write for example seed=0"),
        (
            "consolidation.pointwise_clip=much",
            "consolidation.pointwise_clip='much' is not a number; write a number, or null",
        ),
        ("wake.inputs=[[1]]", r"wake.inputs=[[1]]: wake.inputs has no lists in it; write"),
        ("seed=null", "seed=null is not a whole number; write for example seed=0"),
        ("consolidation.steps=1.5", "consolidation.steps=1.5 is not a whole number; write for"),
        ("consolidation.learning_rate=fast", "consolidation.learning_rate='fast' is not a number"),
        ("gate.max_retention_drop=[1]", "gate.max_retention_drop=[1] is not a number"),
        ("dreaming.enabled=maybe", "dreaming.enabled='maybe' is neither true nor false; write for"),
        ("name=[a]", "name=['a'] is not text; write for example name=night"),
        ("consolidation=3", "consolidation=3"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key_and_a_right_one(word: str, said: str) -> None:
    message = refused(word)
    assert message.startswith(said)


def test_a_value_of_the_wrong_type_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("seed: 3\nconsolidation: {steps: many}\n")
    message = refused("seed=1", path=path)
    assert f"config file '{path}': consolidation.steps='many' is not a whole number" in message


@pytest.mark.parametrize(
    "word",
    [
        "consolidation.steps=0",
        "consolidation.learning_rate=-1e-3",
        "consolidation.batch_size=-2",
        "dreaming.group_size=0",
        "resources.engine_gpus=1.5",
        "resources.engines=0",
        "resources.learner_workers=0",
        "memory.width=0",
        "seed=-1",
        "consolidation.beta=1.5",
        "consolidation.beta=-0.1",
        "gate.max_retention_drop=2",
        "self_study.held_out_share=-0.1",
        "dreaming.max_staleness=-1",
        "consolidation.learning_rate=nan",
        "consolidation.learning_rate=inf",
        "dreaming.temperature=.nan",
    ],
)
def test_a_value_out_of_range_names_key_and_value(word: str) -> None:
    key, value = word.split("=")
    message = refused(word)
    assert key in message
    assert str(yaml.safe_load(value)) in message or str(float(value.strip("."))) in message


def test_wake_learning_needs_a_level_that_is_handed_on() -> None:
    rate, levels = (
        "wake.learning_rate=0.001",
        "memory.levels=[{period: 2, slots: 2}, {period: 4, slots: 2}]",
    )
    assert "memory.levels has one level" in refused(rate)
    assert cfg.load(None, [rate, levels]).wake.learning_rate == 0.001
    with pytest.raises(ConfigError, match=r"wake\.learning_rate=0\.001.*when_full=merge"):
        cfg.load(None, [rate, levels, "memory.when_full=merge"])


@pytest.mark.parametrize("word", ["seed=0", "consolidation.beta=0", "consolidation.beta=1",
                                  "gate.max_retention_drop=0", "dreaming.max_staleness=0",
                                  "consolidation.warmup=0", "self_study.replay_questions=0"])  # fmt: skip
def test_the_edges_are_allowed(word: str) -> None:
    cfg.load(None, [word])


@pytest.mark.parametrize(
    ("word", "choice"),
    [
        ("model.dtype=float8", "bfloat16"),
        ("dreaming.importance_weight.level=word", "sequence"),
        ("memory.growth=high_rank", "low_rank"),
        ("memory.unit=days", "optimizer_steps"),
        ("memory.when_full=forget", "merge"),
        ("dreaming.importance_weight.mode=soft", "truncate"),
    ],
)
def test_a_choice_lists_the_others(word: str, choice: str) -> None:
    message = refused(word)
    assert word.split("=")[0] in message and choice in message


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ("", "at least one level"),
        ("{period: 0, slots: 1}", "period=0"),
        ("{period: 2, slots: 1}", "at least 2 slots"),  # one expert arrives every night
        ("{period: 2, slots: 2}, {period: 3, slots: 2}", "no multiple"),
        ("{period: 2, slots: 2}, {period: 6, slots: 2}", "level 2 has slots=2"),
    ],
)
def test_levels_that_cannot_be_say_what_the_clock_says(levels: str, said: str) -> None:
    message = refused(f"memory.levels=[{levels}]")
    assert message.startswith(f"memory.levels=[{levels}]: ") and said in message


def test_levels_are_typed_and_a_file_may_list_them(tmp_path: Path) -> None:
    path = tmp_path / "levels.yaml"
    path.write_text("memory:\n  levels:\n  - {period: 2, slots: 2}\n  - {period: 4, slots: 3}\n")
    config = cfg.load(path)
    assert config.memory.levels == [LevelConfig(2, 2), LevelConfig(4, 3)]
    assert cfg.from_dict(cfg.to_dict(config)) == config
    assert config.memory.clock().pools == (2, 3)
    assert "slots" in refused("memory.levels=[{period: 2}]")
    assert "slotz" in refused("memory.levels=[{period: 2, slotz: 2}]")
    # Where a night's length in tokens is not known, the clock cannot count what arrives in a period.
    cfg.load(None, ["memory.unit=tokens", "memory.levels=[{period: 9000, slots: 2}]"])


def test_staleness_needs_a_correction() -> None:
    """Of itself an algorithm bounds its ratio; one that has none needs the correction."""
    words = ["dreaming.algorithm=reinforce", "dreaming.importance_weight.level=off"]
    message = refused("dreaming.max_staleness=1", *words)
    assert "dreaming.max_staleness=1" in message and "importance_weight.level" in message
    cfg.load(None, ["dreaming.max_staleness=0", *words])
    cfg.load(None, ["dreaming.max_staleness=1", "dreaming.algorithm=gspo", words[1]])


def test_old_options_of_an_algorithm_are_read_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["dreaming.algorithm=ppo", "dreaming.algorithm_options={discount: 0.9, trace: 0.5}"]
    with caplog.at_level(logging.WARNING):
        config = cfg.load(None, words)
    assert config.dreaming.algorithm_options == {"gamma": 0.9, "gae_lambda": 0.5}
    (line,) = caplog.messages
    assert "discount is now gamma, trace is now gae_lambda" in line
    own = cfg.load(None, ["dreaming.algorithm=mine.Own", words[1]])
    assert own.dreaming.algorithm_options == {"discount": 0.9, "trace": 0.5}


class OwnClipped(GroupClipped):
    """An algorithm of a user's own."""


@pytest.mark.parametrize("name", ["grpo", f"{__name__}.OwnClipped"])
def test_a_group_of_one_is_refused_by_the_algorithm_s_own_flag(name: str) -> None:
    words = [f"dreaming.algorithm={name}", "dreaming.group_size=1"]
    with pytest.raises(ConfigError, match=r"dreaming\.group_size=1 leaves"):
        validation.validate_plugins(cfg.load(None, words))
    validation.validate_plugins(cfg.load(None, [words[0], "dreaming.group_size=2"]))


def test_a_critic_of_ones_own_is_for_dreaming_alone() -> None:
    with pytest.raises(ConfigError, match="needs a critic"):
        validation.validate_plugins(
            cfg.load(None, ["consolidation.algorithm=examples.my_algorithm.ActorCritic"])
        )
    validation.validate_plugins(
        cfg.load(None, ["dreaming.algorithm=examples.my_algorithm.ActorCritic"])
    )


def test_a_temperature_needs_a_correction() -> None:
    words = ["dreaming.temperature=0.7", "dreaming.importance_weight.level=off"]
    message = refused(*words)
    assert all(word in message for word in words) and "importance_weight.level=token" in message
    cfg.load(None, words[:1])
    cfg.load(None, words[1:])


def test_questions_of_ones_own_need_a_day_of_ones_own(tmp_path: Path) -> None:
    for name in ("notes.jsonl", "questions.jsonl"):
        (tmp_path / name).touch()
    word = f"evaluation.questions={tmp_path / 'questions.jsonl'}"
    assert "give wake.inputs" in refused(word)
    cfg.load(None, [word, f"wake.inputs=[{tmp_path / 'notes.jsonl'}]"])


@pytest.mark.parametrize("name", ["dreaming", "consolidation"])
def test_a_group_of_one_has_nothing_to_compare(name: str) -> None:
    one, algorithm = f"{name}.group_size=1", f"{name}.algorithm="
    for compares in ("grpo", "dr_grpo", "dapo", "dapo_unscaled", "gspo", "cispo", "rloo"):
        message = refused(one, algorithm + compares)
        assert one in message and algorithm + compares in message
    option = f"{name}.algorithm_options.group_baseline="
    assert one in refused(one, f"{algorithm}reinforce_plus_plus", f"{option}true")
    for alone in ("reinforce", "rest_em", "reinforce_plus_plus"):
        cfg.load(None, [one, algorithm + alone])


def test_a_group_of_one_that_earns_no_reward() -> None:
    one = "consolidation.group_size=1"
    for quiet in ("consolidation.distillation=1", "consolidation.rollout_prompts=0"):
        cfg.load(None, [one, quiet, "baselines=[self_distillation]"])
        assert one in refused(one, quiet, "baselines=[grpo]")
    cfg.load(None, ["dreaming.group_size=1", "dreaming.enabled=false"])
    cfg.load(None, ["dreaming.group_size=1", "dreaming.algorithm=ppo"])


def test_prefix_bounds_and_room_for_a_prompt() -> None:
    message = refused("consolidation.prefix_min=0.7", "consolidation.prefix_max=0.2")
    assert "prefix_min=0.7" in message and "prefix_max=0.2" in message
    message = refused("self_study.max_tokens=64", "model.max_length=64")
    assert "self_study.max_tokens=64" in message and "model.max_length=64" in message


@pytest.mark.parametrize("key", ["dreaming.max_tokens", "evaluation.max_tokens"])
def test_every_answer_leaves_room_for_a_prompt(key: str) -> None:
    assert key in refused(f"{key}=600")


def test_the_correction_band_is_not_empty() -> None:
    assert "importance_weight.low" in refused(
        "dreaming.importance_weight.low=3", "dreaming.importance_weight.high=2"
    )


def test_an_impossible_split_of_the_machine() -> None:
    message = refused("resources.engines=3", "resources.learner_workers=2")
    assert "5 cores" in message and "there are 4" in message and "resources.cpus" in message
    cfg.load(None, ["resources.engines=3", "resources.learner_workers=2", "resources.cpus=5"])
    cfg.load(None, ["resources.engines=30", "resources.address=auto"])  # another machine's cores


def test_an_elastic_learner_needs_a_cluster_and_weights_that_travel() -> None:
    most = "resources.learner_workers_max=3"
    assert "below learner_workers=4" in refused(most, "resources.learner_workers=4")
    assert "resources.address" in refused(most)
    joined = (most, "resources.address=auto")
    assert "transport=shared_memory" in refused(*joined)
    assert cfg.load(None, [*joined, "resources.transport=disk"]).resources.elastic
    assert not cfg.load(None, [f"{most[:-1]}1"]).resources.elastic


def test_importing_the_configuration_brings_neither_torch_nor_ray() -> None:
    code = "import sys, sleeprl.config.loader; print([m for m in ('torch', 'ray') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_transports_between_gpus_need_gpus(kind: str) -> None:
    words = [f"resources.transport={kind}"]
    assert "resources.engine_gpus=0" in refused(*words)
    words.append("resources.engine_gpus=0.5")
    message = refused(*words)
    assert f"resources.transport={kind}" in message and "resources.learner_gpus=0" in message
    words.append("resources.learner_gpus=0.5")
    assert cfg.load(None, words).resources.transport == kind
    assert "resources.engine=torch" in refused(*words, "resources.engine=torch")


def test_transport_and_update_mode_are_of_those_there_are() -> None:
    assert "Known: disk, ipc, nccl, shared_memory" in refused("resources.transport=pigeon")
    assert "keep, drain, abort" in refused("resources.update_mode=stop")


def test_a_colocated_layout_needs_one_device_to_share() -> None:
    assert "decoupled, colocated" in refused("resources.layout=beside")
    words = ["resources.layout=colocated"]
    assert cfg.load(None, words).resources.layout == "colocated"
    for key in ("engine_gpus", "learner_gpus"):
        message = refused(*words, f"resources.{key}=0.5")
        assert f"resources.{key}=0.5" in message and "shares one device" in message
    words += ["resources.engine_gpus=0.5", "resources.learner_gpus=0.6"]
    assert "do not fit on one" in refused(*words)
    words[-1] = "resources.learner_gpus=0.5"
    assert cfg.load(None, words).resources.layout == "colocated"
    assert "two ranks" in refused(*words, "resources.transport=nccl")
    assert cfg.load(None, [*words, "resources.transport=ipc"]).resources.transport == "ipc"


def test_a_tensor_parallel_engine_has_what_its_processes_need() -> None:
    two = "resources.engine_tensor_parallel=2"
    message = refused(two)
    assert "resources.engine_cpus=1" in message and "set resources.engine_cpus=2" in message
    assert cfg.load(None, [two, "resources.engine_cpus=2"]).resources.engine_tensor_parallel == 2
    words = [two, "resources.engine_cpus=2"]
    assert "resources.engine=torch" in refused(*words, "resources.engine=torch")
    assert "6 cores" in refused(*words, "resources.engines=2", "resources.learner_cpus=2")
    assert "resources.engine_gpus=1" in refused(two, "resources.engine_gpus=1")
    cfg.load(None, [two, "resources.engine_gpus=2"])
    gpus = [two, "resources.engine_gpus=2", "resources.learner_gpus=1"]
    assert "resources.transport=nccl" in refused(*gpus, "resources.transport=ipc")
    cfg.load(None, [*gpus, "resources.transport=nccl"])
    assert "greater than 0" in refused("resources.engine_tensor_parallel=0")


def test_offloading_needs_a_gpu_to_take_the_load_off() -> None:
    for what in ("optimizer", "parameters"):
        message = refused(f"resources.offload={what}")
        assert f"resources.offload={what}" in message and "resources.learner_gpus=0" in message
        config = cfg.load(None, [f"resources.offload={what}", "resources.learner_gpus=1"])
        assert config.resources.offload == what
    assert "none, optimizer, parameters" in refused("resources.offload=all")


# --- the command ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "field", "fix"),
    [
        ("dreaming.reward_options.foo=1", "dreaming.reward_options", "takes scale"),
        ("consolidation.judge_options.foo=1", "consolidation.judge_options", "takes learner, chat"),
        ("dreaming.algorithm_options.foo=1", "dreaming.algorithm_options", "max_resample_rounds"),
        ("consolidation.judge=embedding", "consolidation.judge: ", "'model'"),
        (
            "dreaming.curriculum=examples.brief_reward.brief",
            "dreaming.curriculum",
            "given tasks, seed",
        ),
        (
            "dreaming.reward=os.path",
            "dreaming.reward",
            "is a module and cannot be called; name a class",
        ),
    ],
)
def test_a_dry_run_refuses_a_plug_in_that_cannot_be_called_so(
    error: Callable[..., str], word: str, field: str, fix: str
) -> None:
    said = error("night", "--dry-run", word)
    assert field in said and word.rpartition("=")[2] in said and fix in said


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("notes.pdf", "text", "cannot read this format"),
        ("notes.jsonl", "", "hold no experience"),
        ("notes.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "notes.jsonl:2: neither field 'text'"),
    ],
)
def test_a_dry_run_reads_the_inputs(
    error: Callable[..., str], name: str, text: str, said: str
) -> None:
    Path(name).write_text(text)
    assert said in error("night", "--dry-run", f"wake.inputs=[{name}]")


def test_a_dry_run_reads_the_questions(error: Callable[..., str]) -> None:
    Path("notes.txt").write_text("Mara lives in Oslo.")
    Path("questions.jsonl").write_text('{"question": "Where?"}\n')
    words = ("wake.inputs=[notes.txt]", "evaluation.questions=questions.jsonl")
    assert "questions.jsonl:1: the field 'answer' is missing" in error("night", "--dry-run", *words)
    assert not Path("runs").exists()


def test_a_dry_run_looks_for_the_model(error: Callable[..., str]) -> None:
    assert "model.name='./mine': no such directory" in error("night", "--dry-run", "--model=./mine")


@pytest.mark.parametrize("words", [["--dry-run"], []], ids=["dry", "real"])
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "model architecture 'GPT2LMHeadModel' has no gated MLP"),
        ({"model_type": "gemma3"}, "model architecture 'Gemma3ForConditionalGeneration' has no"),
        ({"model_type": "foonet"}, "has model type `foonet` but Transformers does not recognize"),
        ({"model_type": "t5"}, "model architecture: Unrecognized configuration class"),
        ({}, "Should have a `model_type` key"),
    ],
    ids=["gpt2", "pictures", "unknown", "no decoder", "nothing"],
)
def test_an_architecture_that_cannot_grow_is_told_before_anything_starts(
    error: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    config: dict[str, str],
    said: str,
) -> None:
    monkeypatch.setattr(
        "sleeprl.night.orchestrator.run_night", lambda *_: pytest.fail("it was started")
    )
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps(config))
    told = error("night", *words, "--model=./mine")
    assert "model.name='./mine': " in told and said in told
    assert "supported families: Llama, Mistral, Qwen2, Qwen3, Gemma" in told and len(told) < 500
    assert not Path("runs").exists()


def test_a_model_that_does_not_chat_is_told_before_anything_starts(
    error: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setattr(
        "sleeprl.night.orchestrator.run_night", lambda *_: pytest.fail("it was started")
    )
    shutil.copytree(tiny_model, "mine")
    assert (
        CliRunner()
        .invoke(cli.app, ["night", "--dry-run", "--model=./mine", "wake.people_per_document=1"])
        .exit_code
        == 0
    )
    Path("mine/chat_template.jinja").unlink()
    for words in (["--dry-run"], []):
        told = error("night", *words, "--model=./mine")
        assert "model.name='./mine' has no usable" in told and "no chat template; give a" in told
    Path("mine/tokenizer.json").unlink()
    assert "model.name='./mine' has no usable tokenizer: " in error("night", "--model=./mine")


def test_an_error_is_one_line_with_its_brackets(error: Callable[..., str]) -> None:
    assert "write wake.inputs=[notes.jsonl]" in error("night", "wake.inputs=notes.jsonl")
    Path("wake").mkdir()
    assert "'wake' is not the directory of a run: there is no" in error("night", "--resume=wake")


@pytest.mark.parametrize("command", ["report", "inspect", "replay"])
def test_a_run_that_is_not_there_is_told_so(command: str) -> None:
    told = CliRunner().invoke(cli.app, [command, "runs/nope"], env={"COLUMNS": "200"})
    assert told.exit_code == 2 and "'runs/nope' does not exist" in told.output


def test_help_shows_how_a_list_is_written() -> None:
    out = CliRunner().invoke(cli.app, ["night", "--help"], env={"COLUMNS": "200"}).output
    assert "wake.inputs=[notes.jsonl] model.name" in out
