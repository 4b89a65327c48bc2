"""What the engine runs on the device: two programs over rows of the pool's pages.

The host owns the page tables. It assigns the pages of a whole dispatch beforehand, so that the
compiled decode loop crosses page borders by itself; lengths grow on the device, the table does
not. A prefix cache needs the tables on the host anyway, and an allocator on both sides would have
to agree at every step. A few kilobytes of tables go to the device with each dispatch; what stays
there, donated from call to call, is the pages and the newest token of each sequence: the next call
can be on its way before the host has seen what the last one brought.

A row is any sequence, and means nothing beyond its call; a seat is a sequence's own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from saw_int4_jax.cache import Cache, last_token, split_rows
from saw_int4_jax.generate import Forward, Sampling, sample

# The width of an array: a request may name this many stop tokens, the model's own included.
MAX_STOP_TOKENS = 16

NO_SEAT = 2**31 - 1  # past the end: nothing is read or written there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What stays on the device.

    Attributes:
      cache: of which the pages alone count.
      newest: `int32[seats]`, the newest token of each sequence; -1 after a stop token.
    """

    cache: Cache
    newest: Int[Array, "seats"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """R sequences, or parts of prompts, for one call.

    Attributes:
      seats: `int32[R]`, where the newest token lies; `NO_SEAT`: of no interest.
      tokens: `int32[R, T]`, what to read; T = 0 for decode.
      counts: `int32[R]`, how many of them are real, or how many decode steps to take; 0: none.
      lengths: `int32[R]`, tokens in the pages before them.
      page_table: `int32[R, max_pages]`, with pages for all that the call writes.
      stop_tokens: `int32[R, E]`, tokens that end a sequence; -1 is none.
      sampling: how each picks its next token; `None`: all are greedy. It is another program, not a
        branch, for which the host would have to wait like for a loop's end.
    """

    seats: Int[Array, "R"]
    tokens: Int[Array, "R T"]
    counts: Int[Array, "R"]
    lengths: Int[Array, "R"]
    page_table: Int[Array, "R max_pages"]
    stop_tokens: Int[Array, "R E"]
    sampling: Sampling | None


def idle_rows(size: int, width: int, max_pages: int) -> Rows:
    """Greedy rows without work, in numpy: for the host to fill in."""
    arrays: dict[str, Any] = dict(
        seats=np.full(size, NO_SEAT, np.int32),
        tokens=np.zeros((size, width), np.int32),
        counts=np.zeros(size, np.int32),
        lengths=np.zeros(size, np.int32),
        page_table=np.full((size, max_pages), -1, np.int32),
        stop_tokens=np.full((size, MAX_STOP_TOKENS), -1, np.int32),
    )
    return Rows(**arrays, sampling=None)


@functools.partial(jax.jit, static_argnames="forward", donate_argnames="state")
def prefill_rows(
    forward: Forward, variables: Any, state: State, rows: Rows
) -> tuple[Int[Array, "R"], State]:
    """Reads a piece of a prompt in each row; returns the token after each.

    Consecutive pieces of one prompt may be rows of one call: every layer writes the keys and
    values of all rows before any row attends. The last one alone has a seat.
    """
    logits, cache = _step(
        forward, variables, state.cache, rows, rows.tokens, rows.counts, rows.lengths
    )
    new = sample(logits, rows.lengths + rows.counts, rows.sampling)
    return new, _sit(state, cache, rows, jnp.where(_stops(new, rows), -1, new))


@functools.partial(jax.jit, static_argnames=("forward", "num_steps"), donate_argnames="state")
def decode_rows(
    forward: Forward, variables: Any, state: State, rows: Rows, *, num_steps: int
) -> tuple[Int[Array, "R num_steps"], State]:
    """`counts[r]` decode steps of each row, or fewer where a stop token comes or has come.

    The loop always takes `num_steps` steps: one that asked whether rows are left would have the
    host wait for the answer, on a GPU, and nothing could be sent off behind it.

    Returns:
      The new tokens, -1 after each row's last, and the state.
    """
    newest = state.newest.at[rows.seats].get(mode="fill", fill_value=-1)

    def body(index, carry):
        newest, left, lengths, cache, out = carry
        runs = left > 0
        counts = runs.astype(jnp.int32)
        logits, cache = _step(forward, variables, cache, rows, newest[:, None], counts, lengths)
        lengths += counts
        new = sample(logits, lengths, rows.sampling)
        out = out.at[:, index].set(jnp.where(runs, new, -1))
        stops = runs & _stops(new, rows)
        newest = jnp.where(stops, -1, jnp.where(runs, new, newest))
        return newest, jnp.where(stops, 0, left - counts), lengths, cache, out

    left = jnp.where(newest >= 0, rows.counts, 0)
    out = jnp.full((len(rows.counts), num_steps), -1, jnp.int32)
    carry = newest, left, rows.lengths, state.cache, out
    newest, _, _, cache, out = lax.fori_loop(0, num_steps, body, carry)
    return out, _sit(state, cache, rows, newest)


def _stops(tokens: Int[Array, "R"], rows: Rows) -> Bool[Array, "R"]:
    return (tokens[:, None] == rows.stop_tokens).any(-1)


def _sit(state: State, cache: Cache, rows: Rows, newest: Int[Array, "R"]) -> State:
    seats = state.newest.at[rows.seats].set(newest, mode="drop")
    return State(cache, split_rows(seats, cache))


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
