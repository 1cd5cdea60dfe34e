"""What the machine lacks is told before anything starts, in one message."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sleeprl import api, cli
from sleeprl.cluster import preflight, runtime
from sleeprl.cluster.preflight import describe_scarce_places, refuse_unusable_places
from sleeprl.cluster.runtime import ClusterUnreachable, cluster, protect_token
from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, NightConfig, ResourcesConfig


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def config_of(*words: str) -> NightConfig:
    return cfg.load(None, ["resources.cpus=8", *words])


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_directory_that_is_too_long_for_sockets(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray 2.60 adds this much; the socket's path must have at most 107 bytes.
    room = 107 - len("/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store")
    for path in ("/" + "t" * room, "/" + "ö" * (room // 2 + 1)):
        monkeypatch.setenv(variable, path)
        with pytest.raises(ConfigError, match=rf"^{variable}=.*set RAY_TMPDIR to a shorter one"):
            refuse_unusable_places(config_of())
        refuse_unusable_places(config_of("resources.address=head:6379"))
        with pytest.raises(ConfigError, match="RAY_TMPDIR"):
            api.plan_night(config_of())
    monkeypatch.setenv(variable, "/tmp")
    refuse_unusable_places(config_of())


def test_ray_tmpdir_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "t" * 90)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    refuse_unusable_places(config_of())


@pytest.mark.parametrize("key", ["runs", "generations"])
def test_directories_in_which_nothing_can_be_written(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"{key}='file/x': .*/file' is a file"):
        config_of(f"{key}=file/x")
    locked = tmp_path / "locked"
    locked.mkdir()

    def access(path: Path, mode: int) -> bool:  # as root may write anywhere
        return Path(path) != locked

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(ConfigError, match=rf"{key}='locked/a/b': no permission .*locked"):
        config_of(f"{key}=locked/a/b")
    refuse_unusable_places(config_of())
    monkeypatch.setenv("TMPDIR", str(locked))
    monkeypatch.setattr(preflight, "SOCKET_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"TMPDIR=.*set RAY_TMPDIR to another"):
        refuse_unusable_places(config_of())


def test_little_room_is_told_by_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"/dev/shm": 64_000_000}
    monkeypatch.setattr(
        preflight,
        "shutil",
        SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=free.get(str(path), 10**12))),
    )
    (line,) = describe_scarce_places(config_of())
    assert "/dev/shm has 64 MB free" in line and "--shm-size" in line
    assert describe_scarce_places(config_of("resources.address=auto")) == []
    free |= {"/dev/shm": 10**10, "/tmp": 10**7, str(Path.cwd()): 2 * 10**7}
    lines = describe_scarce_places(config_of())
    assert [line.partition(" has ")[0] for line in lines] == [
        "runs='runs'", "generations='generations'", "TMPDIR='/tmp'"
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, ["night", "--dry-run", "resources.cpus=8"])
    assert done.exit_code == 0 and "TMPDIR='/tmp' has 10 MB free" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Could not find any running Ray instance."),
        RuntimeError("Failed to connect to GCS. " + "Details follow. " * 90),
        ValueError("Malformed address: x"),
        RuntimeError("InvalidAuthToken: Unauthenticated"),
        TimeoutError(),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(runtime.ray, "init", init)
    with pytest.raises(ClusterUnreachable) as caught:
        with cluster(ResourcesConfig(address="head:6379")):
            pass
    message = str(caught.value)
    assert "resources.address='head:6379'" in message and "RAY_AUTH_MODE=token" in message
    assert str(error)[:20] in message and "\n" not in message and len(message) < 700
    assert isinstance(caught.value, ConfigError) and caught.value.__cause__ is None


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_only_the_owner_can_read_the_token_of_a_local_ray(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    protect_token()
    assert not path.exists()
    monkeypatch.delenv("RAY_AUTH_MODE")
    before = os.umask(umask)
    try:
        protect_token()
    finally:
        os.umask(before)
    token = path.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # as Ray makes it
    protect_token()
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o600, token)
