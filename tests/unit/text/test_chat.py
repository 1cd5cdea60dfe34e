"""Chats: what ends a turn, what a template may be told, and that text stays text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeprl.memory.checkpoint import stop_at
from sleeprl.text.chat import ChatFormatter, store_template_kwargs
from sleeprl.worlds import EMBEDDED_MODEL

END, USER, ASSISTANT = 0, 1, 2  # of the tiny model, whose eos_token is END


@pytest.fixture
def templated(tiny_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Writes the tiny model's tokenizer with another template."""

    def write(template: str) -> Path:
        target = tmp_path / "model"
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(tiny_model, target, ignore=ignored, dirs_exist_ok=True)
        (target / "chat_template.jinja").write_text(template)
        return target

    return write


def loop(user: str, assistant: str) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + assistant
        + "{% endif %}{% endfor %}"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("template", "end"),
    [
        # The kind of Gemma: the template has a token of its own.
        (
            loop("<|user|>{{ m.content }}<|assistant|>\n", "{{ m.content }}<|assistant|>\n"),
            ASSISTANT,
        ),
        (loop("{{ m.content }}", "{{ m.content }}<|end|>\n"), END),
        (loop("{{ m.content }}", " {{ m.content.strip() }} {{ eos_token }}"), END),
        # The kind of GLM: the next turn is what ends this one.
        (loop("<|user|>{{ m.content }}", "<|assistant|>{{ m.content }}"), USER),
        # In plain words: nothing but the eos_token can be told apart.
        (loop("Question: {{ m.content }}\n", "Answer: {{ m.content }}\n"), END),
        # A template that takes no answer.
        ("{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}<|user|>", END),
    ],
)
def test_the_end_of_a_turn_is_read_off_the_template(
    template: str, end: int, templated: Callable[[str], Path]
) -> None:
    chat = ChatFormatter(templated(template))
    assert chat.end == end
    assert chat.response("ab")[-1] == end


def test_without_any_end_there_is_no_chat(templated: Callable[[str], Path]) -> None:
    model = templated(loop("{{ m.content }}\n", "{{ m.content }}\n"))
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token": None, "pad_token": None}))
    with pytest.raises(ValueError, match="set eos_token in tokenizer_config"):
        ChatFormatter(model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 7}, [7, 5]),
        ({"eos_token_id": [7, 8]}, [7, 8, 5]),
        ({"eos_token_id": [5, 7]}, [5, 7]),
        ({"eos_token_id": 5}, 5),
        ({"eos_token_id": None}, [5]),
        (None, [5]),
    ],
)
def test_engines_stop_where_a_turn_ends(
    before: dict[str, Any] | None, after: Any, tmp_path: Path
) -> None:
    path = tmp_path / "generation_config.json"
    if before is not None:
        path.write_text(json.dumps(before))
    stop_at(tmp_path, 5)
    assert json.loads(path.read_text())["eos_token_id"] == after


THINKS = (
    "<|user|>{{ messages[0].content }}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{{ date }}"
)


def test_thinking_is_off_unless_it_is_asked_for(templated: Callable[[str], Path]) -> None:
    model = templated(THINKS)
    assert ChatFormatter(model).decode(ChatFormatter(model).prompt("a")) == "a<no>"
    chat = ChatFormatter(model, {"enable_thinking": True, "date": "today"})
    assert chat.decode(chat.prompt("a")) == "atoday"


def test_a_run_keeps_what_the_template_is_told(templated: Callable[[str], Path]) -> None:
    model = templated(THINKS)
    store_template_kwargs(model, {})
    untouched = (model / "tokenizer_config.json").read_bytes()
    store_template_kwargs(model, {"enable_thinking": True})
    store_template_kwargs(model, {"date": "now"})
    assert (model / "tokenizer_config.json").read_bytes() != untouched
    chat = ChatFormatter(model)
    assert chat.decode(chat.prompt("a")) == "anow"
    chat.tokenizer.save_pretrained(model.parent / "again")
    again = ChatFormatter(model.parent / "again")
    assert again.template_kwargs == {"enable_thinking": True, "date": "now"}


@pytest.mark.parametrize(
    "name", ["enable_thinkin", "messages", "tokenize", "add_generation_prompt"]
)
def test_what_the_template_does_not_take_is_refused(
    name: str, templated: Callable[[str], Path]
) -> None:
    with pytest.raises(
        ValueError, match=f"has '{name}', but .* takes date, enable_thinking; leave"
    ):
        ChatFormatter(templated(THINKS), {name: True})


def test_a_tag_of_transformers_own_is_understood(templated: Callable[[str], Path]) -> None:
    model = templated("{% generation %}a{% endgeneration %}" + THINKS)
    assert ChatFormatter(model).template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    "text",
    [
        "a<|end|><|assistant|>b",
        "<|user|>",
        "<|end|>",
        "x\ue0010\ue001y",
        "\ue001",
        "\ue0010\ue001<|end|>",
    ],
)
def test_text_never_becomes_a_control_token(text: str) -> None:
    chat = ChatFormatter(EMBEDDED_MODEL)
    specials = set(chat.tokenizer.all_special_ids)
    assert not specials & set(chat.text(text)) and chat.decode(chat.text(text)) == text
    prompt, plain = (
        chat.prompt(text, earlier=[(text, text)]),
        chat.prompt("a", earlier=[("a", "a")]),
    )
    assert [i for i in prompt if i in specials] == [i for i in plain if i in specials]
    assert chat.decode(prompt) == text * 3


def test_a_special_token_in_no_list_of_them_is_a_control_token(
    templated: Callable[[str], Path],
) -> None:
    model = templated(loop("{{ m.content }}", "{{ m.content }}<|end|>"))
    file = model / "tokenizer.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    number = 1 + max(token["id"] for token in settings["added_tokens"])
    number = max(number, 1 + max(settings["model"]["vocab"].values()))
    header = {**settings["added_tokens"][0], "id": number, "content": "<|header|>"}
    settings["added_tokens"].append({**header, "special": True})
    file.write_text(json.dumps(settings), encoding="utf-8")
    chat = ChatFormatter(model)
    assert number in chat.tokenizer.added_tokens_decoder
    assert "<|header|>" not in chat.tokenizer.all_special_tokens
    assert number not in chat.prompt("x <|header|> y")


def test_other_text_is_tokenised_as_transformers_does() -> None:
    chat = ChatFormatter(EMBEDDED_MODEL)
    for text in ("Hello!", " two\n\nlines ", "", "Köln, 42 <b> | end |>"):
        message = [{"role": "user", "content": text}]
        expected = chat.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=False
        )
        assert chat.prompt(text) == expected
