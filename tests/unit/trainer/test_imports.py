"""Processes with a model do not import what is only installed for others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sleeprl.trainer.imports import hide
from tests.support.paths import ROOT


def test_what_is_hidden_cannot_be_imported_until_the_end_of_the_block() -> None:
    sys.modules.pop("colorsys", None)
    with hide("colorsys", "sys"):
        with pytest.raises(ImportError):
            import colorsys
        assert sys.modules["sys"] is sys  # was there before
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


def test_a_trainer_does_not_import_mlflow() -> None:
    program = (
        "import sys; from sleeprl.trainer.setup import prepare_process;"
        "from sleeprl.trainer.options import TrainerOptions;"
        "prepare_process(TrainerOptions('', None, 'float32', 0, 0.0, 1));"
        "import deepspeed, sleeprl.trainer.trainer;"
        "found = {'mlflow', 'pandas'} & set(sys.modules); assert not found, found;"
        "import mlflow"  # and can, where it is wanted
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
