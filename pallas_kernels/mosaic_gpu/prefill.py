"""`paged_attention` as one Pallas Mosaic GPU kernel, for Hopper.

A program is one warpgroup. It takes one sequence, one KV head, a block of its query rows (T * G of
them: the G query heads of a KV head for each of T tokens) and one split of the context. Pages come
into a ring of shared memory by bulk copies, several blocks ahead of the arithmetic:

- Operands are swapped: scores are `[tokens, rows]` = K qᵀ and the output `[channels, rows]` =
  Vᵀ Pᵀ, so that tokens and channels fill the 64 rows of a `wgmma` and eight query rows are enough.
- The codes are the left operand, straight from registers. A nibble masked out of a 16-bit word
  *is* a float16: the subnormal code * 2^-24 (or 2^-20, four bits up), which the matrix unit
  multiplies exactly. So unpacking is one `and` for each pair of codes, and there is no offset to
  take out again.
- Dequantization is deferred: the scale and the minimum of a token touch only its scores.
- Weights go to the matrix unit in float16 as exp2(score) * scale relative to the largest such
  product so far, so that values of any magnitude keep their digits.
- Each block's output is a fresh accumulator that float32 arithmetic adds to the sum: the matrix
  unit truncates, and would lose digits over a long context.

Scores are in units of log2.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt16, UInt32

from pallas_kernels import page_format
from pallas_kernels.page_format import Pages

MATRIX = plgpu.Layout.WGMMA
TOKENS = plgpu.Layout.WGMMA.reduce(1)  # an array [64] beside [64, rows]
ROWS = plgpu.Layout.WGMMA.reduce(0)  # an array [rows] under [64, rows]

TILE = 64  # rows of the left operand of one `wgmma`

# Finite, so that a row with nothing visible yet has exp2(0) to multiply, not exp2(nan).
MASKED = -1e30
LOG2_E = math.log2(math.e)
# Added to every value scale: its logarithm is then finite. 2^104 times 2^24 tokens is a float32.
TINY = 2.0**-104

# What the four masks of `_codes` make of a code, over 2^-24.
FACTORS = (1, 16, 1, 16)
CODE_UNIT = 2.0**24


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      block_tokens: tokens in a turn of the loop; a multiple of 64.
      rows: most query rows in a program; a multiple of 8.
      programs: contexts are split while that makes no more programs than this,
      max_splits: and into no more parts than this: joining them takes time too.
      slots: blocks in shared memory at a time.
    """

    block_tokens: int = 64
    rows: int = 32
    programs: int = 528
    max_splits: int = 64
    slots: int = 4


def supported(q: Float[Array, "B T H D"], pages: Pages) -> str | None:
    """Why this kernel cannot run, or `None`."""
    group = q.shape[2] // pages.kv_heads
    if pages.format.layout == "paired":
        return "Expected the layout to be 'split' or 'bf16', got 'paired'"
    if pages.head_dim not in (64, 128, 256):
        return f"Expected {pages.head_dim=} to be 64, 128 or 256"
    if pages.page_size % TILE:
        return f"Expected {pages.page_size=} to be a multiple of {TILE}"
    if group > 64:
        return f"Expected {group} query heads for each KV head to be at most 64"
    if q.dtype.itemsize > 4:
        return f"Expected {q.dtype=} to be of at most 32 bits"
    return None


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
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `pallas_kernels.paged_attention`. Beyond its arguments:

    `blocks` says how to cut the work; `None` is the default.
    `interpret` runs it on a CPU, by Pallas' interpreter of GPU kernels.
    """
    blocks = Blocks() if blocks is None else blocks
    batch, queries, heads, head_dim = q.shape
    kv_heads, page_size = pages.kv_heads, pages.page_size
    group = heads // kv_heads
    quantized = pages.scales is not None
    pieces = 4 if quantized else 1
    width = head_dim // pieces
    # A block of queries is a whole number of tokens, each with all heads of the group.
    block_queries = max(1, min(queries, max(blocks.rows, group) // group))
    rows = -(-block_queries * group // 8) * 8
    query_blocks = pl.cdiv(queries, block_queries)
    # A block is a part of a page, or whole pages.
    chunk = math.gcd(page_size, blocks.block_tokens)
    chunks = blocks.block_tokens // chunk
    splits = min(
        max(1, blocks.programs // (batch * kv_heads * query_blocks)),
        blocks.max_splits,
        pl.cdiv(page_table.shape[1] * page_size, blocks.block_tokens),
    )

    factor = scale * LOG2_E if soft_cap is None else scale / soft_cap
    q_blocks, factors, totals = _prepare(
        q, kv_heads, block_queries, query_blocks, rows, factor, pages.format.order, quantized
    )
    arrays = dict(
        q=q_blocks,
        data=pages.data,
        page_table=page_table,
        lengths=lengths,
        query_lengths=query_lengths,
        layer=jnp.asarray(layer, jnp.int32).reshape(1),
        factors=factors,
        totals=totals,
        scales=pages.scales,
        sinks=None if sinks is None else _sink_rows(sinks, kv_heads, block_queries, rows),
    )
    arrays = {name: x for name, x in arrays.items() if x is not None}
    kernel = functools.partial(
        _attend,
        page_size=page_size,
        group=group,
        block_queries=block_queries,
        rows=rows,
        block_tokens=blocks.block_tokens,
        chunk=chunk,
        splits=splits,
        width=width,
        slots=blocks.slots,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        gpu=not interpret,
    )

    def body(*refs):
        outputs = refs[len(arrays) : len(arrays) + 2]
        scratch = refs[len(arrays) + 2 :]
        kernel(**dict(zip(arrays, refs, strict=False)), outputs=outputs, scratch=scratch)

    dtype = jnp.float16 if quantized else jnp.bfloat16
    scratch_types = [
        plgpu.SMEM((pieces, rows, width), dtype, transforms=_tiled(width)),
        plgpu.SMEM((rows, blocks.block_tokens), dtype, transforms=_tiled(blocks.block_tokens)),
        plgpu.SMEM((blocks.slots, chunks, 2, chunk, width), jnp.uint16, transforms=_tiled(width)),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=2 * chunks, num_barriers=blocks.slots),
    ]
    if quantized:
        scratch_types.append(plgpu.SMEM((blocks.slots, chunks, 2, chunk), jnp.uint32))
    lead = (batch, kv_heads, query_blocks, splits)
    options = dict(interpret=plgpu.InterpretGPUParams()) if interpret else {}
    means, log_totals = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*lead, head_dim // TILE, TILE, rows), jnp.float32),
            jax.ShapeDtypeStruct((*lead, rows), jnp.float32),
        ],
        grid=(splits, kv_heads * query_blocks, batch),
        grid_names=("split", "head", "batch"),
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=True,
            reduction_scratch_bytes=128 * rows,
        ),
        **options,
    )(*arrays.values())
    means = _in_order(means, width)
    out = _join_splits(means, log_totals)  # [B, K, query blocks, D, rows]
    out = jnp.moveaxis(out, -1, 3)[:, :, :, : block_queries * group]
    out = out.reshape(batch, kv_heads, query_blocks * block_queries, group, head_dim)
    out = out[:, :, :queries].swapaxes(1, 2).reshape(q.shape)
    return page_format.rotate(out, pages.format.value_order).astype(q.dtype)


def _tiled(width: int) -> tuple:
    """How rows of 16-bit numbers lie in shared memory for `wgmma` to read them."""
    width = min(width, 64)
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def _prepare(
    q: Float[Array, "B T H D"],
    kv_heads: int,
    block_queries: int,
    query_blocks: int,
    rows: int,
    factor: float,
    order: int,
    quantized: bool,
) -> tuple[Array, Array, Array | None]:
    """Queries as the kernel takes them.

    Returns:
      blocks of rows `[B, K, query blocks, pieces, rows, D / pieces]`, rotated, float16 within a
        power of two of 1 (bfloat16 as given, if not quantized);
      the factor `[B]` that turns their products with codes into scores;
      the scores of a key of ones, `[B, K, query blocks, rows]`.
    """
    batch, queries, heads, head_dim = q.shape
    group = heads // kv_heads
    q = jnp.pad(q, ((0, 0), (0, query_blocks * block_queries - queries), (0, 0), (0, 0)))
    q = q.reshape(batch, query_blocks, block_queries, kv_heads, group, head_dim)
    q = jnp.moveaxis(q, 3, 1).reshape(batch, kv_heads, query_blocks, -1, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, rows - q.shape[3]), (0, 0)))
    if not quantized:
        blocks = q.astype(jnp.bfloat16)[:, :, :, None]
        return blocks, jnp.full(batch, factor, jnp.float32), None
    q = page_format.rotate(q, order)
    magnitude = _power_of_two_below(jnp.max(jnp.abs(q), axis=(1, 2, 3, 4)))
    q = q * (1 / magnitude)[:, None, None, None, None]
    shrink = np.repeat(np.float32(1 / np.array(FACTORS)), head_dim // 4)
    q = (q * shrink).astype(jnp.float16)
    factors = factor * magnitude
    totals = jnp.sum(q.astype(jnp.float32) / shrink, axis=-1) * factors[:, None, None, None]
    blocks = q.reshape(*q.shape[:-1], 4, head_dim // 4).swapaxes(3, 4)
    return blocks, factors * CODE_UNIT, totals


def _power_of_two_below(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The largest power of two not above a positive x; 1 for zero, subnormals and no numbers."""
    exponent = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    return jnp.where((exponent == 0) | (power == jnp.inf), 1, power)


def _sink_rows(
    sinks: Float[Array, "H"], kv_heads: int, block_queries: int, rows: int
) -> Float[Array, "K rows"]:
    per_token = sinks.astype(jnp.float32).reshape(kv_heads, 1, -1) * LOG2_E
    out = jnp.tile(per_token, (1, block_queries, 1)).reshape(kv_heads, -1)
    return jnp.pad(out, ((0, 0), (0, rows - out.shape[1])))


# --- The kernel ---------------------------------------------------------------------------------


def _attend(
    *,
    q,
    data,
    page_table,
    lengths,
    query_lengths,
    layer,
    factors,
    totals=None,
    scales=None,
    sinks=None,
    outputs,
    scratch,
    page_size: int,
    group: int,
    block_queries: int,
    rows: int,
    block_tokens: int,
    chunk: int,
    splits: int,
    width: int,
    slots: int,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    gpu: bool,
):
    """One program. Arrays are whole; what is static comes after `scratch`."""
    q_smem, weights_smem, data_smem, q_barrier, barriers, *scales_smem = scratch
    quantized = scales is not None
    pieces = 4 if quantized else 1
    tiles = block_tokens // TILE
    chunks = block_tokens // chunk
    kv_heads = data.shape[2]
    split, batch = lax.axis_index("split"), lax.axis_index("batch")
    kv_head = lax.rem(lax.axis_index("head"), kv_heads)
    query_block = lax.div(lax.axis_index("head"), kv_heads)
    length, real_queries, layer = lengths[batch], query_lengths[batch], layer[0]
    factor = factors[batch]

    # The tokens that some row sees are begin .. end - 1, those that all see full_begin ..
    # full_end - 1.
    first_query = query_block * block_queries
    last_query = jnp.minimum(first_query + block_queries, real_queries) - 1
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
    low, high = lax.div(begin, block_tokens), _cdiv(jnp.maximum(end, 0), block_tokens)
    per_split = _cdiv(jnp.maximum(high - low, 0), splits)
    low = low + split * per_split
    high = jnp.minimum(low + per_split, high)
    turns = jnp.maximum(high - low, 0)

    # --- Copies: block number `turn` of this split into slot turn % slots -----------------------

    def page_ids(turn):
        """Of the block's chunks. Loaded a turn before they are needed."""
        token = (low + turn) * block_tokens
        last = jnp.maximum(end - 1, 0)
        return tuple(
            page_table[batch, lax.div(jnp.minimum(token + i * chunk, last), page_size)]
            for i in range(chunks)
        )

    stored = [(data, data_smem), *((scales, smem) for smem in scales_smem)]

    def copy(turn, ids):
        slot = lax.rem(turn, slots)
        for i, page in enumerate(ids):
            offset = lax.rem((low + turn) * block_tokens + i * chunk, page_size)
            within = pl.ds(pl.multiple_of(offset, chunk), chunk)
            pairs = [
                (source.at[layer, page, kv_head], target.at[slot, i]) for source, target in stored
            ]
            if not quantized:  # keys and values apart: a copy has five axes at most, tiles included
                [(source, target)] = pairs
                pairs = [(source.at[kind], target.at[kind]) for kind in range(2)]
            for source, target in pairs:
                source = source.at[:, within] if quantized else source.at[within]
                plgpu.copy_gmem_to_smem(source, target, barriers.at[slot])

    @pl.when(turns > 0)
    def _():
        plgpu.copy_gmem_to_smem(q.at[batch, kv_head, query_block], q_smem, q_barrier)

    for turn in range(slots):
        pl.when(turn < turns)(functools.partial(copy, turn, page_ids(turn)))

    # --- Rows: which queries, and which tokens each may see: first .. last ----------------------
    row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=ROWS)
    query = first_query + lax.div(row, group)
    # Rows that are no queries see what the others see, so that they hinder nothing.
    position = jnp.minimum(jnp.maximum(query, first_query), last_query) + (length - real_queries)

    def load_rows(ref):
        return plgpu.load(ref, layout=ROWS, optimized=False)

    total_query = load_rows(totals.at[batch, kv_head, query_block]) if quantized else None

    # --- The loop over blocks of tokens ---------------------------------------------------------

    def attend_block(turn, carry, masked):
        running_max, total, shift, acc, next_ids = carry
        slot = lax.rem(turn, slots)
        plgpu.barrier_wait(barriers.at[slot])

        def chunk_of(tile):
            return tile * TILE // chunk, pl.ds(tile * TILE % chunk, TILE)

        def load_tile(kind, tile):
            index, within = chunk_of(tile)
            return data_smem.at[slot, index, kind, within]

        def load_scales(kind, tile, token):
            index, within = chunk_of(tile)
            words = plgpu.load(scales_smem[0].at[slot, index, kind, within], layout=TOKENS)
            if masked:  # a slot never written may hold anything, and 0 * nan is nan
                words = jnp.where(token < length, words, jnp.uint32(0))
            return _split_scales(words)

        def token_of(tile, shape=(TILE,), axis=0, layout=TOKENS):
            token = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
            return token + ((low + turn) * block_tokens + tile * TILE)

        def keys_and_queries(tile):
            words = plgpu.load(load_tile(0, tile), layout=MATRIX)
            for i, keys in enumerate(_numbers(words, quantized, gpu)):
                yield keys, q_smem.at[i].transpose((1, 0))

        # [64 tokens, rows] for each tile.
        products = _sums_of_products([keys_and_queries(tile) for tile in range(tiles)], rows, gpu)

        # Scores, and what they are compared by: the size of their share of the output.
        scores, shares, visible, value_scales = [], [], [], []
        for tile, x in enumerate(products):
            token = token_of(tile)
            if quantized:
                key_scale, key_minimum = load_scales(0, tile, token)
                x = x * _beside(key_scale * factor, x)
                x = x + _beside(key_minimum, x) * _under(total_query, x)
            else:
                x = x * factor
            if soft_cap is not None:
                x = soft_cap * LOG2_E * jnp.tanh(x)
            if masked:
                token = token_of(tile, (TILE, rows), 0, MATRIX)
                last = position if causal else jnp.zeros_like(position) + (length - 1)
                see = token <= _under(last, x)
                if window is not None:
                    see &= token > _under(position - window, x)
                x = jnp.where(see, x, MASKED)
                visible.append(see)
            scores.append(x)
            if quantized:
                value_scale, value_minimum = load_scales(1, tile, token_of(tile))
                value_scale = value_scale + TINY
                value_scales.append((value_scale, value_minimum))
                x = x + _beside(jnp.log2(value_scale), x)
            shares.append(x)

        largest = jnp.max(functools.reduce(jnp.maximum, shares), axis=0)
        new_max = jnp.maximum(running_max, largest)
        decay = jnp.exp2(running_max - new_max)

        total = total * _under(decay, total)
        shift = shift * _under(decay, shift)
        for tile, x in enumerate(scores):
            weights = jnp.exp2(x - _under(new_max, x))
            if masked:
                weights = jnp.where(visible[tile], weights, 0)
            total = total + weights
            if quantized:
                value_scale, value_minimum = value_scales[tile]
                shift = shift + weights * _beside(value_minimum, weights)
                weights = weights * _beside(value_scale, weights)
            weights = weights.astype(weights_smem.dtype)
            weights_smem.at[:, pl.ds(tile * TILE, TILE)].transpose((1, 0))[...] = weights

        values = []
        for tile in range(tiles):
            token = None
            if masked and not quantized:
                token = token_of(tile, (TILE, TILE), 1, MATRIX)
            values.append(_values(load_tile(1, tile), quantized, token, length, gpu))
        plgpu.commit_smem()

        # Every warp has read the slot.
        @pl.when(turn + slots < turns)
        def _():
            copy(turn + slots, next_ids)

        def values_and_weights(i):
            for tile in range(tiles):
                weights = weights_smem.at[:, pl.ds(tile * TILE, TILE)].transpose((1, 0))
                yield values[tile][i], weights

        # [64 channels, rows] for each tile of channels.
        sums = [values_and_weights(i) for i in range(len(acc))]
        products = _sums_of_products(sums, rows, gpu)
        acc = tuple(a * _under(decay, a) + x for a, x in zip(acc, products, strict=True))
        return new_max, total, shift, acc, page_ids(turn + slots + 1)

    def zeros():
        return plgpu.layout_cast(jnp.zeros((TILE, rows), jnp.float32), MATRIX)

    running_max = plgpu.layout_cast(jnp.full((rows,), MASKED, jnp.float32), ROWS)
    if sinks is not None:  # a sink is a key with this score and no value, in the first split
        sink = load_rows(sinks.at[kv_head])
        sink = jnp.where(split == 0, jnp.maximum(sink, MASKED), MASKED)
        running_max = sink
    channel_tiles = pieces * width // TILE
    acc = tuple(zeros() for _ in range(channel_tiles))
    carry = (running_max, zeros(), zeros(), acc, page_ids(slots))

    @pl.when(turns > 0)
    def _():
        plgpu.barrier_wait(q_barrier)

    full_high = jnp.minimum(jnp.maximum(lax.div(full_end, block_tokens) - low, 0), turns)
    full_low = jnp.int32(0)
    if window is not None:
        full_low = jnp.minimum(jnp.maximum(_cdiv(full_begin, block_tokens) - low, 0), full_high)
        carry = lax.fori_loop(0, full_low, functools.partial(attend_block, masked=True), carry)
    carry = lax.fori_loop(full_low, full_high, functools.partial(attend_block, masked=False), carry)
    carry = lax.fori_loop(full_high, turns, functools.partial(attend_block, masked=True), carry)
    running_max, total, shift, acc, _ = carry

    # --- Output ---------------------------------------------------------------------------------
    total = jnp.sum(total, axis=0)
    if sinks is not None:
        total = total + jnp.where(sink > MASKED, jnp.exp2(sink - running_max), 0)
    real = (query < real_queries) & (row < block_queries * group)
    some = real & ((total > 0) | (total != total))
    inverse = jnp.where(some, 1 / jnp.where(some, total, 1), 0)
    if quantized:
        shift = jnp.sum(shift, axis=0)
    means = outputs[0].at[batch, kv_head, query_block, split]
    for i, x in enumerate(acc):
        if quantized:
            x = x * (CODE_UNIT / FACTORS[i]) + _under(shift, x)
        x = x * _under(inverse, x)
        means.at[i][...] = x
    log_total = jnp.where(some, running_max + jnp.log2(jnp.where(some, total, 1)), MASKED)
    outputs[1].at[batch, kv_head, query_block, split][...] = log_total


def _sums_of_products(sums, rows: int, gpu: bool) -> list[Float[Array, "64 rows"]]:
    """For each of `sums`, the sum of the products of its pairs: an array and a reference."""
    if not gpu:  # the interpreter wants both in shared memory

        def dot(a, b):
            return jnp.dot(a, b[...], preferred_element_type=jnp.float32)

        return [functools.reduce(jnp.add, (dot(a, b) for a, b in pairs)) for pairs in sums]

    def multiply(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(multiply, *[plgpu.ACC((TILE, rows), jnp.float32)] * len(sums))


def _cdiv(a, b: int):
    return lax.div(a + (b - 1), b)


def _beside(x, like):
    """[tokens] as [tokens, rows]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, (0,)), MATRIX)


def _under(x, like):
    """[rows] as [tokens, rows]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, (1,)), MATRIX)


# --- Codes --------------------------------------------------------------------------------------


def _numbers(words: UInt16[Array, "a b"], quantized: bool, gpu: bool) -> list[Float[Array, "a b"]]:
    """Words as left operands: their four codes, times 2^-24 and FACTORS, or one bfloat16."""
    if not quantized:
        return [lax.bitcast_convert_type(words, jnp.bfloat16)]
    upper = _shift_right(words, 8, gpu)
    return [*_low_codes(words, 2), *_low_codes(upper, 2)]


def _low_codes(words: UInt16[Array, "a b"], count: int) -> list[Float[Array, "a b"]]:
    masks = (jnp.uint16(0xF), jnp.uint16(0xF0))[:count]
    return [lax.bitcast_convert_type(words & mask, jnp.float16) for mask in masks]


def _values(ref, quantized: bool, token, length, gpu: bool) -> list[Float[Array, "64 tokens"]]:
    """Stored rows [tokens, width] as left operands [64 channels, tokens].

    As `_in_order` undoes it: with words narrower than a tile, a tile holds all
    words several times, each time another nibble of them. With four words to a row of codes, tile
    i of n holds nibbles i, n + i, …
    """
    width = ref.shape[1]
    if not quantized:
        out = []
        for i in range(width // TILE):
            words = plgpu.load(ref.at[:, pl.ds(i * TILE, TILE)].transpose((1, 0)), layout=MATRIX)
            x = lax.bitcast_convert_type(words, jnp.bfloat16)
            if token is not None:
                x = jnp.where(token < length, x, jnp.bfloat16(0))
            out.append(x)
        return out
    copies = TILE // width
    ref = ref.transpose((1, 0))
    if copies == 1:
        return _numbers(plgpu.load(ref, layout=MATRIX), True, gpu)
    words = plgpu.load(ref, layout=_repeated(copies) if gpu else MATRIX)
    return _low_codes(_spread(words, copies, gpu), 4 // copies)


def _repeated(copies: int):
    """The layout MATRIX of an array with 64 / copies rows: warps repeat one another's rows."""
    warps = 4 // copies
    tiling = ((16 * warps, 8), (16, 8), (8, 8), (2,)) if warps > 1 else ((16, 8), (8, 8), (2,))
    warp_dims = (plgpu.Replicated(copies), -7) if warps > 1 else (plgpu.Replicated(4),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiling), warp_dims=warp_dims, lane_dims=(-3, -2), vector_dim=-1
    )


def _spread(words: UInt16[Array, "w tokens"], copies: int, gpu: bool) -> UInt16[Array, "64 tokens"]:
    """All words, one copy under the other, copy i shifted right by i * 16 / copies bits."""
    bits = 16 // copies
    if not gpu:
        return jnp.concatenate([words >> jnp.uint16(bits * i) for i in range(copies)])
    shape = (TILE, words.shape[1])

    @plgpu.inline_mgpu(
        arg_types=(_repeated(copies),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint16, layout=MATRIX),
    )
    def spread(_, words):
        from jax.experimental.mosaic.gpu import fragmented_array, utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        i32 = ir.IntegerType.get_signless(32)
        warp = arith.shrui(utils.thread_idx(), utils.c(5, i32))
        amount = arith.muli(arith.divui(warp, utils.c(4 // copies, i32)), utils.c(bits, i32))
        layout = fragmented_array.WGMMA_LAYOUT
        shifted = _map_words(words, lambda x: arith.shrui(x, amount))
        # The same registers, now each copy's its own.
        registers = shifted.registers.reshape(layout.registers_shape(shape))
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=False
        )

    return spread(words)


def _shift_right(words: UInt16[Array, "a b"], bits: int, gpu: bool) -> UInt16[Array, "a b"]:
    """A pair of words at a time: the lower one's upper bits are the other's, to be masked out."""
    if not gpu:
        return words >> jnp.uint16(bits)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct(words.shape, jnp.uint16, layout=MATRIX),
    )
    def shift(_, words):
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        amount = utils.c(bits, ir.IntegerType.get_signless(32))
        return _map_words(words, lambda x: arith.shrui(x, amount))

    return shift(words)


def _map_words(words, f):
    """Applies f to the 32-bit registers of an array of 16-bit numbers."""
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jaxlib.mlir import ir

    i32 = ir.IntegerType.get_signless(32)
    registers = np.empty_like(words.registers)
    for index, register in np.ndenumerate(words.registers):
        registers[index] = utils.bitcast(f(utils.bitcast(register, i32)), register.type)
    return fragmented_array.FragmentedArray(
        _registers=registers, _layout=words.layout, _is_signed=False
    )


def _in_order(
    tiles: Float[Array, "*lead tiles 64 rows"], width: int
) -> Float[Array, "*lead D rows"]:
    """Undoes the order of channels in `_values`."""
    *lead, count, _, rows = tiles.shape
    if width < TILE:
        tiles = tiles.reshape(*lead, count, TILE // width, width, rows).swapaxes(-4, -3)
    return tiles.reshape(*lead, -1, rows)


def _split_scales(
    words: UInt32[Array, "n"],
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """One word → (scale, minimum) in float32."""
    scale = lax.bitcast_convert_type(words << jnp.uint32(16), jnp.float32)
    return scale, lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)


# --- Joining the splits -------------------------------------------------------------------------


def _join_splits(
    means: Float[Array, "B K blocks splits D rows"],
    log_totals: Float[Array, "B K blocks splits rows"],
) -> Float[Array, "B K blocks D rows"]:
    """The mean of the splits' outputs, weighted by 2**log_totals. Every split's mean is finite."""
    if means.shape[3] == 1:
        return means[:, :, :, 0]
    weights = jnp.exp2(log_totals - jnp.max(log_totals, axis=3, keepdims=True))
    weights = jnp.where(log_totals > MASKED, weights, 0)
    # A split whose mean is NaN has a NaN for its total.
    total = jnp.sum(weights, axis=3)
    mean = jnp.sum(means * weights[:, :, :, :, None], axis=3)
    return mean / jnp.where(total > 0, total, 1)[:, :, :, None]
