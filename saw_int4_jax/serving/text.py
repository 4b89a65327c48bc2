"""A request's text as its tokens come, up to the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from saw_int4_jax.models.tokenizer import Tokenizer


class StoppableText:
    """Text from tokens; it ends before a stop string, and shows no beginning of one.

    Attributes:
      stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.stopped = False
        self._stream = tokenizer.stream(prompt)
        self._stops = tuple(stops)
        self._held = ""  # text that may turn out to be the beginning of a stop string

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that is certain, which may be none."""
        text = self._until_stop(self._held + self._stream.push([token]))
        held = 0 if self.stopped else self._begun(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The rest of the text, when no more tokens come."""
        text = "" if self.stopped else self._until_stop(self._held + self._stream.flush())
        self._held = ""
        return text

    def _until_stop(self, text: str) -> str:
        ends = [end for stop in self._stops if (end := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        return text[: min(ends)] if ends else text

    def _begun(self, text: str) -> int:
        """How many of the last characters are the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        return next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
