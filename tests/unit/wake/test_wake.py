"""Real input in every form into the lake, nothing lost, half or twice; and questions by day."""

import io
import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sleeprl import worlds
from sleeprl.data import Lake
from sleeprl.data.experience import experiences
from sleeprl.data.trajectory import VERSION_KEY
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import with_experience
from sleeprl.wake.answer import choose_documents
from sleeprl.wake.ingest import ExperienceError, ingest, read_experience

CHAT = [
    {"role": "user", "content": "Where does Ann live?"},
    {"role": "assistant", "content": [{"type": "text", "text": "In Oslo."}]},
]


def jsonl(path, *objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def read(lake):
    return experiences(lake.read("experience"))


def test_every_format_gives_the_same_experience(tmp_path):
    lake = Lake(tmp_path / "lake")
    lines = jsonl(tmp_path / "a.jsonl", {"text": "Ann lives in Oslo.", "id": 3}, {"messages": CHAT})
    report = ingest([lines], lake)
    assert (report.added, report.duplicates, report.bad) == (2, 0, [])
    document, chat = read(lake)
    assert document.as_text() == "Ann lives in Oslo."
    assert (document.kind, json.loads(document.metadata)) == ("document", {"id": 3})
    assert document.source == f"{lines}:1"
    assert document.time.utcoffset().total_seconds() == 0
    assert chat.as_text() == "user: Where does Ann live?\nassistant: In Oslo."
    assert (chat.kind, json.loads(chat.messages)) == ("conversation", CHAT)

    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "note.md").write_text("Ann lives in Oslo.\n")
    (folder / "sub" / "b.txt").write_bytes(b"\xef\xbb\xbfBob has a cat.\n\nIt is grey.\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("no")
    plain = [{**m, "content": "In Oslo."} if m["role"] == "assistant" else m for m in CHAT]
    rows = {
        "text": ["Ann lives in Oslo.", None, None],
        "messages": [None, plain, [{"role": "user", "content": "Hi"}]],
        "year": [1, 2, None],
    }
    pq.write_table(pa.table(rows), folder / "c.parquet")
    report = ingest([folder, lines], lake)
    assert (report.added, report.duplicates) == (3, 4)
    assert report.ignored == [str(folder / "picture.png")]
    texts = [e.as_text() for e in read(lake)[2:]]
    assert texts == [chat.as_text(), "user: Hi", "Bob has a cat.\n\nIt is grey."]
    assert [json.loads(e.metadata) for e in read(lake)[2:]] == [{"year": 2}, {}, {}]
    assert len(lake.files("experience")) == 2


def test_a_lake_is_read_as_it_was_recorded(tmp_path):
    lines = tmp_path / "day.jsonl"
    items = [{"text": "Ann lives in Oslo.", "year": 1}, {"messages": CHAT}]
    lines.write_text("".join(json.dumps(item) + "\n" for item in items))
    lake = Lake(tmp_path / "lake")
    ingest([lines], lake)
    assert list(read_experience([lake.directory])) == read(lake)
    other = Lake(tmp_path / "other")
    assert ingest([lake.directory], other).added == 2 and read(other) == read(lake)
    table = lake.read("experience")
    newer = {**table.schema.metadata, VERSION_KEY: b"99"}
    pq.write_table(table.replace_schema_metadata(newer), tmp_path / "newer.parquet")
    with pytest.raises(ExperienceError, match=r"schema version 99.*upgrade sleepRL"):
        list(read_experience([tmp_path / "newer.parquet"]))


def test_stdin_and_tool_calls(tmp_path, monkeypatch):
    call = {"id": "1", "function": {"name": "search", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    line = json.dumps({"messages": messages}).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\n" + line + b"\n")))
    (experience,) = read_experience(["-"])
    assert experience.source == "stdin:2"
    assert experience.as_text() == f"assistant: {json.dumps(call)}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", ":2: not JSON .*a line holds one object"),
        (b"[1]", ":2: a list, not an object"),
        (b'{"txt": "a"}', r":2: neither field 'text' nor 'messages' \(fields: \['txt'\]\)"),
        (b'{"text": 5}', ":2: field 'text' must be text that is not empty, not 5"),
        (b'{"text": "  "}', ":2: field 'text' must be text"),
        (b'{"text": "a", "messages": []}', ":2: both field 'text' and field 'messages'"),
        (b'{"messages": []}', ":2: field 'messages' must be a list"),
        (b'{"messages": [{"role": "me"}]}', r":2: field 'messages\[0\]' .* 'role'"),
        (b'{"messages": [{"role": "user"}]}', r"field 'messages\[0\].content' must be text"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            r"'messages\[0\].content' has parts that are no text",
        ),
        (b'{"text": "\xff"}', ":2: byte 10 is not UTF-8; convert"),
        (rb'{"text": "a\ud800"}', ":2: field 'text' has half a surrogate pair at character 1"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, line, message):
    lake = Lake(tmp_path / "lake")
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    with pytest.raises(
        ExperienceError, match="in.jsonl" + message if message[0] == ":" else message
    ):
        ingest([file], lake)
    assert lake.files("experience") == []
    report = ingest([file], lake, skip_bad=True)
    assert report.added == 2
    assert len(report.bad) == 1
    assert [e.text for e in read(lake)] == ["good", "also good"]


def test_files_that_cannot_be_read(tmp_path):
    lake = Lake(tmp_path / "lake")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "notes").write_text("x")
    (tmp_path / "b.parquet").write_text("x")
    for name, message in {
        "none.txt": "no such file",
        "empty": "no file ending in .jsonl, .parquet",
        "a.pdf": "cannot read this format; convert it",
        "notes": "cannot tell its format; give it a name ending in",
        "b.parquet": "not a readable Parquet file",
    }.items():
        with pytest.raises(ExperienceError, match=f"{name}: {message}"):
            ingest([tmp_path / name], lake)


def test_a_stream_longer_than_a_chunk_is_one_file(tmp_path):
    lake = Lake(tmp_path / "lake")
    file = jsonl(tmp_path / "in.jsonl", *({"text": f"fact {i % 3000}"} for i in range(4000)))
    report = ingest([file], lake)
    assert (report.added, report.duplicates) == (3000, 1000)
    assert len(lake.files("experience")) == 1
    assert [e.text for e in read(lake)] == [f"fact {i}" for i in range(3000)]


# --- questions by day -------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return ChatFormatter(worlds.EMBEDDED_MODEL)


def test_a_rare_word_says_more_than_common_ones(chat):
    common = "Ann lives in the old town of Oslo."
    documents = [common, common.replace("Ann", "Bob"), common.replace("Ann", "Cleo"), "A zebra."]
    question = "Has Oslo seen the zebra?"  # two words of each of the others, one of the last
    assert choose_documents(question, documents, 1000, chat) == ["A zebra.", *documents[:3]]
    assert choose_documents("Where does Bob live?", documents, 1000, chat) == [documents[1]]


def test_of_equals_the_first_comes_first_and_one_comes_always(chat):
    documents = ["Ann has a cat.", "Ann has a dog."]
    assert choose_documents("What has Ann?", documents, 1000, chat) == documents
    assert choose_documents("Quite another matter", documents, 1000, chat) == documents[:1]
    assert choose_documents("What has Ann?", [], 1000, chat) == []


def test_documents_are_chosen_as_long_as_there_is_room(chat):
    documents = [f"Ann has a cat, and number {i}." for i in range(9)]
    question = "What has Ann?"
    asked, cost = len(chat.prompt(question)), len(chat.text(documents[0])) + 4
    for count in range(4):
        room = asked + (count + 1) * cost - 1
        assert choose_documents(question, documents, room, chat) == documents[:count]
    # What is nearest and does not fit is passed over.
    long = "What has Ann? " * 40
    assert choose_documents(question, [long, *documents], asked + 2 * cost, chat) == documents[:2]
    message = with_experience(
        choose_documents(question, documents, asked + 3 * cost, chat), question
    )
    assert len(chat.prompt(message)) <= asked + 3 * cost
