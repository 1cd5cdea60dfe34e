"""Plug-ins by short name, dotted path, entry point and decorator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sleeprl import plugins
from sleeprl.plugins import BUILTIN, PluginError, check, create, importable_name, register, resolve

ROOT = Path(plugins.__file__).parent.parent


@pytest.fixture(autouse=True)
def things(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of plug-in of this file's own."""
    mine = {"ordered": "collections.OrderedDict", "counter": "collections.Counter"}
    monkeypatch.setattr(plugins, "BUILTIN", {**BUILTIN, "thing": mine})
    monkeypatch.setattr(plugins, "_registered", {})


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


def test_options_are_checked_without_a_call(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def make(tasks, size=1):\n    raise RuntimeError\nnumber = 3\n"
    (here / "plugin_checked.py").write_text(text)
    monkeypatch.setattr(plugins, "ADDED_ARGUMENTS", {"thing": ("tasks",)})
    check("plugin_checked.make", "thing", {"size": 2})
    with pytest.raises(PluginError, match=r"'siz'; it takes tasks, size, and every thing is given"):
        check("plugin_checked.make", "thing", {"siz": 2})
    monkeypatch.setattr(plugins, "ADDED_ARGUMENTS", {})
    with pytest.raises(PluginError, match="missing a required argument: 'tasks'"):
        check("plugin_checked.make", "thing", {})
    with pytest.raises(PluginError, match=r"is a int and cannot be called; name a class"):
        check("plugin_checked.number", "thing", {})


# --- by decorator -----------------------------------------------------------------


class Mine:
    def __init__(self, size: int = 1) -> None:
        self.size = size


def test_a_decorated_class_has_a_short_name_here_and_a_path_elsewhere() -> None:
    assert register("thing", "mine")(Mine) is Mine
    assert create("mine", "thing", {"size": 2}).size == 2
    assert importable_name("mine", "thing") == f"{__name__}.Mine"
    assert importable_name("counter", "thing") == "counter"
    assert importable_name("some.where.Else", "thing") == "some.where.Else"


def test_a_short_name_must_be_free_and_its_kind_known() -> None:
    register("thing", "mine")(Mine)
    register("thing", "mine")(Mine)  # the module is imported twice
    with pytest.raises(PluginError, match=r"'mine' is .*Mine already"):
        register("thing", "mine")(dict)
    with pytest.raises(PluginError, match="built in"):
        register("thing", "counter")
    with pytest.raises(PluginError, match="letters, digits"):
        register("thing", "my.name")
    with pytest.raises(PluginError, match=r"no plug-ins of kind 'rewrad'; there are .*reward"):
        register("rewrad", "mine")
    with pytest.raises(PluginError, match="did you mean 'mine'"):
        resolve("mien", "thing")


def test_what_is_defined_in_a_function_cannot_be_imported_elsewhere() -> None:
    class Local:
        pass

    register("thing", "local")(Local)
    with pytest.raises(PluginError, match="top level of a module"):
        importable_name("local", "thing")


SCRIPT = """
from sleeprl.plugins import importable_name, register

@register("reward", "brief")
class Brief: ...

if __name__ == "__main__":
    print(importable_name("brief", "reward"))
"""


def run_script(script: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, script], cwd=directory, env=environment, capture_output=True, text=True
    )


def test_what_a_script_defines_is_imported_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    script = tmp_path / "mine" / "script.py"
    script.write_text(SCRIPT)
    assert run_script(script, tmp_path).stdout == "mine.script.Brief\n"
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert "other processes cannot import" in run_script(script, elsewhere).stderr
