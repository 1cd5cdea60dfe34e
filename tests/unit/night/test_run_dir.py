"""The directory of a run: one night at a time, readable from anywhere, and whole or refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sleeprl import api, cli
from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.evaluation.questions import Day
from sleeprl.lineage import LineageStore, Manifest
from sleeprl.memory.slots import Slots
from sleeprl.night import run_dir, stored_config
from sleeprl.night.run_dir import RunDirectory, RunLock, RunTaken, claim, read_state, resume
from sleeprl.night.schedule import verify_parent
from sleeprl.self_study import question_bank
from sleeprl.self_study.study import load_probes
from sleeprl.utils.files import DamagedFile
from sleeprl.weight_sync.verification import Canary

PROGRESS: Any = SimpleNamespace(
    **dict.fromkeys(("start", "finish", "skip", "warn"), lambda *_: None)
)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(*words: str) -> NightConfig:
    return cfg.load(None, ["resources.cpus=8", *words])


def started(*words: str) -> Path:
    """A run that has begun; returns its directory."""
    run = RunDirectory(config_of(*words), PROGRESS)
    run.close()
    return run.dir


# --- one night at a time ------------------------------------------------------------


def test_of_nights_that_start_at_once_one_gets_the_directory() -> None:
    config = config_of()
    claim(config)
    with pytest.raises(RunTaken, match="holds an unfinished run"):
        claim(config_of())


def test_the_command_takes_the_next_free_name_where_another_was_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def run_night(config: NightConfig) -> Any:
        if not ran:  # another night claims the name between the look and the start
            ran.append("another")
            claim(replace(config))
        claim(config)
        ran.append(config.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run_night", run_night)
    done = CliRunner().invoke(cli.app, ["night", "resources.cpus=8"])
    assert ran == ["another", "night-2"]
    assert done.exit_code == 130 and "runs/night-2" in done.output
    ran.clear()
    done = CliRunner().invoke(cli.app, ["night", "resources.cpus=8", "name=mine"])
    assert isinstance(done.exception, RunTaken) and ran == ["another"]


HOLD = """
import sys
from pathlib import Path
from sleeprl.night.run_dir import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def running() -> Iterator[tuple[Path, int]]:
    """A run that another process holds: its directory, and the process."""
    directory = started()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield directory, process.pid
        process.kill()


def test_a_running_night_is_neither_resumed_nor_replayed(running: tuple[Path, int]) -> None:
    directory, pid = running
    metrics = directory / "metrics.jsonl"
    metrics.write_bytes(b'{"half": ')  # the other process is writing it
    for use in (
        lambda: api.resume_night(directory),
        lambda: claim(config_of()),
        lambda: RunDirectory(config_of(), PROGRESS),
    ):
        with pytest.raises(RunTaken, match=rf"process {pid} on .*kill -INT"):
            use()
    assert metrics.read_bytes() == b'{"half": '
    resume(directory)  # reading its settings is no harm


def test_after_a_kill_the_run_is_free(running: tuple[Path, int]) -> None:
    directory, pid = running
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    RunLock(directory).release()


def test_where_a_file_system_has_no_locks_a_night_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_dir.fcntl, "flock", flock)
    started()


# --- from any directory ---------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A relative path in every setting that is one."""
    (tmp_path / "notes.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "model").mkdir()
    return ["wake.inputs=[notes.jsonl]", "evaluation.questions=q.jsonl", "model.name=model"]


def test_a_run_is_resumed_from_any_directory(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = started(*files, "generations=mine/generations").resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given in (directory, Path("../runs/night")):
        config = resume(given)
        assert config.run_dir == directory
        assert config.generations == str(tmp_path / "mine/generations")
        assert config.wake.inputs == [str(tmp_path / "notes.jsonl")]
        assert config.evaluation.questions == str(tmp_path / "q.jsonl")
        assert config.model.name == str(tmp_path / "model")


def test_a_run_with_relative_paths_starts_them_where_it_lies(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions before stored them."""
    directory = tmp_path / "runs/night"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(cfg.to_yaml(config_of(*files)))
    (directory / "state.json").write_text(
        '{"id": "0", "results": {"wake": 1}, "seconds": {"wake": 1}}'
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = resume(directory)
    assert config.generations == str(tmp_path / "generations")
    assert config.wake.inputs == [str(tmp_path / "notes.jsonl")]


def test_names_that_are_no_paths_stay(tmp_path: Path) -> None:
    (tmp_path / "embedded").mkdir()
    for name in ("embedded", "HEAD", "Qwen/Qwen3-0.6B"):
        config = stored_config.with_whole_paths(config_of(f"model.name={name}"), tmp_path)
        assert config.model.name == name


def test_a_moved_run_is_itself(tmp_path: Path) -> None:
    moved = started().rename(tmp_path / "kept")
    assert resume(moved).run_dir == moved.resolve()


def test_inputs_of_a_finished_phase_may_be_gone(tmp_path: Path, files: list[str]) -> None:
    directory = started(*files)
    state = directory / "state.json"
    for name in ("notes.jsonl", "q.jsonl"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml.*notes\.jsonl' does not exist"):
        resume(directory)
    state.write_text(
        json.dumps({"id": "0", "results": {"wake": {"texts": 1}}, "seconds": {"wake": 1.0}})
    )
    config = resume(directory)
    assert config.wake.inputs == [str(tmp_path / "notes.jsonl")]
    assert config.evaluation.questions == str(tmp_path / "q.jsonl")


# --- whole, and of which version --------------------------------------------------------


def test_a_configuration_that_is_cut_at_any_lines_end_is_refused() -> None:
    directory = started("seed=7", "reporting.sinks=[tensorboard,wandb]")
    file = directory / "config.yaml"
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    assert resume(directory).seed == 7
    for count in (0, 1, 2, 3, 50, *range(len(lines) - 6, len(lines))):
        file.write_text("".join(lines[:count]))
        with pytest.raises(DamagedFile, match=r"runs/night/config\.yaml is (cut off|damaged)"):
            resume(directory)
    plain = cfg.to_yaml(config_of()).splitlines(keepends=True)  # of a version before the last line
    file.write_text("".join(plain[: plain.index("gate:\n")]))
    with pytest.raises(DamagedFile, match=r"is cut off; it has no gate, resources, reporting"):
        resume(directory)
    file.write_text("".join(plain))
    resume(directory)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- 1\n", b"[" * 1200, b"\x00"])
def test_a_damaged_configuration_is_named(content: bytes) -> None:
    directory = started()
    (directory / "config.yaml").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"runs/night/config\.yaml is damaged"):
        resume(directory)


def test_settings_of_another_version_are_told_by_name(caplog: pytest.LogCaptureFixture) -> None:
    directory = started()
    file = directory / "config.yaml"
    text = file.read_text()
    newer = text.replace("by sleepRL ", "by sleepRL 9.").replace("seed: 0", "seed: 0\ncolour: blue")
    file.write_text(newer.replace("  steps: 8\n", "  steps: 8\n  lucid: true\n"))
    with pytest.raises(
        ConfigError, match=r"does not know colour, dreaming\.lucid, set by sleepRL 9"
    ):
        resume(directory)
    assert "stall_seconds: 120.0" in text
    older = text.replace("  stall_seconds: 120.0\n", "").replace("  algorithm_options: {}\n", "")
    file.write_text(older)
    with caplog.at_level(logging.WARNING):
        assert resume(directory).resources.stall_seconds == 120
    assert "resources.stall_seconds=120.0" in caplog.text
    assert "dreaming.algorithm_options={}" in caplog.text
    caplog.clear()
    file.write_text(text)
    resume(directory)
    assert not caplog.text


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "not text": lambda text: b"\xff\xfe" + text,
    "deep": lambda text: b"[" * 100_000,
    "null": lambda text: b"null",
    "a number": lambda text: b"3",
    "of another kind": lambda text: b'{"surprise": [1]}',
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damaged_file_of_a_run_is_named(tmp_path: Path, damage: Any) -> None:
    readers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "state.json": (
            '{"id": "0", "results": {}, "seconds": {}}',
            lambda path: read_state(path.parent),
        ),
        "position.json": ('{"version": 1}', lambda path: DreamingCheckpoint.load(path.parent)),
        "day.json": ('{"documents": [], "probes": [], "texts": []}', Day.load),
        "study.json": ('{"probes": []}', load_probes),
        "canary.json": ('{"token_ids": [1], "logprobs": [], "tolerance": 0.1}', Canary.load),
        "slots.json": (
            '{"base_width": 1, "width": 1, "count": 1, "used": []}',
            lambda path: Slots.load(path.parent),
        ),
    }
    for name, (text, read) in readers.items():
        path = tmp_path / name
        path.write_text(text)
        read(path)
        path.write_bytes(damage(text.encode()))
        with pytest.raises(DamagedFile, match=f"{name} is damaged"):
            read(path)
    questions = tmp_path / "questions.json"
    questions.write_bytes(b"[")
    with pytest.raises(DamagedFile, match=r"questions\.json is damaged"):
        question_bank.load(tmp_path)


# --- the generation to start from --------------------------------------------------------


def test_a_night_verifies_the_generation_that_it_starts_from() -> None:
    store = LineageStore("generations")

    def build(directory: Path) -> None:
        (directory / "model.safetensors").write_text("weights")
        (directory / "config.json").write_text("{}")

    one, two = (store.commit(build, Manifest(name, "tiny")) for name in "ab")
    store.set_head(one)
    for name in (one, one[:8], "HEAD", f"generations/{one}", "embedded", "org/other"):
        verify_parent(config_of(f"model.name={name}"))
    with (store.path(one) / "model.safetensors").open("r+b") as file:
        file.write(b"W")
    for name in (one, one[:8], "HEAD", f"generations/{one}"):
        config = config_of(f"model.name={name}")
        with pytest.raises(ConfigError, match=rf"{one} is not intact: model\.safetensors has cha"):
            verify_parent(config)
        for start in (api.plan_night, api.run_night):
            with pytest.raises(ConfigError, match="is not intact"):
                start(config)
    verify_parent(config_of(f"model.name={two}"))
    assert not Path("runs").exists()
