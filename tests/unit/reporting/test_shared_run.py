"""A run directory that somebody else made: to look at it runs nothing of it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sleeprl.cli import app
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, to_batch
from sleeprl.lineage import LineageStore, Manifest


class Trap:
    """Writes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


@pytest.fixture
def shared(tiny_model: Path, tmp_path: Path) -> Path:
    """A run and its generations, with code wherever somebody could have put some."""
    mark, run = tmp_path / "ran", tmp_path / "runs" / "night"
    model = run / "smaller-self-0"
    shutil.copytree(tiny_model, model)
    code = f"open({str(mark)!r}, 'w')\n"
    for place in (run, model, tmp_path):
        for name in ("trap.py", "sitecustomize.py", "conftest.py"):
            (place / name).write_text(code)
        (place / "data.pkl").write_bytes(pickle.dumps(Trap(mark)))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["trap.T", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (model / "chat_template.jinja").write_text(escape + "{{ messages[0].content }}")
    (run / "config.yaml").write_text(
        "name: night\ndreaming: {reward: trap.reward, curriculum: ./trap.py:C}\n"
        f"logging: {{sinks: [trap.Sink]}}\nwake: !!python/object/apply:os.system ['touch {mark}']\n"
    )
    (run / "summary.json").write_text(json.dumps({"name": "{{ 7 * 7 }}"}))
    (run / "metrics.jsonl").write_text('{"phase": "consolidation", "step": 1, "loss": 1.0}\n')
    trajectory = Trajectory(
        uid="a", task_id="t", attempt=0, purpose="dream", prompt_ids=[3], response_ids=[4],
        logprobs=[-1.0], versions=[1], finish_reason="stop",
    )  # fmt: skip
    Lake(run / "lake").append(to_batch([trajectory]), "trajectories")
    return run


@pytest.mark.parametrize("command", [["report"], ["inspect"], ["inspect", "--uid", "a"]])
def test_to_look_at_a_run_runs_nothing_of_it(
    command: list[str], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked"))
    done = CliRunner().invoke(app, [command[0], str(shared), *command[1:]])
    assert not (shared.parents[1] / "ran").exists()
    assert done.exit_code == 0, done.output
    if command == ["report"]:
        assert "{{ 7 * 7 }}" in (shared / "report.html").read_text()


def test_to_look_at_generations_runs_nothing_of_them(shared: Path, tmp_path: Path) -> None:
    store = LineageStore(tmp_path / "generations")
    first = store.commit(
        shared / "smaller-self-0", Manifest("night-1", "tiny", config={"reward": "trap.reward"})
    )
    for command in (["lineage"], ["diff", first, first], ["rollback", first]):
        CliRunner().invoke(app, [*command, "--root", str(tmp_path / "generations")])
    assert not (tmp_path / "ran").exists()
