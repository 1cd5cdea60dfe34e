"""What TRL's own loss code gives on a fixed batch.

``python -m tests.references.trl_losses`` writes trl_losses.json.

TRL is wanted for this alone (``pip install --no-deps trl datasets pandas dill multiprocess xxhash
httpx httpcore h11 anyio fsspec``), so the tests compare with what is stored, and run TRL again
where it is installed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

STORED = Path(__file__).with_suffix(".json")
LENGTHS, LIMIT, BETA = [5, 2, 3, 4], 7, 0.04
ADVANTAGES = [1.2, -0.7, 0.4, -1.5]
# Our name, TRL's trainer, and its settings; epsilon_low, epsilon_high.
CASES: dict[str, tuple[str, str, str, float, float]] = {
    "grpo": ("GRPO", "grpo", "token", 0.2, 0.2),
    "dr_grpo": ("GRPO", "dr_grpo", "token", 0.2, 0.2),
    "dapo": ("GRPO", "dapo", "token", 0.2, 0.28),
    "gspo": ("GRPO", "grpo", "sequence", 3e-4, 4e-4),
    "cispo": ("GRPO", "cispo", "token", 0.2, 5.0),
    "rloo": ("RLOO", "", "", 0.2, 0.2),
    "reference": ("GRPO", "grpo", "token", 0.2, 0.2),
}


def batch() -> dict[str, Tensor]:
    """Log-probabilities [4, 5] now, of the policy that sampled and of the reference; the mask."""
    generator = torch.Generator().manual_seed(20)
    rand = lambda: torch.rand(4, 5, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).double()
    now = -3 * rand()
    return {"now": now, "old": now - 0.6 * (rand() - 0.5), "ref": now - rand(), "mask": mask}


def run(name: str) -> dict[str, Any]:
    """The loss and its gradient in the current log-probabilities, by TRL."""
    from trl import GRPOTrainer, RLOOTrainer

    kind, loss_type, level, low, high = CASES[name]
    made = batch()
    now, mask = made["now"].requires_grad_(), made["mask"]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (now, torch.zeros_like(now), None),
        _metrics={"eval": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        aux_loss_enabled=False,
        beta=BETA if name == "reference" else 0.0,
        epsilon_high=high,
        epsilon_low=low,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=LIMIT,
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 5),
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
        "old_per_token_logps": made["old"],
        "old_logps": (made["old"] * mask).sum(1),
        "ref_per_token_logps": made["ref"],
        "num_items_in_batch": mask.sum(),
    }
    trainers: dict[str, Any] = {"GRPO": GRPOTrainer, "RLOO": RLOOTrainer}
    loss = trainers[kind]._compute_loss(trainer, None, inputs)
    (slopes,) = torch.autograd.grad(loss, now)
    return {"loss": loss.item(), "slopes": slopes.tolist()}


if __name__ == "__main__":
    found = {"trl": version("trl"), **{name: run(name) for name in CASES}}
    STORED.write_text(json.dumps(found, indent=1) + "\n")
