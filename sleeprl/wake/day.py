"""The day before the night: its documents, and the questions about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rapidfuzz import fuzz, process

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.data.experience import Experience, experience_batch, experiences
from sleeprl.data.lake import EXPERIENCE, Lake
from sleeprl.evaluation.metrics import add_questions, metrics_of
from sleeprl.evaluation.questions import RETENTION, Day, Question, read_questions
from sleeprl.lineage import LineageStore
from sleeprl.text.normalise import normalise
from sleeprl.wake.ingest import ingest, read_experience
from sleeprl.worlds import people as world

EMBEDDED = "embedded"
"""Name of the embedded model."""
SOURCE = "embedded-world"
"""Source of the documents of the embedded world, as the lake records it."""


def build_day(config: NightConfig, lake: Lake) -> Day:
    """Record the day into the lake, and collect the questions about it.

    Without ``wake.inputs`` the embedded world makes the day: fresh people by seed, with questions
    in held-out phrasings. The embedded model, which knows the world's past, also gets questions
    about that (two-hop, retention). For any other model, retention questions come later, from what
    its smaller self writes freely. With inputs, the documents are the user's and the questions come
    from ``evaluation.questions``. Metrics that make their own questions add them in both cases.

    Args:
        config: The settings of the night.
        lake: The run's lake.

    Returns:
        Documents, questions and held-out texts.

    Raises:
        ConfigError: The inputs hold no experience.
    """
    metrics = metrics_of(config)
    if config.wake.inputs:
        day = _own_day(config, lake)
    else:
        day = _embedded_day(config)
        _record(day.documents, lake)
    return add_questions(day, metrics, config.seed)


def preview_day(config: NightConfig) -> tuple[Day, list[str]]:
    """Make the day that ``build_day`` would, but record nothing, and ask no plug-in.

    Args:
        config: The settings of the night; the inputs are files.

    Returns:
        The day, and what each of its documents is called in a message.

    Raises:
        ConfigError: The embedded world has too few people, or the inputs hold no experience.
    """
    if not config.wake.inputs:
        day = _embedded_day(config)
        return day, [f"document {n} of the embedded world" for n in range(len(day.documents))]
    read = {e.uid: e for e in read_experience(config.wake.inputs)}
    documents = [e.as_text() for e in read.values()]
    if not documents:
        raise _no_experience(config)
    questions = read_own_questions(config)
    return Day(documents, _with_documents(questions, documents)), [e.source for e in read.values()]


def read_own_questions(config: NightConfig) -> list[Question]:
    """Read the questions that the settings name; none where they name no file."""
    path = config.evaluation.questions
    kinds = [metric.key for metric in metrics_of(config)]
    return [] if path is None else read_questions(Path(path), kinds)


def _no_experience(config: NightConfig) -> ConfigError:
    given = f"wake.inputs={config.wake.inputs}"
    return ConfigError(f"{given} hold no experience; there is nothing to sleep on")


def _own_day(config: NightConfig, lake: Lake) -> Day:
    """Build a day from the user's documents and questions."""
    ingest(config.wake.inputs, lake)
    documents = [e.as_text() for e in experiences(lake.read(EXPERIENCE))]
    if not documents:
        raise _no_experience(config)
    return Day(documents, _with_documents(read_own_questions(config), documents))


def _with_documents(questions: Sequence[Question], documents: Sequence[str]) -> list[Question]:
    """Assign to each question the most similar document.

    A question that names its own experience, or that is about earlier knowledge, stays as it is.
    """
    bare = [q for q in questions if q.experience is None and q.kind != RETENTION]
    found = dict(zip(map(id, bare), most_similar(bare, documents), strict=True)) if bare else {}
    return [replace(q, experience=found.get(id(q), q.experience)) for q in questions]


def most_similar(questions: Sequence[Question], documents: Sequence[str]) -> list[str]:
    """Return for each question the document that shares most words with it and its answer.

    Args:
        questions: The questions.
        documents: At least one document.
    """
    bags = [normalise(document) for document in documents]
    queries = [normalise(f"{q.question} {q.answer}") for q in questions]
    matches = [process.extractOne(query, bags, scorer=fuzz.token_set_ratio) for query in queries]
    return [documents[match[2]] for match in matches]


def _is_native(config: NightConfig) -> bool:
    """Decide whether the model is the embedded one or a descendant of it."""
    manifest = LineageStore(config.generations).find(config.model.name)
    return (manifest.base_model if manifest else config.model.name) == EMBEDDED


def _record(documents: Sequence[str], lake: Lake) -> None:
    """Write the documents that the lake does not have yet."""
    recorded = lake.uids(EXPERIENCE)
    met = [Experience.document(text, source=SOURCE) for text in documents]
    fresh = [e for e in met if e.uid not in recorded]
    if fresh:
        lake.append(experience_batch(fresh), EXPERIENCE)


def _embedded_day(config: NightConfig) -> Day:
    """Build a day of the embedded world."""
    if config.wake.people > (most := len(world.names("fresh"))):
        raise ConfigError(
            f"wake.people={config.wake.people}, but the embedded world has {most} fresh people; lower it"
        )
    people = world.fresh_people(config.seed, config.wake.people)
    documents = world.documents(people, config.seed, config.wake.people_per_document)
    texts = [d["text"] for d in documents]
    document_of = {name: d["text"] for d in documents for name in d["people"]}
    native = _is_native(config)
    kinds = ("recall", "two_hop") if native else ("recall",)
    questions = [
        Question(q.text, q.answer, q.kind, document_of[q.person])
        for q in world.questions(people, "heldout", kinds, per_attribute=2, seed=config.seed)
    ]
    if not native:
        return Day(texts, questions)
    rng = random.Random(f"retention-{config.seed}")
    old = world.questions(world.old_people(), "heldout", kinds=("recall",), seed=config.seed)
    # With context, an old question gets a document too: retention includes not being distracted by it.
    questions += [
        Question(q.text, q.answer, RETENTION, rng.choice(documents)["text"])
        for q in rng.sample(old, min(config.evaluation.retention_questions, len(old)))
    ]
    count = min(config.evaluation.perplexity_texts, len(world.old_people()))
    held_out = world.old_world_text(config.seed, "heldout", count)
    return Day(texts, questions, held_out)
