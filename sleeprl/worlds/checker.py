"""The checker of the world: parses sentences into facts and judges them.

Everything that a model writes about the world is judged here. A statement or a question is parsed
by the templates (trained and held-out ones) into a subject, an attribute and a value, and compared
with the facts. A sentence that matches no template is *not judged* (None); the checker never
guesses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from sleeprl.evaluation import grading
from sleeprl.text.normalise import normalise
from sleeprl.worlds.people import Facts, Person, entities, old_people
from sleeprl.worlds.phrasings import PHRASINGS
from sleeprl.worlds.vocabulary import DOMAINS, ENTITY

UNKNOWN = "I do not know."
_PERSON, _THING = r"[A-Z]\w* [A-Z]\w*", r"[A-Z]\w*"


@dataclass(frozen=True)
class Claim:
    """A parsed statement or question."""

    name: str
    attribute: str
    value: str | None
    """The stated value; None for a question."""
    template: str
    """The phrasing that matched."""


# --- answers ---------------------------------------------------------------------
def is_correct(answer: str, gold: str) -> bool:
    """Decide whether an answer gives the gold value and no rival of it.

    A rival is any other value of an attribute that can take the gold value.

    Args:
        answer: What the model answered.
        gold: The right value.
    """
    return grading.is_correct(answer, gold, _rivals(normalise(gold)))


@cache
def _rivals(value: str) -> frozenset[str]:
    domains = [{normalise(v) for v in domain} for domain in DOMAINS.values()]
    return frozenset().union(*(d for d in domains if value in d)) - {value}


# --- parsing ---------------------------------------------------------------------
def _pattern(template: str, name: str) -> re.Pattern[str]:
    """Compile a template into a regular expression with the groups ``name`` and ``value``."""
    text = re.escape(template[0].upper() + template[1:] if template[0] != "{" else template)
    fields = {"p": f"(?P<name>{name})", "o": f"(?P<name>{name})", "ps": f"(?P<name>{name})'s",
              "v": r"(?P<value>\w+)", "a": r"an? (?P<value>\w+)"}  # fmt: skip
    for placeholder, group in fields.items():
        text = text.replace(re.escape(f"{{{placeholder}}}"), group)
    return re.compile(text)


@cache
def _patterns(asking: bool) -> tuple[tuple[str, str, re.Pattern[str]], ...]:
    """List (attribute, template, pattern) of every question, or of every statement."""
    rows = []
    for attribute, phrasings in PHRASINGS.items():
        name = _THING if attribute in ENTITY else _PERSON
        for phrasing in ("train", "heldout"):
            templates = (
                phrasings.questions_in(phrasing) if asking else phrasings.statements_in(phrasing)
            )
            rows += [(attribute, template, _pattern(template, name)) for template in templates]
    return tuple(rows)


@cache
def _values(attribute: str) -> frozenset[str]:
    return frozenset(DOMAINS[attribute])


def parse_statement(text: str) -> Claim | None:
    """Parse a statement; None when the text is no statement of this world."""
    for attribute, template, pattern in _patterns(asking=False):
        match = pattern.fullmatch(text.strip())
        if match and match["value"] in _values(attribute):
            return Claim(match["name"], attribute, match["value"], template)
    return None


def parse_question(text: str) -> Claim | None:
    """Parse a question; None when the text is no question of this world."""
    for attribute, template, pattern in _patterns(asking=True):
        match = pattern.fullmatch(text.strip())
        if match:
            return Claim(match["name"], attribute, None, template)
    return None


# --- judging ---------------------------------------------------------------------
class World:
    """The facts about some people (by default the old ones), all companies and all cities."""

    def __init__(self, people: Iterable[Person] | None = None) -> None:
        chosen = old_people() if people is None else people
        self.facts: dict[str, Facts] = entities() | {p.name: p.facts for p in chosen}

    def answer(self, question: str) -> str | None:
        """Return the true answer; None when the text is no question about this world."""
        claim = parse_question(question)
        return self.facts.get(claim.name, {}).get(claim.attribute) if claim else None

    def check_statement(self, text: str) -> bool | None:
        """Judge a statement.

        A claim about a person outside this world is false.

        Args:
            text: One sentence.

        Returns:
            Whether it is true; None when it cannot be parsed as one statement.
        """
        claim = parse_statement(text)
        return None if claim is None else self._is_true(claim)

    def check_qa(self, question: str, answer: str) -> bool | None:
        """Judge an answer; None when the question is none of this world's."""
        claim = parse_question(question)
        if claim is None:
            return None
        gold = self.facts.get(claim.name, {}).get(claim.attribute)
        return gold is not None and is_correct(answer, gold)

    def check_paraphrase(
        self, original: str, text: str, subject: tuple[str, str] | None = None
    ) -> bool | None:
        """Decide whether a text states the same true fact as another one, in other words.

        Args:
            original: The statement to reword.
            text: The rewording.
            subject: (name, attribute) of the original; needed where it uses a pronoun.

        Returns:
            The verdict; None when ``text`` cannot be parsed as one statement.
        """
        claim = parse_statement(text)
        if claim is None:
            return None
        if subject is None:
            source = parse_statement(original)
            subject = (source.name, source.attribute) if source else None
        same = (claim.name, claim.attribute) == subject
        return same and text.strip() != original.strip() and self._is_true(claim)

    def _is_true(self, claim: Claim) -> bool:
        return self.facts.get(claim.name, {}).get(claim.attribute) == claim.value
