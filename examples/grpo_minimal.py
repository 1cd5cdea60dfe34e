"""GRPO without nights: engines write, a reward judges, the trainer learns, and again.

    python examples/grpo_minimal.py [STEPS] [ENGINE]

The embedded model learns to answer in few words. It takes about two minutes on two cores. The
engine is ``torch`` by default, which needs no vLLM and repeats to the bit; the other is ``vllm``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import fmean

from sleeprl.algorithms.base import RewardBatch
from sleeprl.algorithms.grpo import GRPO
from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import ResourcesConfig
from sleeprl.memory.checkpoint import widen
from sleeprl.models.resolve import EMBEDDED
from sleeprl.rollout import EngineOptions, EnginePool, SamplingParams
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer import (
    LossOptions,
    LossWeights,
    Trainer,
    TrainerOptions,
    TrainingExample,
    publish_weights,
    single_rank_group,
)

QUESTIONS = ["Who are you?", "Say hello.", "What do you know?", "Tell me a story."]
GROUP, MAX_TOKENS, WEIGHTS = 8, 24, {"rl": LossWeights(pg=1.0)}


def reward_brevity(token_ids: list[int]) -> float:
    return 1.0 - len(token_ids) / MAX_TOKENS


def main(steps: int = 20, engine: str = "torch") -> list[float]:
    """Train for some steps; returns the mean reward of each."""
    mean_rewards = []
    with tempfile.TemporaryDirectory() as scratch, cluster(ResourcesConfig()), single_rank_group():
        model = f"{scratch}/model"
        widen(EMBEDDED, Path(model), count=1, width=32, dtype="float32")  # room for one expert
        chat = ChatFormatter(model)
        pool = EnginePool.launch(1, EngineOptions(model, "float32", 256), 0, 0, engine)
        trainer = Trainer(TrainerOptions(model, 0, "float32", 0, 3e-2, steps))
        loss = LossOptions(algorithm=GRPO())
        prompts = [chat.prompt(question) for question in QUESTIONS for _ in range(GROUP)]
        groups = [question for question in QUESTIONS for _ in range(GROUP)]
        for step in range(steps):
            seeds = range(step * len(prompts), (step + 1) * len(prompts))
            sampling = [SamplingParams(MAX_TOKENS, seed=seed) for seed in seeds]
            answers = pool.generate(prompts, sampling)
            rewards = [reward_brevity(answer.token_ids) for answer in answers]
            lengths = [len(answer.token_ids) for answer in answers]
            batch = RewardBatch(rewards, groups, lengths, MAX_TOKENS)
            advantages = loss.algorithm.advantages(batch)
            rows = [
                TrainingExample(
                    prompt,
                    answer.token_ids,
                    "rl",
                    advantage=advantage,
                    rollout_logprobs=answer.logprobs,
                )
                for prompt, answer, advantage in zip(prompts, answers, advantages, strict=True)
            ]
            trainer.step(rows, WEIGHTS, loss)
            publish_weights(trainer, pool, canary=prompts[0])
            mean_rewards.append(fmean(rewards))
            print(f"step {step + 1}: reward {mean_rewards[-1]:.2f}", flush=True)
        pool.shutdown()
    return mean_rewards


if __name__ == "__main__":
    main(*(int(word) if word.isdigit() else word for word in sys.argv[1:]))
