"""Chat templates: messages to the text that a model was trained to continue.

Templates are the Jinja ones of Hugging Face tokenizers; they come with a model and run in Jinja's
sandbox. Needs the extra `serve`.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox


class ChatTemplate:
    """A template and the special tokens that it names."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compiles a template.

        Raises:
          ValueError: it is no Jinja template.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        environment.filters["tojson"] = lambda x, **options: json.dumps(
            x, ensure_ascii=False, **options
        )
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"Expected the chat template to be valid: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, up to where the assistant is to go on.

        Raises:
          ValueError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"Expected messages that the chat template takes: {error}") from error


def load_chat_template(directory: pathlib.Path) -> ChatTemplate | None:
    """The template of `chat_template.jinja` or `tokenizer_config.json`; `None`: there is none.

    Raises:
      ValueError: it is damaged.
    """
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    own = directory / "chat_template.jinja"
    if own.is_file():
        source = own.read_text(encoding="utf-8")
    if source is None:
        return None
    special = {
        name: token["content"] if isinstance(token, dict) else token
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (token := config.get(name)) is not None
    }
    return ChatTemplate(source, special)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
