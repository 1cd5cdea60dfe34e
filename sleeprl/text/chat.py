"""Converts between text and tokens with the model's own tokenizer and chat template."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sleeprl.pretrained import load_tokenizer
from sleeprl.utils.files import write_json_atomic

MESSAGE = "\ue000"
"""Placeholder for a message, to find what a template puts before and after it."""
_HIDDEN = "\ue001{}\ue001"
"""Placeholder for a piece of a message that reads like a control token, with its number."""
CUT = "\ufffd"
"""What the decoder returns for an incomplete character."""
TEMPLATE_KWARGS = "chat_template_kwargs"
"""Key of ``tokenizer_config.json`` under which a run keeps ``model.chat_template_kwargs``."""
_OURS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_THINKING = ("enable_thinking", "thinking")
"""Variables by which templates switch the thinking before an answer on and off."""


class ChatFormatter:
    """The tokenizer and chat template of a model.

    Messages are text: what reads like a control token in one (``<|im_end|>``) is encoded as the
    characters that it is.
    """

    def __init__(self, model: str | Path, template_kwargs: Mapping[str, Any] | None = None) -> None:
        """Load the tokenizer.

        Args:
            model: Directory or id of the model.
            template_kwargs: Variables of the template. They go before those that are stored with
                the model. Thinking is off unless they switch it on.

        Raises:
            ValueError: The tokenizer has no chat template, the template has no such variables, or
                nothing ends a turn.
        """
        self.tokenizer: Any = load_tokenizer(model)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {str(model)!r} has no chat template; give a chat model"
            )
        known = _template_variables(self.tokenizer.get_chat_template())
        _require_known(template_kwargs or {}, known)
        self.template_kwargs = {
            **{name: False for name in _THINKING if name in known},
            **self.tokenizer.init_kwargs.get(TEMPLATE_KWARGS, {}),
            **(template_kwargs or {}),
        }
        self.end = self._find_end()

    def prompt(
        self, message: str, opening: str = "", earlier: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """Build the token ids of a prompt, up to where the assistant begins or continues to write.

        Args:
            message: The user message.
            opening: Text that the assistant's turn begins with.
            earlier: Earlier turns as (user, assistant) messages.
        """
        messages = [text for turn in earlier for text in turn]
        hidden: list[str] = []
        rendered = self._render([self._hide(text, hidden) for text in [*messages, message]])
        ids = []
        for number, part in enumerate(re.split(_HIDDEN.format(r"(\d+)"), rendered)):
            # Every second part is the number of a piece of text.
            ids += self.text(hidden[int(part)]) if number % 2 else self._encode(part)
        return [*ids, *self.text(opening)]

    def turn(self) -> list[int]:
        """Build the token ids of a chat up to where the user begins to write."""
        return self._encode(self._render([MESSAGE]).partition(MESSAGE)[0])

    def _render(self, messages: Sequence[str], *, opened: bool = True) -> str:
        """Apply the template to messages of user and assistant in turn.

        Args:
            messages: The messages, the user's first.
            opened: Whether the assistant's next turn is opened.
        """
        roles = itertools.cycle(("user", "assistant"))
        return str(
            self.tokenizer.apply_chat_template(
                [{"role": next(roles), "content": text} for text in messages],
                add_generation_prompt=opened,
                tokenize=False,
                **self.template_kwargs,
            )
        )

    def _encode(self, rendered: str) -> list[int]:
        """Tokenise what a template rendered, in which control tokens are control tokens."""
        return [int(i) for i in self.tokenizer.encode(rendered, add_special_tokens=False)]

    def _hide(self, message: str, hidden: list[str]) -> str:
        """Replace what reads like control tokens by placeholders, and add it to ``hidden``."""

        def replace(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return _HIDDEN.format(len(hidden) - 1)

        return self._control_tokens.sub(replace, message)

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        # Neither list is whole: of <|start_header_id|> only the tokens themselves say it.
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {*self.tokenizer.all_special_tokens, *(str(t) for t in added if t.special)}
        longest_first = sorted(map(re.escape, filter(None, tokens)), key=len, reverse=True)
        own = re.escape(_HIDDEN[0])  # a placeholder in a message is no placeholder
        return re.compile("|".join([*longest_first, own]))

    def _find_end(self) -> int:
        """Find the token that ends the assistant's turn, which need not be ``eos_token``.

        It is the first control token behind the assistant's message; where the template lets only
        the next turn end it, the first one of that.
        """
        eos, added = self.tokenizer.eos_token_id, self.tokenizer.added_tokens_decoder
        for messages in (["a", MESSAGE], ["a", MESSAGE, "b"]):
            try:
                behind = self._render(messages, opened=False).partition(MESSAGE)[2]
            except Exception:
                continue
            for token in self._encode(behind):
                if token == eos or (token in added and added[token].special):
                    return token
        if eos is None:
            raise ValueError(
                "the tokenizer has no eos_token, and the chat template ends a turn with no control "
                "token; set eos_token in tokenizer_config.json to the token that ends an answer"
            )
        return int(eos)

    def response(self, text: str) -> list[int]:
        """Build the token ids of an answer, with the end of the turn."""
        return [*self.text(text), self.end]

    def text(self, text: str) -> list[int]:
        """Tokenise plain text; no part of it becomes a control token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [int(i) for i in ids]

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


def store_template_kwargs(directory: Path, template_kwargs: Mapping[str, Any]) -> None:
    """Keep variables of the chat template with a checkpoint, for each process that formats chats."""
    if not template_kwargs:
        return
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    stored = {**settings.get(TEMPLATE_KWARGS, {}), **template_kwargs}
    write_json_atomic(path, {**settings, TEMPLATE_KWARGS: stored})


def _template_variables(template: str) -> set[str]:
    """Return the names of the variables that a template takes from outside."""
    import jinja2.sandbox
    from jinja2 import meta

    syntax = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(syntax.parse(template))
    except jinja2.TemplateSyntaxError:  # a tag of transformers' own, such as {% generation %}
        return set(re.findall(r"\b[a-z_]+\b", template))


def _require_known(template_kwargs: Mapping[str, Any], known: set[str]) -> None:
    """Raise ValueError for a variable that the template does not take."""
    takes = sorted(known - _OURS - {"bos_token", "eos_token", "raise_exception", "strftime_now"})
    for name in template_kwargs:
        if name not in takes:
            raise ValueError(
                f"model.chat_template_kwargs has {name!r}, but the chat template takes "
                f"{', '.join(takes) or 'no variables'}; leave it out"
            )
