"""Convert the files of packages to an ordinary Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleeprl.models.catalogue.table import CatalogueError
from sleeprl.pretrained import (
    build_model,
    load_architecture,
    load_model,
    load_tokenizer,
    save_model,
)


def from_gguf(
    gguf: Path, target: Path, dtype: str, chat_template: str | None = None, end: str | None = None
) -> None:
    """Write the dequantised model, its tokenizer and chat template into ``target``.

    Args:
        gguf: The file.
        target: Directory of the checkpoint.
        dtype: Number format of the checkpoint.
        chat_template: Chat template in Jinja, where the file has none.
        end: Token that ends a turn, where it is not the file's.
    """
    from transformers import GgufConfig

    tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
    # Asked for this way the model is a plain one afterwards, with no quantisation in its config:
    # an engine would believe that.
    plain = GgufConfig(dequantize=True)
    model = load_model(
        gguf.parent, getattr(torch, dtype), gguf_file=gguf.name, quantization_config=plain
    )
    if end is not None:
        tokenizer.eos_token = end
        for config in (model.config, model.generation_config):
            config.eos_token_id = tokenizer.eos_token_id
    _write(model, tokenizer, target, chat_template)


def from_onnx(package: Path, member: str, target: Path, dtype: str) -> None:
    """Write the Llama of a quantised ONNX export and its tokenizer into ``target``.

    Args:
        package: Directory with config.json, the tokenizer's files, and ``member``.
        member: The ONNX file, relative to ``package``.
        target: Directory of the checkpoint.
        dtype: Number format of the checkpoint.
    """
    config = load_architecture(package)
    tensors = dequantised(package / member)
    if config.tie_word_embeddings:  # exported twice; the input side is the one that stays
        tensors.pop("lm_head.weight", None)
    model = build_model(config, dtype=getattr(torch, dtype))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    left = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if left or unexpected:
        raise CatalogueError(
            f"{member} is no export of {config.architectures}: without {sorted(left)[:3]}, "
            f"with unknown {sorted(unexpected)[:3]}"
        )
    model.tie_weights()
    _write(model, load_tokenizer(package), target, None)


def dequantised(onnx_file: Path) -> dict[str, Tensor]:
    """Read the weights of a dynamically quantised ONNX graph, in float32, by their PyTorch names.

    A weight is ``(q - zero_point) * scale``. A linear layer is the MatMulInteger node
    ``/model/layers.0/mlp/up_proj/MatMul_quant`` with a weight of shape (in, out), the
    transpose of PyTorch's; embeddings and norms keep their names.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise CatalogueError(
            "this model is an ONNX file, which the package onnx reads; pip install 'sleeprl[onnx]'"
        ) from None
    graph = onnx.load(onnx_file).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}

    def weight(name: str) -> Tensor:
        quantised, zero = arrays[f"{name}_quantized"], arrays[f"{name}_zero_point"]
        return (quantised.float() - zero.float()) * arrays[f"{name}_scale"]

    found = {}
    for name in arrays:
        if name.endswith(".weight"):
            found[name] = arrays[name].float()
        elif name.endswith(".weight_quantized"):
            stem = name.removesuffix("_quantized")
            found[stem] = weight(stem)
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            found[f"{module}.weight"] = weight(node.input[1].removesuffix("_quantized")).T
    return found


def _write(model: Any, tokenizer: Any, target: Path, chat_template: str | None) -> None:
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_model(model, tokenizer, target)
