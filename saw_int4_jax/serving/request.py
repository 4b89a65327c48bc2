"""What a caller asks of the engine, and what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from saw_int4_jax.serving.metrics import Timing


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes:
      prompt: token ids.
      max_new_tokens: how many tokens to generate at most.
      temperature: 0 is greedy. `top_k`, `top_p` and `min_p` as in `make_sampling`.
      seed: of the draws. `None`: the order of arrival.
      stop: texts that end it; needs the engine's tokenizer.
      stop_tokens: tokens that end it, beside the model's own.
      ignore_eos: the model's own do not.
      timeout_s: seconds after which it ends in any case.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    ignore_eos: bool = False
    timeout_s: float | None = None


@dataclasses.dataclass(eq=False)
class Response:
    """What has come so far. The engine changes it while it steps.

    Attributes:
      request: what was wanted.
      number: its place in the order of arrival.
      tokens: new tokens, a stop token included.
      text: theirs, if the engine has a tokenizer: without stop strings and stop tokens.
      finish: `"stop"`, `"length"`, `"cancelled"`, `"deadline"`; `None`: it goes on.
      reused_tokens: prompt tokens that were found in the pool.
      preemptions: how often its pages went to older requests.
      timing: when it ended.
    """

    request: Request
    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish: str | None = None
    reused_tokens: int = 0
    preemptions: int = 0
    timing: Timing | None = None
