"""What the model saw in the day: one document or one conversation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from sleeprl.data.trajectory import conform, versioned

EXPERIENCE_SCHEMA = versioned(
    "experience",
    1,
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("time", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("messages", pa.string()),
        pa.field("metadata", pa.string(), nullable=False),
    ],
)


@dataclass(frozen=True)
class Experience:
    """One piece of experience. Make it with ``document`` or ``conversation``."""

    uid: str
    """SHA-256 of the content alone: the same text seen twice is one experience."""
    time: datetime
    """When it was recorded."""
    source: str
    """Where it came from, e.g. ``notes.jsonl:12``."""
    kind: Literal["document", "conversation"]
    text: str
    """A document's text; a conversation as ``role: content`` lines."""
    messages: str | None
    """A conversation's messages as they came in, JSON."""
    metadata: str
    """A JSON object: everything else that came with it."""

    @classmethod
    def document(
        cls, text: str, *, source: str = "", metadata: Mapping[str, Any] | None = None
    ) -> Experience:
        """Surrounding white space is no part of a document."""
        text = text.strip()
        return cls(_hash(text), _now(), source, "document", text, None, _json(metadata or {}))

    @classmethod
    def conversation(
        cls,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        *,
        source: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> Experience:
        """``messages`` in OpenAI chat form and ``text``, the same as ``role: content`` lines."""
        raw = _json(messages)
        return cls(_hash(raw), _now(), source, "conversation", text, raw, _json(metadata or {}))

    def as_text(self) -> str:
        """The form in which it is placed in a prompt."""
        return self.text


def experience_batch(experiences: Iterable[Experience]) -> pa.RecordBatch:
    """Experiences as one record batch, in order."""
    rows = [vars(e) for e in experiences]
    return pa.RecordBatch.from_pylist(rows, schema=EXPERIENCE_SCHEMA)


def experiences(data: pa.RecordBatch | pa.Table) -> list[Experience]:
    """The inverse of ``experience_batch``; also of ``Lake.read("experience")``."""
    data = conform(data, EXPERIENCE_SCHEMA)
    columns = [data.column(f.name).to_pylist() for f in fields(Experience)]
    return [Experience(*row) for row in zip(*columns, strict=True)]


def _now() -> datetime:
    return datetime.now(UTC)


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
