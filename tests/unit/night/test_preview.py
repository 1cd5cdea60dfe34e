"""A night reads its day before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeprl import api
from sleeprl.config.schema import ConfigError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "good.txt").write_text("Mara lives in Oslo.")
    (tmp_path / "good.jsonl").write_text('{"question": "Where is Mara?", "answer": "Oslo"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": "Where is Mara?", "answer": "Oslo"\n')
    return tmp_path


@pytest.mark.parametrize("start", [api.plan_night, api.run_night])
@pytest.mark.parametrize(
    ("inputs", "questions", "message"),
    [
        ("empty.jsonl", "good.jsonl", "hold no experience"),
        ("empty.jsonl", None, "hold no experience"),
        ("good.txt", "bad.jsonl", r"bad\.jsonl:1: not JSON"),
        ("-", "bad.jsonl", r"bad\.jsonl:1: not JSON"),
    ],
)
def test_bad_inputs_are_refused_before_anything_starts(
    start: object, inputs: str, questions: str | None, message: str, place: Path
) -> None:
    words = [f"wake.inputs=[{inputs}]", "resources.cpus=2"]
    words += [f"evaluation.questions={questions}"] if questions else []
    config = api.load_config(overrides=words)
    with pytest.raises(ValueError, match=message):
        start(config)  # type: ignore[operator]
    assert not (place / "runs").exists()


def test_a_layout_that_the_model_does_not_have_is_refused_before_anything_starts(
    tiny_model: Path, place: Path
) -> None:
    from sleeprl.memory.checkpoint import widen

    widen(tiny_model, place / "grown", 1, 8, "float32")
    config = api.load_config(
        overrides=["model.name=./grown", "memory.width=16", "resources.cpus=2"]
    )
    with pytest.raises(ConfigError, match=r"memory\.\S+, but model\.name="):
        api.run_night(config)
    assert not (place / "runs").exists()
