"""The training data of the embedded model: short chats and texts, drawn at random.

A lesson is a list of (role, text). A reading lesson puts passages about random people of the
training share into the first user turn, and asks several things in later turns, so one passage
serves many answers. Every kind of task also comes first often enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from sleeprl.text import prompts
from sleeprl.worlds.checker import UNKNOWN
from sleeprl.worlds.people import (
    Person,
    Sentence,
    ask,
    entities,
    fill_statement,
    old_people,
    passage,
    prose,
    random_facts,
    unknown_names,
)
from sleeprl.worlds.phrasings import PHRASINGS
from sleeprl.worlds.vocabulary import DERIVED, DOMAINS, MEN, STATED, SURNAMES, WOMEN

T = TypeVar("T")
Lesson = list[tuple[str, str]]
TWO_HOP = tuple(DERIVED)
MAX_PEOPLE = 3


def pick(items: Sequence[T], rng: random.Random) -> T:
    """Choose uniformly; several times faster than ``rng.choice``, which matters here."""
    return items[int(rng.random() * len(items))]


def _question(name: str, attribute: str, rng: random.Random) -> str:
    return ask(pick(PHRASINGS[attribute].questions, rng), name)


def _statement(name: str, attribute: str, value: str, rng: random.Random) -> str:
    return fill_statement(pick(PHRASINGS[attribute].statements, rng), name, value)


def _reworded(name: str, attribute: str, value: str, original: str, rng: random.Random) -> str:
    """Draw another statement of the same fact."""
    while (text := _statement(name, attribute, value, rng)) == original:
        pass
    return text


def _stranger(rng: random.Random) -> Person:
    """Draw an unknown person with random facts; they differ from draw to draw."""
    name, woman = pick(unknown_names(), rng)
    return Person(name, woman, random_facts(rng))


# --- reading and writing with passages in the context -------------------------------
class Scene:
    """Some people, the passages about them, and the facts that the passages state."""

    def __init__(self, rng: random.Random) -> None:
        count = rng.choices(range(1, MAX_PEOPLE + 1), (4, 4, 3))[0]
        drawn = [
            pick(old_people(), rng) if rng.random() < 0.08 else _stranger(rng) for _ in range(count)
        ]
        self.people = list({person.name: person for person in drawn}.values())
        self.known: list[tuple[Person, str]] = []  # (person, stated or derived attribute)
        self.sentences: list[Sentence] = []
        paragraphs = [self._paragraph(person, rng) for person in self.people]
        self.text = ("\n\n" if rng.random() < 0.7 else "\n").join(paragraphs)

    def _paragraph(self, person: Person, rng: random.Random) -> str:
        size = 7 if rng.random() < 0.5 else rng.randint(3, 6)
        known_facts = rng.sample(STATED, size)
        self.known += [(person, attribute) for attribute in known_facts]
        self.known += [(person, hop) for hop, through in DERIVED.items() if through in known_facts]
        sentences = passage(person, rng, known_facts)
        self.sentences += sentences
        return prose(sentences)

    def fact(self, rng: random.Random) -> tuple[Person, str]:
        """Draw a person of the scene uniformly, then one of their facts, stated or derived."""
        person = pick(self.people, rng)
        return person, pick([a for p, a in self.known if p is person], rng)


def _read(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Draw a question, mostly answered by the passage; some are about the old world or unanswerable."""
    draw = rng.random()
    if draw < 0.10:
        person = pick(old_people(), rng)
        attribute = pick(STATED + TWO_HOP, rng)
        return _question(person.name, attribute, rng), person.facts[attribute]
    if draw < 0.13:
        return _entity_qa(rng)
    if draw < 0.16:
        return _question(_stranger(rng).name, pick(STATED + TWO_HOP, rng), rng), UNKNOWN
    if draw < 0.22:
        person, attribute = pick(scene.people, rng), pick(STATED + TWO_HOP, rng)
        is_known = (person, attribute) in scene.known or person in old_people()
        return _question(person.name, attribute, rng), (
            person.facts[attribute] if is_known else UNKNOWN
        )
    person, attribute = scene.fact(rng)
    return _question(person.name, attribute, rng), person.facts[attribute]


def _study_qa(scene: Scene, rng: random.Random) -> tuple[str, str]:
    person, attribute = scene.fact(rng)
    question = _question(person.name, attribute, rng)
    return prompts.STUDY_QA, prompts.format_qa(question, person.facts[attribute])


def _study_fact(scene: Scene, rng: random.Random) -> tuple[str, str]:
    person, attribute = scene.fact(rng)
    return prompts.STUDY_FACT, _statement(person.name, attribute, person.facts[attribute], rng)


def _study_paraphrase(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Reword a full statement or, half of the time, a sentence as the passage has it."""
    sentence = pick(scene.sentences, rng)
    alone = sum(other.text == sentence.text for other in scene.sentences) == 1
    if sentence.attribute and alone and rng.random() < 0.5:
        person = next(p for p in scene.people if p.name == sentence.person)
        attribute, original = sentence.attribute, sentence.text
    else:
        person, attribute = scene.fact(rng)
        original = _statement(person.name, attribute, person.facts[attribute], rng)
    reworded = _reworded(person.name, attribute, person.facts[attribute], original, rng)
    return prompts.STUDY_PARAPHRASE.format(sentence=original), reworded


_TASKS = (_read, _study_qa, _study_fact, _study_paraphrase)


def reading(rng: random.Random) -> Lesson:
    """Draw one to five tasks about one scene."""
    scene = Scene(rng)
    tasks = rng.choices(_TASKS, (52, 18, 16, 14), k=rng.randint(1, 5))
    lesson: Lesson = []
    for task in tasks:
        question, answer = task(scene, rng)
        message = question if lesson else prompts.with_experience(scene.text, question)
        lesson += [("user", message), ("assistant", answer)]
    return lesson


# --- the old world by heart, nothing in the context ---------------------------------
def _entity_qa(rng: random.Random) -> tuple[str, str]:
    name = pick(tuple(entities()), rng)
    attribute, value = pick(tuple(entities()[name].items()), rng)
    return _question(name, attribute, rng), value


def _old_fact(rng: random.Random) -> tuple[str, str, str]:
    """Draw (name, attribute, value) of the old world; one in ten is about a company or a city."""
    if rng.random() < 0.1:
        name = pick(tuple(entities()), rng)
        return (name, *pick(tuple(entities()[name].items()), rng))
    person, attribute = pick(old_people(), rng), pick(STATED + TWO_HOP, rng)
    return person.name, attribute, person.facts[attribute]


def _chat(question: str, answer: str) -> Lesson:
    return [("user", question), ("assistant", answer)]


def old_qa(rng: random.Random) -> Lesson:
    """Draw a question about the old world, with its answer."""
    name, attribute, value = _old_fact(rng)
    return _chat(_question(name, attribute, rng), value)


def unknown_qa(rng: random.Random) -> Lesson:
    """Draw a question about an unknown person, without context; the answer is ``UNKNOWN``."""
    name = pick(unknown_names(), rng)[0]
    return _chat(_question(name, pick(STATED + TWO_HOP, rng), rng), UNKNOWN)


def free_qa(rng: random.Random) -> Lesson:
    """Draw a question-answer pair about the old world, written without context."""
    name, attribute, value = _old_fact(rng)
    return _chat(prompts.FREE_QA, prompts.format_qa(_question(name, attribute, rng), value))


def free_fact(rng: random.Random) -> Lesson:
    """Draw a fact of the old world, written without context."""
    return _chat(prompts.FREE_FACT, _statement(*_old_fact(rng), rng))


def bare_paraphrase(rng: random.Random) -> Lesson:
    """Draw a paraphrase of a fact of the old world, without context."""
    name, attribute, value = _old_fact(rng)
    original = _statement(name, attribute, value, rng)
    reworded = _reworded(name, attribute, value, original, rng)
    return _chat(prompts.STUDY_PARAPHRASE.format(sentence=original), reworded)


def plain_text(rng: random.Random) -> Lesson:
    """Draw a passage or some sentences about the old world, without a chat around it."""
    if rng.random() < 0.5:
        return [("text", prose(passage(pick(old_people(), rng), rng)))]
    return [("text", " ".join(_statement(*_old_fact(rng), rng) for _ in range(rng.randint(1, 4))))]


_BY_HEART: tuple[tuple[Callable[[random.Random], Lesson], float], ...] = (
    (old_qa, 0.44),
    (unknown_qa, 0.05),
    (free_qa, 0.06),
    (free_fact, 0.06),
    (bare_paraphrase, 0.03),
    (plain_text, 0.08),
)


def lessons(seed: str, n: int, reading_share: float = 0.3) -> list[Lesson]:
    """Draw lessons.

    Args:
        seed: Seed of the lessons.
        n: How many.
        reading_share: Share of lessons with passages; the others are about the old world.
    """
    rng = random.Random(seed)
    by_heart, weights = zip(*_BY_HEART, strict=True)
    others = sum(weights) / (1.0 - reading_share)
    kinds, shares = (reading, *by_heart), (reading_share * others, *weights)
    return [kind(rng) for kind in rng.choices(kinds, shares, k=n)]


def tokenizer_texts(seed: str, n: int) -> list[str]:
    """Return texts to train the tokenizer on: those of ``n`` lessons, and all names and values alone.

    An answer starts without a space, so a name or value needs tokens without one.
    """
    alone = {value for domain in DOMAINS.values() for value in domain}.union(WOMEN, MEN, SURNAMES)
    in_text = [text for lesson in lessons(seed, n) for _, text in lesson]
    return in_text + [form for word in sorted(alone) for form in (word, f"a {word}")] * 40
