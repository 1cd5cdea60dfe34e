"""``sleeprl inspect``: what a run's engines wrote, as a list and token by token."""

from __future__ import annotations

import io
from pathlib import Path
from typing import get_args

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from sleeprl.cli import app
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Purpose, Trajectory, to_batch
from sleeprl.reporting.inspection import NothingToInspect, inspect_run
from sleeprl.text.chat import ChatFormatter


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A group of dreams, one of them unscored, and some replay."""
    run = tmp_path_factory.mktemp("runs") / "night"
    run.mkdir()
    (run / "smaller-self-0").symlink_to(tiny_model)
    chat = ChatFormatter(tiny_model)

    def made(
        uid: str, purpose: str, text: str, reward: float | None = None,
        advantage: float | None = None,
    ) -> Trajectory:  # fmt: skip
        ids = chat.response(text)
        dream = purpose == "dream"
        return Trajectory(
            uid=uid, task_id="document-1", attempt=0, purpose=purpose,  # type: ignore[arg-type]
            prompt_ids=chat.prompt("tell me"), response_ids=ids,
            logprobs=[-0.25 * (1 + n) for n in range(len(ids))],
            versions=[7] * (len(ids) - 1) + [8 if dream else 7], finish_reason="stop",
            teacher_prompt_ids=None if dream else chat.prompt("read this tell me"),
            reward=reward, unscored="malformed" if dream and reward is None else None,
            ref_logprobs=[-0.5] * len(ids) if dream else None, advantage=advantage,
        )  # fmt: skip

    written = [
        made("dream-0-0", "dream", "ab", 1.0, -4.5),
        made("dream-0-1", "dream", "cd", 3.0, 0.25),
        made("dream-0-2", "dream", "ef"),
        *(made(f"replay-answer-{n}", "replay", "gh") for n in range(4)),
    ]
    Lake(run / "lake").append(to_batch(written), "trajectories")
    return run


def printed(run: Path, width: int = 80, **words: str | int) -> str:
    """What a terminal shows; no line is wider than it."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(inspect_run(run, **words))  # type: ignore[arg-type]
    text = console.export_text()
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


def line(text: str, of: str) -> list[str]:
    (found,) = [row for row in text.splitlines() if row.split()[:1] == [of]]
    return found.split()


def test_a_list_has_versions_rewards_and_advantages(run: Path) -> None:
    text = printed(run)
    assert "7 trajectories: 3 dream, 4 replay" in text
    first, second = line(text, "dream-0-0"), line(text, "dream-0-1")
    assert first[2:5] == ["7-8", "1.000", "-4.500"] and second[2:5] == ["7-8", "3.000", "0.250"]
    assert line(text, "dream-0-2")[3:5] == ["malformed", "-"]
    assert line(text, "replay-answer-3")[2:5] == ["7", "-", "-"]


def test_only_some_of_them(run: Path) -> None:
    text = printed(run, purpose="replay", limit=3)
    assert "4 trajectories: 4 replay; the first 3 are shown" in text
    assert "dream" not in text and "replay-answer-3" not in text
    assert "7 trajectories" in printed(run, task="document-1")
    # An advantage is what the learner made of it, whatever else is shown.
    text = printed(run, purpose="dream", limit=1)
    assert line(text, "dream-0-0")[4] == "-4.500" and "dream-0-1" not in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_list_is_whole_at_any_width(tiny_model: Path, tmp_path: Path, width: int) -> None:
    run = tmp_path / "[red]run"
    run.mkdir()
    (run / "smaller-self-0").symlink_to(tiny_model)
    chat = ChatFormatter(tiny_model)
    uid, text = "rollout-consolidation-12345-[bold]-67", "[red] " + "a" * 70
    ids = chat.response(text)
    each = Trajectory(
        uid=uid, task_id="t", attempt=0, purpose="dream", prompt_ids=chat.prompt("[i]"),
        response_ids=ids, logprobs=[-12.5] * len(ids), versions=[1234] * len(ids),
        finish_reason="stop", reward=-123.456, advantage=-1234.567, meta='{"a": "[red]"}',
    )  # fmt: skip
    Lake(run / "lake").append(to_batch([each]), "trajectories")
    listed = printed(run, width)
    assert "…" not in listed
    # Wrapped or not, every character is there, in its column.
    for whole in (f"{len(each.prompt_ids)}+{len(ids)}", "-123.456", "-1234.567"):
        assert whole in listed
    assert "".join(row[:24].split(" ")[0] for row in listed.splitlines()[1:-2]) == uid
    assert listed.count("a" * 10) and sum(row.count("a") for row in listed.splitlines()[1:-2]) >= 70
    tokens = printed(run, width, uid=uid)
    assert tokens.count("-12.500") == len(ids) and "[red]" in tokens and "[i]" in tokens


def test_one_token_by_token(run: Path, tiny_model: Path) -> None:
    ids = ChatFormatter(tiny_model).response("cd")
    text = printed(run, uid="dream-0-1")
    rows = [row.split() for row in text.splitlines() if row.rstrip()[-1:] in ("7", "8")]
    assert [row[-3:] for row in rows] == [
        [f"{-0.25 * (1 + n):.3f}", "-0.500", "8" if n == len(ids) - 1 else "7"]
        for n in range(len(ids))
    ]
    assert "tell me" in text and "reward 3.000, finished by stop" in text
    assert "read this tell me" in printed(run, uid="replay-answer-0")


def test_what_is_not_there_is_said_with_what_is(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingToInspect, match=r"purpose='drem'; there are dream, replay"):
        inspect_run(run, purpose="drem")
    with pytest.raises(NothingToInspect, match=r"uid='x'.*and 1 more"):
        inspect_run(run, uid="x")
    with pytest.raises(NothingToInspect, match="not the directory of a night"):
        inspect_run(tmp_path)
    (tmp_path / "smaller-self-0").symlink_to(run / "smaller-self-0")
    with pytest.raises(NothingToInspect, match="has no trajectories"):
        inspect_run(tmp_path)


def test_the_command(run: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(run), "--purpose", "dream"])
    assert done.exit_code == 0 and "dream-0-1" in done.output
    text = CliRunner().invoke(app, ["inspect", "--help"], env={"COLUMNS": "160"}).output
    assert all(purpose in text for purpose in set(get_args(Purpose)) - {"eval"})
