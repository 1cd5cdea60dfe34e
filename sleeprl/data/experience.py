"""Experience of the day: documents and conversations."""

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
    """One document or conversation. Create it with ``document`` or ``conversation``."""

    uid: str
    """SHA-256 of the content only, so the same content is one experience."""
    time: datetime
    """Time of recording, in UTC."""
    source: str
    """Origin, for example ``notes.jsonl:12``."""
    kind: Literal["document", "conversation"]
    """``document`` or ``conversation``."""
    text: str
    """Text of a document; a conversation as ``role: content`` lines."""
    messages: str | None
    """Messages of a conversation as received, as JSON; None for a document."""
    metadata: str
    """All other data of the experience, a JSON object."""

    @classmethod
    def document(
        cls, text: str, *, source: str = "", metadata: Mapping[str, Any] | None = None
    ) -> Experience:
        """Create an experience from a document, without its surrounding white space.

        Args:
            text: The document.
            source: Origin of the document.
            metadata: Other data, JSON-serialisable.
        """
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
        """Create an experience from a conversation.

        Args:
            messages: Messages in OpenAI chat form.
            text: The same messages as ``role: content`` lines.
            source: Origin of the conversation.
            metadata: Other data, JSON-serialisable.
        """
        raw = _json(messages)
        return cls(_hash(raw), _now(), source, "conversation", text, raw, _json(metadata or {}))

    def as_text(self) -> str:
        """Return the text that is put into a prompt."""
        return self.text


def experience_batch(experiences: Iterable[Experience]) -> pa.RecordBatch:
    """Convert experiences to one record batch, in order."""
    rows = [vars(e) for e in experiences]
    return pa.RecordBatch.from_pylist(rows, schema=EXPERIENCE_SCHEMA)


def experiences(data: pa.RecordBatch | pa.Table) -> list[Experience]:
    """Convert a batch or table to experiences, in order.

    The inverse of ``experience_batch``; also reads ``Lake.read("experience")``.

    Raises:
        SchemaError: The data has another schema.
    """
    data = conform(data, EXPERIENCE_SCHEMA)
    columns = [data.column(f.name).to_pylist() for f in fields(Experience)]
    return [Experience(*row) for row in zip(*columns, strict=True)]


def _now() -> datetime:
    return datetime.now(UTC)


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
