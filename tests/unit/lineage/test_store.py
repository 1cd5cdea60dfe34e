"""Generations: whole or not there, once per transaction, verified before they return."""

import json
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sleeprl import cli
from sleeprl.lineage import LineageError, LineageStore, Manifest
from sleeprl.reporting.lineage_diff import diff_generations


@pytest.fixture
def store(tmp_path):
    return LineageStore(tmp_path / "generations")


def builder(text):
    def build(directory):
        (directory / "model.safetensors").write_text(text)
        (directory / "tokenizer").mkdir()
        (directory / "tokenizer" / "vocab.json").write_text("{}")

    return build


def commit(store, night, parent=None, text="weights", **more):
    return store.commit(builder(text), Manifest(night, "tiny", parent=parent, **more))


def test_commit_is_idempotent_and_leaves_head(store, tmp_path):
    figures = {"recall": 0.9, "perplexity": float("inf")}
    first = commit(store, "night-1", figures=figures, config={"lr": 1e-3}, seeds={"night": 1})
    assert commit(store, "night-1", text="other") == first
    assert store.head() is None
    manifest = store.get(first)
    assert manifest.figures == {"recall": 0.9, "perplexity": None}
    assert (manifest.id, manifest.transaction, manifest.parent) == (first, "night-1", None)
    assert set(manifest.files) == {"model.safetensors", "tokenizer/vocab.json"}
    assert manifest.size == 9
    assert (store.path(first) / "model.safetensors").read_text() == "weights"
    assert json.loads((store.path(first) / "manifest.json").read_text())["config"] == {"lr": 1e-3}
    second = store.commit(store.path(first), Manifest("copy", "tiny", parent=first[:6]))
    assert store.get(second).parent == first
    assert store.get(second).files == manifest.files


def test_head_rollback_and_tree(store):
    with pytest.raises(LineageError, match="no HEAD yet"):
        store.resolve("HEAD")
    root = commit(store, "1")
    left, right = commit(store, "2", root), commit(store, "3", root)
    leaf = commit(store, "4", left)
    assert [m.id for m in store.list()] == [root, left, right, leaf]
    assert store.set_head(leaf) == store.head() == store.get("HEAD").id == leaf
    (node,) = store.tree()
    assert [child.manifest.id for child in node.children] == [left, right]
    assert node.children[0].children[0].is_head
    assert store.rollback(root) == store.head() == root
    assert len(store.list()) == 4
    assert store.tree()[0].is_head


def test_verify(store):
    good, bad = commit(store, "1"), commit(store, "2")
    assert store.verify(bad) == []
    store.set_head(good)
    (store.path(bad) / "model.safetensors").write_text("weightz")
    (store.path(bad) / "tokenizer" / "vocab.json").unlink()
    (store.path(bad) / "more").write_text("")
    assert store.verify(bad) == [
        "tokenizer/vocab.json is missing",
        "more does not belong",
        "model.safetensors has changed",
    ]
    with pytest.raises(LineageError, match=r"not intact, HEAD stays.*has changed"):
        store.rollback(bad)
    assert store.head() == good


def test_errors(store, tmp_path):
    with pytest.raises(LineageError, match=r"no generation 'abc' in .*it is empty"):
        store.get("abc")
    ids = [commit(store, str(i)) for i in range(40)]
    shared = next(i[0] for i in ids if sum(j[0] == i[0] for j in ids) > 1)
    with pytest.raises(LineageError, match=f"'{shared}' could be any of"):
        store.get(shared)
    with pytest.raises(LineageError, match=r"no generation 'zz'.*it has"):
        commit(store, "child", parent="zz")
    with pytest.raises(LineageError, match="no files to commit"):
        store.commit(lambda directory: None, Manifest("empty", "tiny"))
    with pytest.raises(LineageError, match="link is a symbolic link"):
        store.commit(lambda d: (d / "link").symlink_to(tmp_path), Manifest("link", "tiny"))
    with pytest.raises(LineageError, match="transaction"):
        store.commit(tmp_path, Manifest("", "tiny"))
    (store.path(ids[0]) / "manifest.json").write_text('{"future": 1}')
    with pytest.raises(LineageError, match=r"manifest.json cannot be read: unknown fields"):
        store.get(ids[0])


def damaged(**fields):
    def damage(text):
        return json.dumps(json.loads(text) | fields).encode()

    return damage


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "latin-1": lambda text: text.replace(b"tiny", "tïny".encode("latin-1")),
    "deep": lambda text: b"[" * 100_000,
    "a list": lambda text: b"[]",
    "null": lambda text: b"null",
    "files a list": damaged(files=["model.safetensors"]),
    "files without a hash": damaged(files={"model.safetensors": {"bytes": 1}}),
    "files without a size": damaged(files={"model.safetensors": {"sha256": "0"}}),
    "no date": damaged(created="yesterday"),
    "a number for an id": damaged(id=3),
    "another id": damaged(id="0123456789abcdef"),
    "slots of another kind": damaged(slots={"count": 3, "used": 1}),
    "figures of another kind": damaged(figures=[]),
    "a newer sleepRL's": damaged(colour="blue"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_unreadable_manifest_stops_nothing_but_its_own_generation(store, damage):
    good = commit(store, "1")
    bad, child = commit(store, "2", good), commit(store, "3", good)
    store.set_head(child)
    file = store.path(bad) / "manifest.json"
    file.write_bytes(damage(file.read_bytes()))
    assert [m.id for m in store.list()] == [good, child]
    (problem,) = store.unreadable()
    assert str(file) in problem
    assert store.find(child).id == store.find("HEAD").id == child
    assert store.rollback(good[:8]) == good
    assert store.path(commit(store, "4", child)).is_dir()
    for use in (store.get, store.find, store.verify, store.rollback):
        with pytest.raises(LineageError, match=r"manifest\.json cannot be read"):
            use(bad)
    assert store.head() == good
    done = run("lineage", store)
    assert (done.exit_code, good[:8] in done.stdout) == (0, True)
    assert str(file) in done.stderr
    with pytest.raises(LineageError, match=rf"{store.path(good)}/model.safetensors is damaged"):
        diff_generations(store, good, child)


def run(command, store, *words):
    return CliRunner().invoke(
        cli.app, [command, *words, "--root", str(store.root)], env={"COLUMNS": "400"}
    )


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"", b"a b", b"../..", b"\x1b[31m", b"\x00" * 9])
def test_a_damaged_head_stops_neither_lineage_nor_rollback(store, text):
    one, two = commit(store, "1"), commit(store, "2")
    (store.root / "HEAD").write_bytes(text)
    assert len(store.tree()) == 2
    assert str(store.root / "HEAD") in store.unreadable()[0]
    with pytest.raises(LineageError, match=r"HEAD.*sleeprl rollback ID"):
        store.resolve("HEAD")
    assert store.find(two).id == two
    done = run("rollback", store, one)
    assert done.exit_code == 0, done.output
    assert f"HEAD is {one}" in done.stdout and "HEAD" in done.stderr
    assert store.head() == one and store.unreadable() == []


def test_a_head_that_names_no_generation_is_told(store):
    one = commit(store, "1")
    (store.root / "HEAD").write_text("0" * 16)
    with pytest.raises(LineageError, match=rf"HEAD names '0000.*it has {one[:8]}"):
        store.get("HEAD")


@pytest.mark.parametrize(
    "name", [".mine.tmp", ".editor.0123.tmp", f".{'a' * 16}.tmp", f".notes.{'0' * 32}.tmp"]
)
def test_a_commit_leaves_what_is_not_its_own(store, name):
    other = store.root / name
    other.mkdir(parents=True)
    own = store.root / f".{'a' * 16}.{'0' * 32}.tmp"
    own.mkdir()
    commit(store, "1")
    assert other.is_dir() and not own.exists()


COMMIT_AND_DIE = """
import os, signal, sys
from sleeprl.lineage import LineageStore, Manifest

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def build(directory):
    (directory / "model.safetensors").write_text("new")
    if sys.argv[2] == "while building":
        die()
    (directory / "config.json").write_text("{}")

if sys.argv[2] == "before the rename":
    os.rename = die
LineageStore(sys.argv[1]).commit(build, Manifest("night-2", "tiny", parent="HEAD"))
die()
"""


@pytest.mark.parametrize("when", ["while building", "before the rename", "after the rename"])
def test_sigkill_during_a_commit(store, when):
    old = commit(store, "night-1")
    store.set_head(old)
    done = subprocess.run([sys.executable, "-c", COMMIT_AND_DIE, store.root, when])
    assert done.returncode == -signal.SIGKILL
    assert len(store.list()) == (2 if when == "after the rename" else 1)
    assert store.head() == old
    assert store.verify(old) == []
    new = commit(store, "night-2", parent=old)  # the retry
    assert store.get(new).parent == old
    assert store.verify(new) == []
    assert store.set_head(new) == new
    hidden = {p.name for p in store.root.iterdir() if p.name.startswith(".")}
    assert hidden == {".lock"}
