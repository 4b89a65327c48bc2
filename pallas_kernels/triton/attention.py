"""`paged_attention` as one Pallas kernel for NVIDIA GPUs, and a small one that joins its splits.

A program takes one sequence, one KV head, a block of its query rows (T * G of them: the G query
heads of a KV head for each of T tokens) and one split of the context, and walks over blocks of
tokens with an online softmax. What makes it follow memory rather than arithmetic:

- Operands are swapped: scores are `[tokens, rows]` = K qᵀ and the output `[D, rows]` += Vᵀ Pᵀ, so
  that tokens and channels fill the long sides of the matrix unit.
- Dequantization is deferred. Codes go to the matrix unit as bytes, four of them made by one
  instruction; the scale and the minimum of a token touch only its scores.
- Queries and weights are 16-bit integers, low byte and high byte in two columns next to each
  other. Four rows fill the eight columns of the unit's short side, sums are exact, and the two
  halves meet again within a thread.
- Weights are integers in units of their own block's largest, so that many small ones beside a
  large one, and values of any magnitude, keep their digits.
- Splits are about equal, whatever the lengths: see `share`.

Scores are in units of log2: exp2 is the machine's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.page_format import Pages
from pallas_kernels.triton import arithmetic, prefill
from pallas_kernels.triton.arithmetic import (
    LARGEST_LIMBS,
    LOG2_E,
    MASKED,
    exp2,
    multiply_add,
    padded,
)

# How many bytes the matrix unit sums at a time.
LEAST = 32
# Sums over tokens are kept as so many partial ones, which lie in different threads.
SUMS = 8


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut. The defaults per device are data, in `pallas_kernels/tuning`.

    Attributes:
      block_tokens: tokens in a turn of the loop; a power of two, at least 32.
      rows: most query rows in a program; a power of two, at least 8.
      programs: contexts are split into about so many programs, as many as the device runs at once,
      max_splits: and into no more parts than this: joining them takes time too.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline. A page id is a load of its own, ahead of its
        page's: a true double buffer is five stages.
    """

    block_tokens: int
    rows: int
    programs: int
    max_splits: int
    num_warps: int
    num_stages: int


def supported(
    q: Float[Array, "B T H D"], pages: Pages, page_table: Int[Array, "B max_pages"]
) -> str | None:
    """Why this implementation cannot run, or `None`. Where it runs is not its question."""
    if pages.format.layout == "paired":
        return "Expected the layout to be 'split' or 'bf16', got 'paired'"
    if q.dtype.itemsize > 4:
        return f"Expected {q.dtype=} to be of at most 32 bits"
    if pages.head_dim > 256:
        return f"Expected {pages.head_dim=} to be at most 256"
    return None


# The layer is an operand: a model's layers are one function, traced and lowered once.
@functools.partial(
    jax.jit, static_argnames=("causal", "scale", "window", "soft_cap", "blocks", "interpret")
)
def paged_attention(
    q: Float[Array, "B T H D"],
    pages: Pages,
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    query_lengths: Int[Array, "B"],
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "H"] | None,
    blocks: Blocks | prefill.Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `pallas_kernels.paged_attention`. Beyond its arguments:

    `blocks` says how to cut the work, and which kernel does it: this file's or `prefill`'s; `None`
    is the device's default for this shape.
    `interpret` runs it as plain `jnp` on any device.
    """
    batch, queries, heads, head_dim = q.shape
    group = heads // pages.kv_heads
    if blocks is None:
        blocks = default_blocks(pages, queries * group)
    if isinstance(blocks, prefill.Blocks):
        return prefill.prefill_attention(
            q,
            pages,
            page_table,
            lengths,
            layer=layer,
            query_lengths=query_lengths,
            causal=causal,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            blocks=blocks,
            interpret=interpret,
        )
    # A block of queries is a whole number of tokens, each with all heads of the group.
    rows = max(
        8 if pages.scales is None else 4,
        1 << (group - 1).bit_length(),
        min(blocks.rows, _power_of_two(queries * group)),
    )
    block_queries = min(queries, rows // group)
    query_blocks = pl.cdiv(queries, block_queries)
    # Slots for as many programs as fill the device, and some more for one that is long among many.
    wanted = min(blocks.programs // (pages.kv_heads * query_blocks), batch * blocks.max_splits)
    slots = wanted + 1 if wanted > batch else batch
    if query_blocks == 1:
        slots = max(slots, batch + batch // 4)

    pieces = 4 if pages.format.layout == "split" else 1
    kernel = functools.partial(
        _attend,
        page_size=pages.page_size,
        kv_heads=pages.kv_heads,
        group=group,
        queries=queries,
        block_queries=block_queries,
        rows=rows,
        block_tokens=blocks.block_tokens,
        max_splits=blocks.max_splits,
        pieces=pieces,
        width=head_dim // pieces,
        order=pages.format.order,
        value_order=pages.format.value_order,
        causal=causal,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        gpu=not interpret,
    )
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if slots > batch:
        partial = (slots, queries, heads)
        out_shape += [
            jax.ShapeDtypeStruct((*partial, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partial, jnp.float32),
            jax.ShapeDtypeStruct((batch, 2), jnp.int32),
        ]
    short = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float16
    arrays = dict(
        q=q,
        data=pages.data,
        page_table=page_table,
        lengths=lengths,
        query_lengths=query_lengths,
        layer=jnp.asarray(layer, jnp.int32).reshape(1),
        scales=pages.scales,
        sinks=sinks,
        signs=None
        if pages.format.order == 1
        else jnp.asarray(arithmetic.signs(pages.format.order, head_dim, short, LEAST)),
    )
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def named(*refs):
        kernel(**dict(zip(arrays, refs, strict=False)), outputs=refs[len(arrays) :])

    outputs = pl.pallas_call(
        named,
        grid=(pages.kv_heads * query_blocks, slots),
        out_shape=out_shape,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(out_shape),
        compiler_params=plt.CompilerParams(
            num_warps=blocks.num_warps, num_stages=blocks.num_stages
        ),
        interpret=interpret,
        name="paged_attention",
    )(*arrays.values())
    if slots == batch:
        return outputs[0]
    chunk = _power_of_two(min(max(pl.cdiv(wanted, batch), 4), blocks.max_splits))
    out, means, log_totals, split = outputs
    return _join_splits(out, means, log_totals, split, chunk, interpret)


def default_blocks(pages: Pages, rows: int) -> Blocks | prefill.Blocks:
    """The device's own for so many query rows of a sequence and KV head."""
    bf16 = "_bf16" if pages.scales is None else ""
    blocks = Blocks(**tuning.blocks("decode_attention" + bf16))
    if rows > blocks.rows:
        return prefill.default_blocks(pages)
    # The accumulator grows with the head dim: so must the registers.
    return dataclasses.replace(blocks, num_warps=blocks.num_warps * pl.cdiv(pages.head_dim, 128))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


# --- The work, cut ------------------------------------------------------------------------------


def share(
    slot: Int[Array, ""],
    blocks: Int[Array, "n"],
    *,
    batch: int,
    slots: int,
    max_splits: int,
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Which sequence a slot works on, when all are cut into splits of about equal size.

    Sequences take slots in turn, as many as their blocks ask for, at least one each. Every program
    finds its own from all lengths: what computes a list first is launches of its own.

    Args:
      slot: 0 .. slots - 1.
      blocks: how many blocks of tokens each sequence has; n is a power of two, `batch` or more.
      batch: sequences.
      slots: more than `batch`.
      max_splits: most slots of one sequence.

    Returns:
      The sequence (`batch` if the slot is left over), its first slot, and blocks in a split at
      most.
    """
    index = jnp.arange(len(blocks))
    # With the rounding up of each sequence they come to no more than `slots`.
    size = jnp.maximum(pl.cdiv(jnp.sum(blocks), slots - batch), 1)
    splits = jnp.where(index < batch, count_splits(blocks, size, max_splits), 0)
    before = (index < batch) & (jnp.cumsum(splits) <= slot)
    return jnp.sum(before.astype(jnp.int32)), jnp.sum(jnp.where(before, splits, 0)), size


def count_splits(blocks: Int[Array, "*s"], size: Int[Array, ""], most: int) -> Int[Array, "*s"]:
    """How many slots a sequence takes."""
    return jnp.clip(pl.cdiv(blocks, size), 1, most)


def _block_range(length, queries: Any, window: int | None, block_tokens: int):
    """The blocks that a sequence's queries see: `begin .. end - 1`."""
    end = pl.cdiv(length, block_tokens)
    if window is None:
        return jnp.zeros_like(end), end
    return jnp.minimum(jnp.maximum(length - queries - window + 1, 0) // block_tokens, end), end


# --- Attention over a split ---------------------------------------------------------------------


def _attend(*, lengths, query_lengths, outputs, block_tokens, window, max_splits, **arguments):
    """One program. Arrays are whole; what is static comes after `outputs`."""
    head_block, slot = pl.program_id(0), pl.program_id(1)
    batch = lengths.shape[0]

    def block_range(length, queries):
        return _block_range(length, queries, window, block_tokens)

    if len(outputs) == 1:
        sequence, first = slot, slot
    else:
        index = jnp.arange(_power_of_two(batch))
        begin, end = block_range(
            plt.load(lengths.at[index], mask=index < batch, other=0),
            plt.load(query_lengths.at[index], mask=index < batch, other=0),
        )
        sequence, first, size = share(
            slot, end - begin, batch=batch, slots=outputs[1].shape[0], max_splits=max_splits
        )

    def attend():
        length, queries = lengths[sequence], query_lengths[sequence]
        begin, end = block_range(length, queries)
        splits: Any = 1
        if len(outputs) > 1:
            splits = count_splits(end - begin, size, max_splits)
        part = slot - first
        low, high = (begin + (part + i) * (end - begin) // splits for i in range(2))
        _attend_split(
            slot=slot,
            head_block=head_block,
            batch=sequence,
            length=length,
            real_queries=queries,
            low=low,
            high=high,
            part=part,
            splits=splits,
            outputs=outputs,
            block_tokens=block_tokens,
            window=window,
            **arguments,
        )

    pl.when(sequence < batch)(attend)


def _attend_split(
    *,
    head_block,
    slot,
    batch,
    length,
    real_queries,
    low,
    high,
    part,
    splits,
    q,
    data,
    page_table,
    layer,
    scales=None,
    sinks=None,
    signs=None,
    outputs,
    page_size: int,
    kv_heads: int,
    group: int,
    queries: int,
    block_queries: int,
    rows: int,
    block_tokens: int,
    pieces: int,
    width: int,
    order: int,
    value_order: int,
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    gpu: bool,
):
    """Blocks low .. high - 1 of a sequence, which are one of its splits."""
    kv_head = lax.rem(head_block, kv_heads)
    query_block = lax.div(head_block, kv_heads)
    layer = layer[0]
    quantized = scales is not None

    # --- Rows: which queries, and which tokens each may see: first .. last ----------------------
    row = jnp.arange(rows)
    query = query_block * block_queries + row // group
    head = kv_head * group + row % group
    stored = (row < block_queries * group) & (query < queries)
    real = stored & (query < real_queries)
    # Rows that are no queries see what the others see, so that they hinder nothing.
    first_query = query_block * block_queries
    last_query = jnp.minimum(first_query + block_queries, real_queries) - 1
    position = length - real_queries + jnp.clip(query, first_query, last_query)
    last = position if causal else jnp.broadcast_to(length - 1, row.shape)

    # The tokens that some row sees are begin .. end - 1.
    end = length - real_queries + last_query + 1 if causal else length
    end = jnp.where(last_query >= first_query, end, 0)
    begin = jnp.int32(0)
    if window is not None:
        begin = jnp.maximum(length - real_queries + first_query - window + 1, 0)

    # --- Queries: rotated, as float16 within a power of two of 1 --------------------------------
    size = padded(width, LEAST)
    column = jnp.arange(size)
    inside = column < width

    def load_query(piece, row):  # [len(row), width]
        query = query_block * block_queries + row // group
        head = kv_head * group + row % group
        real = (row < block_queries * group) & (query < jnp.minimum(queries, real_queries))
        channel = piece * width + column
        index = q.at[batch, query[:, None], head[:, None], channel[None, :]]
        return plt.load(index, mask=real[:, None] & inside[None, :], other=0)

    factor: Any = scale * LOG2_E if soft_cap is None else scale / soft_cap
    if quantized:
        # Each row twice, for the two bytes of its numbers, and at least the 16 rows that a matrix
        # product takes.
        twice = jnp.arange(max(16, 2 * rows)) // 2
        q_pieces = [load_query(i, twice) for i in range(pieces)]
        rotate = functools.partial(arithmetic.rotate, signs=signs, order=order, width=width, axis=1)
        if q.dtype == jnp.float32:  # by way of float16, within a power of two of 1
            magnitudes = [arithmetic.power_of_two_below(x) for x in q_pieces]
            magnitude = functools.reduce(jnp.maximum, magnitudes)
            q_pieces = rotate([(x * (1 / magnitude)).astype(jnp.float16) for x in q_pieces])
            factor *= magnitude
        else:
            q_pieces = rotate(q_pieces)
        factor *= order**-0.5
        q_pieces = [jnp.sum(x.reshape(-1, 2 * rows, x.shape[1]), axis=0) for x in q_pieces]

        def row_values(x):
            return jnp.max(x.reshape(rows, 2), axis=1)

        largest = arithmetic.largest_magnitude(q_pieces) + 1e-30
        inverse_step = (LARGEST_LIMBS / largest)[:, None]
        sums = [jnp.sum(x, axis=1) for x in q_pieces]
        total_query = factor * row_values(sums[0] + sums[1] + sums[2] + sums[3])
        odd_query = 8 * factor * row_values(sums[1] + sums[3])
        per_unit = row_values(largest) * (factor / (16 * LARGEST_LIMBS))
        which = jnp.arange(2 * rows)[:, None] % 2
        q_pieces = [arithmetic.limb(x * inverse_step, which).T for x in q_pieces]
    else:
        q_pieces = [load_query(0, row).astype(jnp.bfloat16).T]

    # --- The loop over blocks of tokens ---------------------------------------------------------

    def attend_block(block, carry, masked=True):
        running_max, total, shift, spread, *acc = carry
        token = block * block_tokens + jnp.arange(block_tokens)
        if page_size % block_tokens == 0:  # the block lies in one page
            page = page_table[batch, lax.div(block, page_size // block_tokens)]
            offset = lax.rem(block, page_size // block_tokens) * block_tokens
            offset = offset + jnp.arange(block_tokens)
            page_of_row = page_of_column = page
        else:
            within = jnp.minimum(token, length - 1)
            page = plt.load(page_table.at[batch, lax.div(within, page_size)])
            offset = lax.rem(within, page_size)
            page_of_row, page_of_column = page[:, None], page[None, :]

        def load_keys():  # [tokens, width]
            index = data.at[layer, page_of_row, kv_head, 0, offset[:, None], column[None, :]]
            if size == width:
                return plt.load(index)
            mask = jnp.broadcast_to(inside[None, :], (block_tokens, size))
            return plt.load(index, mask=mask, other=0)

        def load_values():  # [width, tokens]
            index = data.at[layer, page_of_column, kv_head, 1, offset[None, :], column[:, None]]
            if size == width:
                return plt.load(index)
            mask = jnp.broadcast_to(inside[:, None], (size, block_tokens))
            return plt.load(index, mask=mask, other=0)

        def load_scales(kind):
            return plt.load(scales.at[layer, page, kv_head, kind, offset])

        # Scores [tokens, rows].
        keys = load_keys()
        if quantized:
            key_scale, key_minimum = arithmetic.split_scales(load_scales(0))
            tiles = arithmetic.codes_as_bytes(keys, gpu)
            even, odd = (
                arithmetic.dot(tiles[i], q_pieces[i])
                + arithmetic.dot(tiles[i + 2], q_pieces[i + 2])
                for i in range(2)
            )
            scores = arithmetic.join_limbs(16 * even + odd)
            scores = multiply_add(scores, per_unit[None, :], odd_query[None, :], gpu)
            minima = key_minimum[:, None] * total_query[None, :]
            scores = multiply_add(scores, key_scale[:, None], minima, gpu)
        else:
            keys = lax.bitcast_convert_type(keys, jnp.bfloat16)
            scores = arithmetic.dot(keys, q_pieces[0]) * factor
        if soft_cap is not None:
            scores = soft_cap * LOG2_E * jnp.tanh(scores)
        if masked:
            visible = token[:, None] <= last[None, :]
            if window is not None:
                visible &= token[:, None] > (position - window)[None, :]
            scores = jnp.where(visible, scores, MASKED)

        # Above MASKED, so that what is masked weighs nothing.
        block_max = jnp.maximum(jnp.max(scores, axis=0), MASKED / 2)
        new_max = jnp.maximum(running_max, block_max)
        decay = exp2(running_max - new_max, gpu)
        growth = exp2(block_max - new_max, gpu)
        weights = exp2(scores - block_max[None, :], gpu)

        def add(total, x):
            x = jnp.sum(x.reshape(-1, SUMS, rows), axis=0)
            return multiply_add(x, growth[None, :], total * decay[None, :], gpu)

        total = add(total, weights)

        # Output [D, rows]. A value is code * scale + minimum, of every second nibble
        # (code - 8) * scale + minimum + 8 * scale: the codes' terms are the matrix unit's, the
        # others are sums over tokens, `shift` and 8 * `spread`.
        values = load_values()
        if quantized:
            # A slot never written may hold anything, and 0 * nan is nan.
            words = jnp.where(token < length, load_scales(1), jnp.uint32(0))
            value_scale, value_minimum = arithmetic.split_scales(words)
            shift = add(shift, weights * value_minimum[:, None])
            spread = add(spread, weights * value_scale[:, None])
            unit = jnp.maximum(jnp.max(value_scale), 1e-30)
            norm = value_scale * (LARGEST_LIMBS / unit)
            weights = arithmetic.limbs(weights, norm[:, None], gpu)
            growth = growth * unit * (1 / LARGEST_LIMBS)
            products = [
                arithmetic.join_limbs(arithmetic.dot(tile, weights))
                for tile in arithmetic.codes_as_bytes(values, gpu)
            ]
        else:
            weights = weights.astype(jnp.bfloat16)
            values = lax.bitcast_convert_type(values, jnp.bfloat16)
            if masked:
                values = jnp.where((token < length)[None, :], values, 0)
            products = [arithmetic.dot(values, weights)]
        acc = [
            multiply_add(y, growth[None, :], x * decay[None, :], gpu)
            for x, y in zip(acc, products, strict=True)
        ]
        return (new_max, total, shift, spread, *acc)

    zeros = jnp.zeros((rows,), jnp.float32)
    running_max, sink_total = zeros + MASKED, zeros
    if sinks is not None:  # a sink is a key with this score and no value, in the first split
        sink = plt.load(sinks.at[head], mask=stored, other=0).astype(jnp.float32) * LOG2_E
        has_sink = (part == 0) & (sink > MASKED)
        running_max = jnp.where(has_sink, sink, MASKED)
        sink_total = jnp.where(has_sink, 1.0, 0.0)
    acc = [jnp.zeros((size, rows), jnp.float32) for _ in range(pieces)]
    partial = jnp.zeros((SUMS, rows), jnp.float32)
    first = (jnp.arange(SUMS) == 0)[:, None]
    total = jnp.where(first, sink_total[None, :], partial)
    carry: tuple = (running_max, total, partial, partial, *acc)

    low = jnp.maximum(low, begin // block_tokens)
    high = jnp.minimum(high, pl.cdiv(end, block_tokens))
    if not quantized and window is None:
        # The mask of bfloat16 values costs more than a loop of its own for the last block.
        full = length - real_queries + first_query + 1 if causal else length
        middle = jnp.clip(full // block_tokens, low, jnp.maximum(low, high))
        unmasked = functools.partial(attend_block, masked=False)
        carry = lax.fori_loop(low, middle, unmasked, carry)
        low = middle
    carry = lax.fori_loop(low, high, attend_block, carry)
    running_max, *totals = carry
    total, shift, spread = (jnp.sum(x, axis=0) for x in totals[:3])
    acc = totals[3:]

    # --- Output ---------------------------------------------------------------------------------
    inverse = jnp.where(real, 1 / jnp.where(total > 0, total, 1), 0)
    if quantized:
        shifts = [shift + 0 * spread, shift + 8 * spread] * 2
        factors = [1, 1 / 16] * 2
        acc = [x * f + y[None, :] for x, f, y in zip(acc, factors, shifts, strict=True)]
    acc = [x * inverse[None, :] for x in acc]
    if value_order > 1:
        acc = [jnp.where(inside[:, None], x, 0) for x in acc]
        acc = arithmetic.rotate(acc, signs, order=value_order, width=width, axis=0)
        acc = [x * value_order**-0.5 for x in acc]
    out, *partial = outputs
    alone = stored & (splits == 1)
    for i, x in enumerate(acc):
        channel = i * width + column[:, None]
        index = out.at[batch, query[None, :], head[None, :], channel]
        plt.store(index, x.astype(out.dtype), mask=inside[:, None] & alone[None, :])
        if partial:
            index = partial[0].at[slot, query[None, :], head[None, :], channel]
            plt.store(index, x, mask=inside[:, None] & (stored & ~alone)[None, :])
    if partial:
        log_total = jnp.where(real & (total > 0), running_max + jnp.log2(total), MASKED)
        plt.store(partial[1].at[slot, query, head], log_total, mask=stored & ~alone)
        # For the join: where a sequence's splits are.
        pair = jnp.arange(2)
        is_first = jnp.broadcast_to((part == 0) & (head_block == 0), pair.shape)
        plt.store(partial[2].at[batch, pair], jnp.where(pair == 0, slot, splits), mask=is_first)


# --- Joining the splits -------------------------------------------------------------------------


def _join_splits(
    out: Float[Array, "B T H D"],
    means: Float[Array, "slots T H D"],
    log_totals: Float[Array, "slots T H"],
    split: Int[Array, "B 2"],
    chunk: int,
    interpret: bool,
) -> Float[Array, "B T H D"]:
    """Fills in sequences of several splits: means weighted by 2**log_totals, all finite."""
    batch, head_dim = out.shape[0], out.shape[-1]
    rows = math.prod(out.shape[1:-1])
    # Few rows: several programs share the channels of one. Many, most of which have nothing to
    # join: a program looks after several.
    columns = padded(head_dim) if batch * rows > 512 else 32
    rows_each = 4 if rows % 4 == 0 and batch * rows > 2048 else 1
    return pl.pallas_call(
        functools.partial(
            _join, columns=columns, chunk=chunk, rows_each=rows_each, gpu=not interpret
        ),
        grid=(rows // rows_each, batch, pl.cdiv(head_dim, columns)),
        out_shape=jax.ShapeDtypeStruct((batch, rows, head_dim), out.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        input_output_aliases={3: 0},
        compiler_params=plt.CompilerParams(
            num_warps=4 if chunk * columns > 1024 else 1, num_stages=1
        ),
        interpret=interpret,
        name="join_splits",
    )(
        split,
        means.reshape(-1, rows, head_dim),
        log_totals.reshape(-1, rows),
        out.reshape(batch, rows, head_dim),
    ).reshape(out.shape)


def _join(split, *arrays, rows_each: int, **arguments):
    row, batch, part = (pl.program_id(i) for i in range(3))  # read here: `when` may not
    first, splits = split[batch, 0], split[batch, 1]

    def join():
        for i in range(rows_each):
            _join_row(row * rows_each + i, batch, part, first, splits, *arrays, **arguments)

    pl.when(splits > 1)(join)


def _join_row(
    row,
    batch,
    part,
    first,
    splits,
    means,
    log_totals,
    _,
    out,
    *,
    columns: int,
    chunk: int,
    gpu: bool,
):
    column = part * columns + jnp.arange(columns)
    inside = column < out.shape[2]

    def add(i, carry):
        largest, total, acc = carry
        index = i * chunk + jnp.arange(chunk)
        log_total = plt.load(log_totals.at[first + index, row], mask=index < splits, other=MASKED)
        mean = plt.load(
            means.at[first + index[:, None], row, column[None, :]],
            mask=(index < splits)[:, None] & inside[None, :],
            other=0,
        )
        new = jnp.maximum(largest, jnp.max(log_total))
        weight = jnp.where(log_total > MASKED, exp2(log_total - new, gpu), 0)
        decay = jnp.exp2(largest - new)
        total = total * decay + jnp.sum(weight)
        return new, total, acc * decay + jnp.sum(mean * weight[:, None], axis=0)

    carry = jnp.float32(MASKED), jnp.float32(0), jnp.zeros((columns,), jnp.float32)
    _, total, acc = lax.fori_loop(0, pl.cdiv(splits, chunk), add, carry)
    mean = acc / jnp.where(total > 0, total, 1)
    plt.store(out.at[batch, row, column], mean.astype(out.dtype), mask=inside)
