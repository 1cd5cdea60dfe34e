"""Answer questions by day, with the experience in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from sleeprl.config import loader as cfg
from sleeprl.data.experience import experiences
from sleeprl.data.lake import Lake
from sleeprl.memory.growth import engine_extra_tensors
from sleeprl.models.resolve import find_model
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.rollout.types import SamplingParams
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.normalise import normalise
from sleeprl.text.prompts import with_experience
from sleeprl.utils.machine import available_cpus


def choose_documents(
    question: str, documents: Sequence[str], room: int, chat: ChatFormatter
) -> list[str]:
    """Choose the documents that share most words with the question, as many as fit.

    Rare words count more: a word in one document says more than one in all.

    Args:
        question: What is asked.
        documents: What there is.
        room: Tokens for the documents and the question together.
        chat: The chat format.
    """
    bags = [set(normalise(text).split()) for text in documents]
    words = set(normalise(question).split())

    def overlap(index: int) -> float:
        return sum(1.0 / sum(word in bag for bag in bags) for word in words & bags[index])

    chosen: list[str] = []
    used = len(chat.prompt(question))
    for index in sorted(range(len(documents)), key=lambda i: (-overlap(i), i)):
        cost = len(chat.text(documents[index])) + 4
        if chosen and overlap(index) == 0:
            break
        if used + cost > room:
            continue
        chosen.append(documents[index])
        used += cost
    return chosen


def answer(lake: Lake, questions: Sequence[str], model: str) -> list[str]:
    """Answer questions greedily, each with the documents in its prompt that are nearest to it.

    Args:
        lake: What was recorded.
        questions: What is asked.
        model: As in ``model.name``.
    """
    import ray

    settings = cfg.load(None, [f"model.name={model}"])
    source = find_model(settings)
    chat = ChatFormatter(source)
    documents = [e.as_text() for e in experiences(lake.read("experience"))]
    length, reply = settings.model.max_length, settings.evaluation.max_tokens
    prompts = []
    for question in questions:
        near = choose_documents(question, documents, length - reply, chat)
        prompts.append(chat.prompt(with_experience(near, question) if near else question))
    # One of its own, also where `ray start` has left another on this machine.
    ray.init("local", num_cpus=available_cpus(), include_dashboard=False, log_to_driver=False)
    engines = None
    try:
        options = EngineOptions.from_config(settings, str(source), "float32")
        engines = EnginePool.launch(1, options, cpus=1, gpus=0)
        if rest := engine_extra_tensors(source):
            engines.publish(rest)
        sampling = [SamplingParams(reply, temperature=0.0)] * len(prompts)
        return [chat.decode(c.token_ids) for c in engines.generate(prompts, sampling)]
    finally:
        if engines is not None:
            engines.shutdown()
        ray.shutdown()
