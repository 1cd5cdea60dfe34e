"""Mutated configurations: each is refused with one message, or is one that a night can have."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from sleeprl.config import loader as cfg
from sleeprl.config import validation
from sleeprl.config.schema import ConfigError, NightConfig, iter_fields, keys
from sleeprl.night.schedule import describe_levels
from sleeprl.plugins import PluginError
from sleeprl.reporting.terminal import print_message

CASES = 2000
KEYS = [*keys(), "model", "memory", "dreaming.loss", "gate.perplexity", "dreaming.stepz", "nope"]
TEXTS = [
    "", " ", "???", "${nothing}", "${seed}", "/etc", "../x", ".", "..", "a/b", "n" * 300, "[/x]",
    "[red]x", "[bold", "afile", "afile/x", "folder", "s3://bucket/x", "a\0b", "a\x1b[31mb", "a\nb",
    "\ud83d", "\udcff", "\ufeffx", "-rf", "~", "é" * 150, "x/" * 2200, "auto", "null", "true", "off",
    "-1", "1e-300", "3e85", "0x10", "0123", "1_0", "{", "[", "a: b", "!!python/x", "&a", "*a", "%",
    "embedded", "HEAD", "grpo", "vllm", "seeding", "float32", "nights", "ewc", "likelihood_gain",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 8, 64, 0.0, -0.0, 0.5, 1.5, 1e-300, 1e300, 1e-5, 2**31, 2**64, -(2**70), 10**6,
    10**12, math.nan, math.inf, -math.inf,
]  # fmt: skip
PLAIN = st.sampled_from([*TEXTS, *NUMBERS, True, False, None])
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "name", "period", "slots", "ewc", 1, "???"]), inner,
                        max_size=3),
    ),
    max_leaves=4,
)  # fmt: skip
CHANGES = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), PLAIN, min_size=1, max_size=1),
    st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a working directory with a file and a folder in it, on a machine with four cores."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "afile").write_text("a text")
    (folder / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(validation, "available_cpus", lambda: 4)
        patch.setattr(validation, "available_memory", lambda: 16 * 2**30)
        yield folder


def written(value: Any) -> str:
    """Write a value as a word of the command has it."""
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, default_flow_style=True)).strip().removesuffix("...").strip()


def load(changes: dict[str, Any], way: str, place: Path) -> NightConfig:
    """Give changes as words of the command, as a file, or as values in Python."""
    if way == "values":
        return cfg.load(settings=changes)
    if way == "words":
        words = [f"{key}={written(value)}" for key, value in changes.items()]
        return cfg.load(None, words)
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *path, leaf = key.split(".")
        section = nested
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                return NightConfig()
        section[leaf] = value
    (place / "changes.yaml").write_bytes(
        yaml.safe_dump(nested, allow_unicode=True).encode("utf-8", "surrogatepass")
    )
    return cfg.load("changes.yaml")


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.items() if isinstance(value, dict) else value:
            yield from texts_in(list(item) if isinstance(item, tuple) else item)


def require_sense(config: NightConfig) -> None:
    """Fail for an accepted configuration that no night could have."""
    assert config.run_dir.name == config.name and config.run_dir.parent == Path(config.runs)
    assert 0 < len(config.name.encode()) <= 200 and config.name not in (".", "..")
    assert isinstance(config.dreaming.enabled, bool) and config.gate.max_perplexity_ratio >= 1
    for folder in (config.runs, config.generations):
        assert "://" not in folder and not Path(folder).is_file()
    for key, _, value in iter_fields(config):
        if isinstance(value, int) and not isinstance(value, bool):
            assert 0 <= value < (2**32 if key == "seed" else 2**31), key
        if isinstance(value, float):
            assert value == 0 or 1e-12 <= value <= 1e12, key
        for text in texts_in(value):
            assert text != "???" and "\0" not in text, key
            text.encode()
    have = config.resources
    assert max(have.scorers, have.reward_workers, have.engines) * 0.25 <= 4096


@settings(
    max_examples=CASES, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(changes=CHANGES, way=st.sampled_from(["words", "file", "values"]))
def test_a_mutated_configuration_is_refused_in_words_or_makes_sense(
    place: Path, changes: dict[str, Any], way: str
) -> None:
    message = ""
    try:
        config = load(changes, way, place)
        validation.validate_plugins(config)
        describe_levels(config)
    except (ConfigError, PluginError) as error:
        message = str(error)
    if not message:
        require_sense(config)
        if way == "file":  # it takes as long as loading
            assert cfg.validated(config) == config
        return
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    print_message(Console(file=out, width=80), message, "error:", "bold red")
    out.flush()
    assert len(message) < 8000
