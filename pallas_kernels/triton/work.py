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
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.triton.arithmetic import MASKED


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
      query: which of the T tokens.
      head: which of the H query heads.
      stored: the row is one of the output's,
      real: and a query.
      position: its token's, in the sequence.
      last: the last token that it sees.
      begin, end: some row sees a token of `begin .. end - 1`,
      full_begin, full_end: all rows see one of these.
    """

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
    q,
    row: Int[Array, "rows"],
    *,
    first: Int[Array, ""],
    block_queries: int,
    kv_head: Int[Array, ""],
    group: int,
    length: Int[Array, ""],
    real_queries: Int[Array, ""],
    causal: bool,
    window: int | None,
) -> Rows:
    """The rows with these numbers of a block of `block_queries` tokens, of which one is `first`."""
    query = first + row // group
    head = kv_head * group + row % group
    stored = (row < block_queries * group) & (query < q.shape[1])
    # Rows that are no queries see what the others see, so that they hinder nothing.
    history = length - real_queries
    last_query = jnp.minimum(first + block_queries, real_queries) - 1
    position = history + jnp.clip(query, first, last_query)
    last = position if causal else jnp.broadcast_to(length - 1, row.shape)
    end = full_end = length
    if causal:
        end, full_end = history + last_query + 1, history + first + 1
    end = jnp.where(last_query >= first, end, 0)
    begin = full_begin = jnp.int32(0)
    if window is not None:
        begin = jnp.maximum(history + first - window + 1, 0)
        full_begin = jnp.maximum(history + last_query - window + 1, 0)
    real = stored & (query < real_queries)
    return Rows(query, head, stored, real, position, last, begin, end, full_begin, full_end)


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
    if not slots:
        return [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    batch, queries, heads, head_dim = q.shape
    return [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((slots, queries, heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((slots, queries, heads), jnp.float32),
        jax.ShapeDtypeStruct((batch, 2), jnp.int32),
    ]


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
    alone = split.splits == 1
    query, head, stored = (
        jnp.expand_dims(x, 1 - axis) for x in (rows.query, rows.head, rows.stored)
    )
    mask = stored & jnp.expand_dims(inside, axis)
    for x, channel in means:
        channel = jnp.expand_dims(channel, axis)
        index = out.at[split.sequence, query, head, channel]
        plt.store(index, x.astype(out.dtype), mask=mask & alone)
        if partial:
            index = partial[0].at[split.slot, query, head, channel]
            plt.store(index, x, mask=mask & jnp.logical_not(alone))
    if partial:
        log_total = jnp.where(rows.real, log_total, MASKED)
        index = partial[1].at[split.slot, rows.query, rows.head]
        plt.store(index, log_total, mask=rows.stored & jnp.logical_not(alone))
