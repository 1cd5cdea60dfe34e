"""Reads experience into the lake: JSONL, Parquet, plain text, directories, stdin.

An object has either ``text`` or ``messages`` (OpenAI chat form); its other keys become metadata. A
plain-text file is one document. A Parquet file of a lake is read back exactly.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sleeprl.data.experience import (
    EXPERIENCE_SCHEMA,
    Experience,
    experience_batch,
    experiences,
)
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import SchemaError, same_schema

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CHUNK = 1024  # experiences in memory at once


class ExperienceError(ValueError):
    """Input that cannot be read as experience; the message names the file, the line and a fix."""


@dataclass(frozen=True)
class RecordReport:
    """The outcome of one ``ingest``."""

    added: int
    """New experiences in the lake."""
    duplicates: int
    """Items whose content is in the lake already, or twice in the input."""
    bad: list[str]
    """The errors of skipped items (only with ``skip_bad``)."""
    ignored: list[str]
    """Files in the given directories whose format is not supported."""


def ingest(paths: Sequence[str | Path], lake: Lake, *, skip_bad: bool = False) -> RecordReport:
    """Read files into the lake as one new file, or as nothing at all.

    Args:
        paths: Files, directories, or ``-`` for JSONL on stdin.
        lake: The lake.
        skip_bad: Skip and report bad items instead of raising.

    Returns:
        Counts, and the errors of skipped items.

    Raises:
        ExperienceError: An item is bad and ``skip_bad`` is False; nothing is written.
    """
    seen = lake.uids("experience")
    added = duplicates = 0
    bad: list[str] = []

    def unseen() -> Iterator[Experience]:
        nonlocal added, duplicates
        on_bad = (lambda error: bad.append(str(error))) if skip_bad else None
        for experience in read_experience(paths, on_bad=on_bad):
            if experience.uid in seen:
                duplicates += 1
            else:
                added += 1
                seen.add(experience.uid)
                yield experience

    stream = unseen()
    chunks = iter(lambda: list(islice(stream, CHUNK)), [])
    lake.append((experience_batch(chunk) for chunk in chunks), "experience")
    return RecordReport(added, duplicates, bad, [str(file) for file in find_files(paths)[1]])


def read_experience(
    paths: Sequence[str | Path], on_bad: Callable[[ExperienceError], None] | None = None
) -> Iterator[Experience]:
    """Yield the experiences in files and directories (in sorted order), or JSONL on stdin (``-``).

    Args:
        paths: Files, directories, or ``-``.
        on_bad: Receives the error of each bad item, which is then skipped; None raises it.

    Raises:
        ExperienceError: An item is bad and ``on_bad`` is None, or a path cannot be read.
    """
    for path in find_files(paths)[0]:
        split, load = FORMATS[".jsonl" if str(path) == "-" else path.suffix.lower()]
        for source, item in split(path):
            try:
                experience = _experience(load(item), source)
            except ExperienceError as error:
                error = ExperienceError(f"{source}: {error}")
                if on_bad is None:
                    raise error from None
                on_bad(error)
            else:
                yield experience


def find_files(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Find the files to read.

    Hidden files in a directory are left out of both lists.

    Args:
        paths: Files, directories, or ``-``.

    Returns:
        The readable files, and the files in the given directories of an unsupported format.

    Raises:
        ExperienceError: A path does not exist, has an unknown format, or has no readable file in
            it.
    """
    files: list[Path] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [
                file
                for file in sorted(path.rglob("*"))
                if file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            readable = [file for file in inside if file.suffix.lower() in FORMATS]
            if not readable:
                raise ExperienceError(f"{path}: no file ending in {', '.join(FORMATS)} in it")
            files += readable
            ignored += [file for file in inside if file not in readable]
        elif str(path) == "-" or (path.is_file() and path.suffix.lower() in FORMATS):
            files.append(path)
        elif path.exists():
            raise ExperienceError(
                f"{path}: cannot tell its format; rename it to one of {', '.join(FORMATS)}"
            )
        else:
            raise ExperienceError(f"{path}: no such file or directory")
    return files, ignored


# --- from a file to items, and from an item to an object ---------------------------


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    if str(path) == "-":
        yield from _numbered("stdin", sys.stdin.buffer)
    else:
        with path.open("rb") as file:
            yield from _numbered(str(path), file)


def _numbered(name: str, lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name}:{number}", line


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Experience]]:
    try:
        file = pq.ParquetFile(path)
        recorded = same_schema(file.schema_arrow, EXPERIENCE_SCHEMA)  # what ``ingest`` wrote
        number = 0
        for batch in file.iter_batches(CHUNK):
            for row in experiences(batch) if recorded else batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (OSError, pa.ArrowException, SchemaError) as error:
        raise ExperienceError(f"{path}: not a readable Parquet file ({error})") from error


def _whole(path: Path) -> Iterator[tuple[str, bytes]]:
    yield str(path), path.read_bytes()


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExperienceError(
            f"byte {error.start} is not UTF-8; convert the file to UTF-8"
        ) from error


def _load_json(raw: bytes) -> Any:
    try:
        return json.loads(_decode(raw))
    except json.JSONDecodeError as error:
        raise ExperienceError(
            f'not JSON ({error}); a line holds one object, such as {{"text": "..."}}'
        ) from error


def _load_text(raw: bytes) -> Any:
    return {"text": _decode(raw)}


Format = tuple[Callable[[Path], Iterator[tuple[str, Any]]], Callable[[Any], Any]]
FORMATS: dict[str, Format] = {
    ".jsonl": (_lines, _load_json),
    ".parquet": (_rows, lambda row: row),
    ".txt": (_whole, _load_text),
    ".md": (_whole, _load_text),
}


# --- from an object to an experience ------------------------------------------------


def _experience(item: Any, source: str) -> Experience:
    if isinstance(item, Experience):
        return item
    if not isinstance(item, dict):
        raise ExperienceError(f'a {type(item).__name__}, not an object; write {{"text": ...}}')
    metadata = {
        key: value
        for key, value in item.items()
        if key not in ("text", "messages") and value is not None
    }
    text, messages = item.get("text"), item.get("messages")
    if text is None and messages is None:
        raise ExperienceError(
            f"neither field 'text' nor 'messages' (fields: {sorted(item)}); add one of them"
        )
    if text is not None and messages is not None:
        raise ExperienceError("both field 'text' and field 'messages'; keep one of them")
    if messages is None:
        return Experience.document(_text(text, "text"), source=source, metadata=metadata)
    if isinstance(messages, str):  # a Parquet column of JSON
        messages = _load_json(messages.encode("utf-8", "surrogatepass"))
    if not isinstance(messages, list) or not messages:
        raise ExperienceError("field 'messages' must be a list of at least one message")
    lines = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]  # Parquet nulls
    return Experience.conversation(messages, "\n".join(lines), source=source, metadata=metadata)


def _message(message: Any, field: str) -> str:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ExperienceError(f"field '{field}' must be an object with a 'role' of {ROLES}")
    content, calls = message.get("content"), message.get("tool_calls") or []
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise ExperienceError(
                f"field '{field}.content' has parts that are no text; only text can be recorded"
            )
        content = "\n".join(_text(p.get("text"), f"{field}.content") for p in content)
    texts = [] if calls and not content else [_text(content, f"{field}.content")]
    return f"{message['role']}: " + "\n".join(texts + [json.dumps(call) for call in calls])


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ExperienceError(
            f"field '{field}' must be text that is not empty, not {value!r:.40}; "
            "fill it in or remove the item"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ExperienceError(
            f"field '{field}' has half a surrogate pair at character {error.start}; remove it"
        ) from error
    return value.strip()
