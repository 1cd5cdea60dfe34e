"""Reads files of records: JSONL, JSON, CSV, Parquet, Arrow and plain text.

Every reader yields the place of a record (``notes.jsonl:12``) with its value. A record that cannot be
read is yielded as a ``RecordError``, so the reader goes on behind it. A file that cannot be read any
further raises one.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from sleeprl.data.experience import EXPERIENCE_SCHEMA, experiences
from sleeprl.data.trajectory import same_schema

Record = tuple[str, Any]
MAX_DEPTH = 100
"""How deep lists and objects may be nested: far from where Python's own limit ends the program."""
CHUNK = 1024
"""Rows in memory at once."""
_ISO_LATIN = 'convert it, for example with "iconv -f LATIN1 -t UTF-8 FILE > NEW"'
_SPACE = b" \t\r\n\x0b\x0c"
_BOM = b"\xef\xbb\xbf"


class RecordError(ValueError):
    """Input that cannot be read; the message names the file, the line or row, and a fix."""


# --- JSON -------------------------------------------------------------------------


class _Parser:
    """A JSON parser that goes on behind a value that no record may have, and remembers it."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._int,
        )

    def parse(self, text: str, at: int = 0) -> tuple[Any, int]:
        """Parse the value that begins at ``at``.

        Returns:
            The value, or a ``RecordError`` that says what is wrong with it; and where it ends.

        Raises:
            RecordError: The text is not JSON, so there is no end.
        """
        self.problems = []
        try:
            value, end = self._decoder.raw_decode(text, at)
        except RecursionError:
            raise RecordError(_TOO_DEEP) from None
        except json.JSONDecodeError as error:
            raise RecordError(f"not JSON ({error}); a line holds one object in braces") from error
        if not self.problems and is_deeper(value, MAX_DEPTH):
            self.problems.append(_TOO_DEEP)
        return (RecordError(self.problems[0]) if self.problems else value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.problems.append(f"the key {twice!r:.60} occurs twice; keep one of them")
        return found

    def _constant(self, name: str) -> None:
        self.problems.append(f"{name} is not JSON; write null or a number")

    def _float(self, digits: str) -> float:
        if not math.isfinite(number := float(digits)):
            self.problems.append(f"the number {digits:.20} is too large; write it as text")
        return number

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.problems.append(f"a number of {len(digits):,} digits; write it as text")
            return 0


_TOO_DEEP = f"lists or objects nested more than {MAX_DEPTH} deep; flatten them or leave them out"


def is_deeper(value: Any, limit: int) -> bool:
    """Decide whether lists and objects are nested deeper than a limit."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def parse_json(text: str) -> Any:
    """Parse one JSON value, with nothing behind it.

    Raises:
        RecordError: It is not JSON, or has what no record may have: a key twice, NaN, a number
            that is too long, too many levels.
    """
    start = len(text) - len(text.lstrip())
    value, end = _Parser().parse(text, start)
    if text[end:].strip(" \t\r\n"):
        raise RecordError(f"more behind the end of the JSON value, at character {end + 1}")
    if isinstance(value, RecordError):
        raise value
    return value


def decode(raw: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        RecordError: It is not UTF-8; the message says where, and how to convert it.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            fix = _ISO_LATIN.replace("LATIN1", "UTF-16")
            raise RecordError(f"UTF-16, not UTF-8; {fix}") from error
        raise RecordError(f"byte {error.start} is not UTF-8; {_ISO_LATIN}") from error


def _attempt(parse: Callable[[bytes], Any], raw: bytes) -> Any:
    """Parse, and return the error in place of the value."""
    try:
        return parse(raw)
    except RecordError as error:
        return error


def _load_line(raw: bytes) -> Any:
    return parse_json(decode(raw))


# --- from a file to records -------------------------------------------------------


def _open(path: Path) -> AbstractContextManager[IO[bytes]]:
    if str(path) == "-":
        return nullcontext(sys.stdin.buffer)
    return cast("IO[bytes]", gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _name(path: Path) -> str:
    return "stdin" if str(path) == "-" else str(path)


def _numbered(name: str, lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number the lines, which end at a line feed and nowhere else."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            yield number, line
    except (OSError, EOFError, zlib.error) as error:
        where = f"after line {number}" if number else "at all"
        raise RecordError(f"{name}: cannot be read {where} ({error})") from error


def _read_lines(path: Path) -> Iterator[Record]:
    with _opened(path) as file:
        for number, line in _numbered(_name(path), file):
            if line.removeprefix(_BOM).strip(_SPACE):
                yield f"{_name(path)}:{number}", _attempt(_load_line, line)


def _read_json(path: Path) -> Iterator[Record]:
    """Read a list of records, one record, or lines of records under another name."""
    try:
        text = decode(_read_bytes(path))
        at = _skip_space(text, 0)
        if text[at : at + 1] != "[":
            if not text[at:].strip():
                return
            value, end = _Parser().parse(text, at)
            if not text[end:].strip():
                yield str(path), value
                return
    except RecordError as error:
        raise _about(path, error) from error
    yield from _read_list(path, text, at) if text[at] == "[" else _read_lines(path)


def _about(path: Path, error: RecordError) -> RecordError:
    """Return the error with the name of the file before it."""
    message = str(error)
    return error if message.startswith(f"{path}:") else RecordError(f"{path}: {message}")


def _read_list(path: Path, text: str, at: int) -> Iterator[Record]:
    parser, number, at = _Parser(), 0, _skip_space(text, at + 1)
    if text[at : at + 1] == "]":
        at, more = at + 1, False
    else:
        more = True
    while more:
        number += 1
        try:
            value, at = parser.parse(text, at)
        except RecordError as error:
            raise RecordError(f"{path}:{number}: {error}") from error
        yield f"{path}:{number}", value
        at = _skip_space(text, at)
        sign, at = text[at : at + 1], _skip_space(text, at + 1)
        if sign not in (",", "]"):
            raise RecordError(f"{path}:{number}: not JSON (no comma and no ] behind the item)")
        more = sign == ","
    if text[at:].strip():
        raise RecordError(f"{path}:{number}: more behind the end of the list")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_table(path: Path) -> Iterator[Record]:
    """Read a CSV file with a header; the separator is the one that the header has most of."""
    csv.field_size_limit(sys.maxsize)  # a document in a cell may be long
    with _opened(path) as file:
        raw = (line for _, line in _numbered(str(path), file))
        lines = (line.decode("utf-8-sig", "surrogateescape") for line in raw)
        first = next(lines, "")
        if "\0" in first:
            raise RecordError(f"{path}: the header has zero bytes: not UTF-8; {_ISO_LATIN}")
        rows = csv.reader(
            chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True
        )
        names: list[str] | None = None
        while True:
            number = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{path}:{number}", RecordError(f"not CSV ({error})")
                continue
            if names is None:
                names = _header(path, row)
            elif row:
                yield f"{path}:{number}", _named_row(names, row)


def _header(path: Path, row: Sequence[str]) -> list[str]:
    names = [name.strip() for name in row]
    if not all(names) or len({*names}) < len(names):
        raise RecordError(f"{path}:1: the header {names!r:.80} needs a name for each column, once")
    return names


def _named_row(names: Sequence[str], row: Sequence[str]) -> dict[str, str | None] | RecordError:
    if len(row) > len(names):
        return RecordError(
            f"{len(row)} cells, but the header names {len(names)}; put quotes around a cell with a comma"
        )
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return RecordError(f"bytes that are not UTF-8; {_ISO_LATIN}")
    return {**dict.fromkeys(names), **dict(zip(names, row, strict=False))}


def _read_parquet(path: Path) -> Iterator[Record]:
    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(CHUNK)

    return _rows(path, "Parquet", batches())


def _read_arrow(path: Path) -> Iterator[Record]:
    def batches() -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(path)) as file:
            try:
                reader: Any = pa.ipc.open_stream(file)  # what Hugging Face datasets write
            except pa.ArrowInvalid:
                file.seek(0)
                whole = pa.ipc.open_file(file)
                reader = (whole.get_batch(n) for n in range(whole.num_record_batches))
            for batch in reader:
                for at in range(0, batch.num_rows, CHUNK):
                    yield batch.slice(at, CHUNK)

    return _rows(path, "Arrow", batches())


def _rows(path: Path, form: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    number = 0
    try:
        for batch in batches:
            recorded = same_schema(batch.schema, EXPERIENCE_SCHEMA)  # what ``ingest`` wrote
            rows = experiences(batch) if recorded else batch.to_pylist()
            for row in rows:
                number += 1
                yield f"{path}:{number}", row
    # Damaged bytes surface as errors of Arrow, of the file system, or of Python's own types.
    except (OSError, pa.ArrowException, ValueError, OverflowError, RecursionError) as error:
        where = f" after row {number}" if number else ""
        raise RecordError(f"{path}: not a readable {form} file{where} ({error})") from error


def _read_text(path: Path) -> Iterator[Record]:
    yield str(path), _attempt(lambda raw: {"text": decode(raw)}, _read_bytes(path))


def _read_bytes(path: Path) -> bytes:
    try:
        with _open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from error


def _opened(path: Path) -> AbstractContextManager[IO[bytes]]:
    try:
        return _open(path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error})") from error


TEXTS = (".txt", ".md")
"""Formats of which a file is one document."""
FORMATS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_lines,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".arrow": _read_arrow,
    ".ndjson": _read_lines,
    **dict.fromkeys(TEXTS, _read_text),
}
"""The readers, by the end of a file's name."""
_NOT_PACKED = (".parquet", ".arrow")


def format_of(path: Path) -> str | None:
    """Return the key of a file's reader: the end of its name, before ``.gz`` if it is packed.

    Returns:
        A key of ``FORMATS``; None where there is no reader.
    """
    if str(path) == "-":
        return ".jsonl"
    packed = path.suffix.lower() == ".gz"
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    return suffix if suffix in FORMATS and not (packed and suffix in _NOT_PACKED) else None


def read_records(path: Path, form: str | None = None) -> Iterator[Record]:
    """Yield the records of a file, or of JSONL on stdin (``-``).

    Args:
        path: The file.
        form: A key of ``FORMATS``; None for what ``format_of`` says of the file.

    Returns:
        The place of each record with its value: an object, a recorded ``Experience``, or the
        ``RecordError`` of one that cannot be read.

    Raises:
        RecordError: The file cannot be read, or no further.
    """
    return FORMATS[form or format_of(path) or ".jsonl"](path)
