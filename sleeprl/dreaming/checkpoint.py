"""How far a phase of dreaming has come, on disk: what a killed run continues from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from sleeprl.utils.files import write_json_atomic

POSITION = "position.json"
_KEYS = {
    "version": "version",
    "admitted": "task_ids",
    "done": "num_finished",
    "curriculum": "curriculum_state",
    "first_version": "first_version",
}
"""The keys of ``POSITION``, and the fields that they hold."""


@dataclass
class DreamingCheckpoint:
    """The decisions of the driver so far, in ``directory``.

    ``version_dir`` holds the trainer's state of the same version, and a file for each group that was
    under way then (``group_files``).
    """

    directory: Path
    version: int = 0
    """Updates that are finished."""
    task_ids: list[str] = field(default_factory=list)
    """The task of each admitted group, by the group's number."""
    num_finished: int = 0
    """How many groups, from number 0 on, were learned or set aside for one that was."""
    curriculum_state: dict[str, Any] | None = None
    """What the curriculum's ``state_dict`` returned."""
    first_version: int = 1
    """The policy version that the engines had before the first update."""

    @property
    def version_dir(self) -> Path:
        """The directory of the trainer's state and of the groups under way."""
        return self.version_path(self.version)

    def version_path(self, version: int) -> Path:
        """Return the directory of any version."""
        return self.directory / f"version-{version}"

    def group_files(self) -> dict[int, tuple[str, Path]]:
        """Return the stage and the file of each group that was under way, by its number."""
        found = {}
        for path in self.version_dir.glob("*.arrow"):
            number, _, stage = path.stem.partition("-")
            found[int(number)] = (stage, path)
        return dict(sorted(found.items()))

    def save(self) -> None:
        """Write all of it or nothing; then remove the directories of earlier versions."""
        values = {key: getattr(self, name) for key, name in _KEYS.items()}
        write_json_atomic(self.directory / POSITION, values)
        for old in set(self.directory.glob("version-*")) - {self.version_dir}:
            shutil.rmtree(old)

    @classmethod
    def load(cls, directory: Path, first_version: int = 1) -> DreamingCheckpoint:
        """Read the checkpoint in a directory.

        Args:
            directory: where it was saved.
            first_version: the policy version of the engines, for a phase that has not started.

        Returns:
            The checkpoint, or a new one where there is none.
        """
        if not (directory / POSITION).is_file():
            return cls(directory, first_version=first_version)
        values = json.loads((directory / POSITION).read_text())
        return cls(directory, **{_KEYS[key]: value for key, value in values.items()})


def write_group(directory: Path, name: str, batch: pa.RecordBatch) -> None:
    """Write the batch of a group; actors call it, since the driver never has a batch.

    Args:
        directory: a version's directory.
        name: ``NUMBER-STAGE``.
        batch: its dreams.
    """
    with pa.ipc.new_file(directory / f"{name}.arrow", batch.schema) as file:
        file.write_batch(batch)


def read_group(path: str) -> pa.RecordBatch:
    """Read back what ``write_group`` wrote."""
    with pa.ipc.open_file(pa.memory_map(path)) as file:
        return file.get_batch(0)
