"""Loads and writes checkpoints: the one place that calls transformers' ``from_pretrained``.

A model is data. Code that a checkpoint brings along (``auto_map``) is never run and never asked
about, and weights are read from safetensors, not from pickles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeprl.utils.files import apply_umask

if TYPE_CHECKING:
    from torch import Tensor


def load_tokenizer(source: str | Path, **options: Any) -> Any:
    """Load a tokenizer.

    Args:
        source: Directory or Hugging Face id.
        options: Further arguments of ``from_pretrained``.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def load_architecture(source: str | Path) -> Any:
    """Load the ``config.json`` of a checkpoint as a transformers configuration."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def build_model(architecture: Any, **options: Any) -> Any:
    """Build a causal language model from its configuration, without a checkpoint's weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(architecture, trust_remote_code=False, **options)


def load_model(source: str | Path, dtype: Any, **options: Any) -> Any:
    """Load a causal language model.

    Args:
        source: Directory or Hugging Face id.
        dtype: torch dtype of the parameters, or ``"auto"`` for that of the file.
        options: Further arguments of ``from_pretrained``.

    Raises:
        ValueError: The checkpoint lacks weights, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM

    if "gguf_file" not in options:
        options["use_safetensors"] = True
    model, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{source} has no weights for {', '.join(missing[:3])}; copy it again")
    return model


def load_encoder(source: str | Path) -> Any:
    """Load a model without a head, such as a sentence encoder."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True)


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a model in one file of weights, with its tokenizer; readable as the umask allows."""
    model.save_pretrained(directory, max_shard_size="1TB")
    tokenizer.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        apply_umask(path)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; readable as the umask allows (safetensors writes mode 0600)."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata)
    apply_umask(path)
