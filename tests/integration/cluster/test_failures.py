"""What a user sees when an actor dies or raises: the root cause, on one screen."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import ray
from rich.console import Console

from sleeprl import cli
from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind, failure_panel, log_tail
from sleeprl.cluster.process_logs import STALL_LINES
from sleeprl.cluster.remote_actor import RemoteActor, classify
from sleeprl.cluster.waits import WAITS, Watchdog
from tests.support.paths import ROOT


class Fails(RemoteActor):
    def fail(self, how: str) -> None:
        for line in range(100):
            print(f"line {line} before {how}", file=sys.stderr, flush=True)
        if how == "exit":
            os._exit(7)
        if how == "hang":
            time.sleep(600)
        if how == "sys.exit":
            sys.exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"wrong: {'x' * 3000}")

    def ask(self, other: ray.actor.ActorHandle, how: str) -> None:
        """Another's death, as one meets it who works with it."""
        ActorGroup("inner", [other]).call("fail", how=how)


class NeverStarts(RemoteActor):
    def __init__(self) -> None:
        raise KeyError("no such thing")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error",
             runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})  # fmt: skip
    yield
    ray.shutdown()


def shown(error: BaseException) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(failure_panel(error))
    return console.export_text()


def fails(how: str) -> ActorFailure:
    actor = ray.remote(Fails).options(num_cpus=0).remote()
    with pytest.raises(ActorFailure) as caught:
        ActorGroup("engine", [actor]).call("fail", how=how)
    return caught.value


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("exit", FailureKind.RETRYABLE, "without an exit code"),
        ("sys.exit", FailureKind.RETRYABLE, "its process ended with exit code 3"),
        ("kill", FailureKind.RETRYABLE, "without an exit code"),
        ("raise", FailureKind.FATAL, "ValueError: wrong"),
    ],
)
def test_the_root_cause_is_on_one_screen(how: str, kind: FailureKind, reason: str) -> None:
    error = fails(how)
    text = shown(error)
    assert error.failure.kind is kind
    assert f"engine-0.fail failed ({kind})" in text and reason in text
    assert f"line 99 before {how}" in text and "worker-" in text
    assert len(text.splitlines()) <= 25
    if how == "raise":
        assert "in fail" in text


@pytest.mark.usefixtures("local_ray")
def test_the_one_who_died_is_told_not_the_one_who_noticed() -> None:
    outer, inner = (ray.remote(Fails).options(num_cpus=0).remote() for _ in range(2))
    with pytest.raises(ActorFailure) as caught:
        ActorGroup("learner", [outer]).call("ask", other=inner, how="kill")
    failure = caught.value.failure
    assert failure.kind is FailureKind.RETRYABLE and failure.message.startswith("inner-0.fail: ")
    assert "line 99 before kill" in log_tail(failure.pid)[1]


@pytest.mark.usefixtures("local_ray")
def test_one_that_never_started_is_not_restarted() -> None:
    with pytest.raises(ActorFailure) as caught:
        ActorGroup("reward", [ray.remote(NeverStarts).options(num_cpus=0).remote()]).call("ping")
    assert caught.value.failure.kind is FailureKind.FATAL
    assert "no such thing" in shown(caught.value)


@pytest.mark.usefixtures("local_ray")
def test_the_command_shows_the_panel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails("exit")

    @cli.app.command("dies")
    def dies() -> None:
        raise error from ValueError("below it")

    monkeypatch.setattr(cli, "errors", Console(stderr=True, width=100))
    monkeypatch.setattr(sys, "argv", ["sleeprl", "dies"])
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        cli.app.registered_commands.pop()
    told_ = capsys.readouterr().err
    assert ended.value.code == 1
    assert "engine-0.fail failed (retryable)" in told_ and "Traceback" not in told_
    assert len(told_.splitlines()) <= 26


def test_what_is_no_actors_is_left_to_others() -> None:
    assert failure_panel(ValueError("a setting")) is None
    assert classify(ValueError("x")).kind is FailureKind.FATAL
    assert classify(ConnectionError("x")).kind is FailureKind.RETRYABLE


@pytest.mark.usefixtures("local_ray")
def test_a_stall_is_told_with_the_last_lines_of_who_hangs() -> None:
    group = ActorGroup("engine", [ray.remote(Fails).options(num_cpus=0).remote()])
    (pid,) = group.call("pid")
    heard = list[str]()

    def hear(message: str) -> None:
        heard.append(message)
        if "line 99" in message:
            group.kill()  # which ends the wait

    with (
        Watchdog(WAITS, limit_s=0.2, on_stall=hear, every_s=0.1),
        pytest.raises(ActorFailure),
    ):
        group.call("fail", how="hang")
    failure_panel, *lines = heard[-1].splitlines()
    assert failure_panel.endswith("for data from engine: fail") and len(lines) == STALL_LINES
    assert f"-{pid}.err: line 99 before hang" in lines[-1]


class HangsInStart(RemoteActor):
    def start(self) -> None:
        print("loading a model that is not there", file=sys.stderr, flush=True)
        time.sleep(600)


@pytest.mark.usefixtures("local_ray")
def test_engines_that_hang_in_their_start_or_write_for_ever_are_told() -> None:
    """Also outside of dreaming, where the driver alone waits; a member is waited for by its name."""
    group = ActorGroup("engine", [ray.remote(HangsInStart).options(num_cpus=0).remote()])
    heard = list[str]()

    def hear(message: str) -> None:
        heard.append(message)
        if "not there" in message:
            group.kill()

    with Watchdog(WAITS, limit_s=0.2, on_stall=hear, every_s=0.1):
        with pytest.raises(ActorFailure):
            group.call("start")
        assert "driver has waited" in heard[-1] and "for the start of engine: start" in heard[-1]
        assert "loading a model that is not there" in heard[-1]
        group.replace(0, ray.remote(HangsInStart).options(num_cpus=0).remote())
        (ref,) = group.send("start", [{}])
        assert isinstance(group.wait(0, ref, "generate"), Failure)
    assert "for generation by engine-0: generate" in heard[-1]
    assert WAITS.current() == []
