"""`paged_attention` for many query rows of a sequence, as one Pallas kernel for NVIDIA GPUs.

A program takes one sequence, one KV head, a block of its query rows (the G query heads of a KV
head for each of some tokens) and one split of the context. Unlike the decode kernel's, its
operands stand as in any flash attention, scores `[rows, tokens]` and output `[rows, D]`: rows fill
the matrix unit, and all of them share what it costs to unpack a block of tokens.

A block of codes is dequantized to float16 once for all rows of a program, three instructions for a
pair of numbers, and lies in shared memory, where the matrix unit takes it from. A first look at the
scales finds the power of two that keeps numbers of any magnitude within float16. The rest is the
same for BF16 pages.

Scores are in units of log2: exp2 is the machine's own.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.page_format import Pages
from pallas_kernels.triton import arithmetic
from pallas_kernels.triton.arithmetic import (
    LOG2_E,
    MASKED,
    dot,
    exp2,
    multiply_add,
    padded,
    power_of_two,
)
from pallas_kernels.triton.work import (
    Plan,
    Split,
    cut_rows,
    page_ids,
    page_offsets,
    start_of,
    store,
    store_place,
)

# Weights are at most 2**HEADROOM, the closer to float16's largest the more small ones count.
HEADROOM = 15
SCAN = 2048  # tokens


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut. The defaults per device are data, in `pallas_kernels/tuning`.

    Attributes:
      rows: query rows of a program; a power of two, at least 16.
      block_tokens: tokens in a turn of the loop; a power of two, at least 16.
      programs: contexts are split while that makes no more programs than this,
      max_splits: and into no more parts than this.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline.
    """

    rows: int
    block_tokens: int
    programs: int
    max_splits: int
    num_warps: int
    num_stages: int


def default_blocks(pages: Pages) -> Blocks:
    """The device's own."""
    bf16 = "_bf16" if pages.scales is None else ""
    blocks = Blocks(**tuning.blocks("prefill_attention" + bf16))
    # The accumulator and the operands grow with the head dim: registers and shared memory do not.
    share = pl.cdiv(pages.head_dim, 128)
    return dataclasses.replace(
        blocks, rows=blocks.rows // share, block_tokens=blocks.block_tokens // share
    )


def plan(blocks: Blocks, q: Float[Array, "B T H D"], pages: Pages, capacity: int) -> Plan:
    """How to run it over contexts of at most `capacity` tokens."""
    batch, queries, heads, head_dim = q.shape
    group = heads // pages.kv_heads
    # Less than 64 rows do not fill the matrix unit.
    rows = max(64, power_of_two(queries * group))
    rows = max(min(rows, blocks.rows), power_of_two(group))
    query_blocks = pl.cdiv(queries, rows // group)
    splits = min(
        max(1, blocks.programs // (batch * pages.kv_heads * query_blocks)),
        blocks.max_splits,
        pl.cdiv(capacity, blocks.block_tokens),
    )
    signs = None
    if pages.scales is not None:
        signs = arithmetic.signs_side_by_side(pages.format.order, head_dim, jnp.float16)
    return Plan(
        functools.partial(_attend, rows=rows, block_tokens=blocks.block_tokens, splits=splits),
        grid=(splits, pages.kv_heads * query_blocks, batch),
        # A warp has 16 rows of the matrix unit, or several times as many.
        num_warps=min(blocks.num_warps, max(1, rows // 16)),
        slots=batch * splits if splits > 1 else 0,
        chunk=power_of_two(splits),
        signs=signs,
    )


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
    rows: int,
    block_tokens: int,
    splits: int,
    order: int,
    value_order: int,
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    gpu: bool,
):
    """One program. Arrays are whole; what is static comes after `outputs`."""
    quantized, page_size = scales is not None, data.shape[4]
    pieces = 4 if quantized else 1
    width = q.shape[3] // pieces
    part, batch = pl.program_id(0), pl.program_id(2)
    # The last queries see most: they start first.
    head_block = pl.num_programs(1) - 1 - pl.program_id(1)
    length, layer = lengths[batch], layer[0]
    split = Split(batch, part, splits, batch * splits + part)
    store_place(outputs, split, head_block == 0)
    row = cut_rows(
        jnp.arange(rows),
        head_block=head_block,
        rows=rows,
        q=q,
        data=data,
        length=length,
        real_queries=query_lengths[batch],
        causal=causal,
        window=window,
    )

    # The blocks of this split, of them those that need no mask.
    low, high = row.begin // block_tokens, pl.cdiv(row.end, block_tokens)
    per_split = pl.cdiv(high - low, splits)
    low = low + part * per_split
    high = jnp.minimum(low + per_split, high)
    full_high = jnp.clip(row.full_end // block_tokens, low, high)
    full_low = low
    if window is not None:
        full_low = jnp.clip(pl.cdiv(row.full_begin, block_tokens), low, full_high)

    # --- Channels: pieces side by side, each padded to a power of two ---------------------------
    size = padded(width)
    column = jnp.arange(pieces * size)
    channel = column // size * width + column % size
    inside = column % size < width

    def units():  # powers of two for keys and values: see `arithmetic.dequantize`
        def look(turn, largest):
            token = low * block_tokens + turn * SCAN + jnp.arange(SCAN)
            seen = token < jnp.minimum(high * block_tokens, length)
            page = plt.load(page_table.at[batch, lax.div(token, page_size)], mask=seen, other=0)
            out = []
            for kind in (0, 1):
                index = scales.at[layer, page, row.kv_head, kind, lax.rem(token, page_size)]
                step, minimum = arithmetic.split_scales(plt.load(index, mask=seen, other=0))
                size = jnp.maximum(step * arithmetic.LARGEST_STEP, jnp.abs(minimum))
                out.append(jnp.maximum(largest[kind], jnp.where(size < jnp.inf, size, 0)))
            return tuple(out)

        turns = pl.cdiv((high - low) * block_tokens, SCAN)
        start = jnp.zeros((SCAN,), jnp.float32)
        return map(arithmetic.power_of_two_below, lax.fori_loop(0, turns, look, (start, start)))

    def rotate(x, short=False):  # by the unscaled matrix, in float32
        """As one float16 matrix if `short`, else as two that hold most of float32's digits."""
        magnitude = arithmetic.power_of_two_below(x)
        x = x * (1 / magnitude)
        matrix = plt.load(signs.at[column[:, None], column[None, :]])
        rotated = dot(x.astype(jnp.float16), matrix)
        if not short:
            rest = x - x.astype(jnp.float16).astype(jnp.float32)
            rotated += dot(rest.astype(jnp.float16), matrix)
        return rotated * magnitude

    # --- Queries: rotated, as float16 within a power of two of 1 --------------------------------
    q_rows = plt.load(
        q.at[batch, row.query[:, None], row.head[:, None], channel[None, :]],
        mask=row.real[:, None] & inside[None, :],
        other=0,
    )
    factor = abs(scale) * LOG2_E if soft_cap is None else abs(scale) / soft_cap
    if quantized:
        # Order 1 too, by the identity: what comes out of a product lies well for the loop below.
        q_rows = rotate(q_rows.astype(jnp.float32), short=q.dtype.itemsize == 2)
        factor *= order**-0.5
        magnitude = arithmetic.power_of_two_below(q_rows)
        q_rows = (q_rows * (1 / magnitude)).astype(jnp.float16)
        key_unit, value_unit = units()
        factor = factor * magnitude * key_unit
    else:
        q_rows = q_rows.astype(jnp.bfloat16)
        key_unit = value_unit = 1.0
    q_rows = -q_rows if scale < 0 else q_rows

    # --- The loop over blocks of tokens ---------------------------------------------------------

    word = jnp.arange(size)

    pages_of = functools.partial(
        page_ids,
        page_table,
        batch,
        block_tokens=block_tokens,
        page_size=page_size,
        length=length,
    )

    def attend_block(block, carry, masked, q_rows):
        page, bound, total, acc = carry
        token = block * block_tokens + jnp.arange(block_tokens)
        offset = page_offsets(block, block_tokens=block_tokens, page_size=page_size)
        next_page = pages_of(block + 1)  # a turn ahead, so that no page waits for its id

        def load(kind, unit):  # [tokens, columns]
            page_of_row = page[:, None] if page.ndim else page
            index = data.at[layer, page_of_row, row.kv_head, kind, offset[:, None], word[None, :]]
            if size == width:
                rows = plt.load(index)
            else:
                mask = jnp.broadcast_to((word < width)[None, :], (block_tokens, size))
                rows = plt.load(index, mask=mask, other=0)
            written = token < length  # a slot never written may hold anything, and 0 * nan is nan
            if not quantized:
                return jnp.where(written[:, None], rows, 0) if masked and kind == 1 else rows
            words = plt.load(scales.at[layer, page, row.kv_head, kind, offset])
            if masked:
                words = jnp.where(written, words, jnp.uint32(0))
            step, minimum = (x * (1 / unit) for x in arithmetic.split_scales(words))
            return arithmetic.side_by_side(
                arithmetic.dequantize(rows, step[:, None], minimum[:, None], gpu)
            )

        # Scores [rows, tokens], in units of log2.
        scores = dot(q_rows, load(0, key_unit).T)
        if soft_cap is None:
            to_log2 = jnp.broadcast_to(factor, (rows,))
        else:
            to_log2 = jnp.full((rows,), soft_cap * LOG2_E)
            scores = jnp.tanh(scores * jnp.broadcast_to(factor, (rows, 1)))
        if masked:
            visible = token[None, :] <= row.last[:, None]
            if window is not None:
                visible &= token[None, :] > (row.position - window)[:, None]
            scores = jnp.where(visible, scores, MASKED)
        new_bound = jnp.maximum(bound, jnp.max(scores, axis=1) * to_log2 - HEADROOM)
        decay = exp2(bound - new_bound, gpu)
        weights = exp2(multiply_add(scores, to_log2[:, None], -new_bound[:, None], gpu), gpu)
        if masked:
            weights = jnp.where(visible, weights, 0)
        total = total * decay + jnp.sum(weights, axis=1)

        # Output [rows, columns].
        values = load(1, value_unit)
        acc = acc * decay[:, None] + dot(weights.astype(values.dtype), values)
        return next_page, new_bound, total, acc

    bound, total = start_of(sinks, row, part)
    carry: tuple = (pages_of(low), bound, total, jnp.zeros((rows, pieces * size), jnp.float32))

    def attend_all(_, state):
        q_rows, carry = state
        masked = functools.partial(attend_block, masked=True, q_rows=q_rows)
        full = functools.partial(attend_block, masked=False, q_rows=q_rows)
        if window is not None:
            carry = lax.fori_loop(low, full_low, masked, carry)
        carry = lax.fori_loop(full_low, full_high, full, carry)
        carry = lax.fori_loop(full_high, high, masked, carry)
        return jnp.zeros_like(q_rows), carry

    # A loop of one turn: what it carries in goes to the matrix unit from shared memory, what comes
    # out of a rotation would take a quarter of the registers.
    _, carry = lax.fori_loop(0, jnp.minimum(high - low, 1), attend_all, (q_rows, carry))
    _, bound, total, acc = carry

    # --- Output ---------------------------------------------------------------------------------
    inverse = jnp.where(row.real, 1 / jnp.where(total > 0, total, 1), 0)
    x = acc * (inverse * value_unit)[:, None]
    if value_order > 1:
        x = rotate(jnp.where(inside[None, :], x, 0)) * value_order**-0.5
    log_total = jnp.where(total > 0, bound + jnp.log2(total), MASKED)
    store(outputs, split, row, [(x, channel)], inside, log_total, axis=0)
