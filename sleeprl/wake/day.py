"""The day before the night: what was met, and the questions that will be asked about it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from rapidfuzz import fuzz, process, utils

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.data.experience import Experience, experiences
from sleeprl.data.lake import Lake
from sleeprl.evaluation.questions import Day, Question, read_questions
from sleeprl.lineage import LineageStore
from sleeprl.wake.ingest import ingest
from sleeprl.worlds import people as world

EMBEDDED = "embedded"
SOURCE = "embedded-world"


def build_day(config: NightConfig, lake: Lake) -> Day:
    """Record the day into the lake and say what it was about.

    Without ``wake.inputs`` the day is made by the embedded world: fresh people by
    seed, questions in held-out phrasings. The embedded model, which knows that world's
    past, is asked about it too (two-hop, retention). Any other model's retention is
    asked later, on what the smaller self says of itself. With inputs, the documents are
    the user's, and the questions come from ``evaluation.questions``; who is asked with the text
    in the prompt reads what the question names (``experience``), or the likest document.
    Raises ConfigError for inputs that hold nothing.
    """
    if config.wake.inputs:
        ingest(config.wake.inputs, lake)
        documents = [e.as_text() for e in experiences(lake.read("experience"))]
        if not documents:
            raise ConfigError("wake.inputs hold no experience; there is nothing to sleep on")
        path = config.evaluation.questions
        return Day(documents, _placed(read_questions(Path(path)), documents) if path else [])
    return _embedded_day(config, lake)


def _placed(probes: list[Question], documents: list[str]) -> list[Question]:
    """Questions about the day, each with the document in which most words of it and its answer stand,
    unless it says itself what is to be read."""
    return [
        replace(probe, experience=_likest(f"{probe.question} {probe.answer}", documents))
        if probe.experience is None and probe.kind != "retention"
        else probe
        for probe in probes
    ]


def _likest(text: str, documents: list[str]) -> str:
    found = process.extractOne(
        text, documents, scorer=fuzz.token_set_ratio, processor=utils.default_process
    )
    return str(found[0])


def _is_native(config: NightConfig) -> bool:
    """Whether the model is the embedded one or descends from it."""
    manifest = LineageStore(config.generations).find(config.model.name)
    return (manifest.base_model if manifest else config.model.name) == EMBEDDED


def _embedded_day(config: NightConfig, lake: Lake) -> Day:
    from sleeprl.data.experience import experience_batch

    people = world.fresh_people(config.seed, config.wake.people)
    documents = world.documents(people, config.seed, config.wake.people_per_document)
    seen = lake.uids("experience")
    met = [Experience.document(d["text"], source=SOURCE) for d in documents]
    fresh = [e for e in met if e.uid not in seen]
    if fresh:
        lake.append(experience_batch(fresh), "experience")
    home = {name: d["text"] for d in documents for name in d["people"]}
    native = _is_native(config)
    kinds = ("recall", "two_hop") if native else ("recall",)
    probes = [
        Question(q.text, q.answer, q.kind, home[q.person])
        for q in world.questions(people, "heldout", kinds, per_attribute=2, seed=config.seed)
    ]
    if not native:
        return Day([d["text"] for d in documents], probes)
    rng = random.Random(f"retention-{config.seed}")
    old = world.questions(world.old_people(), "heldout", kinds=("recall",), seed=config.seed)
    # The document stands before an old question too, where the context is given: it must not confuse.
    probes += [
        Question(q.text, q.answer, "retention", rng.choice(documents)["text"])
        for q in rng.sample(old, min(config.evaluation.retention_questions, len(old)))
    ]
    return Day(
        [d["text"] for d in documents],
        probes,
        world.old_world_text(config.seed, "heldout", config.evaluation.perplexity_texts),
    )
