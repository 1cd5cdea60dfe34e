"""Make a process ready to train: the device, the training form of a checkpoint, DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sleeprl.memory.growth import growth_of
from sleeprl.memory.slots import Slots
from sleeprl.trainer.cpu_tuning import count_devices_once, keep_memory, load_shared_memory_op
from sleeprl.trainer.deepspeed_config import deepspeed_config, gather_by_layer
from sleeprl.trainer.imports import import_deepspeed
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.response_model import ResponseModel


def prepare_process(options: TrainerOptions) -> None:
    """Tell torch, DeepSpeed and the C library about the device, and import DeepSpeed."""
    os.environ["DS_ACCELERATOR"] = "cuda" if options.gpu else "cpu"
    torch.set_num_threads(options.threads)
    import_deepspeed()
    if not options.gpu:
        load_shared_memory_op()
        count_devices_once()
        keep_memory()


def warm_up(options: TrainerOptions) -> None:
    """Import what a trainer with such options needs, by loading its model once.

    For a process that is started before there is work for it. What the trainer draws later is as if this
    had not been.
    """
    prepare_process(options)
    slots = Slots.load(Path(options.checkpoint))
    if slots is not None:
        with torch.random.fork_rng(devices=[]):
            load_module(options, slots, None)


def load_module(
    options: TrainerOptions, slots: Slots, wake_gradients: Mapping[str, Tensor] | None
) -> tuple[ResponseModel, list[nn.Parameter]]:
    """Return the training form on the CPU, and the parameters that are trained."""
    growth, dtype = growth_of(slots), getattr(torch, options.dtype)
    model = growth.load(
        Path(options.checkpoint), slots, dtype, options.teacher_only_slots, wake_gradients
    )
    if options.slot is None:
        trained = _all_but_tied(model)
    else:
        trained = growth.grow(
            model, slots.width, options.seed, options.slot, gated=options.gated_expert
        )
    gather_by_layer(model)
    module = ResponseModel(model, critic=options.critic)
    if module.critic is not None:
        trained = [*trained, *module.critic.parameters()]
    return module, trained


def start_deepspeed(
    module: ResponseModel, trained: Sequence[nn.Parameter], options: TrainerOptions
) -> tuple[Any, Any]:
    """Return DeepSpeed's engine and optimiser."""
    import deepspeed

    engine, optimizer, _, _ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(
            trained,
            lr=options.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=options.weight_decay,
        ),
        config=deepspeed_config(
            dtype=options.dtype,
            grad_clip=options.grad_clip,
            gpu=options.gpu,
            offload=options.offload,
        ),
    )
    return engine, optimizer


def _all_but_tied(model: nn.Module) -> list[nn.Parameter]:
    """Return every parameter but embeddings that are also the head, which stay frozen.

    An engine that packs its head keeps the old one when it is sent new embeddings.
    """
    config: Any = model.config
    if config.tie_word_embeddings:
        embeddings: Any = model.get_submodule("model.embed_tokens")
        embeddings.weight.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]
