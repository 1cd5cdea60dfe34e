"""What a checkpoint must be to sleep, and that none of its code runs."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sleeprl.config.schema import ConfigError, ModelConfig, NightConfig
from sleeprl.models.check import check_model
from sleeprl.models.resolve import find_model
from sleeprl.pretrained import load_model, save_tensors
from sleeprl.worlds import EMBEDDED_MODEL
from tests.support.paths import ROOT


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny model in three shards."""
    target = tmp_path / "model"
    shutil.copytree(tiny_model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(target, max_shard_size="200KB")
    return target


def check(model: Path, **settings: Any) -> None:
    config = NightConfig(model=ModelConfig(name=str(model), **settings))
    check_model(config, find_model(config))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(model: Path) -> Path:
    return sorted(model.glob("model-*.safetensors"))[1]


def cut(model: Path) -> None:
    with open(shard(model), "r+b") as file:
        file.truncate(shard(model).stat().st_size - 10)


def cut_in_header(model: Path) -> None:
    shard(model).write_bytes(shard(model).read_bytes()[:100])


def point(model: Path) -> None:
    shard(model).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")


def drop_tensor(model: Path) -> None:
    tensors = load_file(shard(model))
    tensors.popitem()
    save_file(tensors, shard(model))


def drop_from_index(model: Path) -> None:
    drop_tensor(model)
    path = model / "model.safetensors.index.json"
    present = {t for file in model.glob("model-*") for t in load_file(file)}
    placed = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map={t: file for t, file in placed.items() if t in present})


def only(kept: str) -> Callable[[Path], None]:
    def leave(model: Path) -> None:
        for path in model.iterdir():
            path.unlink()
        (model / kept).write_text("{}")

    return leave


def pickled(model: Path) -> None:
    weightless(model)
    (model / "pytorch_model.bin").write_bytes(b"")


def weightless(model: Path) -> None:
    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        path.unlink()


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit(model / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: shard(m).unlink(), "lacks 1 of .* files of weights, the first is model-00002-of"),
        (cut, r"model-00002-of-\d+.safetensors \([\d,]+ bytes\) is damaged or cut short"),
        (cut_in_header, "model-00002-of-.* is damaged or cut short"),
        (point, "is a Git LFS pointer; run `git lfs pull`"),
        (drop_tensor, "model-00002-of-.* has no .*, which model.safetensors.index.json has there"),
        (drop_from_index, r"the weights have no .* \(1 tensors are missing\)"),
        (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (lambda m: (m / "model.safetensors.index.json").write_text("{"), "cannot be read"),
        (pickled, "has its weights in a pickle, which can run code; convert it"),
        (weightless, r"has no weights \(\*.safetensors\)"),
        (only("model-Q4_K_M.gguf"), "is a GGUF file, for inference only; give the checkpoint"),
        (only("adapter_config.json"), "is an adapter, not a whole model; merge it into its base"),
        (only("README.md"), "has no config.json"),
        (configured(quantization_config={"quant_method": "gptq"}), r"is quantised \(gptq\)"),
        (configured(quantization_config={"quant_method": "awq"}), r"is quantised \(awq\)"),
        (configured(quantization_config={"bits": 4}), r"is quantised \(quantization_config\)"),
        (configured(intermediate_size=128), r"is \[.*96.*\] in the weights but \[.*128"),
        (configured(max_position_embeddings=256), "more than the 256 positions of model.name="),
        (configured(model_type="own", auto_map={"AutoConfig": "own.C"}), "code of its own"),
        (configured(architectures=["Own"], auto_map={"AutoModel": "own.M"}), "code of its own"),
    ],
)  # fmt: skip
def test_a_broken_or_unfit_checkpoint_is_refused(
    damage: Callable[[Path], None], message: str, model: Path
) -> None:
    check(model)
    damage(model)
    with pytest.raises(ConfigError, match=message) as refused:
        check(model)
    assert str(model) in str(refused.value) and "\n" not in str(refused.value)


def test_a_gguf_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is a GGUF file"):
        check(tmp_path / "model.gguf")


def test_positions_count_what_their_scaling_adds(model: Path) -> None:
    edit(model / "config.json", max_position_embeddings=256)
    edit(
        model / "config.json",
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )
    check(model, max_length=512)
    with pytest.raises(ConfigError, match="more than the 512 positions"):
        check(model, max_length=513)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "llama3", "factor": 32.0, "rope_theta": 1e4,
                             "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        {"model_type": "gemma3_text",
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
        {"model_type": "gemma3", "text_config": {"max_position_embeddings": 256,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}}},
    ],
)  # fmt: skip
def test_positions_that_are_scaled_already_are_not_scaled_again(
    changes: dict[str, Any], model: Path
) -> None:
    edit(model / "config.json", rope_parameters=None)
    edit(model / "config.json", max_position_embeddings=256, **changes)
    with pytest.raises(ConfigError, match="more than the 256 positions"):
        check(model, max_length=257)


def test_the_embedded_model_has_positions_too() -> None:
    config = NightConfig(model=ModelConfig(max_length=1025))
    with pytest.raises(ConfigError, match=r"max_length=1025 is more than the 1024"):
        check_model(config, EMBEDDED_MODEL)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_neither_run_nor_asked_about(
    file: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked"))
    (model / "own.py").write_text(f"open({str(model / 'ran')!r}, 'w')\n")
    if file == "config.json":
        edit(model / file, model_type="own", auto_map={"AutoConfig": "own.C"})
    else:
        (model / "tokenizer.json").unlink()
        auto_map = {"AutoTokenizer": ["own.T", None]}
        edit(model / file, tokenizer_class="OwnTokenizer", auto_map=auto_map)
    with pytest.raises(ConfigError, match=f"code of its own .auto_map in {file}.*never run"):
        check(model)
    assert not (model / "ran").exists()


def test_only_one_module_loads_checkpoints() -> None:
    wanted = {"from_pretrained", "save_pretrained", "save_file", "snapshot_download"}
    users = {
        str(path.relative_to(ROOT / "sleeprl"))
        for path in (ROOT / "sleeprl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in wanted
    }
    assert users == {"pretrained.py", "models/hub.py"}


def test_missing_weights_are_never_drawn_at_random(model: Path) -> None:
    drop_from_index(model)
    with pytest.raises(ValueError, match="has no weights for"):
        load_model(model, torch.float32)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_are_readable_as_the_umask_allows(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
