"""Generations as directories: an ordinary Hugging Face checkpoint plus ``manifest.json``.

    ROOT/<id>/…    one generation, immutable once committed
    ROOT/HEAD      the id of the current generation

A generation is present as a whole or not at all. ``commit`` does not move HEAD: the switch from one
model to another is the one atomic write of ``set_head``.
"""

from __future__ import annotations

import difflib
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sleeprl._version import __version__
from sleeprl.utils.files import (
    atomic_directory,
    leftovers,
    locked,
    read_json,
    sha256_file,
    write_json_atomic,
    write_text_atomic,
)

MANIFEST = "manifest.json"
_ID = "[0-9a-f]{16}"
"""Pattern of an id."""


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
            for leftover in leftovers(self.root, _ID):
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
        """List the manifests of all generations, oldest first, without those of ``unreadable``."""
        return sorted(self._read_all()[0], key=lambda m: (m.created, m.id))

    def unreadable(self) -> Sequence[str]:
        """Say which manifests cannot be read and why, one line each; and the same of HEAD."""
        problems = [str(error) for error in self._read_all()[1]]
        try:
            self.head()
        except LineageError as error:
            problems.append(str(error))
        return problems

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

        Raises:
            LineageError: The manifest of that generation cannot be read.
        """
        known = self._ids()
        if model == "HEAD" and known:
            return self.get(model)
        found = next((i for i in known if len(model) >= 4 and i.startswith(model)), None)
        return None if found is None else self._manifest(found)

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
            if head not in self._ids():
                raise LineageError(
                    f"{self.root / 'HEAD'} names {head!r}, which is not a generation there; "
                    f"choose one: `sleeprl rollback ID`. {_known(head, self._ids())}"
                )
            return head
        ids = self._ids()
        matches = [i for i in ids if generation and i.startswith(generation)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise LineageError(f"generation {generation!r} could be any of {matches}")
        raise LineageError(
            f"no generation {generation!r} in {self.root}; {_known(generation, ids)}"
        )

    def head(self) -> str | None:
        """Return the id of the current generation; None before the first.

        Raises:
            LineageError: The file HEAD does not hold an id.
        """
        pointer = self.root / "HEAD"
        if not pointer.exists():
            return None
        try:
            head = pointer.read_bytes().decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise LineageError(
                f"{pointer} cannot be read: {error}; `sleeprl rollback ID` writes it again"
            ) from error
        if not head.isalnum():
            raise LineageError(
                f"{pointer} is damaged: it holds {head[:40]!r} and no id; `sleeprl rollback ID` "
                "writes it again"
            )
        return head

    def set_head(self, generation: str) -> str:
        """Make a generation the current one.

        Returns:
            Its full id.
        """
        generation = self.resolve(generation)
        if (self.root / "HEAD").is_dir():
            raise LineageError(f"{self.root / 'HEAD'} is a directory; move it away")
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
        try:
            head = self.head()
        except LineageError:  # one of ``unreadable``
            head = None
        nodes = {m.id: Node(m, m.id == head, []) for m in self.list()}
        for node in nodes.values():
            if node.manifest.parent in nodes:
                nodes[node.manifest.parent].children.append(node)
        return [node for node in nodes.values() if node.manifest.parent not in nodes]

    def _ids(self) -> Sequence[str]:
        """List the ids by the names of the directories, also where a manifest is unreadable."""
        return sorted(file.parent.name for file in self.root.glob(f"[!.]*/{MANIFEST}"))

    def _read_all(self) -> tuple[Sequence[Manifest], Sequence[LineageError]]:
        """Read all manifests; returns those that can be read, and the errors of the others."""
        manifests, errors = [], []
        for generation in self._ids():
            try:
                manifests.append(self._manifest(generation))
            except LineageError as error:
                errors.append(error)
        return manifests, errors

    def _manifest(self, generation: str) -> Manifest:
        file = self.root / generation / MANIFEST
        try:
            values = read_json(file)
            if not isinstance(values, dict):
                raise ValueError("it is not a JSON object")
            unknown = values.keys() - {f.name for f in fields(Manifest)}
            if unknown:
                raise ValueError(f"unknown fields {sorted(unknown)}, of a newer sleepRL?")
            manifest = Manifest(**values)
            _check_types(manifest)
        except (OSError, ValueError, TypeError) as error:
            raise LineageError(f"{file} cannot be read: {error}") from error
        if manifest.id != generation:
            raise LineageError(
                f"{file} cannot be read: it is of the generation {manifest.id!r}; a generation's "
                "directory has its id as its name"
            )
        return manifest


def _check_types(manifest: Manifest) -> None:
    """Raise ValueError or TypeError where a value is not of its field's kind."""
    for name in ("config", "seeds", "figures", "slots", "clock", "files"):
        if not isinstance(getattr(manifest, name), Mapping):
            raise ValueError(f"{name} is not an object")
    for name in ("transaction", "base_model", "note", "sleeprl_version", "id", "created"):
        if not isinstance(getattr(manifest, name), str):
            raise ValueError(f"{name} is not text")
    if not isinstance(manifest.parent, str | None):
        raise ValueError("parent is neither an id nor null")
    datetime.fromisoformat(manifest.created)
    if "count" in manifest.slots and not isinstance(manifest.slots.get("used"), Sequence):
        raise ValueError("slots.used is not a list")
    for name, entry in manifest.files.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"files: {name!r} has no sha256")
        if not isinstance(entry.get("bytes"), int):
            raise ValueError(f"files: {name!r} has no size in bytes")


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
            raise LineageError(
                f"{name} is a symbolic link in {directory}; a generation holds files only"
            )
        if path.is_file() and name != MANIFEST:
            files[name] = path
    return files
