"""Generations: whole or not there, once per transaction, verified before they return."""

import json
import signal
import subprocess
import sys

import pytest

from sleeprl.lineage import LineageError, LineageStore, Manifest


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
        store.list()


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
