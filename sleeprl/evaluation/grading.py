"""Decides whether an answer is right, and how near it is: containment, exact match, F1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from sleeprl.text.normalise import has_word, normalise, weigh, words

_DENIAL = re.compile(r"\b(?:not|never)\b|n['’]t\b", re.IGNORECASE)
_OR = re.compile(
    r"\b(?:or|oder|ou|eller|или|또는)\b|或者?|または|あるいは|もしくは|หรือ|(?<=[^\W\d])\s*/\s*(?=[^\W\d])",
    re.IGNORECASE,
)
"""What stands between alternatives."""
_LIST = re.compile(r",(?!\d)|(?<!\d),|[;、，；،\n•]|\b(?:and|und|et|y)\b|&", re.IGNORECASE)
"""What stands between the items of a list."""
_BULLET = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+")
_ARTICLES = {"a", "an", "the"}
MANY = 3
"""From so many items on, a list is no answer."""
MORE = 4
"""How many words an answer may have beside the right ones."""


def is_correct(
    answer: str, gold: str | Sequence[str], rivals: Collection[str] = (), question: str = ""
) -> bool:
    """Decide whether an answer contains the gold words and says little else (containment).

    The gold words must occur as they are, in one piece. Allowed are at most four more words that
    are not the question's, no negation unless the gold answer has one, and no rival. An answer that
    names alternatives, or lists three or more things, is right only if each of them is.

    Args:
        answer: What the model answered.
        gold: The right answer, or several of which any will do.
        rivals: Single words that would be another answer.
        question: The question; an answer may repeat its words.
    """
    golds = [gold] if isinstance(gold, str) else gold
    return all(
        any(_contains(piece, each, rivals, question) for each in golds)
        for piece in _alternatives(answer, golds, question)
    )


def _contains(answer: str, gold: str, rivals: Collection[str], question: str) -> bool:
    found, wanted = words(answer), words(gold)
    others = set(found) - set(wanted)
    repeated = set(words(question)) - set(wanted)
    own = sum(weigh(word) for word in found if word not in repeated)
    if not wanted or own > sum(map(weigh, wanted)) + MORE or others & {*rivals}:
        return False
    if _DENIAL.search(answer) and not _DENIAL.search(gold):
        return False
    return _has_run(found, wanted)


def _alternatives(answer: str, golds: Sequence[str], question: str) -> list[str]:
    """Split an answer into the alternatives that it names; one piece where it names none.

    A right answer that has such a separator itself is not split at it.
    """
    if not any(_OR.search(gold) for gold in golds):
        pieces = [piece for piece in _split(answer, golds, question) if has_word(piece)]
        if len(pieces) > 1:
            return pieces
    if any(_LIST.search(gold) for gold in golds):
        return [answer]
    items = [_BULLET.sub("", item) for item in _LIST.split(answer)]
    items = [item for item in items if has_word(item)]
    longest = 1 + max((sum(map(weigh, words(gold))) for gold in golds), default=0)
    short = all(sum(map(weigh, words(item))) <= longest for item in items[1:])
    return items if len(items) >= MANY and short else [answer]


def _split(answer: str, golds: Sequence[str], question: str) -> list[str]:
    """Split an answer at what stands between alternatives in it."""
    pieces, start = [], 0
    for found in _OR.finditer(answer):
        if _separates(found, [words(gold) for gold in golds], words(question)):
            pieces.append(answer[start : found.start()])
            start = found.end()
    return [*pieces, answer[start:]]


def _separates(found: re.Match[str], golds: Sequence[list[str]], question: list[str]) -> bool:
    """Decide whether a separator stands between alternatives.

    It does not in what the answer repeats of the question ("War or Peace"), unless the question
    names the right answer, as one that offers a choice does. A slash without spaces does only
    beside a right answer ("Porto/Lisbon"), not in "he/she" or "km/h".
    """
    before, behind = words(found.string[: found.start()]), words(found.string[found.end() :])
    run = [*before[-1:], *words(found[0]), *behind[:1]]
    named = {word for gold in golds for word in gold} - _ARTICLES
    if _has_run(question, run) and not named.intersection(question):
        return False
    if found[0] != "/":
        return True
    return any(before[-len(gold) :] == gold or behind[: len(gold)] == gold for gold in golds)


def _has_run(text: list[str], run: list[str]) -> bool:
    """Decide whether words stand in a text in one piece."""
    return any(text[i : i + len(run)] == run for i in range(len(text) - len(run) + 1))


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if the answer is a right one and nothing else, after ``normalise``; else 0."""
    return float(any(_bare(answer) == _bare(gold) for gold in golds))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Return the best F1 of the answer's words and those of a right answer."""
    return max((_f1(_bare(answer), _bare(gold)) for gold in golds), default=0.0)


def _bare(text: str) -> list[str]:
    """Return the words without articles, as SQuAD counts them."""
    found = normalise(text).split()
    return [word for word in found if word not in _ARTICLES] or found


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0
