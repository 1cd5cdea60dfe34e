"""Gets models from the Hugging Face hub, by their id."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from sleeprl.config.schema import ConfigError

DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What describes a model: configuration, tokenizer, chat template, index of the weights."""
WEIGHTS = ("*.safetensors", "*.gradients")
# The same weights in other formats, which would double the download.
_IGNORED = ("consolidated*.safetensors", "original/*", "metal/*", "onnx/*", "openvino/*")


class HubUnreachable(ConfigError):
    """Raised where the hub does not answer and the local cache has no such model."""


def fetch_model(name: str) -> Path:
    """Fetch a model, from the local cache where it is there.

    Its description comes first and is small, so that a model that cannot sleep is refused
    (``check_model``) before its weights are fetched.

    Raises:
        ConfigError: The hub has no such model, or cannot be reached.
    """
    return _fetch(name, (*DESCRIPTION, *WEIGHTS))


def fetch_description(name: str) -> Path:
    """Fetch all of a model but its weights.

    Raises:
        ConfigError: The hub has no such model, or cannot be reached.
    """
    from huggingface_hub import HfApi

    directory = _fetch(name, DESCRIPTION)
    try:
        files = HfApi().list_repo_files(name)
    except Exception:  # of several libraries: what the cache has is all there is to look at
        return directory
    require_format(f"model.name={name!r}", files)
    return directory


def require_format(name: str, files: Sequence[str]) -> None:
    """Refuse what is no checkpoint in safetensors, by the names of its files.

    Args:
        name: The setting and its value, for the message.
        files: Paths of the files.

    Raises:
        ConfigError: With the way out.
    """
    top = {file for file in files if "/" not in file}
    if "adapter_config.json" in top:
        raise ConfigError(
            f"{name} is an adapter, not a whole model; merge it into its base first: "
            "model.merge_and_unload().save_pretrained(directory) of peft, and save the tokenizer "
            "there too"
        )
    if any(file.endswith(".safetensors") for file in top) and "config.json" in top:
        return
    if any(file.endswith(".gguf") for file in top):
        raise ConfigError(
            f"{name} is a GGUF file, for inference only; give the checkpoint that it was made "
            "from, or convert it: AutoModelForCausalLM.from_pretrained(directory, "
            "gguf_file=FILE).save_pretrained(target) of transformers, and the tokenizer likewise"
        )
    if "config.json" not in top:
        raise ConfigError(f"{name} has no config.json; give a checkpoint of transformers")
    if any(file.endswith((".bin", ".pt", ".pth")) for file in top):
        raise ConfigError(
            f"{name} has its weights in a pickle, which can run code; convert it: "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(target) of "
            "transformers writes safetensors"
        )
    raise ConfigError(f"{name} has no weights (*.safetensors); copy or fetch the model again")


def _fetch(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    setting = f"model.name={name!r}"
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED))
        )
    except GatedRepoError:
        raise ConfigError(
            f"{setting} is gated: accept its terms on its page on the hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{setting} is not on the Hugging Face hub; mind the spelling (organisation/name), and "
            "for a private model log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError:
        raise HubUnreachable(
            f"{setting} is not in the local cache, and the Hugging Face hub cannot be reached; "
            "give the directory of a checkpoint, or a name that `sleeprl models` lists"
        ) from None
    except Exception as error:
        reason = textwrap.shorten(str(error), 300)
        raise ConfigError(
            f"{setting} cannot be fetched from the Hugging Face hub: {reason}"
        ) from None
