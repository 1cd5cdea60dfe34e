"""The embedded model: a small standard Llama that every engine can serve, and how to query it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sleeprl.config.schema import SelfStudyConfig
from sleeprl.evaluation.statistics import perplexity

TEMPERATURE = SelfStudyConfig().temperature


def new_model(
    tokenizer: PreTrainedTokenizerFast, width: int, layers: int, mlp: int, head_dim: int
) -> LlamaForCausalLM:
    """Create a randomly initialised model in float32.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        width: Size of the hidden states; a multiple of ``head_dim``.
        layers: Number of layers.
        mlp: Width of the MLPs.
        head_dim: Size of an attention head.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim,
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.inference_mode()
def respond(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[str],
    sample: bool = False,
    max_new_tokens: int = 40,
    batch: int = 256,
) -> list[str]:
    """Answer each user message, greedily or sampled as in self-study.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        messages: User messages, one per chat.
        sample: Sample at ``TEMPERATURE`` instead of greedy decoding.
        max_new_tokens: The longest answer, in tokens.
        batch: Chats in one call of ``generate``.

    Returns:
        The answers, in the order of the messages.
    """
    order = sorted(range(len(messages)), key=lambda i: len(messages[i]))
    answers = [""] * len(messages)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        chats = [[{"role": "user", "content": messages[i]}] for i in chosen]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        how = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0} if sample else {}
        output = model.generate(**inputs, **how, max_new_tokens=max_new_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers


@torch.inference_mode()
def measure_perplexity(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    batch: int = 64,
) -> float:
    """Measure the perplexity of plain texts per token, the first token of each text not counted."""
    total, count = 0.0, 0
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            list(texts[start : start + batch]),
            padding=True, padding_side="right", return_tensors="pt",
        ).to(model.device)  # fmt: skip
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
        scored = inputs["attention_mask"][:, 1:].bool()
        nats = torch.nn.functional.cross_entropy(logits[scored], inputs["input_ids"][:, 1:][scored])
        total, count = total + nats.item() * int(scored.sum()), count + int(scored.sum())
    return perplexity(total, count)
