"""A tiny random model that every real component loads in a moment, and what is read from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleeprl.memory.slots import Slots


def make_tiny_model(directory: Path, *, architecture: str = "llama", seed: int = 0) -> Path:
    """A random two-layer model with a byte-level tokenizer, as a Hugging Face checkpoint."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=specials[1:],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(seed)
    config_class, model_class = {
        "gemma": (Gemma3TextConfig, Gemma3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[architecture]
    model = model_class(
        config_class(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def newborn(directory: Path, output: Path, slots: Slots, seed: int) -> None:
    """Write the expert that is born in the first slot of a checkpoint."""
    import torch
    from safetensors.torch import save_file

    from sleeprl.memory.checkpoint import EXPERT, expert_tensors
    from sleeprl.memory.gated_mlp import grow, load_training_form

    model = load_training_form(directory, slots, torch.float32)
    grow(model, slots.width, seed, 0)
    named = expert_tensors({n: p.detach() for n, p in model.named_parameters()})
    output.mkdir()
    save_file({n: t.contiguous() for n, t in named.items()}, output / EXPERT)


def plain_logprobs(
    model: Any, ids: list[int], weights: Mapping[str, Any] | None = None
) -> list[float]:
    """Log-probabilities of ids 1.. by transformers alone, with ``weights`` over the model's."""
    import torch

    state = model.state_dict() | dict(weights or {})
    with torch.no_grad():
        out = torch.func.functional_call(model, state, (torch.tensor([ids]),))
    chosen = torch.tensor(ids[1:])[:, None]
    return out.logits[0, :-1].log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
