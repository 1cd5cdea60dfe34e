"""Between text and tokens: the model's own tokenizer and chat template, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MESSAGE = "\ue000"
"""Stands for a message where a template is asked what comes before it."""
CUT = "\ufffd"
"""Where the text of some tokens ends within a character."""


class ChatFormatter:
    """Turns a user message into prompt ids, an answer into response ids, and ids into text."""

    def __init__(self, model: str | Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {str(model)!r} has no chat template; give a chat model"
            )
        self.end = int(self.tokenizer.eos_token_id)

    def prompt(
        self, message: str, opening: str = "", earlier: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """Ids that end where the assistant begins to speak, or behind what it has already said.

        earlier: messages of the user and the assistant that went before.
        """
        messages = [
            {"role": role, "content": text}
            for turn in earlier
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        ids = self.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": message}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return [*map(int, ids), *self.text(opening)]

    def turn(self) -> list[int]:
        """Ids that end where the user begins to speak."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": MESSAGE}], add_generation_prompt=True, tokenize=False
        )
        return self.text(str(rendered).partition(MESSAGE)[0])

    def response(self, text: str) -> list[int]:
        """Ids of an answer and the end of the turn."""
        return [*self.text(text), self.end]

    def text(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; of one that is a part of a character, the whole character."""
        found: list[str] = []
        for end in range(1, len(ids) + 1):
            text = str(self.tokenizer.decode(list(ids[len(found) : end])))
            if not text.endswith(CUT):
                found += [text] * (end - len(found))
        return found + [CUT] * (len(ids) - len(found))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
