"""The record of one pass of the model: a ``Trajectory``, in Python and in Arrow.

Trajectories travel from engine to trainer as Arrow record batches, whose schema has a name and a
version. A new version only adds nullable columns or drops columns. A column that an older batch
lacks is read as null, a column that only the older batch has is ignored, and a version newer than
this program's is an error. Versions before 4 have ``gain`` and ``gap`` in ``meta``; they are read
into their columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa

Purpose = Literal["self_study", "replay", "rollout", "dream", "redrawn", "outdated", "eval"]
Tabular = TypeVar("Tabular", pa.RecordBatch, pa.Table)

FLOAT32_MAX = float(np.finfo(np.float32).max)
NAME_KEY, VERSION_KEY = b"sleeprl.schema", b"sleeprl.version"


class SchemaError(ValueError):
    """Data that violates its schema."""


def count_stale_tokens(versions: Sequence[int], min_version: int) -> int:
    """Count the tokens at the start of a response that are too old to train on.

    Args:
        versions: Policy version of each token.
        min_version: Oldest version to train on.

    Returns:
        The number of tokens up to and including the last one of an older version.
    """
    return max((n + 1 for n, version in enumerate(versions) if version < min_version), default=0)


def find_oldest_last_version(batch: pa.RecordBatch) -> int | None:
    """Return the minimum over responses of the last token's policy version; None without tokens."""
    written = filter(None, batch.column("versions").to_pylist())
    return min((versions[-1] for versions in written), default=None)


def versioned(name: str, version: int, columns: Sequence[pa.Field]) -> pa.Schema:
    """Create an Arrow schema with its name and version in the metadata."""
    return pa.schema(columns, {NAME_KEY: name.encode(), VERSION_KEY: str(version).encode()})


def _column(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


TRAJECTORY_SCHEMA = versioned(
    "trajectory",
    4,
    [
        _column("uid", pa.string()),
        _column("task_id", pa.string()),
        _column("attempt", pa.int32()),
        _column("purpose", pa.string()),
        _column("prompt_ids", pa.list_(pa.int32())),
        _column("response_ids", pa.list_(pa.int32())),
        _column("logprobs", pa.list_(pa.float32())),
        _column("versions", pa.list_(pa.int32())),
        _column("finish_reason", pa.string()),
        pa.field("teacher_prompt_ids", pa.list_(pa.int32())),
        pa.field("reward", pa.float32()),
        pa.field("unscored", pa.string()),
        pa.field("ref_logprobs", pa.list_(pa.float32())),
        pa.field("advantage", pa.float32()),
        pa.field("gain", pa.float64()),
        pa.field("gap", pa.float64()),
        pa.field("parsed", pa.string()),
        _column("meta", pa.string()),
    ],
)


@dataclass(frozen=True)
class Trajectory:
    """One prompt and one sampled response, with everything that training on it needs.

    Guarantees:

    * ``logprobs``, ``versions`` and, if present, ``ref_logprobs`` have one entry per response
      token;
    * a missing reward differs from reward 0: after scoring, ``unscored`` gives the reason;
    * an invalid trajectory cannot be created (SchemaError).
    """

    uid: str
    """Unique identifier. A retry of the same work has the same uid, so it counts once."""
    task_id: str
    """Task of the prompt; the attempts at one task form a group."""
    attempt: int
    """Number of the sample in its group, from 0."""
    purpose: Purpose
    """Purpose of the trajectory, which determines its readers."""
    prompt_ids: list[int]
    """Token ids of the prompt."""
    response_ids: list[int]
    """Token ids of the response."""
    logprobs: list[float]
    """Natural log-probability of each response token under the policy that sampled it (float32)."""
    versions: list[int]
    """Policy version that sampled each response token. The weights can change within a response."""
    finish_reason: str
    """``stop`` for a complete response, ``length`` for a truncated one, ``running`` for an
    unfinished one."""
    teacher_prompt_ids: list[int] | None = None
    """Token ids of the teacher's prompt, which has the experience, for the same response."""
    reward: float | None = None
    """The reward (float32)."""
    unscored: str | None = None
    """Reason for a missing reward."""
    ref_logprobs: list[float] | None = None
    """Natural log-probability of each response token under the reference policy (float32)."""
    advantage: float | None = None
    """Advantage in the update that trained on it (float32); with a critic the mean over tokens.
    None if no update used the reward."""
    gain: float | None = None
    """Change of the log-likelihood of the task's questions after one training step on a dream (nats
    per token); None if there is nothing to train on."""
    gap: float | None = None
    """Negative log-likelihood of the task's questions before that step (nats per token)."""
    parsed: str | None = None
    """The response as parsed by the dream's format, as JSON; None if it is malformed."""
    meta: str = "{}"
    """All data without a column, a JSON object."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check the invariants.

        Raises:
            SchemaError: An invariant is violated; the message names the field and its value.
        """
        if not self.uid:
            raise SchemaError(f"uid {self.uid!r} must not be empty")
        if self.purpose not in get_args(Purpose):
            raise self._error(f"purpose {self.purpose!r} is none of {get_args(Purpose)}")
        if self.attempt < 0:
            raise self._error(f"attempt {self.attempt} must not be negative")
        tokens = len(self.response_ids)
        for name in ("logprobs", "versions", "ref_logprobs"):
            values = getattr(self, name)
            if values is not None and len(values) != tokens:
                raise self._error(
                    f"{name} has {len(values)} entries for the {tokens} of response_ids"
                )
        for name in ("logprobs", "ref_logprobs"):
            for value in getattr(self, name) or ():
                if not math.isfinite(value):
                    raise self._error(f"{name} has {value}, which is not finite")
        if self.reward is not None and not abs(self.reward) <= FLOAT32_MAX:
            raise self._error(f"reward {self.reward} is not finite; set unscored instead")
        if self.reward is not None and self.unscored is not None:
            raise self._error(
                f"reward {self.reward} and unscored {self.unscored!r} exclude each other"
            )
        try:
            is_object = isinstance(json.loads(self.meta), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise self._error(f"meta {self.meta!r:.60} is not a JSON object")

    def _error(self, problem: str) -> SchemaError:
        return SchemaError(f"trajectory {self.uid!r}: {problem}")


def to_batch(trajectories: Sequence[Trajectory]) -> pa.RecordBatch:
    """Convert trajectories to one record batch, in order."""
    arrays = [
        pa.array([getattr(t, field.name) for t in trajectories], field.type)
        for field in TRAJECTORY_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=TRAJECTORY_SCHEMA)


def from_batch(batch: pa.RecordBatch | pa.Table) -> list[Trajectory]:
    """Convert a batch or table to trajectories, in order (inverse of ``to_batch``).

    Raises:
        SchemaError: The data has another schema, or a trajectory is invalid.
    """
    batch = conform(batch, TRAJECTORY_SCHEMA)
    columns = [batch.column(f.name).to_pylist() for f in fields(Trajectory)]
    return [Trajectory(*row) for row in zip(*columns, strict=True)]


def same_schema(found: pa.Schema, schema: pa.Schema) -> bool:
    """Return whether both schemas have the same name. The version, and so the columns, may differ."""
    return bool((found.metadata or {}).get(NAME_KEY) == schema.metadata[NAME_KEY])


def check_schema(found: pa.Schema, schema: pa.Schema) -> None:
    """Check that data of schema ``found`` can be read as ``schema``.

    Raises:
        SchemaError: The name differs, the version is newer, or columns are unknown or missing.
    """
    wanted, have = schema.metadata, found.metadata or {}
    name, version = wanted[NAME_KEY].decode(), int(wanted[VERSION_KEY])
    if not same_schema(found, schema):
        other = have.get(NAME_KEY, b"nothing of sleepRL").decode()
        raise SchemaError(f"expected data of schema {name!r}, got {other!r}")
    if (given := int(have.get(VERSION_KEY, b"0"))) > version:
        raise SchemaError(
            f"{name} data has schema version {given}, this sleepRL reads up to {version}; "
            "upgrade sleepRL"
        )
    unknown = sorted(set(found.names) - set(schema.names))
    if unknown and given == version:
        raise SchemaError(f"{name} data has unknown columns {unknown}")
    missing = [f.name for f in schema if not f.nullable and f.name not in found.names]
    if missing:
        raise SchemaError(f"{name} data lacks the columns {missing}")


def conform(data: Tabular, schema: pa.Schema) -> Tabular:
    """Give ``data`` exactly the columns of ``schema``.

    Args:
        data: Rows of the same schema, in any version up to that of ``schema``.
        schema: The schema to conform to.

    Returns:
        The rows. A nullable column that ``data`` lacks is null, unless an earlier version has its
        values in ``meta``.

    Raises:
        SchemaError: ``data`` cannot be read as ``schema``.
    """
    check_schema(data.schema, schema)
    lifted = _lift_from_meta(data) if set(_ONCE_IN_META) & set(schema.names) else {}
    arrays = []
    for field in schema:
        if field.name not in data.schema.names:
            values = lifted.get(field.name, pa.nulls(data.num_rows, field.type))
            arrays.append(pa.chunked_array([values]) if isinstance(data, pa.Table) else values)
            continue
        values = data.column(field.name)
        if values.null_count and not field.nullable:
            raise SchemaError(f"column {field.name!r} has {values.null_count} null values")
        arrays.append(values.cast(field.type))
    return type(data).from_arrays(arrays, schema=schema)


_ONCE_IN_META = ("gain", "gap")


def _lift_from_meta(data: pa.RecordBatch | pa.Table) -> dict[str, pa.Array]:
    """Read the columns that schema versions before 4 have inside ``meta``."""
    names = data.schema.names
    if "meta" not in names or set(_ONCE_IN_META) <= set(names):
        return {}
    metas = [
        json.loads(meta) if '"gap"' in meta else {} for meta in data.column("meta").to_pylist()
    ]
    return {name: pa.array([m.get(name) for m in metas], pa.float64()) for name in _ONCE_IN_META}


def with_column(batch: Tabular, name: str, values: Sequence[Any]) -> Tabular:
    """Copy ``batch`` with new ``values`` in one column of its schema.

    Args:
        batch: The rows.
        name: Name of the column.
        values: One value per row.

    Raises:
        SchemaError: The number of values differs from the number of rows.
    """
    if len(values) != batch.num_rows:
        raise SchemaError(f"{name} has {len(values)} values for {batch.num_rows} trajectories")
    index = batch.schema.get_field_index(name)
    field = batch.schema.field(index)
    return batch.set_column(index, field, pa.array(values, field.type))


def with_rewards(
    batch: pa.RecordBatch, rewards: Sequence[float | None], unscored: Sequence[str | None]
) -> pa.RecordBatch:
    """Score a batch: each row gets either a finite reward or the reason for having none.

    Args:
        batch: The trajectories.
        rewards: Reward of each row, or None.
        unscored: Reason for a missing reward of each row, or None.

    Raises:
        SchemaError: A row has both, neither, or a reward that float32 cannot represent.
    """
    for uid, reward, reason in zip(batch.column("uid").to_pylist(), rewards, unscored, strict=True):
        if (reward is None) == (reason is None):
            raise SchemaError(
                f"trajectory {uid!r}: reward {reward!r} and unscored {reason!r}; "
                "exactly one of them must be set"
            )
        if reward is not None and not abs(reward) <= FLOAT32_MAX:
            raise SchemaError(f"trajectory {uid!r}: reward {reward!r} must be finite")
    return with_column(with_column(batch, "reward", rewards), "unscored", unscored)


def with_ref_logprobs(
    batch: pa.RecordBatch, ref_logprobs: Sequence[Sequence[float]]
) -> pa.RecordBatch:
    """Add the reference policy's log-probability of every response token.

    Args:
        batch: The trajectories.
        ref_logprobs: Natural log-probabilities of each row's response tokens.

    Raises:
        SchemaError: A row does not have one value per response token.
    """
    lengths = batch.column("response_ids").value_lengths().to_pylist()
    for uid, values, tokens in zip(
        batch.column("uid").to_pylist(), ref_logprobs, lengths, strict=True
    ):
        if len(values) != tokens:
            raise SchemaError(
                f"trajectory {uid!r}: ref_logprobs of length {len(values)} for {tokens} tokens"
            )
    return with_column(batch, "ref_logprobs", ref_logprobs)
