"""Times of requests and what they come to."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

PERCENTILES = (50, 75, 90)


@dataclasses.dataclass(frozen=True)
class Timing:
    """A finished request, in seconds of the engine's clock.

    Attributes:
      arrival: when it was submitted.
      first: when its first token came; `None`: none came.
      end: when it ended.
      tokens: new tokens.
    """

    arrival: float
    first: float | None
    end: float
    tokens: int

    @property
    def e2e_s(self) -> float:
        """From arrival to the end."""
        return self.end - self.arrival

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return None if self.first is None else self.first - self.arrival

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.end - self.first) / (self.tokens - 1)


class Metrics:
    """Counts since the start, and the timings of the newest requests.

    Attributes:
      finished: finished requests by reason.
      prompt_tokens: tokens of the prompts of finished requests.
      reused_tokens: prompt tokens that were found in the pool.
      new_tokens: tokens generated.
      timings: of the newest finished requests.
      on_finish: called with each timing, if set.
    """

    def __init__(self, keep: int = 10_000):
        self.finished: collections.Counter[str] = collections.Counter()
        self.prompt_tokens = self.reused_tokens = self.new_tokens = 0
        self.timings: collections.deque[Timing] = collections.deque(maxlen=keep)
        self.on_finish: Callable[[Timing], None] | None = None

    def record(self, timing: Timing, finish: str) -> None:
        self.finished[finish] += 1
        self.timings.append(timing)
        if self.on_finish is not None:
            self.on_finish(timing)

    def summary(self) -> dict[str, Any]:
        """Counts, tokens per second over the newest requests, and percentiles of their times."""
        return {
            "finished": dict(self.finished),
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            **summarize(list(self.timings)),
        }


def summarize(timings: list[Timing]) -> dict[str, float]:
    """Mean and percentiles of E2E, TTFT and TPOT in seconds, and tokens per second of all."""
    found: dict[str, float] = {}
    for name in ("e2e_s", "ttft_s", "tpot_s"):
        values = [value for timing in timings if (value := getattr(timing, name)) is not None]
        if values:
            found[f"{name}_mean"] = float(np.mean(values))
            for percent in PERCENTILES:
                found[f"{name}_p{percent}"] = float(np.percentile(values, percent))
    if timings:
        seconds = max(x.end for x in timings) - min(x.arrival for x in timings)
        if seconds > 0:
            found["tokens_per_s"] = sum(timing.tokens for timing in timings) / seconds
    return found
