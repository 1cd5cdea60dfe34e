"""Measure a model of the world: recall, reading, writing with a passage, free writing.

``python -m sleeprl.worlds.evaluate DIR`` prints the figures as JSON. The tests use fresh people and
held-out phrasings; of what they ask, only the facts of the old world are in the training data.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from sleeprl.pretrained import load_model, load_tokenizer
from sleeprl.text import prompts
from sleeprl.worlds.checker import (
    UNKNOWN,
    Claim,
    World,
    is_correct,
    parse_question,
    parse_statement,
)
from sleeprl.worlds.model import measure_perplexity, respond
from sleeprl.worlds.people import (
    Person,
    Question,
    documents,
    entity_questions,
    fresh_people,
    old_people,
    old_world_text,
    questions,
    statements,
)
from sleeprl.worlds.vocabulary import DERIVED, STATED

MAX_PEOPLE = 3


class Examiner:
    """The tests of one model."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> None:
        """Prepare the tests.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            n: Size of each test.
            seed: Seed of the people, the questions and the sampling.
        """
        self.model, self.tokenizer, self.n, self.seed = model, tokenizer, n, seed
        self.rng = random.Random(f"exam-{seed}")

    def examine(self) -> dict:
        """Run all tests; shares are of ``n`` unless a test says otherwise."""
        torch.manual_seed(self.seed)
        was_training = self.model.training
        self.model.eval()
        figures = {
            "knows": self.knows(),
            "reads": self.reads(),
            "writes": self.writes(),
            "writes_freely": self.writes_freely(),
            "perplexity": round(
                measure_perplexity(self.model, self.tokenizer, old_world_text()), 3
            ),
            "n": self.n,
        }
        self.model.train(was_training)
        return figures

    # --- answers ---
    def knows(self) -> dict:
        """Measure recall without context: old people, companies, cities, and unknown people."""
        old = questions(old_people(), per_attribute=3, seed=self.seed)
        strangers = questions(fresh_people(self.seed + 1, 50), seed=self.seed)
        exam = {
            "recall": [q for q in old if q.kind == "recall"],
            "two_hop": [q for q in old if q.kind == "two_hop"],
            "entities": entity_questions(seed=self.seed),
        }
        shares = {kind: self._right(self._some(those)) for kind, those in exam.items()}
        replies = respond(self.model, self.tokenizer, [q.text for q in self._some(strangers)])
        shares["says_unknown"] = _share(reply == UNKNOWN for reply in replies)
        return shares

    def reads(self) -> dict:
        """Measure recall from passages about fresh people, by the number of people in a passage."""
        shares = {}
        for count in range(1, MAX_PEOPLE + 1):
            people, texts = self._passages(count)
            exam = questions(people, seed=self.seed)
            for kind in ("recall", "two_hop"):
                chosen = self._some([q for q in exam if q.kind == kind])
                shares[f"{kind}_{count}"] = self._right(chosen, [texts[q.person] for q in chosen])
        people, texts = self._passages(2)
        chosen = self._some(questions(old_people(), seed=self.seed))
        contexts = [texts[self.rng.choice(people).name] for _ in chosen]
        shares["old_person_not_in_text"] = self._right(chosen, contexts)
        return shares

    def _right(self, exam: Sequence[Question], contexts: Sequence[str] | None = None) -> float:
        messages = [q.text for q in exam]
        if contexts is not None:
            messages = list(map(prompts.with_experience, contexts, messages))
        replies = respond(self.model, self.tokenizer, messages)
        return _share(is_correct(r, q.answer) for r, q in zip(replies, exam, strict=True))

    # --- writing ---
    def writes(self) -> dict:
        """Judge text sampled as in self-study, from passages about one to three fresh people."""
        people, texts = self._mixed_passages()
        world = World(people)
        contexts = [texts[self.rng.choice(people).name] for _ in range(self.n)]
        facts = self._sample([prompts.with_experience(c, prompts.STUDY_FACT) for c in contexts])
        pairs = self._sample([prompts.with_experience(c, prompts.STUDY_QA) for c in contexts])
        figures = {"fact": _judge_facts(facts, world, contexts)}
        figures["qa"] = _judge_pairs(pairs, world, contexts)
        originals = [_one_statement(self.rng.choice(people), self.rng) for _ in range(self.n)]
        reworded = self._sample(
            prompts.with_experience(
                texts[_subject(text)], prompts.STUDY_PARAPHRASE.format(sentence=text)
            )
            for text in originals
        )
        figures["paraphrase"] = {
            "correct": _share(
                world.check_paraphrase(a, b) for a, b in zip(originals, reworded, strict=True)
            )
        }
        return figures

    def writes_freely(self) -> dict:
        """Judge text sampled as in self-study with nothing in the context; old people only."""
        world, old = World(), {person.name for person in old_people()}
        facts = self._sample([prompts.FREE_FACT] * self.n)
        pairs = self._sample([prompts.FREE_QA] * self.n)
        figures = {"fact": _judge_facts(facts, world), "qa": _judge_pairs(pairs, world)}
        questions_read = [parse_question(pair[0]) for pair in map(prompts.parse_qa, pairs) if pair]
        statements_read = [parse_statement(text) for text in facts]
        for kind, claims in (("fact", statements_read), ("qa", questions_read)):
            named = {claim.name for claim in claims if claim} & old
            figures[kind]["old_people_seen"] = len(named)
        # Expected number under uniform draws of the old people; nine draws in ten are about people.
        figures["old_people_if_uniform"] = round(
            len(old) * (1 - (1 - 1 / len(old)) ** (0.9 * self.n))
        )
        return figures

    def _sample(self, messages: Iterable[str]) -> list[str]:
        return respond(self.model, self.tokenizer, list(messages), sample=True)

    # --- material ---
    def _some(self, exam: Sequence[Question]) -> list[Question]:
        return self.rng.sample(exam, min(self.n, len(exam)))

    def _passages(self, count: int) -> tuple[list[Person], dict[str, str]]:
        """Return fresh people, and by name the passage about each one; ``count`` people share one."""
        people = fresh_people(self.seed + 10 * count, count * max(20, self.n // 6))
        passages = documents(people, self.seed, people_per_document=count)
        return people, {name: doc["text"] for doc in passages for name in doc["people"]}

    def _mixed_passages(self) -> tuple[list[Person], dict[str, str]]:
        everybody: dict[str, Person] = {}
        texts: dict[str, str] = {}
        for count in range(1, MAX_PEOPLE + 1):
            people, passages = self._passages(count)
            new = {p.name: p for p in people if p.name not in everybody}
            everybody |= new
            texts |= {name: passages[name] for name in new}
        return list(everybody.values()), texts


def _one_statement(person: Person, rng: random.Random) -> str:
    attribute = rng.choice(STATED)
    return rng.choice(statements(person.name, attribute, person.facts[attribute]))


# --- judging what was written -------------------------------------------------------
def _judge_facts(
    written: Sequence[str], world: World, contexts: Sequence[str] | None = None
) -> dict:
    claims = [parse_statement(text) for text in written]
    true = [world.check_statement(text) is True for text in written]
    return _judgement(true, claims, written, contexts)


def _judge_pairs(
    written: Sequence[str], world: World, contexts: Sequence[str] | None = None
) -> dict:
    pairs = [prompts.parse_qa(text) for text in written]
    true = [pair is not None and world.check_qa(*pair) is True for pair in pairs]
    return _judgement(true, [parse_question(p[0]) if p else None for p in pairs], written, contexts)


def _subject(statement: str) -> str:
    claim = parse_statement(statement)
    assert claim is not None, f"not a statement of the world: {statement}"
    return claim.name


def _judgement(
    true: list[bool],
    claims: Sequence[Claim | None],
    written: Sequence[str],
    contexts: Sequence[str] | None,
) -> dict:
    """Compute the share that is correct, and how evenly the attributes are covered.

    With contexts, a text is correct only if it is about a person of its own context.
    """
    if contexts is not None:
        true = [
            ok and claim is not None and claim.name in text
            for ok, claim, text in zip(true, claims, contexts, strict=True)
        ]
    attributes = Counter(claim.attribute for claim in claims if claim)
    figures = {
        "correct": _share(true),
        "attribute_evenness": _evenness(attributes[a] for a in (*STATED, *DERIVED)),
        "two_hop": _share(claim is not None and claim.attribute in DERIVED for claim in claims),
        "phrasings": len({claim.template for claim in claims if claim}),
        "distinct": _share_distinct(written),
    }
    if contexts is not None:
        places = Counter(
            _place(c.name, text) for c, text in zip(claims, contexts, strict=True) if c
        )
        figures["last_of_several"] = _last_share(places)
    return figures


def _place(name: str, text: str) -> tuple[int, int]:
    """Return which paragraph is about the person (-1 for none), and the number of paragraphs."""
    paragraphs = [p for p in text.split("\n") if p]
    return next((i for i, p in enumerate(paragraphs) if name in p), -1), len(paragraphs)


def _last_share(places: Counter) -> float:
    """Compute how often the last person of the fullest texts is written about (even: 1 / MAX_PEOPLE)."""
    total = sum(n for (_, of), n in places.items() if of == MAX_PEOPLE)
    return round(places[(MAX_PEOPLE - 1, MAX_PEOPLE)] / total, 3) if total else 0.0


def _evenness(counts: Iterable[int]) -> float:
    """Compute the entropy of the counts over that of a uniform spread; 1 is even."""
    counts = list(counts)
    total = sum(counts)
    if not total:
        return 0.0
    entropy = -sum(c / total * math.log(c / total) for c in counts if c)
    return round(entropy / math.log(len(counts)), 3)


def _share(right: Iterable[object]) -> float:
    marks = [bool(r) for r in right]
    return round(sum(marks) / len(marks), 4) if marks else 0.0


def _share_distinct(written: Sequence[str]) -> float:
    return round(len(set(written)) / len(written), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory of the model")
    parser.add_argument("--n", type=int, default=500, help="size of each test")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, "auto").to(device)
    tokenizer = load_tokenizer(args.model)
    print(json.dumps(Examiner(model, tokenizer, args.n, args.seed).examine(), indent=1))


if __name__ == "__main__":
    main()
