"""Plug-ins by short name, dotted path and entry point."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sleeprl import plugins as registry
from sleeprl.plugins import BUILTIN, PluginError, check, create, resolve


@pytest.fixture(autouse=True)
def things(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of plug-in of this file's own."""
    mine = {"ordered": "collections.OrderedDict", "counter": "collections.Counter"}
    monkeypatch.setattr(registry, "BUILTIN", {**BUILTIN, "thing": mine})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; what a test imports from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in list(sys.modules):
        if name.startswith("plugin_"):
            monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_short_name() -> None:
    from collections import OrderedDict

    assert resolve("ordered", "thing") is OrderedDict


def test_every_builtin_can_be_found() -> None:
    for kind, builtin in BUILTIN.items():
        for name in builtin:
            assert callable(resolve(name, kind))


def test_a_dotted_path_into_the_working_directory(here: Path) -> None:
    (here / "plugin_mine.py").write_text("def make(size=1):\n    return ['x'] * size\n")
    assert create("plugin_mine.make", "thing", {"size": 3}) == ["x"] * 3
    assert create("plugin_mine.make", "thing", {}) == ["x"]


def test_an_installed_module_wins_over_a_file_of_its_name(here: Path) -> None:
    (here / "json.py").write_text("loads = None\n")
    assert resolve("json.loads", "thing") is not None


def test_an_entry_point_of_an_installed_package(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = here / "plugin_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sleeprl.thing]\ninstalled = plugin_package:Made\n")
    (here / "plugin_package.py").write_text("class Made:\n    pass\n")
    monkeypatch.syspath_prepend(str(here))
    assert resolve("installed", "thing").__name__ == "Made"
    with pytest.raises(PluginError, match="installed"):  # named among the known ones
        resolve("other", "thing")
    with pytest.raises(PluginError):  # of another kind
        resolve("installed", "reward")


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(PluginError, match="did you mean 'ordered'") as caught:
        resolve("orderd", "thing")
    assert "counter, ordered" in str(caught.value) and "dotted path" in str(caught.value)
    with pytest.raises(PluginError, match=r"'zzz' is unknown\. Known: counter"):
        resolve("zzz", "thing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module.Thing", "no_such_module"),
        ("collections.Nothing", "Nothing"),
        (".Thing", "Thing"),
        ("collections.", "collections"),
    ],
)
def test_a_path_that_leads_nowhere(name: str, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        resolve(name, "thing")


def test_a_plug_in_with_a_fault_says_whose_it_is(here: Path) -> None:
    (here / "plugin_broken.py").write_text("def make(:\n")
    with pytest.raises(PluginError, match=r"plugin_broken\.make"):
        resolve("plugin_broken.make", "thing")


def test_a_wrong_option_is_named_with_the_plug_in(here: Path) -> None:
    (here / "plugin_options.py").write_text("def make(size):\n    return size\n")
    with pytest.raises(PluginError, match=r"plugin_options\.make.*siz"):
        create("plugin_options.make", "thing", {"siz": 1})


def test_options_are_checked_without_a_call(here: Path) -> None:
    text = "def make(tasks, size=1):\n    raise RuntimeError\nnumber = 3\n"
    (here / "plugin_checked.py").write_text(text)
    check("plugin_checked.make", "thing", {"size": 2}, ("tasks",))
    with pytest.raises(PluginError, match=r"'siz'; it takes tasks, size, and every thing is given"):
        check("plugin_checked.make", "thing", {"siz": 2}, ("tasks",))
    with pytest.raises(PluginError, match="missing a required argument: 'tasks'"):
        check("plugin_checked.make", "thing", {})
    with pytest.raises(PluginError, match=r"is a int and cannot be called; name a class"):
        check("plugin_checked.number", "thing", {})
