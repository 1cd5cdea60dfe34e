"""Models by their id, from a hub in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from sleeprl import api
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.models.check import check_model
from sleeprl.models.resolve import describe_model, find_model
from sleeprl.text.chat import ChatFormatter
from tests.support.hub import Hub, publish, serve


@pytest.fixture(scope="module")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as hubs have them, with files beside it that no night reads."""
    root = tmp_path_factory.mktemp("hub")
    target = root / "org" / "model"
    publish(tiny_model, target, "200KB")
    (target / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (target / "original").mkdir()
    (target / "original" / "params.json").write_text("{}")
    (target / "pytorch_model.bin").write_bytes(b"a pickle")
    (target / "README.md").write_text("# Model\n")
    return root


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with serve(published) as running:
        yield running


@pytest.fixture
def reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Hub], None]:
    """Makes a hub the one of this process, with an empty cache."""
    monkeypatch.chdir(tmp_path)

    def choose(hub: Hub) -> None:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    return choose


def settings(name: str) -> NightConfig:
    return api.load_config(overrides=[f"model.name={name}", "resources.cpus=2"])


def test_a_dry_run_looks_at_a_model_without_its_weights(hub: Hub, tmp_path: Path) -> None:
    words = ["-m", "sleeprl", "night", "--dry-run", "--model=org/model", "resources.cpus=2"]
    done = hub.run(*words, cwd=tmp_path, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "org/model" in done.stdout and done.stderr == ""
    asked = " ".join(hub.asked)
    assert "chat_template.jinja" in asked and "index.json" in asked
    assert ".safetensors " not in asked + " " and "/cdn/" not in asked


def test_a_model_comes_whole_and_with_nothing_beside_it(
    hub: Hub, reach: Callable[[Hub], None]
) -> None:
    reach(hub)
    config = settings("org/model")
    directory = find_model(config)
    check_model(config, directory)
    assert ChatFormatter(directory).prompt("Hello!")
    shards = {path.name for path in (hub.root / "org" / "model").glob("model-*")}
    names = {path.name for path in directory.iterdir()}
    assert {*shards, "chat_template.jinja", "tokenizer.json", "generation_config.json"} < names
    assert not {"consolidated.safetensors", "original", "pytorch_model.bin"} & names


def to_adapter(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (model / "adapter_model.safetensors").write_bytes(b"")


def to_gguf(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.rename(path.with_suffix(".gguf"))


def to_quantised(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (to_adapter, "is an adapter, not a whole model; merge it into its base first"),
        (to_gguf, "is a GGUF file, for inference only; give the checkpoint"),
        (to_quantised, "is quantised (awq)"),
        (shutil.rmtree, "is not on the Hugging Face hub; mind the spelling"),
    ],
)
def test_what_cannot_sleep_is_refused_before_its_weights_are_fetched(
    damage: Callable[[Path], None],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    reach: Callable[[Hub], None],
) -> None:
    shutil.copytree(tiny_model, tmp_path / "org" / "other")
    damage(tmp_path / "org" / "other")
    with serve(tmp_path) as hub:
        reach(hub)
        with pytest.raises(ConfigError) as refused:
            api.plan_night(settings("org/other"))
    told = str(refused.value)
    assert told.startswith("model.name='org/other' ") and message in told and "\n" not in told
    assert not [path for path in hub.asked if "/cdn/" in path]


def test_a_hub_that_does_not_answer_is_named_by_the_dry_run(
    tmp_path: Path, reach: Callable[[Hub], None]
) -> None:
    with serve(tmp_path) as hub:
        reach(hub)  # and closed again: nobody listens at its address
    lacks = " ".join(api.plan_night(settings("org/model")).warnings)
    assert (
        "model.name='org/model' is not in the local cache" in lacks and "cannot be reached" in lacks
    )


def test_a_model_in_the_cache_needs_no_hub(
    published: Path, tmp_path: Path, reach: Callable[[Hub], None]
) -> None:
    with serve(published) as hub:
        reach(hub)
        fetched = find_model(settings("org/model"))
    assert describe_model(settings("org/model")) == fetched  # and now nobody listens
    assert find_model(settings("org/model")) == fetched
