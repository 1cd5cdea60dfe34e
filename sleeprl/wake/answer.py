"""Answer questions by day, with the experience in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from sleeprl import config as cfg
from sleeprl.actors.engine import EngineOptions, Sampling
from sleeprl.actors.fleet import Fleet
from sleeprl.chat import Chat
from sleeprl.losses.imitation import normalise
from sleeprl.memory.growth import beside
from sleeprl.models import find_model
from sleeprl.prompts import with_experience
from sleeprl.settings import available_cpus
from sleeprl.trajectories.experience import experiences
from sleeprl.trajectories.lake import Lake


def choose(question: str, documents: Sequence[str], room: int, chat: Chat) -> list[str]:
    """The documents that share most words with the question, as many as fit into ``room`` tokens.

    Rare words count more: a word in one document says more than one in all.
    """
    bags = [set(normalise(text).split()) for text in documents]
    asked = set(normalise(question).split())

    def overlap(index: int) -> float:
        return sum(1.0 / sum(word in bag for bag in bags) for word in asked & bags[index])

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
    """Greedy answers of ``model``, each with what it met that is nearest to the question."""
    import ray

    settings = cfg.load(None, [f"model.name={model}"])
    source = find_model(settings)
    chat = Chat(source)
    documents = [e.as_text() for e in experiences(lake.read("experience"))]
    length, reply = settings.model.max_length, settings.evaluation.max_tokens
    prompts = []
    for question in questions:
        near = choose(question, documents, length - reply, chat)
        prompts.append(chat.prompt(with_experience(near, question) if near else question))
    # One of its own, also where `ray start` has left another on this machine.
    ray.init("local", num_cpus=available_cpus(), include_dashboard=False, log_to_driver=False)
    fleet = None
    try:
        options = EngineOptions.of(settings, str(source), "float32")
        fleet = Fleet.launch(1, options, cpus=1, gpus=0)
        if rest := beside(source):
            fleet.publish(rest)
        sampling = [Sampling(reply, temperature=0.0)] * len(prompts)
        return [chat.decode(c.token_ids) for c in fleet.generate(prompts, sampling)]
    finally:
        if fleet is not None:
            fleet.shutdown()
        ray.shutdown()
