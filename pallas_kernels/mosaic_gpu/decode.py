"""Decode attention over INT4 pages in Pallas Mosaic GPU, for Hopper: a few query rows a sequence.

A program is one warpgroup. It takes one sequence, one KV head and one split of the context, and
walks over it 128 tokens at a time. Pages come into a ring of shared memory by bulk copies.

Everything is exact in integers, up to the softmax:

- Codes are bytes. `word & 0x0F0F` is two of the four codes of a word, as bytes; `word & 0xF0F0` the
  other two, times 16. That is all the unpacking of keys.
- Queries are numbers of 16 bits, in two digits of 8: every row of queries is two columns of the
  matrix product, the upper digit and the lower one, and 256 * upper + lower is the product in
  int32. So are the weights of the softmax. A row has a unit of its own; weights are relative to the
  largest in the block, so that none is lost.
- The four warps share nothing but the copies: each has 32 of the 128 tokens, its own maximum and
  its own sums, joined at the end.

Operands are swapped: scores are `[tokens, rows]` = K qᵀ and the output `[channels, rows]` = Vᵀ Pᵀ,
so that tokens and channels fill the 16 rows of an `mma` and four query rows its 8 columns.
Dequantization is deferred: the scale and the minimum of a token touch only its scores, in units
of log2.
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
from jaxtyping import Array, Float, Int

from pallas_kernels import page_format
from pallas_kernels.page_format import Pages

WARPS = 4
TOKENS = 128  # in a turn of the loop
PAIRS = 16  # pairs of neighbouring tokens that a warp has of them
MAX_ROWS = 12  # of queries; more would take more registers than there are
MAX_PARTS = 64  # of a context, for the same reason: they are joined in registers

# Finite, so that a row with nothing visible yet has exp2(0) to multiply, not exp2(nan).
MASKED = -1e30
LOG2_E = math.log2(math.e)
# Added to every value scale: its logarithm is then finite. 2^104 times 2^24 tokens is a float32.
TINY = 2.0**-104

QUERY_UNITS = 32_512  # the largest query, in its row's units: 127 * 256
WEIGHT_UNITS = 32_768  # the largest weight: half of what 16 bits hold, for what exp2 and log2 err


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      programs: contexts are cut into parts while that makes no more programs than this, which is
        what runs at once,
      least_turns: and while the longest has so many blocks of 128 tokens in each.
      slots: blocks in shared memory at a time; `None`: one if contexts are cut, else two. A block
        is read into registers at once, so that one slot is enough for copies beside the
        arithmetic; more serve some multiprocessors at the cost of others.
    """

    programs: int = 528
    least_turns: int = 4
    slots: int | None = None


# --- Layouts: who holds what ----------------------------------------------------------------------
# A lane is 4 * g + t, as the matrix instructions have it.


def _layout(tiles, warps, lanes, vector):
    from jax.experimental.mosaic.gpu import fragmented_array

    layout = fragmented_array.TiledLayout(
        plgpu.Tiling(tiles), warps, lanes, vector, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(
        layout.tiling,
        warp_dims=layout.warp_dims,
        lane_dims=layout.lane_dims,
        vector_dim=layout.vector_dim,
    )


# [warp, item, row]: items (pairs of tokens, or words of channels) over g, query rows over t.
BY_WARP = _layout(((4, 16, 4), (1, 8, 4), (1,)), (-7,), (-3, -2), -1)
ITEMS = BY_WARP.reduce(2)  # [warp, item]
ROWS = BY_WARP.reduce((0, 1))  # [row]
OUTPUT = _layout(((32, 4), (8, 4), (1,)), (-5,), (-3, -2), -1)  # [word, row]: a quarter to a warp
WARP_ROWS = BY_WARP.reduce(1)  # [warp, row]


# [row, word] of queries: a row to a warp, a word to a lane.
QUERIES = _layout(((4, 32), (1, 1)), (-4,), (-3,), -1)
# [row, word] of their digits: words 2 t, 2 t + 1 of row g // 2, for the columns of an `mma`.
DIGITS = _layout(
    ((4, 16), (4, 8), (1, 2)), (plgpu.Replicated(4),), (-4, plgpu.Replicated(2), -3), -1
)


def _keys_layout(chunks: int):
    """[chunk, pair, 64 words]: two words to a register, as the left operand of an `mma`."""
    pairs = 64 // chunks
    return _layout(((chunks, pairs, 16), (1, 16, 8), (8, 8), (2,)), (-9, -8), (-3, -2), -1)


def _values_layout(chunks: int):
    """[chunk, pair, 64 words]: two neighbouring pairs to a register, transposed on the way."""
    pairs = 64 // chunks
    return _layout(((chunks, pairs, 8), (1, 16, 8), (8, 8), (2, 1)), (-10, -9), (-3, -4), -2)


def _scales_layout(chunks: int):
    """[chunk, warp in chunk, token]: a pair of tokens to a register."""
    return _layout(
        ((chunks, 4 // chunks, 32), (1, 1, 16), (2,)), (-7, -6), (-2, plgpu.Replicated(4)), -1
    )


def supported(q: Float[Array, "B T H D"], pages: Pages) -> str | None:
    """Why this kernel cannot run, or `None`."""
    rows = q.shape[1] * q.shape[2] // pages.kv_heads
    if pages.format.layout != "split":
        return f"Expected the layout to be 'split', got {pages.format.layout!r}"
    if pages.head_dim != 128:
        return f"Expected {pages.head_dim=} to be 128"
    if pages.page_size % 32:
        return f"Expected {pages.page_size=} to be a multiple of 32"
    if rows > MAX_ROWS:
        return f"Expected {rows} query rows for each KV head to be at most {MAX_ROWS}"
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
    batch, queries, heads, head_dim = q.shape
    kv_heads, page_size = pages.kv_heads, pages.page_size
    group = heads // kv_heads
    rows = -(-queries * group // 4) * 4
    blocks = Blocks() if blocks is None else blocks
    chunk = math.gcd(page_size, TOKENS)
    chunks = TOKENS // chunk
    words = head_dim // 4
    turns = pl.cdiv(page_table.shape[1] * page_size, TOKENS)
    parts = min(blocks.programs // (batch * kv_heads), pl.cdiv(turns, blocks.least_turns))
    parts = max(1, min(parts, MAX_PARTS))
    slots = blocks.slots or (1 if parts > 1 else 2)
    q_rows = q.reshape(batch, queries, kv_heads, group, head_dim).swapaxes(1, 2)
    q_rows = q_rows.reshape(batch, kv_heads, queries * group, head_dim)
    q_rows = jnp.pad(q_rows, ((0, 0), (0, 0), (0, rows - queries * group), (0, 0)))
    # Two tokens to a row of 128 bytes, which is what a copy can swizzle.
    data = pages.data.reshape(*pages.data.shape[:4], page_size // 2, 2 * words)
    assert pages.scales is not None  # `supported` says so
    scales = pages.scales.reshape(*pages.scales.shape[:4], page_size // 32, 32)
    arrays = dict(
        q=q_rows,
        data=data,
        page_table=page_table,
        lengths=lengths,
        query_lengths=query_lengths,
        layer=jnp.asarray(layer, jnp.int32).reshape(1),
        scales=scales,
        sinks=None if sinks is None else _sink_rows(sinks, kv_heads, queries, rows),
    )
    arrays = {name: x for name, x in arrays.items() if x is not None}
    kernel = functools.partial(
        _attend,
        page_size=page_size,
        group=group,
        queries=queries,
        rows=rows,
        order=pages.format.order,
        factor=scale * LOG2_E if soft_cap is None else scale / soft_cap,
        chunk=chunk,
        parts=parts,
        slots=slots,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        gpu=not interpret,
    )

    def decode_attention(*refs):
        inputs, outputs, scratch = refs[: len(arrays)], refs[len(arrays) : -7], refs[-7:]
        kernel(**dict(zip(arrays, inputs, strict=True)), outputs=outputs, scratch=scratch)

    options: dict = dict(
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=True,
            reduction_scratch_bytes=0,
        ),
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpret else {}),
    )

    value_order = pages.format.value_order
    dtype = q.dtype if value_order == 1 else jnp.float32
    out_type = jax.ShapeDtypeStruct((batch, kv_heads, rows, head_dim), dtype)
    part_types = [
        jax.ShapeDtypeStruct((batch, kv_heads, parts, rows), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, parts, rows, head_dim), jnp.float32),
    ]
    swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    out = plgpu.kernel(
        decode_attention,
        out_type=part_types if parts > 1 else out_type,
        grid=(parts, batch, kv_heads),  # the heads beside one another, as in a page
        grid_names=("part", "batch", "head"),
        scratch_types=[
            plgpu.SMEM((slots, chunks, 2, chunk // 2, 2 * words), jnp.uint16, transforms=swizzled),
            plgpu.SMEM((slots, chunks, 2, chunk // 32, 32), jnp.uint32),
            plgpu.Barrier(num_arrivals=2 * chunks, num_barriers=slots),
            plgpu.SMEM((2, rows, words), jnp.uint32),
            plgpu.SMEM((2, rows), jnp.float32),
            plgpu.SMEM((3, WARPS, rows), jnp.float32),
            plgpu.SMEM((WARPS, words, rows), jnp.float32),
        ],
        **options,
    )(*arrays.values())
    if parts > 1:
        pieces = 1 if parts * rows <= 64 else 4  # of the channels: registers hold all parts

        def join_parts(*refs):
            _join(*refs, pieces=pieces, gpu=not interpret)

        out = plgpu.kernel(
            join_parts,
            out_type=out_type,
            grid=(batch, kv_heads, pieces),
            grid_names=("batch", "head", "piece"),
            **options,
        )(*out)
    out = out[:, :, : queries * group]  # [B, K, T * G, D]
    out = out.reshape(batch, kv_heads, queries, group, head_dim).swapaxes(1, 2).reshape(q.shape)
    return out if value_order == 1 else page_format.rotate(out, value_order).astype(q.dtype)


def _sink_rows(
    sinks: Float[Array, "H"], kv_heads: int, queries: int, rows: int
) -> Float[Array, "K rows"]:
    per_token = sinks.astype(jnp.float32).reshape(kv_heads, 1, -1) * LOG2_E
    out = jnp.tile(per_token, (1, queries, 1)).reshape(kv_heads, -1)
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
    scales,
    sinks=None,
    outputs,
    scratch,
    page_size: int,
    group: int,
    queries: int,
    rows: int,
    order: int,
    factor: float,
    chunk: int,
    parts: int,
    slots: int,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    gpu: bool,
):
    """One program. Arrays are whole; what is static comes after `scratch`."""
    data_smem, scales_smem, barriers, digits_smem, rows_smem, stats_smem, sums_smem = scratch
    chunks = TOKENS // chunk
    words = data.shape[-1] // 2
    kv_head, layer = lax.axis_index("head"), layer[0]
    batch, part = lax.axis_index("batch"), lax.axis_index("part")
    length, real_queries = lengths[batch], query_lengths[batch]
    *log_totals, means = outputs
    if parts > 1 and gpu:
        plgpu.griddepcontrol_launch_dependents()  # the joining kernel may take its places

    # The blocks that some row sees, and of them this part's: low .. low + turns - 1.
    begin = jnp.int32(0)
    if window is not None:
        begin = lax.div(jnp.maximum(length - real_queries - window + 1, 0), TOKENS)
    count = jnp.where(real_queries > 0, _cdiv(length, TOKENS) - begin, 0)
    low = begin + lax.div(count * part, parts)
    turns = begin + lax.div(count * (part + 1), parts) - low

    # --- Copies: block number `turn` of the part into slot turn % slots -------------------------

    def page_ids(turn):
        """Of the block's chunks. Loaded a turn before they are needed."""
        token = (low + turn) * TOKENS
        last = jnp.maximum(length - 1, 0)
        return tuple(
            page_table[batch, lax.div(jnp.minimum(token + i * chunk, last), page_size)]
            for i in range(chunks)
        )

    def copy(turn, ids):
        slot = lax.rem(turn, slots)
        for i, page in enumerate(ids):
            offset = lax.rem((low + turn) * TOKENS + i * chunk, page_size)
            for source, target, tokens in ((data, data_smem, 2), (scales, scales_smem, 32)):
                size = chunk // tokens
                within = pl.ds(pl.multiple_of(lax.div(offset, tokens), size), size)
                source = source.at[layer, page, kv_head, :, within]
                plgpu.copy_gmem_to_smem(source, target.at[slot, i], barriers.at[slot])

    for turn in range(slots):
        pl.when(turn < turns)(functools.partial(copy, turn, page_ids(turn)))

    # --- Queries --------------------------------------------------------------------------------
    # One array [row, word] for each nibble of the words: channel = nibble * words + word.
    pieces = [
        plgpu.load(
            q.at[batch, kv_head, :, pl.ds(i * words, words)], layout=QUERIES, optimized=False
        ).astype(jnp.float32)
        for i in range(4)
    ]
    pieces = _rotate(pieces, order, gpu)
    largest = jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, pieces)), axis=1)
    unit = jnp.where(largest > 0, largest, 1) * (1 / QUERY_UNITS)
    inverse = plgpu.layout_cast(lax.broadcast_in_dim(1 / unit, pieces[0].shape, (0,)), QUERIES)
    pieces = [x * inverse for x in pieces]
    rows_smem.at[0][...] = unit * factor  # a unit of a row's products with codes, as a score
    rows_smem.at[1][...] = jnp.sum(functools.reduce(jnp.add, pieces), axis=1)  # times a key of ones
    for i in range(2):  # nibbles 0 and 2 are in one mask, 1 and 3 in the other, times 16
        lower, upper = (_digits(x * (1 / 16 if i else 1)) for x in (pieces[i], pieces[i + 2]))
        digits_smem.at[i][...] = lower | upper << jnp.uint32(16)
    _wait_for_all_warps(gpu)
    unit, total_query = (
        plgpu.load(rows_smem.at[i], layout=ROWS, optimized=False) for i in range(2)
    )
    q_low, q_high = (
        _query_columns(plgpu.load(digits_smem.at[i], layout=DIGITS, optimized=False), gpu)
        for i in range(2)
    )
    row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=ROWS)
    query = lax.div(row, group)
    # Rows that are no queries see what the others see, so that they hinder nothing.
    position = jnp.minimum(query, real_queries - 1) + (length - real_queries)

    # --- The loop over blocks of tokens ---------------------------------------------------------

    def attend_block(turn, carry, masked):
        running_max, total, shift, acc, next_ids = carry
        slot = lax.rem(turn, slots)
        plgpu.barrier_wait(barriers.at[slot])
        key_words = plgpu.load(data_smem.at[slot, :, 0], layout=_keys_layout(chunks))
        value_words = plgpu.load(data_smem.at[slot, :, 1], layout=_values_layout(chunks))

        scale_words = [
            _even_and_odd(
                plgpu.load(
                    scales_smem.at[slot, :, kind],
                    layout=_scales_layout(chunks),
                    optimized=False,
                ),
                gpu,
            )
            for kind in range(2)
        ]
        _wait_for_all_warps(gpu)  # they have read the slot

        @pl.when(turn + slots < turns)
        def _():
            copy(turn + slots, next_ids)

        low_codes, high_codes = (key_words & jnp.uint16(mask) for mask in (0x0F0F, 0xF0F0))
        products = _keys_dot_queries(low_codes, high_codes, q_low, q_high, gpu)

        # Scores, and what they are compared by: the size of their share of the output.
        scores, shares, visible, value_scales = [], [], [], []
        for half, x in enumerate(products):  # [warp, pair, row] of even tokens, of odd tokens
            key_word, value_word = scale_words[0][half], scale_words[1][half]
            token = _token(x.shape, BY_WARP, half) + (low + turn) * TOKENS
            if masked:  # a slot never written may hold anything, and 0 * nan is nan
                written = _token(key_word.shape, ITEMS, half) + (low + turn) * TOKENS < length
                key_word = jnp.where(written, key_word, jnp.uint32(0))
                value_word = jnp.where(written, value_word, jnp.uint32(0))
            key_scale, key_minimum = _split_scales(key_word)
            value_scale, value_minimum = _split_scales(value_word)
            value_scale = value_scale + TINY
            x = x.astype(jnp.float32) * _of_items(key_scale, x)
            x = x + _of_items(key_minimum, x) * _of_rows(total_query, x)
            x = x * _of_rows(unit, x)
            if soft_cap is not None:
                x = soft_cap * LOG2_E * jnp.tanh(x)
            if masked:
                last = position if causal else jnp.zeros_like(position) + (length - 1)
                see = token <= _of_rows(last, x)
                if window is not None:
                    see &= token > _of_rows(position - window, x)
                x = jnp.where(see, x, MASKED)
                visible.append(see)
            scores.append(x)
            value_scales.append((value_scale, value_minimum))
            shares.append(x + _of_items(jnp.log2(value_scale), x))

        block_max = jnp.max(jnp.maximum(*shares), axis=1)  # [warp, row]
        new_max = jnp.maximum(running_max, block_max)
        decay, grow = jnp.exp2(running_max - new_max), jnp.exp2(block_max - new_max)

        totals, shifts, numbers = [], [], []
        for half, x in enumerate(scores):
            value_scale, value_minimum = value_scales[half]
            weights = jnp.exp2(x - _of_warp_rows(block_max, x))
            if masked:
                weights = jnp.where(visible[half], weights, 0)
            totals.append(weights)
            shifts.append(weights * _of_items(value_minimum, x))
            # Rounded to an integer in the low bits of a float32.
            x = weights * _of_items(value_scale, x) * WEIGHT_UNITS + 2.0**23
            numbers.append(lax.bitcast_convert_type(x, jnp.uint32))
        old, new = _of_warp_rows(decay, total), _of_warp_rows(grow, total)
        total = total * old + jnp.add(*totals) * new
        shift = shift * old + jnp.add(*shifts) * new
        even, odd = numbers
        sums = _values_dot_weights(value_words, even, odd, gpu)
        old, new = _of_warp_rows(decay, acc[0]), _of_warp_rows(grow, acc[0])
        acc = tuple(a * old + x.astype(jnp.float32) * new for a, x in zip(acc, sums, strict=True))
        return new_max, total, shift, acc, page_ids(turn + slots + 1)

    def zeros(items):
        return plgpu.layout_cast(jnp.zeros((WARPS, items, rows), jnp.float32), BY_WARP)

    running_max = plgpu.layout_cast(jnp.full((WARPS, rows), MASKED, jnp.float32), WARP_ROWS)
    sums = zeros(PAIRS), zeros(PAIRS), tuple(zeros(words) for _ in range(4))
    carry = (running_max, *sums, page_ids(slots))

    # Tokens from full_begin to full_end - 1 all rows see.
    full_end = length - real_queries + 1 if causal else length
    full_high = jnp.minimum(jnp.maximum(lax.div(full_end, TOKENS) - low, 0), turns)
    full_low = jnp.int32(0)
    if window is not None:
        full_begin = jnp.maximum(length - window, 0)
        full_low = jnp.minimum(jnp.maximum(_cdiv(full_begin, TOKENS) - low, 0), full_high)
        carry = lax.fori_loop(0, full_low, functools.partial(attend_block, masked=True), carry)
    carry = lax.fori_loop(full_low, full_high, functools.partial(attend_block, masked=False), carry)
    carry = lax.fori_loop(full_high, turns, functools.partial(attend_block, masked=True), carry)
    running_max, total, shift, acc, *_ = carry

    # --- Output -----------------------------------------------------------------------------
    stats_smem.at[0][...] = running_max
    stats_smem.at[1][...] = jnp.sum(total, axis=1)
    stats_smem.at[2][...] = jnp.sum(shift, axis=1)
    _wait_for_all_warps(gpu)

    def of_warps(i):
        return [
            plgpu.load(stats_smem.at[i, warp], layout=ROWS, optimized=False)
            for warp in range(WARPS)
        ]

    largest = functools.reduce(jnp.maximum, of_warps(0))
    if sinks is not None:  # a sink is a key with this score and no value, in the first part
        sink = plgpu.load(sinks.at[kv_head], layout=ROWS, optimized=False)
        sink = jnp.where(part == 0, jnp.maximum(sink, MASKED), MASKED)
        largest = jnp.maximum(largest, sink)
    shares = [jnp.exp2(x - largest) for x in of_warps(0)]
    total, shift = (
        functools.reduce(jnp.add, [x * y for x, y in zip(of_warps(i), shares, strict=True)])
        for i in (1, 2)
    )
    if sinks is not None:
        total = total + jnp.where(sink > MASKED, jnp.exp2(sink - largest), 0)
    real = (query < real_queries) & (row < queries * group)
    some = real & ((total > 0) | (total != total))
    inverse = jnp.where(some, 1 / jnp.where(some, total, 1), 0)
    place = (batch, kv_head, part) if log_totals else (batch, kv_head)
    means = means.at[place]
    for nibble, x in enumerate(acc):
        sums_smem[...] = x
        _wait_for_all_warps(gpu)
        out = shift * inverse
        out = plgpu.layout_cast(lax.broadcast_in_dim(out, (words, rows), (1,)), OUTPUT)
        for warp in range(WARPS):
            x = plgpu.load(sums_smem.at[warp], layout=OUTPUT, optimized=False)
            y = shares[warp] * inverse * (1 / (WEIGHT_UNITS * (16 if nibble % 2 else 1)))
            out = out + x * plgpu.layout_cast(lax.broadcast_in_dim(y, x.shape, (1,)), OUTPUT)
        _wait_for_all_warps(gpu)

        channels = means.at[:, pl.ds(nibble * words, words)]
        channels.transpose((1, 0))[...] = out.astype(means.dtype)
    if log_totals:
        log_total = jnp.where(some, largest + jnp.log2(jnp.where(some, total, 1)), MASKED)
        log_totals[0].at[place][...] = log_total


def _cdiv(a, b: int):
    return lax.div(a + (b - 1), b)


def _token(shape, layout, half: int):
    """Which token of the block."""
    warp = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    pair = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    return warp * (2 * PAIRS) + pair * 2 + half


def _of_items(x, like):
    """[warp, item] as [warp, item, row]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, (0, 1)), BY_WARP)


def _of_rows(x, like):
    """[row] as [warp, item, row]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, (2,)), BY_WARP)


def _of_warp_rows(x, like):
    """[warp, row] as [warp, item, row]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, (0, 2)), BY_WARP)


def _split_scales(words):
    """One word → (scale, minimum) in float32."""
    scale = lax.bitcast_convert_type(words << jnp.uint32(16), jnp.float32)
    return scale, lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)


def _digits(x):
    """Integers within ±QUERY_UNITS as two digits in 16 bits: 256 * upper + lower, both signed."""
    x = jnp.round(x).astype(jnp.int32)
    both = ((x + 128) & 0xFF00) | (x & 0xFF)
    return lax.bitcast_convert_type(both & 0xFFFF, jnp.uint32)


# --- Products, on registers -----------------------------------------------------------------------


def _even_and_odd(words, gpu: bool):
    """`uint32 [chunk, warp in chunk, token]` as two of [warp, pair]."""
    shape = (WARPS, PAIRS)
    if not gpu:
        words = words.reshape(*shape, 2)
        return words[..., 0], words[..., 1]
    result = plgpu.ShapeDtypeStruct(shape, words.dtype, layout=ITEMS)

    @plgpu.inline_mgpu(arg_types=(_scales_layout(words.shape[0]),), return_type=(result, result))
    def split(_, words):
        return tuple(
            _fragments([_element(r, i) for r in words.registers.flat], shape, ITEMS, False)
            for i in range(2)
        )

    return split(words)


def _element(register, i: int):
    """Of a register of several numbers, one, as a register of its own."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    x = vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
    return vector.broadcast(ir.VectorType.get((1,), x.type), x)


def _rotate(pieces, order: int, gpu: bool):
    """`page_format.rotate` of [row, channel], given as four arrays [row, word] of channels."""
    words = pieces[0].shape[1]
    if not gpu:
        q = page_format.rotate(jnp.concatenate(pieces, axis=1), order)
        return jnp.split(q, 4, axis=1)
    half = 1
    while half < order:
        if half < words:
            pieces = [_butterfly(x, half) for x in pieces]
        else:
            step = half // words
            a = [i for i in range(4) if not i & step]
            sums = {i: pieces[i] + pieces[i + step] for i in a}
            differences = {i + step: pieces[i] - pieces[i + step] for i in a}
            pieces = [(sums | differences)[i] for i in range(4)]
        half *= 2
    return [x * (order**-0.5) for x in pieces]


def _butterfly(x, half: int):
    """a + b and a - b of the numbers of two lanes `half` apart."""

    @plgpu.inline_mgpu(
        arg_types=(QUERIES,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=QUERIES)
    )
    def exchange(_, x):
        from jax.experimental.mosaic.gpu import utils

        registers = [utils.shfl_bfly(r, half) for r in x.registers.flat]
        return _fragments(registers, x.shape, QUERIES, None)

    lane = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=QUERIES)
    return exchange(x) + jnp.where((lane & half) == 0, x, -x)


def _query_columns(digits, gpu: bool):
    """Digits, two numbers to a word, as the columns of a right operand: upper, lower, upper, …"""
    rows, words = digits.shape
    size = 2 * words
    if not gpu:
        numbers = jnp.stack([digits & 0xFFFF, digits >> 16], -1).reshape(rows, size)
        numbers = jnp.stack([numbers >> 8, numbers & 0xFF], 1).reshape(2 * rows, size)
        return lax.bitcast_convert_type(numbers.astype(jnp.uint8), jnp.int8).T

    @plgpu.inline_mgpu(
        arg_types=(DIGITS,),
        return_type=plgpu.ShapeDtypeStruct(
            (size, 2 * rows), jnp.int8, layout=plgpu.Layout.MMA_RHS(jnp.int8)
        ),
    )
    def columns(_, digits):
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        i32 = ir.IntegerType.get_signless(32)
        selector = arith.select(_is_odd_column(), utils.c(0x6420, i32), utils.c(0x7531, i32))
        out = np.empty((rows // 4, words // 8), dtype=object)  # [column tile, 16 bytes]
        for index, register in zip(np.ndindex(out.shape), digits.registers.flat, strict=True):
            first, second = (utils.bitcast(_element(register, i), i32) for i in range(2))
            out[index] = utils.bitcast(utils.prmt(first, second, selector), _bytes_type())
        out = out.reshape(rows // 4, words // 16, 2).swapaxes(0, 1)  # [32 bytes, column tile, 16]
        return _fragments(out, (size, 2 * rows), plgpu.Layout.MMA_RHS(jnp.int8), True)

    return columns(digits)


def _bytes_type():
    from jaxlib.mlir import ir

    return ir.VectorType.get((4,), ir.IntegerType.get_signless(8))


def _is_odd_column():
    """Whether this lane has the lower digits of a row in a right operand: its g is odd."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.IntegerType.get_signless(32)
    return arith.cmpi(
        arith.CmpIPredicate.ne, arith.andi(utils.thread_idx(), utils.c(4, i32)), utils.c(0, i32)
    )


def _wait_for_all_warps(gpu: bool):
    """Without the fence of `commit_smem`, which waits for loads of page ids under way."""
    if not gpu:
        return plgpu.commit_smem()

    @plgpu.inline_mgpu()
    def wait(_):
        from jax.experimental.mosaic.gpu import utils

        utils.warpgroup_barrier()

    return wait()


def _fragments(registers, shape, layout, is_signed):
    from jax.experimental.mosaic.gpu import fragmented_array

    layout = layout.to_mgpu() if hasattr(layout, "to_mgpu") else layout
    registers = np.asarray(registers, dtype=object).reshape(layout.registers_shape(shape))
    return fragmented_array.FragmentedArray(
        _registers=registers, _layout=layout, _is_signed=is_signed
    )


def _keys_dot_queries(low, high, q_low, q_high, gpu: bool):
    """Codes of keys times queries: for even and for odd tokens, int32 [warp, pair, row].

    `low` and `high` are codes as bytes, `uint16 [chunk, pair, 64]`, the second times 16; a pair is
    the words of an even token, then those of the odd one. `q_low` and `q_high` are the digits for
    each, `int8 [bytes of a token, 2 * rows]`.
    """
    rows = q_low.shape[1] // 2
    shape = (WARPS, PAIRS, rows)
    if not gpu:

        def product(words, digits):
            codes = jnp.stack([words & 0xFF, words >> 8], -1).reshape(WARPS, PAIRS, 2, -1)
            return jnp.einsum("wpek,kc->ewpc", codes.astype(jnp.int32), digits.astype(jnp.int32))

        x = (product(low, q_low) + product(high, q_high)).reshape(2, *shape, 2)
        return tuple(x[..., 0] * 256 + x[..., 1])
    layout = _keys_layout(low.shape[0])
    columns = plgpu.Layout.MMA_RHS(jnp.int8)
    result = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=BY_WARP)

    @plgpu.inline_mgpu(arg_types=(layout, layout, columns, columns), return_type=(result, result))
    def dot(_, low, high, q_low, q_high):
        from jax.experimental.mosaic.gpu import utils
        from jax.experimental.mosaic.gpu.mma import MMALayouts, mma

        layouts = MMALayouts(jnp.int8)

        def as_bytes(words):
            registers = [utils.bitcast(r, _bytes_type()) for r in words.registers.flat]
            return _fragments(registers, (64, 128), layouts.lhs, False)

        codes = [as_bytes(low), as_bytes(high)]
        out = []
        for half in range(2):
            acc = _zeros((64, 2 * rows), layouts.acc)
            for a, b in zip(codes, (q_low, q_high), strict=True):
                acc = mma(acc, a[:, 64 * half : 64 * half + 64], b)
            out.append(_join_digits(acc, shape))
        return tuple(out)

    return dot(low, high, q_low, q_high)


def _values_dot_weights(words, even, odd, gpu: bool):
    """Codes of values times weights: int32 [warp, word, row] for each of the four nibbles.

    The second and the fourth are times 16. Each warp sums over its own tokens. `words` are
    `uint16 [chunk, pair, 64]`, as for keys; the weights of `even` and `odd` tokens
    `uint32 [warp, pair, row]`, of which the low 16 bits count.
    """
    rows = even.shape[2]
    if not gpu:
        words = words.reshape(WARPS, PAIRS, 2, -1).astype(jnp.int32)
        weights = (jnp.stack([even, odd], 2) & 0xFFFF).astype(jnp.int32)
        nibbles = [words >> 8 * (i // 2) & (0xF0 if i % 2 else 0xF) for i in range(4)]
        return [jnp.einsum("wpec,wper->wcr", codes, weights) for codes in nibbles]
    width = words.shape[2] // 2
    shape = (WARPS, width, rows)
    result = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=BY_WARP)

    @plgpu.inline_mgpu(
        arg_types=(_values_layout(words.shape[0]), BY_WARP, BY_WARP), return_type=(result,) * 4
    )
    def dot(_, words, even, odd):
        from jax.experimental.mosaic.gpu import utils
        from jax.experimental.mosaic.gpu.mma import MMALayouts, mma
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        layouts = MMALayouts(jnp.int8)
        i32 = ir.IntegerType.get_signless(32)

        def constant(x):
            return utils.c(x, i32)

        def as_i32(x):
            return utils.bitcast(x, i32)

        # Weights: a lane has row t of the pairs g and g + 8, and is to have one digit of row g // 2
        # (the upper one if g is even), of the tokens 4 t .. 4 t + 3 and 16 more.
        digits = arith.select(_is_odd_column(), constant(0x2604), constant(0x7351))
        operand = []
        for a, b in zip(even.registers.flat, odd.registers.flat, strict=True):
            both = utils.prmt(as_i32(a), as_i32(b), constant(0x5410))
            both = utils.inline_ptx(
                "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", both, result_types=i32
            )
            x = utils.prmt(both, utils.shfl_bfly(both, 4), digits)
            operand.append(utils.bitcast(x, _bytes_type()))
        operand = _fragments(operand, (32, 2 * rows), layouts.rhs, False)

        # Values: a register has word g of two pairs' even tokens, or of their odd ones; it is to
        # have one byte of that word, of four tokens in order.
        found = words.registers.reshape(2, width // 16, 2, 2)  # [odd, tile, word + 8, pair + 8]
        sums = []
        for selector in (0x6240, 0x7351):  # the lower bytes, the upper ones
            pairs = np.empty(found.shape[1:], object)
            for index, a in np.ndenumerate(found[0]):
                pairs[index] = utils.prmt(as_i32(a), as_i32(found[1][index]), constant(selector))
            pairs = pairs.swapaxes(1, 2)  # [tile, pair + 8, word + 8]
            for mask in (0x0F0F0F0F, 0xF0F0F0F0):
                codes = [
                    utils.bitcast(arith.andi(x, constant(mask)), _bytes_type()) for x in pairs.flat
                ]
                codes = _fragments(codes, (4 * width, 32), layouts.lhs, False)
                acc = mma(_zeros((4 * width, 2 * rows), layouts.acc), codes, operand)
                sums.append(_join_digits(acc, shape))
        return tuple(sums)

    return dot(words, even, odd)


def _zeros(shape, layout):
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jaxlib.mlir import ir

    zero = utils.c(0, ir.IntegerType.get_signless(32))
    return fragmented_array.FragmentedArray.splat(zero, shape, layout, is_signed=True)


def _join_digits(acc, shape):
    """256 * upper + lower, from the two columns of a row that a register holds."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    out = []
    for register in acc.registers.flat:  # of [item tile, row tile, item + 8]
        upper, lower = _element(register, 0), _element(register, 1)
        out.append(arith.addi(arith.shli(upper, utils.c(8, i32)), lower))
    return _fragments(out, shape, BY_WARP, True)


# --- Joining the parts ----------------------------------------------------------------------------


def _join(log_totals, means, out, *, pieces: int, gpu: bool):
    """A piece of a KV head's channels: the parts' outputs, weighted by 2**log_totals."""
    place = lax.axis_index("batch"), lax.axis_index("head")
    size = means.shape[-1] // pieces
    channels = pl.ds(lax.axis_index("piece") * size, size)
    if gpu:
        plgpu.griddepcontrol_wait()  # for all that the decode kernel writes
    layout = _parts_layout(size)
    x = plgpu.load(
        means.at[(*place, slice(None), slice(None), channels)], layout=layout, optimized=False
    )
    log_total = plgpu.load(log_totals.at[place], layout=layout.reduce(2), optimized=False)
    weight = jnp.exp2(
        log_total - _of_parts(jnp.max(log_total, axis=0), log_total, layout.reduce(2))
    )
    total = jnp.sum(weight, axis=0)  # [row]
    weight = plgpu.layout_cast(lax.broadcast_in_dim(weight, x.shape, (0, 1)), layout)
    mean = jnp.sum(weight * x, axis=0)  # [row, channel]
    total = plgpu.layout_cast(lax.broadcast_in_dim(total, mean.shape, (0,)), layout.reduce(0))
    out.at[(*place, slice(None), channels)][...] = (mean / total).astype(out.dtype)


def _parts_layout(channels: int):
    """[part, row, channel]: a row to a warp, its channels over the lanes, all parts to a lane."""
    width = channels // 32
    return _layout(((1, WARPS, channels), (1, 1, width)), (-5,), (-4,), -1)


def _of_parts(x, like, layout):
    """[row] as [part, row]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, (1,)), layout)
