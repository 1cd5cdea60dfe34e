"""Generations as directories: an ordinary Hugging Face checkpoint plus ``manifest.json``.

    ROOT/<id>/…    one generation, immutable once committed
    ROOT/HEAD      the id of the current generation

A generation is present as a whole or not at all. ``commit`` does not move HEAD: the switch from one
model to another is the one atomic write of ``set_head``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sleeprl._version import __version__
from sleeprl.utils.files import (
    atomic_directory,
    locked,
    sha256_file,
    write_json_atomic,
    write_text_atomic,
)

MANIFEST = "manifest.json"


class LineageError(ValueError):
    """A generation that is missing, ambiguous, or not intact."""


@dataclass(frozen=True)
class Manifest:
    """The record of a generation. The store sets ``id``, ``created`` and ``files``."""

    transaction: str
    """The night that made the generation; a second commit of the same transaction changes nothing."""
    base_model: str
    """The model that the first generation of this line started from: a name or a path."""
    parent: str | None = None
    """Id of the parent generation; None for the first of its line."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration."""
    seeds: Mapping[str, int] = field(default_factory=dict)
    """Seeds by what they are for."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The measured figures of the generation, as in the night's summary."""
    slots: Mapping[str, Any] = field(default_factory=dict)
    """The layout of the memory slots, and which are filled."""
    clock: Mapping[str, Any] = field(default_factory=dict)
    """State of the memory clock; the next night continues from it."""
    steps: Sequence[Mapping[str, Any]] = ()
    """The transfers and merges of the night, in order."""
    note: str = ""
    """Free text."""
    sleeprl_version: str = __version__
    """Version that wrote the manifest."""
    id: str = ""
    """Id of the generation: 16 hexadecimal digits."""
    created: str = ""
    """ISO 8601, UTC."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Relative path -> ``{"sha256": hex, "bytes": int}``, for all files but the manifest."""

    @property
    def size(self) -> int:
        """Size of all files, in bytes."""
        return sum(int(file["bytes"]) for file in self.files.values())


@dataclass(frozen=True)
class Node:
    """A generation in the tree of generations."""

    manifest: Manifest
    is_head: bool
    children: list[Node]


class LineageStore:
    """The generations under one directory.

    Methods accept a unique prefix of an id, or ``HEAD``, wherever they take a generation.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def commit(self, source: Path | Callable[[Path], object], manifest: Manifest) -> str:
        """Commit the files of a directory as a generation.

        The id follows from ``manifest.transaction``; a transaction that is committed already is
        left as it is. If the process dies before the end, nothing is committed.

        Args:
            source: A directory to copy, or a function that writes the files into a given directory.
            manifest: The record, without the fields that the store sets.

        Returns:
            The id of the generation.

        Raises:
            LineageError: The transaction is empty, there are no files, one is a symbolic link, or
                the parent is unknown.
        """
        if not manifest.transaction:
            raise LineageError("manifest.transaction must not be empty")
        generation = hashlib.sha256(manifest.transaction.encode()).hexdigest()[:16]
        with locked(self.root / ".lock"):
            if (self.root / generation).exists():
                return generation
            # Leftovers are of killed commits: the lock excludes running ones.
            for leftover in self.root.glob(".*.tmp/"):
                shutil.rmtree(leftover)
            parent = None if manifest.parent is None else self.resolve(manifest.parent)
            with atomic_directory(self.root / generation) as directory:
                if callable(source):
                    source(directory)
                else:
                    shutil.copytree(source, directory, dirs_exist_ok=True)
                files = {
                    name: {"sha256": sha256_file(file), "bytes": file.stat().st_size}
                    for name, file in _files(directory).items()
                }
                if not files:
                    raise LineageError(f"no files to commit in {source}")
                complete = replace(
                    manifest,
                    id=generation,
                    parent=parent,
                    created=datetime.now(UTC).isoformat(),
                    files=files,
                )
                write_json_atomic(directory / MANIFEST, asdict(complete))
        return generation

    def list(self) -> Sequence[Manifest]:
        """List the manifests of all generations, oldest first."""
        directories = [file.parent.name for file in self.root.glob(f"[!.]*/{MANIFEST}")]
        return sorted(map(self._manifest, directories), key=lambda m: (m.created, m.id))

    def get(self, generation: str) -> Manifest:
        """Return the manifest of a generation.

        Raises:
            LineageError: The generation is unknown or ambiguous, or its manifest cannot be read.
        """
        return self._manifest(self.resolve(generation))

    def find(self, model: str) -> Manifest | None:
        """Find the generation that a model name refers to.

        Args:
            model: ``HEAD``, or at least four characters of an id; any other name finds nothing.

        Returns:
            Its manifest, or None.
        """
        known = self.list()
        if model == "HEAD" and known:
            return self.get(model)
        return next((m for m in known if len(model) >= 4 and m.id.startswith(model)), None)

    def path(self, generation: str) -> Path:
        """Return the checkpoint directory of a generation. It is read-only by convention."""
        return self.root / self.resolve(generation)

    def resolve(self, generation: str) -> str:
        """Return the full id for a unique prefix or ``HEAD``.

        Raises:
            LineageError: No generation matches, or several do.
        """
        if generation == "HEAD":
            head = self.head()
            if head is None:
                raise LineageError(f"{self.root} has no HEAD yet: nothing has been committed")
            return head
        ids = [manifest.id for manifest in self.list()]
        matches = [i for i in ids if generation and i.startswith(generation)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise LineageError(f"generation {generation!r} could be any of {matches}")
        raise LineageError(
            f"no generation {generation!r} in {self.root}; {_known(generation, ids)}"
        )

    def head(self) -> str | None:
        """Return the id of the current generation; None before the first."""
        pointer = self.root / "HEAD"
        return pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None

    def set_head(self, generation: str) -> str:
        """Make a generation the current one.

        Returns:
            Its full id.
        """
        generation = self.resolve(generation)
        write_text_atomic(self.root / "HEAD", generation + "\n")
        return generation

    def rollback(self, generation: str) -> str:
        """Verify the files of a generation, then make it the current one. Nothing is deleted.

        Returns:
            Its full id.

        Raises:
            LineageError: A file differs from the manifest; HEAD does not move.
        """
        if problems := self.verify(generation):
            raise LineageError(
                f"generation {generation} is not intact, HEAD stays: {'; '.join(problems)}"
            )
        return self.set_head(generation)

    def verify(self, generation: str) -> Sequence[str]:
        """Compare the files of a generation with its manifest.

        Returns:
            One line per difference; empty when every file is intact.
        """
        expected = self.get(generation).files
        found = _files(self.path(generation))
        return (
            [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
            + [f"{name} does not belong" for name in sorted(found.keys() - expected.keys())]
            + [
                f"{name} has changed"
                for name in sorted(expected.keys() & found.keys())
                if sha256_file(found[name]) != expected[name]["sha256"]
            ]
        )

    def tree(self) -> Sequence[Node]:
        """Return the roots of the tree: generations without a known parent, with all descendants."""
        head = self.head()
        nodes = {m.id: Node(m, m.id == head, []) for m in self.list()}
        for node in nodes.values():
            if node.manifest.parent in nodes:
                nodes[node.manifest.parent].children.append(node)
        return [node for node in nodes.values() if node.manifest.parent not in nodes]

    def _manifest(self, generation: str) -> Manifest:
        file = self.root / generation / MANIFEST
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            unknown = values.keys() - {f.name for f in fields(Manifest)}
            if unknown:
                raise ValueError(f"unknown fields {sorted(unknown)}, of a newer sleepRL?")
            return Manifest(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise LineageError(f"{file} cannot be read: {error}") from error


def _known(wanted: str, ids: Sequence[str]) -> str:
    """Suggest what a wrong id may mean; ids are abbreviated as in ``sleeprl lineage``."""
    if not ids:
        return "it is empty"
    starts = {i[: max(1, len(wanted))]: i[:8] for i in ids}
    near = difflib.get_close_matches(wanted, starts, n=1)
    hint = f"did you mean {starts[near[0]]!r}? " if near else ""
    latest = ", ".join(i[:8] for i in ids[-5:])
    return hint + (f"it has {latest}" if len(ids) <= 5 else f"it has {len(ids)}, the last {latest}")


def _files(directory: Path) -> dict[str, Path]:
    """Map relative name to path for all files but the manifest; symbolic links are refused."""
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            raise LineageError(f"{name} is a symbolic link; a generation holds files only")
        if path.is_file() and name != MANIFEST:
            files[name] = path
    return files
