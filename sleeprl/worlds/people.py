"""The people of the world: the old ones that the embedded model knows, and fresh ones.

A hash of the full name assigns it to one of two shares. The *training* share names the old people
and everybody that the embedded model reads about in training. The *fresh* share is never trained
on, so anything that a model knows about a fresh person comes from its context or from later
training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from sleeprl.worlds.phrasings import COMBINED, PHRASINGS
from sleeprl.worlds.vocabulary import (
    CITIES,
    CITY_COUNTRY,
    COMPANIES,
    DERIVED,
    DOMAINS,
    INDUSTRIES,
    MEN,
    STATED,
    SURNAMES,
    WOMEN,
)

OLD_SEED = 20260606
OLD_SIZE = 240
FRESH_SHARE = 5  # one name in five is excluded from training
COMBINED_PROBABILITY = 0.3  # that a passage has two facts in one sentence

Facts = dict[str, str]


@dataclass(frozen=True)
class Person:
    """A person: a name, and the facts about them, stated and derived."""

    name: str
    woman: bool
    facts: Facts = field(hash=False)

    @property
    def stated(self) -> Facts:
        """The facts that a passage states."""
        return {attribute: self.facts[attribute] for attribute in STATED}


@dataclass(frozen=True)
class Question:
    """A question with its gold answer."""

    text: str
    answer: str
    kind: str
    """``"recall"`` or ``"two_hop"``."""
    person: str
    """The name that it asks about."""
    attribute: str
    phrasing: str
    """``"train"`` or ``"heldout"``."""


# --- names -----------------------------------------------------------------------
@cache
def names(share: str) -> tuple[tuple[str, bool], ...]:
    """List all (name, is a woman) of the ``"training"`` or the ``"fresh"`` share, in a fixed order."""
    wanted = {"training": False, "fresh": True}[share]
    firsts = [(first, True) for first in WOMEN] + [(first, False) for first in MEN]
    everybody = ((f"{first} {last}", woman) for first, woman in firsts for last in SURNAMES)
    return tuple((name, woman) for name, woman in everybody if is_fresh(name) is wanted)


def is_fresh(name: str) -> bool:
    """Decide whether a name is in the fresh share, which no training uses."""
    return zlib.crc32(name.encode()) % FRESH_SHARE == 0


# --- facts -----------------------------------------------------------------------
@cache
def entities() -> dict[str, Facts]:
    """Return the facts about companies and cities, which old and fresh people share."""
    rng = random.Random(OLD_SEED)
    companies = {
        company: {"company_city": rng.choice(CITIES), "company_industry": rng.choice(INDUSTRIES)}
        for company in COMPANIES
    }
    return companies | {city: {"city_country": land} for city, land in CITY_COUNTRY.items()}


def random_facts(rng: random.Random) -> Facts:
    """Draw each stated attribute uniformly, and derive the others."""
    facts = {a: DOMAINS[a][int(rng.random() * len(DOMAINS[a]))] for a in STATED}
    company = entities()[facts["employer"]]
    facts["country"] = CITY_COUNTRY[facts["city"]]
    facts["employer_city"] = company["company_city"]
    facts["employer_industry"] = company["company_industry"]
    return facts


def _people(share: str, seed: int, n: int) -> list[Person]:
    rng = random.Random(f"{share}-{seed}")
    chosen = rng.sample(names(share), n)
    return [Person(name, woman, random_facts(rng)) for name, woman in chosen]


@cache
def old_people() -> tuple[Person, ...]:
    """Return the people that the embedded model knows; always the same."""
    return tuple(_people("training", OLD_SEED, OLD_SIZE))


@cache
def unknown_names() -> tuple[tuple[str, bool], ...]:
    """Return the names of the training share without the old people.

    The embedded model reads about them in training, each time with other facts.
    """
    old = {person.name for person in old_people()}
    return tuple((name, woman) for name, woman in names("training") if name not in old)


def fresh_people(seed: int, n: int) -> list[Person]:
    """Draw ``n`` people that the embedded model has never seen; other seeds give other people."""
    return _people("fresh", seed, n)


# --- stating ---------------------------------------------------------------------
def article(value: str) -> str:
    """Prefix a value with its indefinite article."""
    return f"an {value}" if value[0] in "aeiou" else f"a {value}"


def possessive(name: str) -> str:
    """Return the possessive form of a name."""
    return f"{name}'s"


def fill_statement(template: str, name: str, value: str) -> str:
    """Fill a template into a statement about the full name."""
    text = template.format(p=name, ps=possessive(name), o=name, v=value, a=article(value))
    return text[0].upper() + text[1:]


def ask(template: str, name: str) -> str:
    """Fill a template into a question about the full name."""
    return template.format(p=name, ps=possessive(name))


def statements(name: str, attribute: str, value: str, phrasing: str = "train") -> list[str]:
    """State a fact in every phrasing of a kind.

    Args:
        name: The full name of the subject.
        attribute: The attribute.
        value: Its value.
        phrasing: ``"train"`` or ``"heldout"``.
    """
    return [
        fill_statement(template, name, value)
        for template in PHRASINGS[attribute].statements_in(phrasing)
    ]


@dataclass(frozen=True)
class Sentence:
    """A sentence of a passage."""

    text: str
    person: str
    attribute: str | None
    """The attribute that it states; None where it states two."""


def _forms(person: Person, rng: random.Random, first: bool) -> dict[str, str]:
    """Choose how a sentence refers to the person: in full at first, later often by a short form."""
    draw = rng.random()
    if first or draw < 0.4:
        return {"p": person.name, "ps": possessive(person.name), "o": person.name}
    given = person.name.split()[0]
    if draw < 0.6:
        return {"p": given, "ps": possessive(given), "o": given}
    subject, owner = ("she", "her") if person.woman else ("he", "his")
    return {"p": subject, "ps": owner, "o": given}


def _plan(attributes: Sequence[str], rng: random.Random) -> list[tuple[tuple[str, ...], str]]:
    """Choose which facts share a sentence, and the template of each sentence, in random order."""
    left = list(attributes)
    plan: list[tuple[tuple[str, ...], str]] = []
    if rng.random() < COMBINED_PROBABILITY:
        pair, template = rng.choice(COMBINED)
        if all(attribute in left for attribute in pair):
            plan.append((pair, template))
            left = [attribute for attribute in left if attribute not in pair]
    for attribute in left:
        templates = PHRASINGS[attribute].statements
        plan.append(((attribute,), templates[int(rng.random() * len(templates))]))
    rng.shuffle(plan)
    return plan


def passage(
    person: Person, rng: random.Random, attributes: Sequence[str] = STATED
) -> list[Sentence]:
    """Write the sentences of a passage about one person, in random order.

    Args:
        person: The person.
        rng: Draws phrasings, pronouns and order.
        attributes: The stated attributes to include.
    """
    sentences = []
    for i, (facts, template) in enumerate(_plan(attributes, rng)):
        words = _forms(person, rng, first=i == 0)
        if len(facts) == 1:
            value = person.facts[facts[0]]
            words |= {"v": value, "a": article(value)}
        else:
            for attribute in facts:
                value = person.facts[attribute]
                words |= {attribute: value, f"{attribute}_a": article(value)}
        text = template.format(**words)
        text = text[0].upper() + text[1:]
        sentences.append(Sentence(text, person.name, facts[0] if len(facts) == 1 else None))
    return sentences


def prose(sentences: Iterable[Sentence]) -> str:
    """Join sentences into one paragraph."""
    return " ".join(sentence.text for sentence in sentences)


def documents(
    people: Sequence[Person],
    seed: int = 0,
    people_per_document: int = 1,
    attributes: Sequence[str] = STATED,
) -> list[dict]:
    """Write the documents of a day.

    Every document states all ``attributes`` of its people; the phrasings vary with the seed.

    Args:
        people: The people that the documents are about.
        seed: Seed of the phrasings.
        people_per_document: People in one document.
        attributes: The stated attributes to include.

    Returns:
        Passages, each as ``{"text": str, "people": [name, ...]}``.
    """
    rng = random.Random(f"documents-{seed}")
    groups = [
        people[i : i + people_per_document] for i in range(0, len(people), people_per_document)
    ]
    return [
        {
            "text": "\n".join(prose(passage(person, rng, attributes)) for person in group),
            "people": [person.name for person in group],
        }
        for group in groups
    ]


# --- asking ----------------------------------------------------------------------
def questions(
    people: Iterable[Person],
    phrasing: str = "heldout",
    kinds: Sequence[str] = ("recall", "two_hop"),
    per_attribute: int = 1,
    seed: int = 0,
) -> list[Question]:
    """Ask about every attribute of some people.

    A two-hop question goes through a shared entity; its second hop needs the old world.

    Args:
        people: The people.
        phrasing: ``"train"`` or ``"heldout"``.
        kinds: Kinds of questions, of ``"recall"`` and ``"two_hop"``.
        per_attribute: Phrasings of each question, as far as there are so many.
        seed: Seed of the choice of phrasings.
    """
    rng = random.Random(f"questions-{seed}")
    kinds_asked = [("recall", a) for a in STATED] + [("two_hop", a) for a in DERIVED]
    return [
        Question(ask(template, p.name), p.facts[attribute], kind, p.name, attribute, phrasing)
        for p in people
        for kind, attribute in kinds_asked
        if kind in kinds
        for template in _some(PHRASINGS[attribute].questions_in(phrasing), per_attribute, rng)
    ]


def entity_questions(phrasing: str = "heldout", seed: int = 0) -> list[Question]:
    """Ask one question about every attribute of every company and city."""
    rng = random.Random(f"entities-{seed}")
    return [
        Question(
            ask(rng.choice(PHRASINGS[attribute].questions_in(phrasing)), name),
            value, "recall", name, attribute, phrasing,
        )
        for name, facts in entities().items()
        for attribute, value in facts.items()
    ]  # fmt: skip


def old_world_text(seed: int = 0, phrasing: str = "heldout", n: int = OLD_SIZE) -> list[str]:
    """Write true text about old people, for perplexity: their facts in random order.

    Args:
        seed: Seed of people, order and phrasings.
        phrasing: ``"train"`` or ``"heldout"``.
        n: Number of texts, one per person.
    """
    rng = random.Random(f"text-{seed}")

    def state(person: Person, attribute: str) -> str:
        return rng.choice(statements(person.name, attribute, person.facts[attribute], phrasing))

    return [
        " ".join(state(person, attribute) for attribute in rng.sample(STATED, len(STATED)))
        for person in rng.sample(old_people(), n)
    ]


def _some(templates: Sequence[str], n: int, rng: random.Random) -> list[str]:
    return rng.sample(templates, min(n, len(templates)))
