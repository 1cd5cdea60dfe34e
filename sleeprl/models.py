"""Where a model comes from, and the number format it runs in."""

from __future__ import annotations

from pathlib import Path

from sleeprl.config import ConfigError, NightConfig, ResourcesConfig
from sleeprl.lineage import LineageError, LineageStore

EMBEDDED = Path(__file__).parent / "worlds" / "embedded"


def find_model(config: NightConfig) -> Path:
    """The checkpoint directory of ``model.name``.

    In this order: ``embedded``; a local directory; a committed generation (its id, a
    unique prefix of it, or HEAD); a Hugging Face id, from the local cache or the hub.
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
    store = LineageStore(config.generations)
    try:
        return store.path(store.resolve(name))
    except LineageError as error:
        if "/" not in name:
            raise ConfigError(
                f"model.name={name!r} is neither 'embedded', a directory, nor a generation: {error}"
            ) from None
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        )
    except Exception as error:
        raise ConfigError(
            f"model.name={name!r} cannot be had from the Hugging Face hub: {error}"
        ) from None


def device_dtype(dtype: str, resources: ResourcesConfig) -> str:
    """``auto`` is bfloat16 where a GPU computes and float32 on the CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if resources.engine_gpus or resources.learner_gpus else "float32"
