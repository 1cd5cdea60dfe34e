"""Reads experience from an object, in the forms that people have.

A document has ``text``. A conversation has ``messages`` (OpenAI chat form), ``conversations``
(ShareGPT), or an instruction with its reply (Alpaca, Dolly, prompt and completion). The other keys
become metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sleeprl.data.experience import Experience
from sleeprl.data.records import RecordError, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_ROLES = {
    **dict.fromkeys(ROLES),
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Roles of every form; the value is the name in OpenAI's form where that differs."""
_CHATS = ("messages", "conversations", "conversation")
_INSTRUCTIONS = ("instruction", "prompt")
_REPLIES = ("output", "completion", "response")
_BESIDES = ("input", "context")
"""Keys of what an instruction is about (Alpaca, Dolly)."""


class ExperienceError(RecordError):
    """Input that cannot be read as experience; the message names the file, the line and a fix."""


def experience_of(item: Any, source: str) -> Experience:
    """Make the experience of one record.

    Args:
        item: An object in one of the forms, or an ``Experience``, which stays as it is.
        source: Origin, for example ``notes.jsonl:12``.

    Raises:
        ExperienceError: The record has no known form, or a field of it is no text.
    """
    if isinstance(item, Experience):
        return item
    if not isinstance(item, dict):
        raise ExperienceError(f'a {type(item).__name__}, not an object; write {{"text": ...}}')
    given = [key for key in ("text", *_CHATS) if item.get(key) is not None]
    if len(given) > 1:
        raise ExperienceError(f"both field {given[0]!r} and field {given[1]!r}; keep one of them")
    if given == ["text"]:
        text = _text(item["text"], "text")
        return Experience.document(text, source=source, metadata=_others(item, given))
    if given:
        used, messages = given, _listed(item[given[0]], given[0])
        lines = [_message(message, f"{given[0]}[{i}]") for i, message in enumerate(messages)]
        messages = [_chat_form(message) for message in messages]
    else:
        used, messages = _pair(item)
        lines = [f"{message['role']}: {message['content']}" for message in messages]
    return Experience.conversation(
        messages, "\n".join(lines), source=source, metadata=_others(item, used)
    )


def is_experience(item: Any) -> bool:
    """Decide whether a record has the keys of one of the forms."""
    return isinstance(item, Mapping) and not {"text", *_CHATS, *_INSTRUCTIONS}.isdisjoint(item)


def _others(item: Mapping[str, Any], used: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in used and value is not None}


# --- conversations ----------------------------------------------------------------


def _listed(messages: Any, field: str) -> list[Any]:
    """Return the messages as a list, also of JSON in a column and of a table with a column per key."""
    if isinstance(messages, str):
        messages = _json(messages, field)
    if isinstance(messages, dict) and all(isinstance(v, list) for v in messages.values()):
        columns = list(messages.values())
        if len({len(column) for column in columns}) == 1:
            messages = [dict(zip(messages, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(messages, list) or not messages:
        raise ExperienceError(f"field '{field}' must be a list of at least one message")
    return messages


def _json(text: str, field: str) -> Any:
    try:
        return parse_json(text)
    except RecordError as error:
        raise ExperienceError(f"field '{field}' is text, and {error}") from error


def _role(message: Mapping[str, Any]) -> str | None:
    """Return the role of a message in OpenAI's form; None for an unknown one."""
    role = message.get("role") if message.get("role") is not None else message.get("from")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        return None
    return _ROLES[role.lower()] or role.lower()


def _content(message: Mapping[str, Any]) -> Any:
    return message.get("content") if message.get("content") is not None else message.get("value")


def _message(message: Any, field: str) -> str:
    """Write a message as ``role: content``."""
    if not isinstance(message, dict) or (role := _role(message)) is None:
        raise ExperienceError(f"field '{field}' must be an object with a 'role' of {ROLES}")
    content, calls = _content(message), _calls(message, field)
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise ExperienceError(
                f"field '{field}.content' has parts that are no text; only text can be recorded"
            )
        content = "\n".join(_text(p.get("text"), f"{field}.content") for p in content)
    texts = [] if calls and not content else [_text(content, f"{field}.content")]
    return f"{role}: " + "\n".join(texts + [json.dumps(call) for call in calls])


def _calls(message: Mapping[str, Any], field: str) -> list[Any]:
    calls, call = message.get("tool_calls"), message.get("function_call")
    if calls is None:
        calls = [] if call is None else [call]
        field = f"{field}.tool_calls" if call is None else f"{field}.function_call"
        if not all(isinstance(each, dict) for each in calls):
            raise ExperienceError(f"field '{field}' must be an object, not {call!r:.40}")
    elif not isinstance(calls, list) or not all(isinstance(each, dict) for each in calls):
        raise ExperienceError(
            f"field '{field}.tool_calls' must be a list of objects, not {calls!r:.40}"
        )
    return calls


def _chat_form(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message in OpenAI's form, without the nulls of a Parquet row."""
    found = {key: value for key, value in message.items() if value is not None}
    for key, name in (("from", "role"), ("value", "content")):
        if key in found and name not in found:
            found[name] = found.pop(key)
    return {**found, "role": _role(message)}


# --- an instruction with its reply ------------------------------------------------


def _pair(item: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the keys of an instruction and its reply, and both as messages.

    Raises:
        ExperienceError: There is none; the message says which fields there are.
    """
    ask = next((key for key in _INSTRUCTIONS if item.get(key) is not None), None)
    reply = next((key for key in _REPLIES if item.get(key) is not None), None)
    if ask is None or reply is None:
        raise ExperienceError(_missing(item, ask))
    used, before = [ask, reply], []
    if isinstance(item.get("system"), str) and item["system"].strip():
        used.append("system")
        before = [{"role": "system", "content": _text(item["system"], "system")}]
    question = _side(item[ask], ask, "user")
    about = next((key for key in _BESIDES if item.get(key) is not None), None)
    if about is not None and ask == "instruction":
        used.append(about)
        if not isinstance(item[about], str):
            raise ExperienceError(f"field '{about}' must be text, not {item[about]!r:.40}")
        if item[about].strip() and len(question) == 1:
            question[0]["content"] += "\n\n" + _text(item[about], about)
    return used, [*before, *question, *_side(item[reply], reply, "assistant")]


def _side(value: Any, field: str, role: str) -> list[dict[str, Any]]:
    """Return one side of a pair as messages: a text, or a list of messages (TRL's form)."""
    if not isinstance(value, list):
        return [{"role": role, "content": _text(value, field)}]
    found = _listed(value, field)
    lines = [_message(message, f"{field}[{i}]") for i, message in enumerate(found)]
    return [
        {"role": role, "content": text}
        for role, _, text in (line.partition(": ") for line in lines)
    ]


def _missing(item: Mapping[str, Any], ask: str | None) -> str:
    """Say what an object lacks."""
    null = [key for key in ("text", *_CHATS, *_INSTRUCTIONS) if key in item and item[key] is None]
    if null:
        names = " and ".join(f"field {key!r}" for key in null)
        return f"{names} {'is' if len(null) == 1 else 'are'} null; fill it in or remove the item"
    if ask is not None:
        return f"field {ask!r} without its reply in {' or '.join(map(repr, _REPLIES))}; add it"
    return (
        f"neither field 'text' nor 'messages' (fields: {sorted(map(str, item))}); add one of them"
    )


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
