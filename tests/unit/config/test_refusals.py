"""Values that were once accepted and ended a night, or named a place that is not a run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeprl.cli import _split
from sleeprl.config import loader as cfg
from sleeprl.config import validation
from sleeprl.config.schema import ConfigError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "available_cpus", lambda: 4)
    monkeypatch.setattr(validation, "available_memory", lambda: 8 * 2**30)
    (tmp_path / "notes.txt").write_text("a text")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=???"], "seed=??? stands for a missing value"),
        (["dreaming.reward_options.x=???"], "reward_options.x=??? stands for a missing"),
        (["baselines=['???']"], "baselines=??? stands for a missing"),
        (["dreaming.enabled=-1"], "dreaming.enabled=-1 is neither true nor false"),
        (["memory.reset=7"], "memory.reset=7 is neither true nor false"),
        (["memory.reset=0.5"], "memory.reset=0.5 is neither true nor false"),
        (["name=/tmp/x"], "name='/tmp/x' is a path; write one name"),
        (["name=../other"], "name='../other' is a path"),
        (["name=.."], "name='..' is a path"),
        (["name=" + "k" * 280], "a name of 280 bytes, and a file system takes 255"),
        (["name=" + "ä" * 110], "has 220 bytes; write a name of at most 200"),
        (["model.name=" + "k" * 280], "model.name='kkk"),
        (["wake.inputs=[" + "k" * 280 + "]"], "wake.inputs='kkk"),
        (["evaluation.questions=" + "k/" * 2100], "and a path at most 4095"),
        (["runs=gs://bucket/x"], "runs='gs://bucket/x' is a URL; give a directory"),
        (["generations=notes.txt"], "notes.txt' is a file; give the path of a directory"),
        (["runs=notes.txt/inside"], "notes.txt' is a file; give the path of a directory"),
        (["resources.address=' '"], "is empty; write a value"),
        (["wake.inputs=['']"], "wake.inputs='' is empty"),
        (["wake.inputs=[{path: notes.txt}]"], "wake.inputs is a list of texts"),
        (["memory.levels=[5]"], "5 is no level; write memory.levels=[{period: 5, slots: 5}]"),
        (["memory.levels=[{period: 5, slots: 100000}]"], "must have at most 4096 slots"),
        (["gate.max_perplexity_ratio=1e-9"], "must be at least 1"),
        (["resources.reward_workers=90000"], "resources.reward_workers=90000 must be at most 4096"),
        (["resources.scorers=100"], "resources.scorers=100 and resources.reward_workers=1 are 101"),
        (["seed=4294967296"], "seed=4294967296 must be at most 4294967295"),
        (["dreaming.steps=99999999999"], "must be at most 2147483647"),
        (["consolidation.beta=1e-40"], "is too small to make a difference"),
        (["dreaming.loss.sft=1e30"], "must be at most 1e+12"),
        (["fixed_capacity.learning_rates.ewc=1e9"], "learning_rates.ewc=1000000000.0 must be at most"),
        (["self_study.held_out_share=0"], "leaves no question to score a dream on"),
        (["self_study.held_out_share=1", "self_study.facts_per_document=0"], "keeps every pair out"),
        (["baselines=[ewc]", "self_study.replay_questions=0"], "'ewc' needs the smaller self's own"),
        (["baselines=[replay,replay]"], "names 'replay' twice"),
        (["resources.learner_gpus=2"], "resources.learner_gpus=2, but a process computes on one GPU"),
        (["resources.learner_gpus=0.5", "resources.learner_workers=2"], "which NCCL refuses"),
        (
            ["resources.transport=ipc", "resources.engines=2", "resources.engine_gpus=0.5",
             "resources.learner_gpus=0.5"],
            "transport=ipc stays within one GPU, but resources.engines=2",
        ),
        (["dreaming.tasks_per_step=100", "dreaming.max_staleness=3"], "let 500 groups be in flight"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cfg.load(None, words)
    assert said in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "words",
    [
        ["dreaming.enabled=1"], ["dreaming.enabled=yes"], ["seed=4294967295"], ["name=a b"],
        ["name='[red]'"], ["resources.scorers=8"],
        ["self_study.held_out_share=0", "dreaming.enabled=false"], ["runs=new/folder"],
        ["self_study.assistant_prefix='Question:\\n'"], ["gate.max_perplexity_ratio=1"],
    ],
)  # fmt: skip
def test_what_works_is_accepted(words: list[str]) -> None:
    cfg.load(None, words)


@pytest.mark.parametrize("text", ["3e85", "01234567", "1_0", "true", "off", "0x1f"])
def test_a_name_that_reads_like_a_number_stays_as_it_is(text: str) -> None:
    assert cfg.load(None, [f"model.name={text}", f"name={text}"]).name == text


@pytest.mark.parametrize(
    "raw",
    [
        b'name: "a\\0b"\n', b"name: \xff\n", b"a: {" * 400, b"3\n", b"name: !!binary aGk=\n",
        b"dreaming: {reward_options: {a: " + b"[" * 900 + b"]" * 900 + b"}}\n",
        b"name: &a [*a]\n", b'name: "\\ud83d"\n',
    ],
    ids=["nul", "latin-1", "unclosed", "number", "bytes", "deep", "cycle", "surrogate"],
)  # fmt: skip
def test_a_file_that_cannot_be_a_configuration_is_named(place: Path, raw: bytes) -> None:
    (place / "x.yaml").write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        cfg.load("x.yaml")
    assert "x.yaml" in str(caught.value) or "name=" in str(caught.value)


@pytest.mark.parametrize("path", [["x.yaml"], 3, ".", "k" * 300, "a\0b"])
def test_what_is_no_path_of_a_file_is_refused_as_one(path: object) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*; give the path of a YAML file"):
        cfg.load(path)  # type: ignore[arg-type]


def test_a_byte_order_mark_is_no_part_of_the_first_key(place: Path) -> None:
    (place / "x.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert cfg.load("x.yaml").seed == 3


def test_a_word_that_is_an_existing_file_is_a_file(place: Path) -> None:
    (place / "seed=1").mkdir()
    (place / "seed=1" / "c.yaml").write_text("seed: 5\n")
    long = "wake.inputs=[" + "k" * 300 + "]"
    assert _split(["seed=1/c.yaml", "seed=1", long]) == (Path("seed=1/c.yaml"), ["seed=1", long])
