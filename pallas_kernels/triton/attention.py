"""`paged_attention` as one Pallas kernel for NVIDIA GPUs, and a small one that joins its splits.

A program takes one sequence, one KV head, a block of its query rows (T * G of them: the G query
heads of a KV head for each of T tokens) and one split of the context, and walks over blocks of
tokens with an online softmax. What makes it follow memory rather than arithmetic:

- Operands are swapped: scores are `[tokens, rows]` = K qᵀ and the output `[D, rows]` += Vᵀ Pᵀ, so
  that tokens and channels fill the long sides of the matrix unit and eight rows are enough for the
  short one.
- Dequantization is deferred. Codes go to the matrix unit as small float16 integers, made by one or
  two instructions for each pair; the scale and the minimum of a token touch only its scores.
- Weights go to the matrix unit in float16 as p * scale / unit, `unit` being the largest scale so
  far, so that values of any magnitude keep their digits.

Scores are in units of log2: exp2 is the machine's own.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.page_format import Pages
from pallas_kernels.triton import arithmetic, prefill
from pallas_kernels.triton.arithmetic import LOG2_E, MASKED, OFFSET, exp2, multiply_add, padded
from pallas_kernels.triton.join import join_splits


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut. The defaults per device are data, in `pallas_kernels/tuning`.

    Attributes:
      block_tokens: tokens in a turn of the loop; a power of two, at least 16.
      rows: most query rows in a program; a power of two, at least 8.
      programs: contexts are split while that makes no more programs than this,
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
        8,
        1 << (group - 1).bit_length(),
        min(blocks.rows, _power_of_two(queries * group)),
    )
    block_queries = min(queries, rows // group)
    query_blocks = pl.cdiv(queries, block_queries)
    capacity = page_table.shape[1] * pages.page_size
    splits = min(
        max(1, blocks.programs // (batch * pages.kv_heads * query_blocks)),
        blocks.max_splits,
        pl.cdiv(capacity, blocks.block_tokens),
    )

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
        splits=splits,
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
    if splits == 1:
        out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    else:
        partial = (batch, queries, heads, splits)
        out_shape = [
            jax.ShapeDtypeStruct((*partial, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partial, jnp.float32),
        ]
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
        else jnp.asarray(arithmetic.signs(pages.format.order, head_dim, jnp.float16)),
    )
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def named(*refs):
        kernel(**dict(zip(arrays, refs, strict=False)), outputs=refs[len(arrays) :])

    outputs = pl.pallas_call(
        named,
        grid=(splits, pages.kv_heads * query_blocks, batch),
        out_shape=out_shape,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(out_shape),
        compiler_params=plt.CompilerParams(
            num_warps=blocks.num_warps, num_stages=blocks.num_stages
        ),
        interpret=interpret,
        name="paged_attention",
    )(*arrays.values())
    if splits == 1:
        return outputs[0]
    mean, log_total = outputs
    return join_splits(mean, log_total, q.dtype, interpret)


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


def _attend(
    *,
    q,
    data,
    page_table,
    lengths,
    query_lengths,
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
    splits: int,
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
    """One program. Arrays are whole; what is static comes after `outputs`."""
    split, batch = pl.program_id(0), pl.program_id(2)
    kv_head = lax.rem(pl.program_id(1), kv_heads)
    query_block = lax.div(pl.program_id(1), kv_heads)
    length, real_queries, layer = lengths[batch], query_lengths[batch], layer[0]
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

    # The tokens that some row sees are begin .. end - 1, those that all see full_begin ..
    # full_end - 1.
    if causal:
        end = length - real_queries + last_query + 1
        full_end = length - real_queries + first_query + 1
    else:
        end = full_end = length
    end = jnp.where(last_query >= first_query, end, 0)
    begin = full_begin = jnp.int32(0)
    if window is not None:
        begin = jnp.maximum(length - real_queries + first_query - window + 1, 0)
        full_begin = jnp.maximum(length - real_queries + last_query - window + 1, 0)

    # --- Queries: rotated, as float16 within a power of two of 1 --------------------------------
    column = jnp.arange(padded(width))
    inside = column < width

    # Held as [rows, width], at least the 16 rows that a matrix product takes, and turned after the
    # rotation: a product leaves its result in the registers where the loop's want it turned.
    tall = jnp.arange(max(16, rows))
    tall_query = query_block * block_queries + tall // group
    tall_head = kv_head * group + tall % group
    tall_real = (tall < block_queries * group) & (tall_query < jnp.minimum(queries, real_queries))

    def load_query(piece):
        channel = piece * width + column
        index = q.at[batch, tall_query[:, None], tall_head[:, None], channel[None, :]]
        x = plt.load(index, mask=tall_real[:, None] & inside[None, :], other=0)
        return x.astype(jnp.float32)

    def turn(x):  # [width, rows]; rows that were added are zero
        return jnp.sum(x.reshape(-1, rows, x.shape[1]), axis=0).T if len(x) > rows else x.T

    q_pieces = [load_query(i) for i in range(pieces)]
    factor = scale * LOG2_E if soft_cap is None else scale / soft_cap
    if quantized:
        largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x)) for x in q_pieces))
        magnitude = arithmetic.power_of_two_below(largest)
        q_pieces = [(x * (1 / magnitude)).astype(jnp.float16) for x in q_pieces]
        q_pieces = arithmetic.rotate(q_pieces, signs, order=order, width=width, axis=1)
        q_pieces = [turn(x) for x in q_pieces]
        factor *= order**-0.5 * magnitude
        q_pieces = [
            (x * (1 / f)).astype(jnp.float16)
            for x, f in zip(q_pieces, arithmetic.FACTORS, strict=True)
        ]
        sums = [jnp.sum(x.astype(jnp.float32), axis=0) for x in q_pieces]
        minus_offset = -OFFSET * functools.reduce(jnp.add, sums)[None, :]
        total_query = factor * functools.reduce(
            jnp.add, (x * f for x, f in zip(sums, arithmetic.FACTORS, strict=True))
        )
    else:
        q_pieces = [turn(x).astype(jnp.bfloat16) for x in q_pieces]

    # --- The loop over blocks of tokens ---------------------------------------------------------

    def attend_block(block, carry, masked):
        running_max, total, shift, unit, *acc = carry
        token = block * block_tokens + jnp.arange(block_tokens)
        if page_size % block_tokens == 0:  # the block lies in one page
            page = page_table[batch, lax.div(block, page_size // block_tokens)]
            offset = lax.rem(block, page_size // block_tokens) * block_tokens
            offset = offset + jnp.arange(block_tokens)
            page_of_row = page_of_column = page
        else:
            within = jnp.minimum(token, length - 1) if masked else token
            page = plt.load(page_table.at[batch, lax.div(within, page_size)])
            offset = lax.rem(within, page_size)
            page_of_row, page_of_column = page[:, None], page[None, :]

        def load_keys():  # [tokens, width]
            index = data.at[layer, page_of_row, kv_head, 0, offset[:, None], column[None, :]]
            if padded(width) == width:
                return plt.load(index)
            mask = jnp.broadcast_to(inside[None, :], (block_tokens, padded(width)))
            return plt.load(index, mask=mask, other=0)

        def load_values():  # [width, tokens]
            index = data.at[layer, page_of_column, kv_head, 1, offset[None, :], column[:, None]]
            if padded(width) == width:
                return plt.load(index)
            mask = jnp.broadcast_to(inside[:, None], (padded(width), block_tokens))
            return plt.load(index, mask=mask, other=0)

        def load_scales(kind):
            words = plt.load(scales.at[layer, page, kv_head, kind, offset])
            if masked:  # a slot never written may hold anything, and 0 * nan is nan
                words = jnp.where(token < length, words, jnp.uint32(0))
            return arithmetic.split_scales(words)

        # Scores [tokens, rows].
        keys = load_keys()
        if quantized:
            key_scale, key_minimum = load_scales(0)
            scores = minus_offset
            for x, y in zip(arithmetic.codes_with_offset(keys, gpu), q_pieces, strict=True):
                scores = scores + arithmetic.dot(x, y)
            scores = scores * (key_scale * factor)[:, None]
            scores = multiply_add(key_minimum[:, None], total_query[None, :], scores, gpu)
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

        new_max = jnp.maximum(running_max, jnp.max(scores, axis=0))
        decay = exp2(running_max - new_max, gpu)
        weights = exp2(scores - new_max[None, :], gpu)
        if masked:
            weights = jnp.where(visible, weights, 0)
        total = total * decay + jnp.sum(weights, axis=0)

        # Output [D, rows]. x = (code - 8) * scale + (minimum + 8 * scale): the first term is the
        # matrix unit's, in units of `unit`, the second is a sum over tokens.
        values = load_values()
        if quantized:
            value_scale, value_minimum = load_scales(1)
            middle = value_minimum + 8 * value_scale
            shift = shift * decay + jnp.sum(weights * middle[:, None], axis=0)
            new_unit = jnp.maximum(unit, jnp.max(value_scale))
            per_unit = 1 / new_unit
            decay = decay * (unit * per_unit)
            weights = (weights * (value_scale * per_unit)[:, None]).astype(jnp.float16)
            tiles = arithmetic.codes_centred(values, gpu)
            unit = new_unit
        else:
            weights = weights.astype(jnp.bfloat16)
            values = lax.bitcast_convert_type(values, jnp.bfloat16)
            if masked:
                values = jnp.where((token < length)[None, :], values, 0)
            tiles = [values]
        acc = [
            x * decay[None, :] + arithmetic.dot(tile, weights)
            for x, tile in zip(acc, tiles, strict=True)
        ]
        return (new_max, total, shift, unit, *acc)

    zeros = jnp.zeros((rows,), jnp.float32)
    running_max, total = zeros + MASKED, zeros
    if sinks is not None:  # a sink is a key with this score and no value, in the first split
        sink = plt.load(sinks.at[head], mask=stored, other=0).astype(jnp.float32) * LOG2_E
        has_sink = (split == 0) & (sink > MASKED)
        running_max = jnp.where(has_sink, sink, MASKED)
        total = jnp.where(has_sink, 1.0, 0.0)
    acc = [jnp.zeros((padded(width), rows), jnp.float32) for _ in range(pieces)]
    carry: tuple = (running_max, total, zeros, jnp.float32(1e-30), *acc)

    low, high = begin // block_tokens, pl.cdiv(end, block_tokens)
    per_split = pl.cdiv(high - low, splits)
    low = low + split * per_split
    high = jnp.minimum(low + per_split, high)
    full_high = jnp.clip(full_end // block_tokens, low, high)
    full_low = low
    if window is not None:
        full_low = jnp.clip(pl.cdiv(full_begin, block_tokens), low, full_high)
        carry = lax.fori_loop(low, full_low, functools.partial(attend_block, masked=True), carry)
    carry = lax.fori_loop(full_low, full_high, functools.partial(attend_block, masked=False), carry)
    carry = lax.fori_loop(full_high, high, functools.partial(attend_block, masked=True), carry)
    running_max, total, shift, unit, *acc = carry

    # --- Output ---------------------------------------------------------------------------------
    inverse = jnp.where(real, 1 / jnp.where(total > 0, total, 1), 0)
    if quantized:
        acc = [x * unit + shift[None, :] for x in acc]
    acc = [x * inverse[None, :] for x in acc]
    if value_order > 1:
        acc = [jnp.where(inside[:, None], x, 0) for x in acc]
        acc = arithmetic.rotate(acc, signs, order=value_order, width=width, axis=0)
        acc = [x * value_order**-0.5 for x in acc]
    for i, x in enumerate(acc):
        part = (split,) if len(outputs) == 2 else ()
        channel = i * width + column[:, None]
        index = outputs[0].at[batch, query[None, :], head[None, :], *part, channel]
        mask = inside[:, None] & stored[None, :]
        plt.store(index, x.astype(outputs[0].dtype), mask=mask)
    if len(outputs) == 2:
        log_total = jnp.where(real & (total > 0), running_max + jnp.log2(total), MASKED)
        plt.store(outputs[1].at[batch, query, head, split], log_total, mask=stored)
