"""Converts between text and tokens with the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MESSAGE = "\ue000"
"""Placeholder for a message, to find what a template puts before it."""
CUT = "\ufffd"
"""What the decoder returns for an incomplete character."""


class ChatFormatter:
    """The tokenizer and chat template of a model."""

    def __init__(self, model: str | Path) -> None:
        """Load the tokenizer.

        Args:
            model: Directory or id of the model.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
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
        """Build the token ids of a prompt, up to where the assistant begins or continues to write.

        Args:
            message: The user message.
            opening: Text that the assistant's turn begins with.
            earlier: Earlier turns as (user, assistant) messages.
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
        """Build the token ids of a chat up to where the user begins to write."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": MESSAGE}], add_generation_prompt=True, tokenize=False
        )
        return self.text(str(rendered).partition(MESSAGE)[0])

    def response(self, text: str) -> list[int]:
        """Build the token ids of an answer, with the end of the turn."""
        return [*self.text(text), self.end]

    def text(self, text: str) -> list[int]:
        """Tokenise plain text, without special tokens."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; a token within a character gets the whole character."""
        found: list[str] = []
        for end in range(1, len(ids) + 1):
            text = str(self.tokenizer.decode(list(ids[len(found) : end])))
            if not text.endswith(CUT):
                found += [text] * (end - len(found))
        return found + [CUT] * (len(ids) - len(found))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids, without special tokens and surrounding white space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
