"""Fixtures that every test may ask for, and how tests share the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random two-layer Llama with a byte-level tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several workers one thread; what a test starts decides for itself."""
    if hasattr(config, "workerinput"):
        import torch

        torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what the steps of ``.ci/run`` before this one took."""
    path = os.environ.get("CI_STEPS")
    if path and Path(path).is_file():
        steps = " s, ".join(Path(path).read_text().splitlines())
        terminalreporter.write_line(f"steps of .ci/run so far: {steps} s")
