"""What the engine runs on the device: two programs over rows of the pool's pages.

The host owns the page tables. It assigns the pages of a whole dispatch beforehand, so that the
compiled decode loop crosses page borders by itself; lengths grow on the device, the table does
not. A prefix cache needs the tables on the host anyway, and an allocator on both sides would have
to agree at every step. A few kilobytes of tables go to the device with each dispatch; what stays
there, donated from call to call, is the pages alone.

A row is any sequence, and means nothing beyond its call.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from saw_int4_jax.cache import Cache, last_token
from saw_int4_jax.generate import Forward, Sampling, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """R sequences, or parts of prompts, for one call.

    Attributes:
      tokens: `int32[R, T]`, what to read; the newest token alone, T = 1, for decode.
      counts: `int32[R]`, how many of them are real, or how many decode steps to take; 0: none.
      lengths: `int32[R]`, tokens in the pages before them.
      page_table: `int32[R, max_pages]`, with pages for all that the call writes.
      stop_tokens: `int32[R, E]`, tokens that end a sequence; -1 is none.
      sampling: how each picks its next token.
    """

    tokens: Int[Array, "R T"]
    counts: Int[Array, "R"]
    lengths: Int[Array, "R"]
    page_table: Int[Array, "R max_pages"]
    stop_tokens: Int[Array, "R E"]
    sampling: Sampling


@functools.partial(jax.jit, static_argnames="forward", donate_argnames="cache")
def prefill_rows(
    forward: Forward, variables: Any, cache: Cache, rows: Rows
) -> tuple[Int[Array, "R"], Cache]:
    """Reads a piece of a prompt in each row; returns the token after each.

    Consecutive pieces of one prompt may be rows of one call: every layer writes the keys and
    values of all rows before any row attends.
    """
    logits, cache = _step(forward, variables, cache, rows, rows.tokens, rows.counts, rows.lengths)
    return _sample(logits, rows.lengths + rows.counts, rows.sampling), cache


@functools.partial(jax.jit, static_argnames=("forward", "max_steps"), donate_argnames="cache")
def decode_rows(
    forward: Forward, variables: Any, cache: Cache, rows: Rows, *, max_steps: int
) -> tuple[Int[Array, "R max_steps"], Cache]:
    """`counts[r]` decode steps of each row, or fewer where a stop token comes.

    Returns:
      The new tokens, -1 after each row's last, and the cache.
    """
    out = jnp.full((len(rows.counts), max_steps), -1, jnp.int32)

    def going(carry):
        return (carry[2] > 0).any()

    def body(carry):
        index, tokens, left, lengths, cache, out = carry
        counts = (left > 0).astype(jnp.int32)
        logits, cache = _step(forward, variables, cache, rows, tokens[:, None], counts, lengths)
        lengths += counts
        new = _sample(logits, lengths, rows.sampling)
        out = out.at[:, index].set(jnp.where(counts > 0, new, -1))
        stopped = (new[:, None] == rows.stop_tokens).any(-1)
        return index + 1, new, jnp.where(stopped, 0, left - counts), lengths, cache, out

    carry = (0, rows.tokens[:, 0], rows.counts, rows.lengths, cache, out)
    *_, cache, out = lax.while_loop(going, body, carry)
    return out, cache


def _step(
    forward, variables, cache: Cache, rows: Rows, tokens, counts, lengths
) -> tuple[Float[Array, "R vocab"], Cache]:
    """The model on each row's tokens. Of the cache it returns only the pages are new."""
    seen = dataclasses.replace(
        cache, page_table=rows.page_table, lengths=lengths + counts, new_tokens=counts
    )
    logits, seen = forward(variables, tokens, seen)
    if logits.shape[1] > 1:
        logits = last_token(logits, seen)
    return logits[:, 0], dataclasses.replace(cache, pages=seen.pages)


def _sample(logits: Float[Array, "R vocab"], position, sampling: Sampling) -> Int[Array, "R"]:
    """`sample`, whose sorting is left out where all rows are greedy."""
    return lax.cond(
        (sampling.temperature > 0).any(),
        lambda: sample(logits, position, sampling),
        lambda: sample(logits, position, None),
    )
