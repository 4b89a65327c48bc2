"""`paged_attention` for few query rows of a sequence, as one Pallas kernel for NVIDIA GPUs.

A program takes one KV head, a block of its query rows (see `work`) and a share of the blocks of
tokens of all sequences, and walks over those of one sequence after the other with an online
softmax. What makes it follow memory rather than arithmetic:

- Operands are swapped: scores are `[tokens, rows]` = K qᵀ and the output `[D, rows]` += Vᵀ Pᵀ, so
  that tokens and channels fill the long sides of the matrix unit.
- Dequantization is deferred. Codes go to the matrix unit as bytes, four of them made by one
  instruction; the scale and the minimum of a token touch only its scores.
- Queries and weights are 16-bit integers, low byte and high byte in two columns next to each
  other. Four rows fill the eight columns of the unit's short side, sums are exact, and the two
  halves meet again within a thread.
- Weights are integers in units of their own block's largest, so that many small ones beside a
  large one, and values of any magnitude, keep their digits.
- Shares are equal, whatever the lengths, and end within sequences: see `share`.

Scores are in units of log2: exp2 is the machine's own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.page_format import Pages
from pallas_kernels.triton import arithmetic
from pallas_kernels.triton.arithmetic import (
    LARGEST_LIMBS,
    LOG2_E,
    MASKED,
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

# How many bytes the matrix unit sums at a time.
LEAST = 32
# Sums over tokens are kept as so many partial ones, which lie in different threads.
SUMS = 8
# What it costs to start on a sequence, in blocks of tokens.
START = 1


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut. The defaults per device are data, in `pallas_kernels/tuning`.

    Attributes:
      block_tokens: tokens in a turn of the loop; a power of two, at least 32.
      rows: most query rows in a program; a power of two, at least 8.
      programs: about so many share the work, as many as the device runs at once,
      max_splits: and no more than this for each sequence: joining splits takes time too.
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


def default_blocks(pages: Pages, rows: int) -> Blocks:
    """The device's own for so many query rows of a sequence and KV head."""
    bf16 = "_bf16" if pages.scales is None else ""
    blocks = Blocks(**tuning.blocks("decode_attention" + bf16))
    # The accumulator grows with the head dim, scores with the rows: registers must suffice.
    size = pl.cdiv(pages.head_dim, 128)
    return dataclasses.replace(
        blocks,
        rows=max(8, blocks.rows // size),
        num_warps=blocks.num_warps * size,
        block_tokens=blocks.block_tokens // (2 if rows > 8 else 1),
    )


def plan(blocks: Blocks, q: Float[Array, "B T H D"], pages: Pages) -> Plan:
    """How to run it."""
    batch, queries, heads, head_dim = q.shape
    group = heads // pages.kv_heads
    rows = max(
        8 if pages.scales is None else 4,
        power_of_two(group),
        min(blocks.rows, power_of_two(queries * group)),
    )
    programs = pages.kv_heads * pl.cdiv(queries, rows // group)
    slots = count_slots(batch, blocks.programs // programs, blocks.max_splits)
    signs = None
    if pages.format.order > 1:
        short = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float16
        signs = arithmetic.signs(pages.format.order, head_dim, short, LEAST)
    return Plan(
        functools.partial(_attend, rows=rows, block_tokens=blocks.block_tokens),
        grid=(programs, slots),
        num_warps=blocks.num_warps,
        # Where a program's share ends and where a sequence ends, a split ends.
        slots=slots + batch - 1,
        chunk=power_of_two(min(max(slots // batch, 4), 64)),
        signs=signs,
    )


# --- The work, cut ------------------------------------------------------------------------------


def count_slots(batch: int, programs: int, max_splits: int) -> int:
    """How many programs share the sequences of a head.

    As many as there are, or a few less, so that sequences of equal length are cut evenly.
    """
    slots = max(1, min(programs, batch * max_splits))
    even = slots // batch * batch if slots >= batch else batch // pl.cdiv(batch, slots)
    return even if 8 * even >= 7 * slots else slots


def share(
    slot: Int[Array, ""], units: Int[Array, "n"], slots: int | Int[Array, ""]
) -> tuple[Int[Array, ""], ...]:
    """Cuts all sequences, one after the other, into ranges of equal size, one for each slot.

    Every program finds its own from all lengths: what computes a list first is launches of its own.

    Args:
      slot: 0 .. slots - 1.
      units: of work, for each sequence.
      slots: the last ones get nothing if there are fewer units.

    Returns:
      The first sequence of the slot, how many it works on, the first unit of that sequence; the
      slot's own units `low .. high - 1`; and for `slot_of` the number of units and of slots used.
    """
    ends, total = jnp.cumsum(units), jnp.sum(units)
    used = jnp.minimum(slots, total)
    low, high = (lax.div((slot + i) * total, jnp.maximum(used, 1)) for i in range(2))
    before = (units > 0) & (ends <= low)
    here = (ends > low) & (ends - units < high) & (slot < used)
    sequence, touched = (jnp.sum(x.astype(jnp.int32)) for x in (before, here))
    return sequence, touched, jnp.sum(jnp.where(before, units, 0)), low, high, total, used


def slot_of(unit: Int[Array, ""], total: Int[Array, ""], used: Int[Array, ""]) -> Int[Array, ""]:
    """The slot that has a unit: see `share`."""
    return lax.div((unit + 1) * used - 1, total)


def _visible_blocks(length, queries: Any, window: int | None, block_tokens: int):
    """The blocks that a sequence's queries see: `begin .. end - 1`."""
    end = jnp.where(queries > 0, pl.cdiv(length, block_tokens), 0)
    if window is None:
        return jnp.zeros_like(end), end
    return jnp.minimum(jnp.maximum(length - queries - window + 1, 0) // block_tokens, end), end


def _attend(*, lengths, query_lengths, outputs, block_tokens, window, **arguments):
    """One program. Arrays are whole; what is static comes after `outputs`."""
    head_block, slot = pl.program_id(0), pl.program_id(1)
    slots, batch = pl.num_programs(1), lengths.shape[0]
    index = jnp.arange(power_of_two(batch))
    all_lengths, all_queries = (
        plt.load(x.at[index], mask=index < batch, other=0) for x in (lengths, query_lengths)
    )
    begin, end = _visible_blocks(all_lengths, all_queries, window, block_tokens)
    units = jnp.where(index < batch, end - begin + START, 0)
    first_sequence, touched, start, low, high, *cut = share(slot, units, slots)

    def attend_next(i, start):
        sequence = first_sequence + i
        length, queries = lengths[sequence], query_lengths[sequence]
        begin, end = _visible_blocks(length, queries, window, block_tokens)
        stop = start + START + end - begin
        first = slot_of(start, *cut)
        splits = jnp.where(end > begin, slot_of(stop - 1, *cut) - first + 1, 0)
        split = Split(sequence, slot - first, splits, slot + sequence)
        store_place(outputs, split, head_block == 0)

        def attend():
            _attend_split(
                split=split,
                head_block=head_block,
                length=length,
                real_queries=queries,
                low=begin + jnp.maximum(low - start - START, 0),
                high=jnp.minimum(begin + jnp.maximum(high - start - START, 0), end),
                outputs=outputs,
                block_tokens=block_tokens,
                window=window,
                **arguments,
            )

        pl.when(end > begin)(attend)
        return stop

    lax.fori_loop(0, touched, attend_next, start)


# --- Attention over a split ---------------------------------------------------------------------


def _attend_split(
    *,
    split: Split,
    head_block,
    length,
    real_queries,
    low,
    high,
    q,
    data,
    page_table,
    layer,
    scales=None,
    sinks=None,
    signs=None,
    outputs,
    rows: int,
    block_tokens: int,
    order: int,
    value_order: int,
    causal: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    gpu: bool,
):
    """Blocks low .. high - 1 of a sequence, which are one of its splits."""
    quantized, page_size = scales is not None, data.shape[4]
    pieces = 4 if quantized else 1
    width = q.shape[3] // pieces
    batch, layer = split.sequence, layer[0]
    cut = functools.partial(
        cut_rows,
        head_block=head_block,
        rows=rows,
        q=q,
        data=data,
        length=length,
        real_queries=real_queries,
        causal=causal,
        window=window,
    )
    row = cut(jnp.arange(rows))

    pages_of = functools.partial(
        page_ids,
        page_table,
        batch,
        block_tokens=block_tokens,
        page_size=page_size,
        length=length,
    )
    low = jnp.maximum(low, row.begin // block_tokens)
    high = jnp.minimum(high, pl.cdiv(row.end, block_tokens))

    # --- Queries: rotated, as float16 within a power of two of 1 --------------------------------
    size = padded(width, LEAST)
    column = jnp.arange(size)
    inside = column < width

    def load_query(piece, row):  # [rows, width]
        channel = piece * width + column
        index = q.at[batch, row.query[:, None], row.head[:, None], channel[None, :]]
        return plt.load(index, mask=row.real[:, None] & inside[None, :], other=0)

    factor: Any = scale * LOG2_E if soft_cap is None else scale / soft_cap
    if quantized:
        # Each row twice, for the two bytes of its numbers, and at least the 16 rows that a matrix
        # product takes.
        twice = cut(jnp.arange(max(16, 2 * rows)) // 2)
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
        odd = q_pieces[1] + q_pieces[3]
        total_query = factor * row_values(jnp.sum(q_pieces[0] + q_pieces[2] + odd, axis=1))
        odd_query = 8 * factor * row_values(jnp.sum(odd, axis=1))
        per_unit = row_values(largest) * (factor / (16 * LARGEST_LIMBS))
        which = jnp.arange(2 * rows)[:, None] % 2
        q_pieces = [arithmetic.limb(x * inverse_step, which).T for x in q_pieces]
    else:
        q_pieces = [load_query(0, row).astype(jnp.bfloat16).T]

    # --- The loop over blocks of tokens ---------------------------------------------------------

    def attend_block(block, carry, masked=True):
        running_max, total, shift, spread, *acc = carry
        page = pages_of(block)
        token = block * block_tokens + jnp.arange(block_tokens)
        offset = page_offsets(block, block_tokens=block_tokens, page_size=page_size)
        page_of_row, page_of_column = (page[:, None], page[None, :]) if page.ndim else (page, page)

        def load_keys():  # [tokens, width]
            index = data.at[layer, page_of_row, row.kv_head, 0, offset[:, None], column[None, :]]
            if size == width:
                return plt.load(index)
            mask = jnp.broadcast_to(inside[None, :], (block_tokens, size))
            return plt.load(index, mask=mask, other=0)

        def load_values():  # [width, tokens]
            index = data.at[layer, page_of_column, row.kv_head, 1, offset[None, :], column[:, None]]
            if size == width:
                return plt.load(index)
            mask = jnp.broadcast_to(inside[:, None], (size, block_tokens))
            return plt.load(index, mask=mask, other=0)

        def load_scales(kind):
            return plt.load(scales.at[layer, page, row.kv_head, kind, offset])

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
            scores = arithmetic.dot(keys, q_pieces[0]) * factor
        if soft_cap is not None:
            scores = soft_cap * LOG2_E * jnp.tanh(scores)
        if masked:
            visible = token[:, None] <= row.last[None, :]
            if window is not None:
                visible &= token[:, None] > (row.position - window)[None, :]
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
            if masked:
                values = jnp.where((token < length)[None, :], values, 0)
            products = [arithmetic.dot(values, weights)]
        acc = [
            multiply_add(y, growth[None, :], x * decay[None, :], gpu)
            for x, y in zip(acc, products, strict=True)
        ]
        return (new_max, total, shift, spread, *acc)

    running_max, sink_total = start_of(sinks, row, split.part)
    acc = [jnp.zeros((size, rows), jnp.float32) for _ in range(pieces)]
    partial = jnp.zeros((SUMS, rows), jnp.float32)
    first = (jnp.arange(SUMS) == 0)[:, None]
    total = jnp.where(first, sink_total[None, :], partial)
    carry: tuple = (running_max, total, partial, partial, *acc)

    if not quantized and window is None:
        # The mask of bfloat16 values costs more than a loop of its own for the last block.
        middle = jnp.clip(row.full_end // block_tokens, low, jnp.maximum(low, high))
        unmasked = functools.partial(attend_block, masked=False)
        carry = lax.fori_loop(low, middle, unmasked, carry)
        low = middle
    carry = lax.fori_loop(low, high, attend_block, carry)
    running_max, *totals = carry
    total, shift, spread = (jnp.sum(x, axis=0) for x in totals[:3])
    acc = totals[3:]

    # --- Output ---------------------------------------------------------------------------------
    inverse = jnp.where(row.real, 1 / jnp.where(total > 0, total, 1), 0)
    if quantized:
        shifts = [shift + 0 * spread, shift + 8 * spread] * 2
        factors = [1, 1 / 16] * 2
        acc = [x * f + y[None, :] for x, f, y in zip(acc, factors, shifts, strict=True)]
    acc = [x * inverse[None, :] for x in acc]
    if value_order > 1:
        acc = [jnp.where(inside[:, None], x, 0) for x in acc]
        acc = arithmetic.rotate(acc, signs, order=value_order, width=width, axis=0)
        acc = [x * value_order**-0.5 for x in acc]
    means = [(x, i * width + column) for i, x in enumerate(acc)]
    log_total = jnp.where(total > 0, running_max + jnp.log2(total), MASKED)
    store(outputs, split, row, means, inside, log_total, axis=1)
