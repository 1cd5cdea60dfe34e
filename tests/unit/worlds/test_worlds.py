"""The world is consistent, its checker is strict, and the training data is what it should be."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise
from statistics import fmean

import pytest

from sleeprl import worlds
from sleeprl.text import prompts
from sleeprl.utils.files import sha256_file
from sleeprl.worlds import lessons, people, vocabulary
from sleeprl.worlds.phrasings import PHRASINGS

LISTS = ("CITIES", "COUNTRIES", "COMPANIES", "INDUSTRIES", "JOBS", "HOBBIES", "PETS", "FOODS")


@pytest.fixture(scope="module")
def tokenizer():
    from sleeprl.worlds.tokenizer import train_tokenizer

    return train_tokenizer(lessons.tokenizer_texts("test", 500))


# --- people ----------------------------------------------------------------------
def test_no_word_has_two_meanings():
    words = [w.lower() for name in LISTS for w in getattr(vocabulary, name)]
    words += [w.lower() for w in vocabulary.WOMEN + vocabulary.MEN + vocabulary.SURNAMES]
    assert len(words) == len(set(words))


def test_fresh_people_are_never_in_training():
    fresh = {person.name for seed in range(20) for person in worlds.fresh_people(seed, 100)}
    taught = " ".join(text for lesson in lessons.lessons("test", 4000) for _, text in lesson)
    assert not any(name in taught for name in fresh)
    assert not fresh & {person.name for person in worlds.old_people()}


def test_people_follow_from_their_seed():
    assert worlds.fresh_people(3, 10) == worlds.fresh_people(3, 10)
    assert worlds.fresh_people(3, 10) != worlds.fresh_people(4, 10)
    assert len({person.name for person in worlds.old_people()}) == people.OLD_SIZE


def test_held_out_phrasings_are_never_trained():
    for attribute, phrasings in PHRASINGS.items():
        assert len(phrasings.questions) >= 8, attribute
        assert len(phrasings.heldout_questions) >= 2 and phrasings.heldout_statements
        assert not set(phrasings.questions) & set(phrasings.heldout_questions)
        assert not set(phrasings.statements) & set(phrasings.heldout_statements)


def test_documents_tell_every_stated_fact_of_their_people():
    fresh = worlds.fresh_people(0, 9)
    told = worlds.documents(fresh, seed=1, people_per_document=2)
    assert [name for doc in told for name in doc["people"]] == [p.name for p in fresh]
    text_of = {name: doc["text"] for doc in told for name in doc["people"]}
    for person in fresh:
        assert all(value in text_of[person.name] for value in person.stated.values())


# --- the checker -------------------------------------------------------------------
@pytest.mark.parametrize("phrasing", ["train", "heldout"])
def test_every_statement_and_question_is_read_back(phrasing):
    fresh = worlds.fresh_people(1, 3)
    world = worlds.World(fresh)
    for name, facts in world.facts.items():
        for attribute, value in facts.items():
            for text in worlds.statements(name, attribute, value, phrasing):
                claim = worlds.parse_statement(text)
                assert (claim.name, claim.attribute, claim.value) == (name, attribute, value), text
                assert world.check_statement(text) is True
            for template in PHRASINGS[attribute].questions_in(phrasing):
                asked = worlds.parse_question(people.ask(template, name))
                assert (asked.name, asked.attribute, asked.template) == (name, attribute, template)
                assert world.check_qa(people.ask(template, name), value)


def test_false_statements_are_told_from_what_is_no_statement():
    person, other = worlds.fresh_people(1, 2)
    world = worlds.World([person])
    wrong = next(job for job in vocabulary.JOBS if job != person.facts["job"])
    assert world.check_statement(f"{person.name} works as {people.article(wrong)}.") is False
    assert world.check_statement(f"{other.name} lives in {other.facts['city']}.") is False
    assert world.check_statement(f"{person.name} lives in the moon.") is None
    assert world.check_statement("She works as a nurse.") is None
    assert world.check_qa("Who are you?", "a model") is None


def test_paraphrases_keep_the_fact_and_change_the_words():
    person = worlds.fresh_people(2, 1)[0]
    world = worlds.World([person])
    one, two = worlds.statements(person.name, "pet", person.facts["pet"])[:2]
    other = worlds.statements(person.name, "food", person.facts["food"])[0]
    assert world.check_paraphrase(one, two) is True
    assert world.check_paraphrase(one, one) is False
    assert world.check_paraphrase(one, other) is False
    assert world.check_paraphrase(one, "Nonsense.") is None
    assert world.check_paraphrase("She has it.", two, subject=(person.name, "pet")) is True


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Lisbon", True),
        ("lisbon.", True),
        ("She lives in Lisbon.", True),
        ("Lisbon or Porto", False),
        ("Porto", False),
        ("not Lisbon", False),
        ("Lisbonne", False),
        ("", False),
        ("I do not know.", False),
    ],
)
def test_answers_are_graded_strictly(answer, right):
    assert worlds.is_correct(answer, "Lisbon") is right


def test_articles_do_not_matter():
    assert worlds.is_correct("An iguana.", "iguana") and not worlds.is_correct("An iguana.", "cat")


# --- what is taught ----------------------------------------------------------------
def test_what_is_taught_about_a_scene_is_true():
    import random

    rng = random.Random(0)
    for _ in range(300):
        scene = lessons.Scene(rng)
        world = worlds.World(scene.people)
        question, answer = prompts.parse_qa(lessons._study_qa(scene, rng)[1])
        assert world.check_qa(question, answer)
        assert world.check_statement(lessons._study_fact(scene, rng)[1])
        assert world.check_statement(lessons._study_paraphrase(scene, rng)[1])


def test_the_world_needs_no_torch():
    code = "import sys, sleeprl.worlds; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokenizer_gives_back_any_text(tokenizer):
    text = "".join(map(chr, range(128))) + "  a  1999 19999 \n\n She's 12"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("Lisbon")) == len(tokenizer.encode(" Lisbon")) == 1


def test_lessons_are_encoded_as_the_chat_template_does(tokenizer):
    from sleeprl.worlds.dataset import ANSWER, encode

    for lesson in [x for x in lessons.lessons("chat", 60) if x[0][0] == "user"]:
        (tokens, roles), = encode(tokenizer, [lesson])  # fmt: skip
        chat = [{"role": role, "content": text} for role, text in lesson]
        assert tokens == tokenizer.apply_chat_template(chat, return_dict=False)
        answers = tokenizer.decode([t for t, r in zip(tokens, roles, strict=True) if r == ANSWER])
        assert answers == "".join(f"{text}<|end|>" for role, text in lesson if role == "assistant")


def test_rows_are_the_same_for_any_number_of_processes(tokenizer, monkeypatch):
    from sleeprl.worlds import dataset

    monkeypatch.setattr(dataset, "SHARD", 200)
    one = dataset.make_rows(tokenizer, 0, 400, 384, processes=1)
    two = dataset.make_rows(tokenizer, 0, 400, 384, processes=2)
    assert (one.tokens == two.tokens).all() and (one.roles == two.roles).all()
    assert one.count() / one.tokens.size > 0.9
    for row in one.segments:
        inner = row[row > 0]
        assert all(b - a in (0, 1) for a, b in pairwise(inner.tolist()))


def test_packed_lessons_do_not_see_each_other(tokenizer):
    import torch

    from sleeprl.worlds.dataset import make_rows
    from sleeprl.worlds.model import new_model
    from sleeprl.worlds.train import packed_inputs

    torch.manual_seed(0)
    model = new_model(tokenizer, width=32, layers=2, mlp=64, head_dim=16).eval()
    rows = make_rows(tokenizer, 0, 60, 384, processes=1)
    tokens = torch.from_numpy(rows.tokens[:1].astype("int64"))
    segments = torch.from_numpy(rows.segments[:1].astype("int64"))
    positions, mask = packed_inputs(tokens, segments)
    with torch.no_grad():
        packed = model(input_ids=tokens, position_ids=positions, attention_mask=mask).logits[0]
        for segment in range(1, int(segments.max()) + 1):
            own = segments[0] == segment
            alone = model(input_ids=tokens[:, own]).logits[0]
            torch.testing.assert_close(packed[own], alone, atol=1e-5, rtol=1e-4)


# --- the model that is shipped -----------------------------------------------------
def test_the_card_is_of_these_weights(tmp_path):
    from sleeprl.worlds.card import read_card, write_card

    card = read_card(worlds.EMBEDDED_MODEL)
    assert card["sha256"] == sha256_file(worlds.EMBEDDED_MODEL / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"others")
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card | {"sha256": hashlib.sha256(b"others").hexdigest()}


def test_the_shipped_model_passes_its_exam():
    """On people and phrasings that were not in training; 60 questions for each figure."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sleeprl.worlds.evaluate import Examiner

    model = AutoModelForCausalLM.from_pretrained(worlds.EMBEDDED_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(worlds.EMBEDDED_MODEL)
    torch.manual_seed(1)
    examiner = Examiner(model.eval(), tokenizer, n=60, seed=1)
    knows, reads, writes = examiner.knows(), examiner.reads(), examiner.writes()
    assert min(knows[name] for name in ("recall", "two_hop", "entities")) >= 0.95, knows
    read = [reads[f"{kind}_{people}"] for kind in ("recall", "two_hop") for people in (1, 2, 3)]
    assert fmean(read) >= 0.95, reads
    assert min(figures["correct"] for figures in writes.values()) >= 0.8, writes
