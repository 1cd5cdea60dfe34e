"""Experience in the forms that people have, and every kind of damage to it named and skipped."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sleeprl.data import Lake, records
from sleeprl.data.experience import Experience
from sleeprl.data.records import FORMATS
from sleeprl.data.trajectory import VERSION_KEY
from sleeprl.wake.folders import find_files
from sleeprl.wake.ingest import ExperienceError, ingest, read_experience

ASKED = "user: Where does Ann live?\nassistant: In Oslo."
ASK, REPLY = "Where does Ann live?", "In Oslo."


def read(*paths: Path) -> list[Experience]:
    return list(read_experience(paths))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "human", "content": ASK}, {"role": "gpt", "content": REPLY}]},
        {"messages": [{"role": "User", "content": ASK}, {"role": "model", "content": REPLY}]},
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": REPLY}]},
        {"conversations": [{"role": "user", "content": ASK}, {"from": "gpt", "value": REPLY}]},
        {"conversations": {"from": ["human", "gpt"], "value": [ASK, REPLY]}},
        {"messages": json.dumps([{"from": "human", "value": ASK}, {"from": "bot", "value": REPLY}])},
        {"instruction": ASK, "input": "", "output": REPLY},
        {"instruction": ASK, "context": None, "response": REPLY},
        {"prompt": ASK, "completion": REPLY},
        {"prompt": ASK, "response": REPLY, "input": None},
        {
            "prompt": [{"role": "user", "content": ASK}],
            "completion": [{"role": "assistant", "content": REPLY}],
        },
    ],
)  # fmt: skip
def test_every_form_of_a_conversation_is_the_same_experience(tmp_path: Path, row: Any) -> None:
    plain = {
        "messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}]
    }
    found, same = read(write(tmp_path / "a.jsonl", row, plain))
    assert found.as_text() == ASKED
    assert (found.uid, found.messages) == (same.uid, same.messages)
    assert json.loads(found.metadata) == {}


def test_an_instruction_may_have_an_input_and_a_system_message(tmp_path: Path) -> None:
    row = {
        "system": "Be brief.",
        "instruction": "Shorten.",
        "input": "A long text.",
        "output": "A.",
    }
    (found,) = read(write(tmp_path / "a.jsonl", {**row, "id": 7}))
    assert found.as_text() == "system: Be brief.\nuser: Shorten.\n\nA long text.\nassistant: A."
    assert json.loads(found.metadata) == {"id": 7}


# --- kinds of files ---------------------------------------------------------------

OSLO = {"text": "Ann lives in Oslo.", "year": 3}


def _arrow(path: Path, *, stream: bool) -> None:
    table = pa.Table.from_pylist([OSLO])
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)


LINE = json.dumps(OSLO).encode()
FILES = {
    "lines.ndjson": LINE,
    "packed.jsonl.gz": gzip.compress(LINE),
    "Packed.JSON.GZ": gzip.compress(b"[" + LINE + b"]"),
    "list.json": b"\xef\xbb\xbf [\n" + LINE + b"\n]\n",
    "one.json": json.dumps(OSLO, indent=2).encode(),
    "lines.json": LINE + b"\n\n" + LINE + b"\n",
    "table.csv": b"text,year\r\nAnn lives in Oslo.,3\r\n",
    "semicolons.csv": b'\xef\xbb\xbf"text";"year"\n"Ann lives in Oslo.";3\n',
    "tabs.tsv": b"year\ttext\n3\tAnn lives in Oslo.\n",
    "packed.csv.gz": gzip.compress(b"text,year\nAnn lives in Oslo.,3\n"),
    "text.txt.gz": gzip.compress(b"Ann lives in Oslo.\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINE + b"\n\xef\xbb\xbf\n",
}


@pytest.mark.parametrize("name", [*FILES, "stream.arrow", "file.arrow"])
def test_every_kind_of_file_gives_the_same_experience(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name in FILES:
        path.write_bytes(FILES[name])
    else:
        _arrow(path, stream=name.startswith("stream"))
    assert {each.uid for each in read(path)} == {Experience.document(OSLO["text"]).uid}
    if "text.txt" not in name:
        assert all(str(json.loads(each.metadata)["year"]) == "3" for each in read(path))


def test_a_line_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\u2028b\u0085c"}\r\n\n{"text": "d"}', encoding="utf-8")
    assert [(e.text, e.source) for e in read(file)] == [
        ("a\u2028b\u0085c", f"{file}:1"), ("d", f"{file}:3"),
    ]  # fmt: skip


def test_a_cell_may_have_lines_and_be_long(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    long = "word " * 40_000
    file.write_text(f'text\n"Ann,\n""Bob"""\n\n"{long}"\n', encoding="utf-8")
    first, second = read(file)
    assert (first.text, first.source) == ('Ann,\n"Bob"', f"{file}:2")
    assert (second.text, second.source) == (long.strip(), f"{file}:5")


# --- data sets --------------------------------------------------------------------


def test_of_a_downloaded_data_set_only_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist([OSLO]), tmp_path / "data" / "train-00000.parquet")
    beside = ["README.md", "LICENSE.txt", "requirements.txt", "notes/card.md", "CITATION.cff"]
    for name in beside:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("about the data", encoding="utf-8")
    for name in ("dataset_infos.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"default": {}}', encoding="utf-8")
    report = ingest([tmp_path], Lake(tmp_path.parent / "lake"))
    assert report.added == 1
    left_out = {str(Path(file).relative_to(tmp_path)) for file in report.ignored}
    assert left_out == {*beside, "dataset_infos.json", "tokenizer.json"}
    assert read(tmp_path / "README.md")[0].text == "about the data"  # given by its name


def test_a_folder_of_texts_is_read_without_what_is_about_it(tmp_path: Path) -> None:
    for name in ("a.md", "b.txt", "README_de.md", "licence"):
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    files, left_out = find_files([tmp_path])
    assert [file.name for file in files] == ["a.md", "b.txt"]
    assert {file.name for file in left_out} == {"README_de.md", "licence"}


def test_a_folder_is_searched_without_reading_its_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("a", ' \n[{"text": "a"}]'), ("b", '{"text": "b"}'), ("c", '{"c": 1}')):
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
    read_whole: list[str] = []

    def read_records(file: Path) -> Any:
        read_whole.append(file.name)
        return records.read_records(file)

    monkeypatch.setattr("sleeprl.wake.folders.read_records", read_records)
    files, left_out = find_files([tmp_path])
    assert [file.name for file in files] == ["a.json", "b.json"]
    assert [file.name for file in left_out] == ["c.json"]
    assert read_whole == ["b.json", "c.json"]


def test_a_data_set_that_was_saved_on_disk(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        _arrow(folder / "data-00000-of-00001.arrow", stream=True)
        _arrow(folder / "cache-1f2e.arrow", stream=True)
        (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}', encoding="utf-8")
    files, left_out = find_files([tmp_path])
    assert [str(f.relative_to(tmp_path)) for f in files] == [
        "test/data-00000-of-00001.arrow", "train/data-00000-of-00001.arrow",
    ]  # fmt: skip
    assert len(left_out) == 7
    assert len(read(tmp_path / "train")) == 1


# --- what cannot be read ----------------------------------------------------------


def nested(depth: int) -> bytes:
    return b'{"text": "x", "m": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (nested(1_100), "nested more than 100 deep"),
        (nested(200_000), "nested more than 100 deep"),
        (nested(101), "nested more than 100 deep"),
        (b'{"text": "x", "n": -' + b"9" * 5_000 + b"}", "a number of 5,001 digits"),
        (b'{"text": "x", "n": NaN}', "NaN is not JSON"),
        (b'{"text": "x", "n": -Infinity}', "-Infinity is not JSON"),
        (b'{"text": "x", "n": 1e999}', "the number 1e999 is too large"),
        (b'{"text": "x", "text": "y"}', "the key 'text' occurs twice"),
        (b'{"text": "x"} {"text": "y"}', "more behind the end of the JSON value"),
        ('{"text": "ä"}'.encode("utf-16"), "UTF-16, not UTF-8; convert it"),
        (b'{"text": "K\xf6ln"}', 'is not UTF-8; convert it, for example with "iconv'),
        (b"null", "a NoneType, not an object"),
        (b'{"text": null}', "field 'text' is null"),
        (b'{"text": null, "messages": null}', "field 'text' and field 'messages' are null"),
        (b'{"instruction": "x"}', "field 'instruction' without its reply"),
        (b'{"conversations": {"from": ["human"], "value": []}}', "list of at least one message"),
        (b'{"messages": "[1"}', "field 'messages' is text, and not JSON"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', r"'messages\[0\]' .* 'role'"),
        (b'{"prompt": 3, "completion": "x"}', "field 'prompt' must be text"),
        (rb'{"prompt": "\udc00", "completion": "x"}', "field 'prompt' has half a surrogate"),
        *(
            (
                b'{"messages": [{"role": "assistant", "content": "x", "tool_calls": %s}]}' % calls,
                r"'messages\[0\].tool_calls' must be a list of objects",
            )
            for calls in (b"3", b"true", b"false", b'{"a": 1}', b'"f"', b"[1]", b"[[]]", b"{}", b'""')
        ),
    ],
)  # fmt: skip
def test_damage_is_named_with_its_line_and_skipped(
    tmp_path: Path, line: bytes, message: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line.replace(b"\n", b"") + b'\n{"text": "too"}\n')
    with pytest.raises(ExperienceError, match=rf"a\.jsonl:2: .*{message}"):
        read(file)
    bad: list[ExperienceError] = []
    assert [e.text for e in read_experience([file], bad.append)] == ["good", "too"]
    assert len(bad) == 1


BROKEN = {
    "cut.jsonl.gz": (gzip.compress(LINE)[:30], "cannot be read"),
    "no.jsonl.gz": (LINE, "cannot be read"),
    "no.parquet": (b"PAR1", "not a readable Parquet file"),
    "no.arrow": (b"ARROW1", "not a readable Arrow file"),
    "open.json": (b"[" + LINE + b",", ":2: not JSON"),
    "comma.json": (b"[" + LINE + b" " + LINE, ":1: not JSON"),
    "more.json": (b"[" + LINE + b"] 1", "more behind the end of the list"),
    "twice.csv": (b"text,text\na,b\n", ":1: the header"),
    "wide.csv": (b"text\na,b\n", ":2: 2 cells, but the header names 1"),
    "quote.csv": (b'text\n"a\n', ":2: not CSV"),
    "latin.csv": (b"text\nK\xf6ln\n", ":2: bytes that are not UTF-8"),
    "latin.txt": (b"K\xf6ln", "byte 1 is not UTF-8"),
    "wide.txt": ("Köln".encode("utf-16"), "UTF-16"),
    "empty.txt": (b" \n", "field 'text' must be text"),
    "item.json": (b"[" + LINE + b', {"text": NaN}]', ":2: NaN is not JSON"),
    "picture.png": (b"\x89PNG", "cannot read this format"),
    "packed.gz": (gzip.compress(LINE), "cannot tell its format"),
    "table.parquet.gz": (b"", "cannot tell its format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_left_out(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path, good = tmp_path / name, write(tmp_path / "good.jsonl", {"text": "good"})
    path.write_bytes(content)
    lake = Lake(tmp_path / "lake")
    with pytest.raises(ExperienceError, match=rf"{name}:.*{message.removeprefix(':')}"):
        ingest([path, good], lake)
    assert not lake.files("experience")
    report = ingest([path, good, tmp_path / "none.txt"], lake, skip_bad=True)
    assert len(report.bad) == 2 and "none.txt: no such file" in "".join(report.bad)
    assert "good" in [e.text for e in read(*lake.files("experience"))]


def test_a_recorded_file_of_an_odd_version_is_named(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    ingest([write(tmp_path / "a.jsonl", {"text": "good"})], lake)
    table = pq.read_table(lake.files("experience")[0])
    odd = {**table.schema.metadata, VERSION_KEY: b"abc"}
    pq.write_table(table.replace_schema_metadata(odd), tmp_path / "odd.parquet")
    with pytest.raises(ExperienceError, match=r"odd\.parquet: not a readable Parquet file"):
        read(tmp_path / "odd.parquet")


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_refused(tmp_path: Path, path: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"text": "a"})
    for skip_bad in (False, True):
        with pytest.raises(ExperienceError, match="an empty path"):
            ingest([path], Lake(tmp_path / "lake"), skip_bad=skip_bad)


def test_a_name_that_is_no_text_and_one_that_is_too_long(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/K\xf6ln.txt"))
    path.write_text("In Köln.", encoding="utf-8")
    (found,) = read(path)
    assert found.source.endswith(r"K\udcf6ln.txt")
    with pytest.raises(ExperienceError, match="too long"):
        read(tmp_path / ("n" * 300 + ".txt"))


# --- fuzz -------------------------------------------------------------------------

FUZZ = settings(
    max_examples=500,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SEEDS = st.integers(0, 2**64 - 1)
SOUND = [
    OSLO,
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{}]}]},
    {"conversations": [{"from": "human", "value": "é"}], "tags": [1, [2.5, None]]},
    {"instruction": "a", "input": "b", "output": "c"},
]
KEYS = ["text", "messages", "conversations", "role", "content", "from", "value", "tool_calls",
        "prompt", "completion", "instruction", "output", "a"]  # fmt: skip
PLAIN = [
    None,
    True,
    3,
    -0.5,
    10**30,
    1e300,
    math.nan,
    "",
    "a",
    "é\u2028",
    "\ud800",
    "\0",
    "user",
    "[]",
]


def any_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(5 if depth < 4 else 3)
    if kind == 3:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 4:
        return {rng.choice(KEYS): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(PLAIN)


def damaged(raw: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(4)):
        at, new = rng.randrange(len(raw) + 1), rng.randbytes(rng.randrange(4))
        raw = raw[:at] + new + raw[at + rng.choice([0, len(new), len(raw)]) :]
    return raw


def check_every_item_is_read_or_named(path: Path) -> None:
    bad: list[ExperienceError] = []
    found = list(read_experience([path], bad.append))
    assert all(isinstance(each, Experience) and each.text.encode() for each in found)
    assert all(str(error).startswith(str(path)) for error in bad)
    if bad:
        with pytest.raises(ExperienceError):
            read(path)


@FUZZ
@given(seed=SEEDS)
def test_lines_of_any_kind_never_end_the_reader(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [*(any_value(rng) for _ in range(3)), rng.choice(SOUND)]
    path = tmp_path / f"a{rng.choice(['.jsonl', '.json', '.csv', '.jsonl.gz'])}"
    raw = damaged("\n".join(map(json.dumps, rows)).encode(), rng)
    path.write_bytes(damaged(gzip.compress(raw), rng) if path.suffix == ".gz" else raw)
    check_every_item_is_read_or_named(path)


@FUZZ
@given(seed=SEEDS)
def test_damaged_parquet_never_ends_the_reader(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    texts = rng.choices([None, "", "a", "é"], k=rng.randrange(1, 4))
    pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), tmp_path / "a.parquet")
    path = tmp_path / "b.parquet"
    path.write_bytes(damaged((tmp_path / "a.parquet").read_bytes(), rng))
    check_every_item_is_read_or_named(path)


def test_the_readers_are_those_of_the_message() -> None:
    with pytest.raises(ExperienceError, match=", ".join(FORMATS)):
        find_files([__file__])
