"""How far a phase of dreaming has come, on disk: what a killed run goes on from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from sleeprl.utils.files import write_json_atomic

POSITION = "position.json"


@dataclass
class DreamingCheckpoint:
    """In ``directory``. version: updates done. admitted: the task of each group, by its number.
    done: how many of them, from 0 on, were learned or set aside for one that was. curriculum: its
    state. first_version: the policy version that the engines had before the first update.

    In ``checkpoint`` are the learner's state of this version, and a file for each group that was
    under way (``groups``).
    """

    directory: Path
    version: int = 0
    admitted: list[str] = field(default_factory=list)
    done: int = 0
    curriculum: dict[str, Any] | None = None
    first_version: int = 1

    @property
    def checkpoint(self) -> Path:
        return self.at(self.version)

    def at(self, version: int) -> Path:
        return self.directory / f"version-{version}"

    def groups(self) -> dict[int, tuple[str, Path]]:
        """Stage and file of each group that was under way, by its number."""
        found = {}
        for path in self.checkpoint.glob("*.arrow"):
            number, _, stage = path.stem.partition("-")
            found[int(number)] = (stage, path)
        return dict(sorted(found.items()))

    def save(self) -> None:
        """Whole or not at all; what earlier versions left is removed afterwards."""
        names = ("version", "admitted", "done", "curriculum", "first_version")
        write_json_atomic(self.directory / POSITION, {name: getattr(self, name) for name in names})
        for old in set(self.directory.glob("version-*")) - {self.checkpoint}:
            shutil.rmtree(old)

    @classmethod
    def load(cls, directory: Path, first_version: int = 1) -> DreamingCheckpoint:
        """The position that was kept, or the beginning with that policy version."""
        if not (directory / POSITION).is_file():
            return cls(directory, first_version=first_version)
        return cls(directory, **json.loads((directory / POSITION).read_text()))


def write_group(directory: Path, name: str, batch: pa.RecordBatch) -> None:
    """name: ``NUMBER-STAGE``. For whoever writes the checkpoint; the driver never has a batch."""
    with pa.ipc.new_file(directory / f"{name}.arrow", batch.schema) as file:
        file.write_batch(batch)


def read_group(path: str) -> pa.RecordBatch:
    with pa.ipc.open_file(pa.memory_map(path)) as file:
        return file.get_batch(0)
