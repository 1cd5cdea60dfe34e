"""Fixtures that every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random two-layer Llama with a byte-level tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
