"""Checks that a checkpoint can sleep, before anything starts."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.memory.slots import FILE, Slots
from sleeprl.models.hub import require_format
from sleeprl.pretrained import build_model, load_architecture
from sleeprl.text.chat import ChatFormatter

EMBEDDED = Path(__file__).parents[1] / "worlds" / "embedded"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LFS = b"version https://git-lfs"
_SCALED = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
"""Kinds of RoPE scaling whose factor ``max_position_embeddings`` has already, as vLLM takes it."""


def check_model(config: NightConfig, directory: Path, *, weights: bool = True) -> None:
    """Check that a checkpoint can sleep: architecture, chat template, positions, weights.

    It is built without weights (on the meta device), which takes seconds, most of them to
    import torch. The embedded model is known to be good, and so are the architecture and the
    tokenizer of a model that has slept.

    Args:
        config: The settings of the night.
        directory: The checkpoint.
        weights: Whether the files of weights are there to be checked.

    Raises:
        ConfigError: If it cannot.
    """
    name = f"model.name={config.model.name!r}"
    _check_length(config, _read_settings(name, directory / "config.json"))
    if directory == EMBEDDED and not config.model.chat_template_kwargs:
        return
    built, slept = None, _has_slots(name, directory)
    if not slept:
        built = _check_architecture(name, directory)
    if weights:
        require_format(name, os.listdir(directory))
    if not slept or config.model.chat_template_kwargs:
        _check_chat(config, name, directory)
    if weights:
        _check_weights(name, directory, built)


def _read_settings(name: str, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{name} has no {path.name}; copy or fetch the model again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{name}: {path} is not a JSON object; copy or fetch the model again")
    return settings


def _has_slots(name: str, directory: Path) -> bool:
    try:
        return Slots.load(directory) is not None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{name}: {directory / FILE} is damaged ({error}); copy the generation again"
        ) from None


def _check_length(config: NightConfig, settings: dict[str, Any]) -> None:
    """Refuse a ``model.max_length`` beyond the positions that the model was made for."""
    positions, length = _positions(settings), config.model.max_length
    if positions is not None and length > positions:
        raise ConfigError(
            f"model.max_length={length} is more than the {positions} positions of "
            f"model.name={config.model.name!r}; set it to at most {positions}"
        )


def _positions(settings: dict[str, Any]) -> int | None:
    """Compute the longest sequence of a model, in tokens; None where its config does not say."""
    text = settings.get("text_config") or settings
    given = text.get("max_position_embeddings")
    if not isinstance(given, int):
        return None
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if "gemma3" in f"{settings.get('model_type')} {text.get('model_type')}" or not isinstance(
        scaling, dict
    ):
        return given
    longest = given
    for kind in (scaling, *scaling.values()):
        if not isinstance(kind, dict) or kind.get("rope_type", kind.get("type")) in _SCALED:
            continue
        if isinstance(kind.get("factor"), int | float):
            longest = max(longest, int(given * kind["factor"]))
    return longest


def _check_architecture(name: str, directory: Path) -> Any:
    """Build the model without weights, and check that experts can grow in it.

    Returns:
        The model, on the meta device.
    """
    import torch

    from sleeprl.memory.gated_mlp import FAMILIES, UnsupportedModel, mlps

    settings = _read_settings(name, directory / "config.json")
    if quantisation := settings.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise ConfigError(
            f"{name} is quantised ({method or 'quantization_config'}), and experts grow in weights "
            "of full precision; give the model that it was made from, or convert it: "
            "model.dequantize().save_pretrained(directory) of transformers"
        )
    own_code = settings.get("auto_map")
    try:
        with torch.device("meta"):
            model = build_model(load_architecture(directory))
        mlps(model)
    except UnsupportedModel as error:
        raise ConfigError(f"{name}: {error}") from None
    except Exception as error:  # of many kinds, and with a list of all that transformers knows
        if own_code:
            raise _own_code(name, "config.json") from None
        reason = textwrap.shorten(str(error), 200)
        raise ConfigError(
            f"{name}: transformers cannot build this model architecture: {reason}; "
            f"supported families: {FAMILIES}"
        ) from None
    named = settings.get("architectures") or []
    if own_code and type(model).__name__ not in named:
        raise _own_code(name, "config.json")
    return model


def _own_code(name: str, file: str) -> ConfigError:
    return ConfigError(
        f"{name} needs code of its own (auto_map in {file}), which is never run; give a model whose "
        "architecture and tokenizer transformers itself has, or a version of it for transformers"
    )


def _check_chat(config: NightConfig, name: str, directory: Path) -> None:
    try:
        chat = ChatFormatter(directory, config.model.chat_template_kwargs)
        chat.prompt("Hello!")
    except Exception as error:
        path = directory / "tokenizer_config.json"
        if path.is_file() and "auto_map" in _read_settings(name, path):
            raise _own_code(name, path.name) from None
        reason = textwrap.shorten(str(error), 300)
        raise ConfigError(f"{name} has no usable tokenizer: {reason}") from None


def _check_weights(name: str, directory: Path, built: Any) -> None:
    """Check that all weights are there and whole, from the headers of their files."""
    files = _files_of(name, directory)
    found: dict[str, list[int]] = {}
    for file, expected in files.items():
        shapes = dict(_shapes(name, directory / file))
        if lacking := sorted(expected - shapes.keys()):
            raise ConfigError(
                f"{name}: {file} has no {lacking[0]}, which {INDEX} has there; "
                "copy or fetch the model again"
            )
        found.update(shapes)
    if built is not None:
        _compare(name, found, built)


def _files_of(name: str, directory: Path) -> dict[str, set[str]]:
    """Return the files of weights, each with the tensors that the index has in it."""
    if (directory / SINGLE).is_file() or not (directory / INDEX).is_file():
        if not (directory / SINGLE).is_file():
            raise ConfigError(
                f"{name} has neither {SINGLE} nor {INDEX}; copy or fetch the model again"
            )
        return {SINGLE: set()}
    placed = _read_settings(name, directory / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ConfigError(f"{name}: {INDEX} has no weight_map; copy or fetch the model again")
    files: dict[str, set[str]] = {}
    for tensor, file in placed.items():
        files.setdefault(str(file), set()).add(tensor)
    missing = [file for file in sorted(files) if not (directory / file).is_file()]
    if missing:
        raise ConfigError(
            f"{name} lacks {len(missing)} of {len(files)} files of weights, the first is "
            f"{missing[0]}; copy or fetch the model again"
        )
    return files


def _shapes(name: str, path: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and shape of each tensor of a safetensors file; its data is not read."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ConfigError(f"{name}: {path.name} is a Git LFS pointer; run `git lfs pull` there")
    try:
        with safe_open(path, framework="numpy") as tensors:
            for tensor in tensors.keys():  # noqa: SIM118
                yield tensor, tensors.get_slice(tensor).get_shape()
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{name}: {path.name} ({path.stat().st_size:,} bytes) is damaged or cut short "
            f"({error}); copy or fetch it again"
        ) from None


def _compare(name: str, found: dict[str, list[int]], built: Any) -> None:
    """Compare the tensors in the files with those of the architecture.

    Some architectures have other names in files than in memory; transformers converts those, and
    they are not compared.
    """
    wanted = {tensor: list(value.shape) for tensor, value in built.state_dict().items()}
    for tensor in found.keys() & wanted.keys():
        if found[tensor] != wanted[tensor]:
            raise ConfigError(
                f"{name}: {tensor} is {found[tensor]} in the weights but {wanted[tensor]} by "
                "config.json; they belong to different models"
            )
    tied = set(getattr(built, "all_tied_weights_keys", {}))
    lacking = sorted(wanted.keys() - found.keys() - tied)
    if lacking and found.keys() <= wanted.keys():
        raise ConfigError(
            f"{name}: the weights have no {lacking[0]} ({len(lacking)} tensors are missing); "
            "copy or fetch the model again"
        )
