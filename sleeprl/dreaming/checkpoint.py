"""The progress of dreaming on disk, from which a killed run continues."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from sleeprl.utils.files import read_record, write_json_atomic

POSITION = "position.json"
_KEYS = {
    "version": "version",
    "admitted": "task_ids",
    "done": "num_finished",
    "curriculum": "curriculum_state",
    "first_version": "first_version",
}
"""The keys of ``POSITION``, and the fields that they store."""


@dataclass
class DreamingCheckpoint:
    """The driver's state in ``directory``.

    ``version_dir`` has the trainer's state of the same version, and a file for each group that was
    in flight then (``group_files``).
    """

    directory: Path
    version: int = 0
    """Number of finished updates."""
    task_ids: list[str] = field(default_factory=list)
    """Task of each admitted group, by the group's number."""
    num_finished: int = 0
    """Number of finished groups: all numbers below it were learned from or set aside."""
    curriculum_state: dict[str, Any] | None = None
    """The curriculum's ``state_dict``."""
    first_version: int = 1
    """Policy version of the engines before the first update."""

    @property
    def version_dir(self) -> Path:
        """Directory of the trainer's state and of the groups in flight."""
        return self.version_path(self.version)

    def version_path(self, version: int) -> Path:
        """Return the directory of a version."""
        return self.directory / f"version-{version}"

    def group_files(self) -> dict[int, tuple[str, Path]]:
        """Return the stage and the file of each group that was in flight, by its number."""
        found = {}
        for path in self.version_dir.glob("*.arrow"):
            number, _, stage = path.stem.partition("-")
            found[int(number)] = (stage, path)
        return dict(sorted(found.items()))

    def save(self) -> None:
        """Write the state atomically, then remove the directories of earlier versions."""
        values = {key: getattr(self, name) for key, name in _KEYS.items()}
        write_json_atomic(self.directory / POSITION, values)
        for old in set(self.directory.glob("version-*")) - {self.version_dir}:
            shutil.rmtree(old)

    @classmethod
    def load(cls, directory: Path, first_version: int = 1) -> DreamingCheckpoint:
        """Read the checkpoint in a directory.

        Args:
            directory: Directory of the checkpoint.
            first_version: Policy version of the engines, for a phase that has not started.

        Returns:
            The checkpoint, or a new one where there is none.
        """
        if not (directory / POSITION).is_file():
            return cls(directory, first_version=first_version)
        return read_record(
            directory / POSITION,
            lambda values: cls(directory, **{_KEYS[key]: v for key, v in values.items()}),
        )


def write_group(directory: Path, name: str, batch: pa.RecordBatch) -> None:
    """Write the batch of a group. Actors call it, since the driver never has a batch.

    Args:
        directory: Directory of a version.
        name: ``NUMBER-STAGE``.
        batch: The group's dreams.
    """
    with pa.ipc.new_file(directory / f"{name}.arrow", batch.schema) as file:
        file.write_batch(batch)


def read_group(path: str) -> pa.RecordBatch:
    """Read a batch that ``write_group`` wrote, memory-mapped."""
    with pa.ipc.open_file(pa.memory_map(path)) as file:
        return file.get_batch(0)
