"""The experience lake: append-only Parquet tables, one immutable file per append.

A file appears completely or not at all. A row is identified by its ``uid``, so if an append is
retried because its outcome is unknown, its rows count once when read.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sleeprl.data.experience import EXPERIENCE_SCHEMA
from sleeprl.data.trajectory import TRAJECTORY_SCHEMA, SchemaError, check_schema, conform
from sleeprl.utils.files import atomic_path

if TYPE_CHECKING:
    import pyarrow.dataset as ds

TRAJECTORIES, EXPERIENCE = "trajectories", "experience"
"""The kinds of tables."""
SCHEMAS = {TRAJECTORIES: TRAJECTORY_SCHEMA, EXPERIENCE: EXPERIENCE_SCHEMA}


class LakeError(ValueError):
    """A file that the lake cannot read, or a kind of table that it does not have."""


class Lake:
    """Tables of a fixed set of kinds (``SCHEMAS``) in one directory.

    Files are named ``DIR/KIND/ORDINAL-UUID.parquet``. The names sort in the order of appending, and
    they are unique, so concurrent writers need no lock.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a lake.

        Args:
            directory: Root of the tables; the first append creates it.
        """
        self.directory = Path(directory)

    def append(
        self, data: pa.Table | pa.RecordBatch | Iterable[pa.RecordBatch], kind: str
    ) -> Path | None:
        """Write ``data`` to one new file.

        An iterable is written batch by batch; if it raises, nothing is appended.

        Args:
            data: The rows.
            kind: A key of ``SCHEMAS``.

        Returns:
            Path of the file, or None if there are no rows.

        Raises:
            LakeError: There is no such kind.
            SchemaError: The rows do not fit the schema.
        """
        schema = _schema(kind)
        if isinstance(data, pa.RecordBatch):
            data = [data]
        elif isinstance(data, pa.Table):
            data = data.to_batches()
        batches = (conform(batch, schema) for batch in data if batch.num_rows)
        first = next(batches, None)
        if first is None:
            return None
        last = max((int(file.name.split("-")[0]) for file in self.files(kind)), default=-1)
        path = self.directory / kind / f"{last + 1:08d}-{uuid.uuid4().hex}.parquet"
        with (
            atomic_path(path) as temporary,
            pq.ParquetWriter(
                temporary, schema, compression="zstd", write_page_checksum=True
            ) as writer,
        ):
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        return path

    def rewrite(self, data: pa.Table | pa.RecordBatch, kind: str) -> None:
        """Replace all rows of a kind, which removes those of an unfinished attempt.

        Sampling is not always reproducible to the bit, so without this a text that one attempt
        excludes from training could be trained on from another.

        Args:
            data: The new rows.
            kind: A key of ``SCHEMAS``.
        """
        for file in self.files(kind):
            file.unlink()
        self.append(data, kind)

    def files(self, kind: str) -> list[Path]:
        """List the files of a kind, oldest first."""
        _schema(kind)
        return sorted((self.directory / kind).glob("[0-9]*-*.parquet"))

    def read(self, kind: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all rows of a kind in the order of appending, each uid once.

        The last row of a uid counts, since work is repeated after a crash.

        Args:
            kind: A key of ``SCHEMAS``.
            columns: Columns to read besides ``uid``; None for all.

        Raises:
            LakeError: There is no such kind, or a file is damaged.
            SchemaError: A file has a newer schema version.
        """
        schema = _schema(kind)
        if columns is not None:
            wanted = [schema.field(name) for name in dict.fromkeys(["uid", *columns])]
            schema = pa.schema(wanted, schema.metadata)
        tables = [schema.empty_table()]
        for file in self.files(kind):
            self._check(file, kind)
            try:
                with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                    table = parquet.read(schema.names)
            except (OSError, pa.ArrowException) as error:
                raise _corrupt(file, error) from error
            tables.append(conform(table, schema))
        table = pa.concat_tables(tables)
        _, from_the_end = np.unique(table.column("uid").to_numpy()[::-1], return_index=True)
        keep = np.zeros(table.num_rows, dtype=bool)
        keep[table.num_rows - 1 - from_the_end] = True
        return table.filter(pa.array(keep))

    def uids(self, kind: str) -> set[str]:
        """Return the uids of all rows of a kind."""
        return set(self.read(kind, []).column("uid").to_pylist())

    def pick(self, kind: str, uids: Sequence[str]) -> pa.Table:
        """Read the rows of some uids, in the given order, without loading the other rows into memory.

        Args:
            kind: A key of ``SCHEMAS``.
            uids: The uids to read.

        Raises:
            KeyError: There is no row of a uid.
        """
        wanted = pc.field("uid").isin(pa.array(uids, pa.string()))
        table = self.scan(kind).to_table(filter=wanted)
        last = {uid: row for row, uid in enumerate(table.column("uid").to_pylist())}
        return table.take(pa.array([last[uid] for uid in uids], pa.int64()))

    def scan(self, kind: str) -> ds.Dataset:
        """Open a kind as a pyarrow dataset, for data larger than memory.

        Rows of retried appends are not merged. A column that a file lacks is null, even if an
        earlier schema version has the value in ``meta``.

        Args:
            kind: A key of ``SCHEMAS``.

        Raises:
            LakeError: There is no such kind, or a file is damaged.
            SchemaError: A file has a newer schema version.
        """
        import pyarrow.dataset as ds  # imports pandas: one second that actors without a scan save

        files = self.files(kind)
        for file in files:
            self._check(file, kind)
        if not files:
            return ds.dataset(_schema(kind).empty_table())
        return ds.dataset([str(file) for file in files], schema=_schema(kind), format="parquet")

    def _check(self, file: Path, kind: str) -> None:
        try:
            check_schema(pq.read_schema(file), _schema(kind))
        except SchemaError as error:
            raise SchemaError(f"{file}: {error}") from error
        except (OSError, pa.ArrowException) as error:
            raise _corrupt(file, error) from error


def _schema(kind: str) -> pa.Schema:
    if kind not in SCHEMAS:
        raise LakeError(f"the lake has no kind {kind!r}; it has {sorted(SCHEMAS)}")
    return SCHEMAS[kind]


def _corrupt(file: Path, error: Exception) -> LakeError:
    return LakeError(
        f"{file} is truncated or corrupt ({error}). Restore it from a copy, or move it out of "
        f"{file.parent} to go on without its rows."
    )
