"""Reads experience into the lake: files of records, plain text, directories, stdin.

What a record may look like is in ``forms``, the kinds of files are in ``sleeprl.data.records``. A
Parquet file of a lake is read back exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sleeprl.data.experience import Experience, experience_batch
from sleeprl.data.lake import Lake
from sleeprl.data.records import RecordError, read_records
from sleeprl.wake.folders import find_files
from sleeprl.wake.forms import ExperienceError, experience_of

CHUNK = 1024  # experiences in memory at once
OnBad = Callable[[ExperienceError], None]


@dataclass(frozen=True)
class RecordReport:
    """The outcome of one ``ingest``."""

    added: int
    """New experiences in the lake."""
    duplicates: int
    """Items whose content is in the lake already, or twice in the input."""
    bad: list[str]
    """The errors of skipped items and files (only with ``skip_bad``)."""
    ignored: list[str]
    """Files in the given directories that are not data, or of a format that cannot be read."""


def ingest(paths: Sequence[str | Path], lake: Lake, *, skip_bad: bool = False) -> RecordReport:
    """Read files into the lake as one new file, or as nothing at all.

    Args:
        paths: Files, directories, or ``-`` for JSONL on stdin.
        lake: The lake.
        skip_bad: Skip and report bad items and files instead of raising.

    Returns:
        Counts, and the errors of what was skipped.

    Raises:
        ExperienceError: An item or a file is bad and ``skip_bad`` is False; nothing is written.
    """
    added = duplicates = 0
    bad: list[str] = []
    on_bad = (lambda error: bad.append(str(error))) if skip_bad else None
    files, ignored = find_files(paths, on_bad)
    seen = lake.uids("experience")

    def unseen() -> Iterator[Experience]:
        nonlocal added, duplicates
        for experience in _read_files(files, on_bad):
            if experience.uid in seen:
                duplicates += 1
            else:
                added += 1
                seen.add(experience.uid)
                yield experience

    stream = unseen()
    chunks = iter(lambda: list(islice(stream, CHUNK)), [])
    lake.append((experience_batch(chunk) for chunk in chunks), "experience")
    return RecordReport(added, duplicates, bad, [str(file) for file in ignored])


def read_experience(
    paths: Sequence[str | Path], on_bad: OnBad | None = None
) -> Iterator[Experience]:
    """Yield the experiences in files and directories (in sorted order), or JSONL on stdin (``-``).

    Args:
        paths: Files, directories, or ``-``.
        on_bad: Receives the error of each bad item and file, which is then skipped; None raises it.

    Raises:
        ExperienceError: An item or a file is bad and ``on_bad`` is None.
    """
    yield from _read_files(find_files(paths, on_bad)[0], on_bad)


def _read_files(files: Sequence[Path], on_bad: OnBad | None) -> Iterator[Experience]:
    def report(error: ExperienceError) -> None:
        if on_bad is None:
            raise error from None
        on_bad(error)

    for path in files:
        try:
            for place, item in read_records(path):
                # A file's name may have bytes that are no text.
                source = place.encode("utf-8", "backslashreplace").decode()
                try:
                    if isinstance(item, RecordError):
                        raise item
                    experience = experience_of(item, source)
                except RecordError as error:
                    report(ExperienceError(f"{source}: {error}"))
                else:
                    yield experience
        except ExperienceError:
            raise
        except RecordError as error:
            report(ExperienceError(str(error)))
