"""What the decode kernel and the prefill kernel share: how the work is cut, where outputs go.

A sequence has T * G query rows for each KV head: the G query heads of that head for each of T
tokens. A program takes a block of them, a whole number of tokens, and a split of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.triton.arithmetic import LOG2_E, MASKED


class Plan(NamedTuple):
    """How a kernel is launched.

    Attributes:
      kernel: one program; takes references by name, what is static, and `outputs`.
      slots: room for the outputs of so many splits; 0 if no context is split.
      chunk: how many splits of a sequence are joined at a time, a power of two.
      signs: the rotation's matrices.
    """

    kernel: Callable[..., None]
    grid: tuple[int, ...]
    num_warps: int
    slots: int
    chunk: int
    signs: np.ndarray | None


class Rows(NamedTuple):
    """Query rows of a program, and which tokens they see.

    Attributes:
      kv_head: all rows'.
      query: which of the T tokens.
      head: which of the H query heads.
      stored: the row is one of the output's,
      real: and a query.
      position: its token's, in the sequence.
      last: the last token that it sees.
      begin, end: some row sees a token of `begin .. end - 1`,
      full_begin, full_end: all rows see one of these.
    """

    kv_head: Int[Array, ""]
    query: Int[Array, "rows"]
    head: Int[Array, "rows"]
    stored: Bool[Array, "rows"]
    real: Bool[Array, "rows"]
    position: Int[Array, "rows"]
    last: Int[Array, "rows"]
    begin: Int[Array, ""]
    end: Int[Array, ""]
    full_begin: Int[Array, ""]
    full_end: Int[Array, ""]


def cut_rows(
    row: Int[Array, "rows"],
    *,
    head_block: Int[Array, ""],
    rows: int,
    q,
    data,
    length: Int[Array, ""],
    real_queries: Int[Array, ""],
    causal: bool,
    window: int | None,
) -> Rows:
    """The rows of these numbers in a block of `rows`: all KV heads' first blocks come first."""
    kv_heads, queries = data.shape[2], q.shape[1]
    group = q.shape[2] // kv_heads
    block_queries = min(queries, rows // group)
    kv_head = lax.rem(head_block, kv_heads)
    first = lax.div(head_block, kv_heads) * block_queries
    query, head = first + row // group, kv_head * group + row % group
    stored = (row < block_queries * group) & (query < queries)
    # Rows that are no queries see what the others see, so that they hinder nothing.
    history = length - real_queries
    last_query = jnp.minimum(first + block_queries, real_queries) - 1
    position = history + jnp.clip(query, first, last_query)
    last = position if causal else jnp.broadcast_to(length - 1, row.shape)
    end = full_end = length
    if causal:
        end, full_end = history + last_query + 1, history + first + 1
    begin = full_begin = jnp.int32(0)
    if window is not None:
        begin, full_begin = (jnp.maximum(history + x - window + 1, 0) for x in (first, last_query))
    return Rows(
        kv_head=kv_head,
        query=query,
        head=head,
        stored=stored,
        real=stored & (query < real_queries),
        position=position,
        last=last,
        begin=begin,
        end=jnp.where(last_query >= first, end, 0),
        full_begin=full_begin,
        full_end=full_end,
    )


def page_ids(
    page_table, sequence, block, *, block_tokens: int, page_size: int, length
) -> Int[Array, "#block_tokens"]:
    """The page of each token of a block, or of all if they lie in one. Past the end, the last."""
    token = block * block_tokens + jnp.arange(block_tokens)
    if page_size % block_tokens == 0:
        token = block * block_tokens
    token = jnp.minimum(token, jnp.maximum(length - 1, 0))
    return plt.load(page_table.at[sequence, lax.div(token, page_size)])


def page_offsets(block, *, block_tokens: int, page_size: int) -> Int[Array, "block_tokens"]:
    """Where in its page each token of a block lies."""
    token = jnp.arange(block_tokens)
    if page_size % block_tokens == 0:
        return lax.rem(block, page_size // block_tokens) * block_tokens + token
    return lax.rem(block * block_tokens + token, page_size)


def start_of(sinks, rows: Rows, part) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """A split's largest score and total weight before its first token.

    A sink is a key with this score and no value, in the first split.
    """
    if sinks is None:
        return jnp.full(rows.head.shape, MASKED), jnp.zeros(rows.head.shape, jnp.float32)
    sink = plt.load(sinks.at[rows.head], mask=rows.stored, other=0).astype(jnp.float32) * LOG2_E
    has_sink = (part == 0) & (sink > MASKED)
    return jnp.where(has_sink, sink, MASKED), jnp.where(has_sink, 1.0, 0.0)


# --- Outputs ------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Part number `part` of the `splits` of a sequence; its slot, the next part's the next."""

    sequence: Any
    part: Any
    splits: Any
    slot: Any


def output_shapes(q: Float[Array, "B T H D"], slots: int) -> list[jax.ShapeDtypeStruct]:
    """A kernel's outputs.

    The output, of sequences that are one split; and if there are slots for more, each split's mean,
    log2 of its total weight, and for each sequence its first slot and how many splits it is.
    """
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if slots:
        out += [jax.ShapeDtypeStruct((slots, *q.shape[1:]), jnp.float32)]
        out += [jax.ShapeDtypeStruct((slots, *q.shape[1:-1]), jnp.float32)]
        out += [jax.ShapeDtypeStruct((q.shape[0], 2), jnp.int32)]
    return out


def store_place(outputs, split: Split, once: Bool[Array, ""]) -> None:
    """Where a sequence's splits are, by one program for each of them: `once`."""
    if len(outputs) > 1:
        pair = jnp.arange(2)
        mask = jnp.broadcast_to(once & (split.part == 0), pair.shape)
        plt.store(
            outputs[3].at[split.sequence, pair],
            jnp.where(pair == 0, split.slot, split.splits),
            mask=mask,
        )


def store(
    outputs,
    split: Split,
    rows: Rows,
    means: Sequence[tuple[Float[Array, "…"], Int[Array, "columns"]]],
    inside: Bool[Array, "columns"],
    log_total: Float[Array, "rows"],
    *,
    axis: int,
) -> None:
    """What a split comes to: channels of the mean and which ones, rows along `axis`."""
    out, *partial = outputs
    query, head, stored = (
        jnp.expand_dims(x, 1 - axis) for x in (rows.query, rows.head, rows.stored)
    )
    mask = stored & jnp.expand_dims(inside, axis)

    def store_means(ref, place, mask):
        for x, channel in means:
            index = ref.at[place, query, head, jnp.expand_dims(channel, axis)]
            plt.store(index, x.astype(ref.dtype), mask=mask)

    if not partial:
        return store_means(out, split.sequence, mask)
    stored = rows.stored
    if not isinstance(split.splits, int):  # some sequences are one split, as lengths have it
        alone = split.splits == 1
        store_means(out, split.sequence, mask & alone)
        mask, stored = mask & ~alone, stored & ~alone
    store_means(partial[0], split.slot, mask)
    log_total = jnp.where(rows.real, log_total, MASKED)
    plt.store(partial[1].at[split.slot, rows.query, rows.head], log_total, mask=stored)
