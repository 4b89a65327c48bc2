"""What a cache costs in quality: teacher-forced text through it, compared with BF16.

Every token's keys and values pass through the paged cache before anything attends to them, as in
decode, so that the figures hold for generation and not only for a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saw_int4_jax.cache import Cache, CacheSpec, extend, init_cache
from saw_int4_jax.generate import Forward

__all__ = ["Score", "evaluate", "windows"]


@dataclasses.dataclass(frozen=True)
class Score:
    """Quality of one cache over a text.

    Attributes:
      tokens: predicted tokens.
      nats: mean negative log-likelihood of a token.
      kl: mean KL divergence of the next-token distribution from the reference's, in nats.
      top1: share of tokens where the likeliest next token is the reference's.
    """

    tokens: int
    nats: float
    kl: float
    top1: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits to encode the text, over its bytes."""
        return self.nats * self.tokens / math.log(2) / num_bytes


def windows(
    tokens: Sequence[int], length: int, bos: int | None = None
) -> Int[np.ndarray, "N length+1"]:
    """Cuts a text into windows that predict `length` tokens each; the rest is dropped.

    Each begins with `bos`, or, for a model without one, with the token before it.

    Raises:
      ValueError: the text is too short for one window.
    """
    stream = np.asarray(tokens, np.int32)
    body = stream if bos is not None else stream[1:]
    count = len(body) // length
    if count == 0:
        raise ValueError(f"Expected a text of {len(stream)} tokens to hold one window of {length}")
    body = body[: count * length].reshape(count, length)
    first = np.full(count, bos) if bos is not None else stream[: count * length : length]
    return np.concatenate([first[:, None], body], axis=1).astype(np.int32)


@functools.partial(jax.jit, static_argnames="forward", donate_argnames="cache")
def _logits(
    forward: Forward,
    variables: Any,
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B"],
    cache: Cache,
) -> tuple[Float[Array, "B T vocab"], Cache]:
    cache, _ = extend(cache, real * tokens.shape[1], max_count=tokens.shape[1])
    return forward(variables, tokens, cache)


@jax.jit
def compare_logits(
    logits: Float[Array, "B T vocab"],
    reference: Float[Array, "B T vocab"],
    targets: Int[Array, "B T"],
) -> Float[Array, "4 B T"]:
    """For each token: nats, KL from the reference, whether the top agrees, whether it is right."""
    log_p, log_r = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    nats = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    kl = (jnp.exp(log_r) * (log_r - log_p)).sum(-1)
    top = log_p.argmax(-1)
    return jnp.stack([nats, kl, top == log_r.argmax(-1), top == targets])


def evaluate(
    forward: Forward,
    variables: Any,
    text: Int[np.ndarray, "N length+1"],
    specs: Sequence[CacheSpec],
    *,
    batch: int = 8,
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Scores several caches against the first, over the same windows of text.

    Args:
      forward: the model, returning the logits of all tokens; see `saw_int4_jax.generate`.
      variables: its parameters.
      text: from `windows`.
      specs: the caches; the first is the reference for KL and top-1. Their `num_pages` is
        replaced by what a batch needs.
      batch: windows at a time.
      chunk: tokens of each window in one call. Tokens within a chunk see each other through the
        cache too.
      progress: called with the tokens scored and their total.

    Raises:
      ValueError: no window, or `chunk` does not divide the windows' length.
    """
    count, length = text.shape[0], text.shape[1] - 1
    if count < 1 or length % chunk:
        raise ValueError(f"Expected {text.shape=} to be [N, length + 1], {chunk=} dividing length")
    batch = min(batch, count)
    specs = [
        dataclasses.replace(spec, num_pages=batch * -(-length // spec.page_size)) for spec in specs
    ]
    sums = np.zeros((len(specs), 3))
    done, total = 0, count * length
    for row in range(0, count, batch):
        rows = np.arange(row, row + batch)
        real, part = rows < count, text[np.minimum(rows, count - 1)]
        caches = [init_cache(spec, batch, length) for spec in specs]
        for start in range(0, length, chunk):
            tokens = part[:, start : start + chunk + 1]
            reference = None
            for i, cache in enumerate(caches):
                logits, caches[i] = _logits(forward, variables, tokens[:, :-1], real, cache)
                reference = logits if reference is None else reference
                figures = np.asarray(compare_logits(logits, reference, tokens[:, 1:]))
                sums[i] += figures[:3, real].sum((1, 2), np.float64)
            done += int(real.sum()) * chunk
            if progress is not None:
                progress(done, total)
    return [Score(total, *map(float, row)) for row in sums / total]
