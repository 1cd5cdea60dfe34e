"""Answers questions by day, with the experience in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from sleeprl.config import loader as cfg
from sleeprl.data.experience import experiences
from sleeprl.data.lake import Lake
from sleeprl.memory.growth import engine_extra_tensors
from sleeprl.models.catalogue import CATALOGUE
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

    A word weighs the inverse of the number of documents that contain it.

    Args:
        question: The question.
        documents: The candidates.
        room: Tokens for the documents and the question together.
        chat: The chat format.

    Returns:
        The chosen documents, best match first. The first may share no word with the question.
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
    """Answer questions greedily, each with the best matching documents in its prompt.

    Args:
        lake: The recorded experience.
        questions: The questions.
        model: As in ``model.name``.

    Returns:
        One answer per question.
    """
    import ray

    of_model = {spec.name: spec.night for spec in CATALOGUE.values()}
    settings = cfg.load(None, [f"model.name={model}"], of_model)
    source = find_model(settings)
    chat = ChatFormatter(source, settings.model.chat_template_kwargs)
    documents = [e.as_text() for e in experiences(lake.read("experience"))]
    length, reply = settings.model.max_length, settings.evaluation.max_tokens
    prompts = []
    for question in questions:
        near = choose_documents(question, documents, length - reply, chat)
        prompts.append(chat.prompt(with_experience(near, question) if near else question))
    # A Ray instance of its own, even where `ray start` runs another one on this machine.
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
