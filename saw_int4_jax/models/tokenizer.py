"""Text to token ids and back, also piece by piece while a model generates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Decoded before a piece of text so that the piece does not count as the beginning of one.
_ANCHOR = "a"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the `tokenizers` library and the tokens that end a text.

    Attributes:
      backend: does the work.
      eos_ids: ids that end a generation.
    """

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...] = ()

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The token that `encode` puts before every text; `None`: there is none."""
        first = self.encode(_ANCHOR)[:1]
        return None if first == self._anchor[:1] else first[0]

    @functools.cached_property
    def _anchor(self) -> list[int]:
        return self.backend.encode(_ANCHOR, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, beginning with the BOS token if the tokenizer has one."""
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids))

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A stream of the text that follows `prompt`."""
        return TextStream(self, prompt)


class TextStream:
    """Turns token ids into text as they come, in time linear in their number.

    The texts of all calls together are what `decode` makes of all ids, less the prompt's text.
    A character whose bytes are spread over several tokens comes out whole, once it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # Decoders treat the beginning of a text in their own way: most drop a space there.
        self._anchor: list[int] = []
        self._pending: list[int] = []
        if tokenizer.decode(prompt):
            self._anchor = tokenizer._anchor
        else:
            self._pending = list(prompt)

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that is complete, which may be none."""
        self._pending += ids
        text = self._text()
        # Keeping ids without text keeps the beginning of the text where it is.
        return "" if text.endswith(_REPLACEMENT) or not text else self._emit(text)

    def flush(self) -> str:
        """The rest of the text: U+FFFD for bytes that never became a character."""
        return self._emit(self._text())

    def _text(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._anchor + self._pending)[len(decode(self._anchor)) :]

    def _emit(self, text: str) -> str:
        self._anchor, self._pending = self._tokenizer._anchor, []
        return text
