"""What one pass of the model leaves behind: a ``Trajectory``, as Python and as Arrow.

From engine to trainer trajectories travel as Arrow record batches whose schema carries its name and
version. A new version only adds nullable columns or drops some: a column that an older batch lacks
reads as null, one that it alone has is ignored, and a newer version than this program knows is an
error. What versions before 4 held in ``meta`` (``gain`` and ``gap``) is read into its columns.
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
    """Data that does not have the form its schema promises."""


def count_stale_tokens(versions: Sequence[int], min_version: int) -> int:
    """Count the tokens at the beginning of a response that may not be learned from.

    Args:
        versions: the policy version of each token.
        min_version: the oldest version that may be learned from.

    Returns:
        The number of tokens up to the last one of an older version.
    """
    return max((n + 1 for n, version in enumerate(versions) if version < min_version), default=0)


def find_oldest_last_version(batch: pa.RecordBatch) -> int | None:
    """Return the policy version of each response's last token, the least of them; None without
    tokens."""
    written = filter(None, batch.column("versions").to_pylist())
    return min((versions[-1] for versions in written), default=None)


def versioned(name: str, version: int, columns: Sequence[pa.Field]) -> pa.Schema:
    """Make an Arrow schema that carries its name and version in its metadata."""
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
    """One prompt and one sampled response, with all that training on it needs.

    Guarantees:

    * ``logprobs``, ``versions``, and where present ``ref_logprobs`` have one entry per response token;
    * a trajectory without a reward is not one with reward 0: after scoring, ``unscored`` says why;
    * an invalid trajectory cannot be made (SchemaError).
    """

    uid: str
    """Unique; a retry of the same work has the same uid, so it counts once."""
    task_id: str
    """The task that the prompt is of; its attempts are a group."""
    attempt: int
    """0, 1, … : the number of the sample in its group."""
    purpose: Purpose
    """What the trajectory is for, and so who reads it."""
    prompt_ids: list[int]
    """Token ids of the prompt."""
    response_ids: list[int]
    """Token ids of the response."""
    logprobs: list[float]
    """Natural log-probability of each response token under the policy that sampled it (float32)."""
    versions: list[int]
    """Policy version that sampled each response token (weights may change on the way)."""
    finish_reason: str
    """``stop`` for a whole response, ``length`` for a cut one, ``running`` for one under way."""
    teacher_prompt_ids: list[int] | None = None
    """The prompt of the self that has the experience, for the same response."""
    reward: float | None = None
    """The reward (float32)."""
    unscored: str | None = None
    """Why there is no reward."""
    ref_logprobs: list[float] | None = None
    """Natural log-probability of each response token under the reference policy (float32)."""
    advantage: float | None = None
    """The advantage of the update that learned from it (float32); with a critic the mean over the
    tokens. None where nothing was learned from the reward."""
    gain: float | None = None
    """What one step of learning from a dream adds to the log-likelihood of its task's questions (nats
    per token); None where there is nothing to learn from."""
    gap: float | None = None
    """Negative log-likelihood of the task's questions before that step (nats per token)."""
    parsed: str | None = None
    """What the dream's format has read in the response, as JSON; None where it is malformed."""
    meta: str = "{}"
    """A JSON object: all that has no column."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise SchemaError naming the field and its value where an invariant is broken."""
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
    """Convert a batch or table to trajectories, in order; the inverse of ``to_batch``."""
    batch = conform(batch, TRAJECTORY_SCHEMA)
    columns = [batch.column(f.name).to_pylist() for f in fields(Trajectory)]
    return [Trajectory(*row) for row in zip(*columns, strict=True)]


def same_schema(found: pa.Schema, schema: pa.Schema) -> bool:
    """Tell whether both have the same name; the version and so the columns may differ."""
    return bool((found.metadata or {}).get(NAME_KEY) == schema.metadata[NAME_KEY])


def check_schema(found: pa.Schema, schema: pa.Schema) -> None:
    """Raise SchemaError unless data of schema ``found`` can be read as ``schema``."""
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

    Returns:
        The rows; a nullable column that ``data`` lacks is null, but for what an earlier version held
        in ``meta``.

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
    """Read the columns that schema versions before 4 held inside ``meta``."""
    names = data.schema.names
    if "meta" not in names or set(_ONCE_IN_META) <= set(names):
        return {}
    metas = [
        json.loads(meta) if '"gap"' in meta else {} for meta in data.column("meta").to_pylist()
    ]
    return {name: pa.array([m.get(name) for m in metas], pa.float64()) for name in _ONCE_IN_META}


def with_column(batch: Tabular, name: str, values: Sequence[Any]) -> Tabular:
    """Copy ``batch`` with other ``values`` in one column of its schema.

    Raises:
        SchemaError: there is not one value for each row.
    """
    if len(values) != batch.num_rows:
        raise SchemaError(f"{name} has {len(values)} values for {batch.num_rows} trajectories")
    index = batch.schema.get_field_index(name)
    field = batch.schema.field(index)
    return batch.set_column(index, field, pa.array(values, field.type))


def with_rewards(
    batch: pa.RecordBatch, rewards: Sequence[float | None], unscored: Sequence[str | None]
) -> pa.RecordBatch:
    """Score a batch: each row gets either a finite reward or the reason why it has none.

    Raises:
        SchemaError: a row has both, neither, or a reward that float32 cannot hold.
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

    Raises:
        SchemaError: a row does not have one for each token.
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
