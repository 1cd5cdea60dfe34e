"""The people of the world: the old ones that the embedded model knows, and fresh ones.

A full name belongs by its hash to one of two shares. The *training* share names the old people
and everybody that the embedded model reads about in training; the *fresh* share is never trained
on, so whatever is known about a fresh person was read or learned after the model was shipped.
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
FRESH_SHARE = 5  # one name in five is never used in training
COMBINED_PROBABILITY = 0.3  # that a passage has two facts in one sentence

Facts = dict[str, str]


@dataclass(frozen=True)
class Person:
    """A name and what is true of it: stated attributes and those that follow from them."""

    name: str
    woman: bool
    facts: Facts = field(hash=False)

    @property
    def stated(self) -> Facts:
        return {attribute: self.facts[attribute] for attribute in STATED}


@dataclass(frozen=True)
class Question:
    """One question with its gold answer; ``person`` is the name that it asks about."""

    text: str
    answer: str
    kind: str  # "recall" or "two_hop"
    person: str
    attribute: str
    phrasing: str  # "train" or "heldout"


# --- names -----------------------------------------------------------------------
@cache
def names(share: str) -> tuple[tuple[str, bool], ...]:
    """All (name, is a woman) of the ``"training"`` or the ``"fresh"`` share, in a fixed order."""
    wanted = {"training": False, "fresh": True}[share]
    firsts = [(first, True) for first in WOMEN] + [(first, False) for first in MEN]
    everybody = ((f"{first} {last}", woman) for first, woman in firsts for last in SURNAMES)
    return tuple((name, woman) for name, woman in everybody if is_fresh(name) is wanted)


def is_fresh(name: str) -> bool:
    """Whether a name is kept out of all training."""
    return zlib.crc32(name.encode()) % FRESH_SHARE == 0


# --- facts -----------------------------------------------------------------------
@cache
def entities() -> dict[str, Facts]:
    """What is true of the companies and the cities, which old and fresh people share."""
    rng = random.Random(OLD_SEED)
    companies = {
        company: {"company_city": rng.choice(CITIES), "company_industry": rng.choice(INDUSTRIES)}
        for company in COMPANIES
    }
    return companies | {city: {"city_country": land} for city, land in CITY_COUNTRY.items()}


def random_facts(rng: random.Random) -> Facts:
    """A life: each stated attribute drawn uniformly, and what follows from it."""
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
    """The people that the embedded model knows by heart; always the same ones."""
    return tuple(_people("training", OLD_SEED, OLD_SIZE))


@cache
def unknown_names() -> tuple[tuple[str, bool], ...]:
    """The training share without the old people: those the model reads about and never knows."""
    old = {person.name for person in old_people()}
    return tuple((name, woman) for name, woman in names("training") if name not in old)


def fresh_people(seed: int, n: int) -> list[Person]:
    """``n`` people that the embedded model has never seen; other seeds give other people."""
    return _people("fresh", seed, n)


# --- telling ---------------------------------------------------------------------
def article(value: str) -> str:
    return f"an {value}" if value[0] in "aeiou" else f"a {value}"


def possessive(name: str) -> str:
    return f"{name}'s"


def fill_statement(template: str, name: str, value: str) -> str:
    """A statement about the full name."""
    text = template.format(p=name, ps=possessive(name), o=name, v=value, a=article(value))
    return text[0].upper() + text[1:]


def ask(template: str, name: str) -> str:
    return template.format(p=name, ps=possessive(name))


def statements(name: str, attribute: str, value: str, phrasing: str = "train") -> list[str]:
    """The fact in every phrasing of that kind."""
    return [
        fill_statement(template, name, value)
        for template in PHRASINGS[attribute].statements_in(phrasing)
    ]


@dataclass(frozen=True)
class Sentence:
    """A sentence of a passage; ``attribute`` is None where it tells two facts."""

    text: str
    person: str
    attribute: str | None


def _forms(person: Person, rng: random.Random, first: bool) -> dict[str, str]:
    """How a sentence refers to the person: in full at first, later often by a short form."""
    draw = rng.random()
    if first or draw < 0.4:
        return {"p": person.name, "ps": possessive(person.name), "o": person.name}
    given = person.name.split()[0]
    if draw < 0.6:
        return {"p": given, "ps": possessive(given), "o": given}
    subject, owner = ("she", "her") if person.woman else ("he", "his")
    return {"p": subject, "ps": owner, "o": given}


def _plan(attributes: Sequence[str], rng: random.Random) -> list[tuple[tuple[str, ...], str]]:
    """Which facts share a sentence, and the template of each sentence, in random order."""
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
    """The sentences of a passage that tells those facts of one person, in random order."""
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
    return " ".join(sentence.text for sentence in sentences)


def documents(
    people: Sequence[Person],
    seed: int = 0,
    people_per_document: int = 1,
    attributes: Sequence[str] = STATED,
) -> list[dict]:
    """What is read in the day: passages, each as ``{"text": str, "people": [name, ...]}``.

    Every document tells all ``attributes`` of its people; the phrasings vary with the seed.
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
    """Questions about every attribute of those people, ``per_attribute`` phrasings of each.

    A two-hop question asks through a shared entity; its second hop is old-world knowledge.
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
    """One question about every attribute of every company and city."""
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
    """True text about ``n`` old people, for perplexity: held-out statements, shuffled."""
    rng = random.Random(f"text-{seed}")

    def state(person: Person, attribute: str) -> str:
        return rng.choice(statements(person.name, attribute, person.facts[attribute], phrasing))

    return [
        " ".join(state(person, attribute) for attribute in rng.sample(STATED, len(STATED)))
        for person in rng.sample(old_people(), n)
    ]


def _some(templates: Sequence[str], n: int, rng: random.Random) -> list[str]:
    return rng.sample(templates, min(n, len(templates)))
