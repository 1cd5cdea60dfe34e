"""What one pass of the model leaves behind: a ``Trajectory``, as Python and as Arrow.

From engine to learner trajectories travel as Arrow record batches whose schema
carries its name and version. Versions only ever add nullable columns, or drop them: a
column that an older batch lacks reads as null, one that it alone has is passed over, and
a newer version than this program knows is an error.
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


def outdated(versions: Sequence[int], since: int) -> int:
    """How many tokens a response begins with of which the last is of a policy version before
    ``since``: what may not be learned from. versions: of each token."""
    return max((n + 1 for n, version in enumerate(versions) if version < since), default=0)


def newest(batch: pa.RecordBatch) -> int | None:
    """The version that wrote the last token of a response: of all, the least."""
    written = filter(None, batch.column("versions").to_pylist())
    return min((versions[-1] for versions in written), default=None)


def versioned(name: str, version: int, columns: Sequence[pa.Field]) -> pa.Schema:
    """An Arrow schema that carries its name and version in its metadata."""
    return pa.schema(columns, {NAME_KEY: name.encode(), VERSION_KEY: str(version).encode()})


def _column(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


TRAJECTORY_SCHEMA = versioned(
    "trajectory",
    3,
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
        _column("meta", pa.string()),
    ],
)


@dataclass(frozen=True)
class Trajectory:
    """One prompt and one sampled response, with all that training on it needs.

    ``logprobs``, ``versions``, and where present ``ref_logprobs`` have one entry per
    response token. Floats are stored as float32. A trajectory without a reward is not one
    with reward 0: after scoring, ``unscored`` says why there is none. An invalid trajectory
    cannot be made (SchemaError).
    """

    uid: str
    """Unique; a retry of the same work has the same uid, so it counts once."""
    task_id: str
    attempt: int
    """0, 1, … : the samples of one task, its group."""
    purpose: Purpose
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    """Natural log-probability of each response token under the policy that sampled it."""
    versions: list[int]
    """Policy version that sampled each response token (weights may change on the way)."""
    finish_reason: str
    teacher_prompt_ids: list[int] | None = None
    """The prompt of the self that has the experience, for the same response."""
    reward: float | None = None
    unscored: str | None = None
    ref_logprobs: list[float] | None = None
    advantage: float | None = None
    """What the learner made of the reward, beside the others of its update; with a critic the mean
    over the tokens. None where nothing was learned from the reward."""
    meta: str = "{}"
    """A JSON object."""

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
    """Trajectories as one record batch, in order."""
    arrays = [
        pa.array([getattr(t, field.name) for t in trajectories], field.type)
        for field in TRAJECTORY_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=TRAJECTORY_SCHEMA)


def from_batch(batch: pa.RecordBatch | pa.Table) -> list[Trajectory]:
    """The trajectories of a batch or table, in order; the inverse of ``to_batch``."""
    batch = conform(batch, TRAJECTORY_SCHEMA)
    columns = [batch.column(f.name).to_pylist() for f in fields(Trajectory)]
    return [Trajectory(*row) for row in zip(*columns, strict=True)]


def same_schema(found: pa.Schema, schema: pa.Schema) -> bool:
    """Whether both have the same name; the version and so the columns may differ."""
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
    """``data`` with exactly the columns of ``schema``; missing nullable ones read as null."""
    check_schema(data.schema, schema)
    arrays = []
    for field in schema:
        if field.name not in data.schema.names:
            arrays.append(pa.nulls(data.num_rows, field.type))
            continue
        values = data.column(field.name)
        if values.null_count and not field.nullable:
            raise SchemaError(f"column {field.name!r} has {values.null_count} null values")
        arrays.append(values.cast(field.type))
    return type(data).from_arrays(arrays, schema=schema)


def with_column(batch: Tabular, name: str, values: Sequence[Any]) -> Tabular:
    """A copy of ``batch`` in which column ``name`` of the schema holds ``values``."""
    if len(values) != batch.num_rows:
        raise SchemaError(f"{name} has {len(values)} values for {batch.num_rows} trajectories")
    index = batch.schema.get_field_index(name)
    field = batch.schema.field(index)
    return batch.set_column(index, field, pa.array(values, field.type))


def with_rewards(
    batch: pa.RecordBatch, rewards: Sequence[float | None], unscored: Sequence[str | None]
) -> pa.RecordBatch:
    """Score a batch: each row gets either a finite reward or the reason why it has none."""
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
    """Add the reference policy's log-probability of every response token."""
    lengths = batch.column("response_ids").value_lengths().to_pylist()
    for uid, values, tokens in zip(
        batch.column("uid").to_pylist(), ref_logprobs, lengths, strict=True
    ):
        if len(values) != tokens:
            raise SchemaError(
                f"trajectory {uid!r}: ref_logprobs of length {len(values)} for {tokens} tokens"
            )
    return with_column(batch, "ref_logprobs", ref_logprobs)
