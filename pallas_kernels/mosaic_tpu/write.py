"""`write_kv` for TPU: rotate, quantize, pack and scatter in one kernel, in place.

A copy to or from a page must be whole tiles: 32 tokens of rows, 128 tokens of scales. A grid step
encodes a block of tokens in VMEM, lists the units (such tiles) that they fall into, and for each
unit reads what is there, puts the block's tokens in and writes it back. A unit that the tokens
fill is not read. Several units are in flight at once.

Tokens reach their row of a unit by a product with a 0/1 matrix: exact, for any order of slots, and
on a matrix unit that has nothing else to do.

Units of one grid step never conflict: each puts in *all* tokens of the block that fall into it, so
a unit that is listed twice is written twice with the same bytes. Between grid steps all copies
have ended.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import page_format
from pallas_kernels.mosaic_tpu.attention import (
    LANES,
    hadamard_signs,
    pages_supported,
    tokens_last,
)
from pallas_kernels.page_format import Pages
from pallas_kernels.xla import write as xla_write

BLOCK_TOKENS = 128
BLOCK_NUMBERS = 1 << 18  # bounds K * D * tokens of a block, and so the memory
TILE_TOKENS = 32
IN_FLIGHT = 8


def supported(pages: Pages, k: Float[Array, "n K D"], v: Float[Array, "n K D"]) -> str | None:
    """Why this implementation cannot run, or `None`. Where it runs is not its question."""
    return pages_supported(pages)


def write_kv(
    pages: Pages,
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    slots: Int[Array, "n"],
    *,
    layer: int | Int[Array, ""],
    interpret: Any = False,
) -> Pages:
    """See `pallas_kernels.write_kv`. `interpret` is as of `pl.pallas_call`."""
    n, kv_heads, head_dim = k.shape
    if n == 0:
        return pages
    page_size = pages.page_size
    block = max(16, min(BLOCK_TOKENS, BLOCK_NUMBERS // (kv_heads * head_dim) // 16 * 16))
    block = min(block, -(-n // 16) * 16)
    blocks = -(-n // block)
    padding = blocks * block - n
    slots = jnp.pad(slots, (0, padding), constant_values=-1)
    dtype = jnp.bfloat16 if k.dtype == v.dtype == jnp.bfloat16 else jnp.float32
    k, v = (jnp.pad(x.astype(dtype).swapaxes(0, 1), ((0, 0), (0, padding), (0, 0))) for x in (k, v))
    by_channel = tokens_last(pages)
    unit = math.gcd(page_size, LANES if by_channel else TILE_TOKENS)
    chunk = math.gcd(page_size, LANES)

    tokens = pl.BlockSpec((kv_heads, block, head_dim), lambda i, *_: (0, i, 0))
    in_place = pl.BlockSpec(memory_space=pltpu.HBM)
    operands = [
        (slots.reshape(blocks, 1, block), pl.BlockSpec((1, 1, block), lambda i, *_: (i, 0, 0))),
        (slots.reshape(blocks, block, 1), pl.BlockSpec((1, block, 1), lambda i, *_: (i, 0, 0))),
        (k, tokens),
        (v, tokens),
    ]
    if pages.format.order > 1:
        square = pl.BlockSpec((head_dim, head_dim), lambda i, *_: (0, 0))
        operands.append((hadamard_signs(pages), square))
    data = pages.data.swapaxes(-1, -2) if by_channel else pages.data
    arrays = [data] if pages.scales is None else [data, pages.scales]
    aliases = {2 + len(operands) + i: i for i in range(len(arrays))}
    operands += [(x, in_place) for x in arrays]

    unit_shape = list(data.shape[2:])
    unit_shape[-1 if by_channel else -2] = unit
    scratch = [
        pltpu.VMEM((block, _pieces(pages) * kv_heads * head_dim), jnp.bfloat16),
        pltpu.VMEM((IN_FLIGHT, *unit_shape), data.dtype),
        *_units_in_flight(block),
    ]
    if pages.scales is not None:
        folded = page_format.is_folded(pages.scales)
        window = pages.scales.shape[2:] if folded else (2, kv_heads, chunk)
        scratch += [
            pltpu.VMEM((8 * kv_heads, block), jnp.bfloat16),
            pltpu.VMEM((IN_FLIGHT, *window), jnp.uint32),
            *_units_in_flight(block),
        ]
    inputs, in_specs = zip(*operands, strict=True)
    out = pl.pallas_call(
        functools.partial(_kernel, pages=jax.eval_shape(lambda: pages), unit=unit, chunk=chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(blocks,),
            in_specs=in_specs,
            out_specs=[in_place] * len(arrays),
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), disable_bounds_checks=True
        ),
        name=f"write_kv_{pages.format.layout}",
        interpret=interpret,
    )(jnp.asarray(layer, jnp.int32).reshape(1), slots, *inputs)
    data = out[0].swapaxes(-1, -2) if by_channel else out[0]
    return Pages(data, out[1] if len(out) > 1 else None, pages.format)


def _pieces(pages: Pages) -> int:
    """Bytes that a channel's key and value take."""
    return 1 if pages.format.layout == "paired" else 4


def _units_in_flight(block: int) -> list:
    """The units listed, the tokens in each, and a semaphore per direction for those in flight."""
    return [
        pltpu.SMEM((block,), jnp.int32),
        pltpu.SMEM((block,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, IN_FLIGHT)),
    ]


# --- In the kernel --------------------------------------------------------------------------


def _kernel(layer_ref, slots_ref, *refs, pages, unit, chunk):
    rest = iter(refs)
    format, page_size, kv_heads = pages.format, pages.page_size, pages.kv_heads
    by_channel, quantized = tokens_last(pages), pages.scales is not None
    folded = quantized and page_format.is_folded(pages.scales)
    share = 64 // page_size if folded else 1  # heads in a row of scales

    def take(count):
        return list(itertools.islice(rest, count))

    lane_slots, row_slots, k_ref, v_ref = take(4)
    signs = take(1)[0][...] if format.order > 1 else None
    take(1 + quantized)  # the arrays as inputs: the same memory as the outputs
    arrays = take(1 + quantized)
    bytes_ref, data_vmem, *data_units = take(5)
    block, head_dim = k_ref.shape[1:]

    # --- Encode the block: bytes [token, (piece, head, channel)], and words

    k, v = (x[...].reshape(kv_heads * block, head_dim) for x in (k_ref, v_ref))
    if quantized:
        words_ref, scales_vmem, *scales_units = rest
        k_codes, k_words = _quantize(_rotate(k, signs, format.order))
        v_codes, v_words = _quantize(_rotate(v, signs, format.value_order))
        pieces = [k_codes + 16 * v_codes]
        words_ref[...] = _word_bytes([k_words, v_words], kv_heads, share)
    else:
        pieces = []
        for x in (k, v):
            bits = _bfloat16_bits(x.astype(jnp.float32)).astype(jnp.int32)
            pieces += [bits & 0xFF, bits >> 8]
    for i, piece in enumerate(pieces):
        piece = piece.astype(jnp.float32).astype(jnp.bfloat16)  # below 256: exact
        for h in range(kv_heads):
            column = (i * kv_heads + h) * head_dim
            rows = slice(h * block, (h + 1) * block)
            bytes_ref[:, column : column + head_dim] = piece[rows]

    # --- Put tokens into units

    def put_rows(ref, base):
        """Tokens of the block into a unit of pages that starts at slot `base`."""
        if by_channel:
            lane = lax.broadcasted_iota(jnp.int32, (block, unit), 1)
            here = (row_slots[0] - base == lane).astype(jnp.float32)
            dimensions = (((0,), (0,)), ((), ()))
            operands = bytes_ref[...], here.astype(jnp.bfloat16)
            new = here.max(0, keepdims=True) > 0
        else:
            row = lax.broadcasted_iota(jnp.int32, (unit, block), 0)
            here = (lane_slots[0] - base == row).astype(jnp.float32)
            dimensions = (((1,), (0,)), ((), ()))
            operands = here.astype(jnp.bfloat16), bytes_ref[...]
            new = here.max(1, keepdims=True) > 0
        moved = lax.dot_general(*operands, dimensions, preferred_element_type=jnp.float32)
        moved = moved.astype(jnp.int32)

        def part(piece, h):
            start = (piece * kv_heads + h) * head_dim
            channels = slice(start, start + head_dim)
            return moved[channels] if by_channel else moved[:, channels]

        for h in range(kv_heads):
            if quantized:
                old = ref[h].astype(jnp.int32)
                ref[h] = jnp.where(new, part(0, h), old).astype(ref.dtype)
                continue
            for kind in (0, 1):
                bits = part(2 * kind, h) | part(2 * kind + 1, h) << 8
                old = ref[h, kind].astype(jnp.int32)
                ref[h, kind] = jnp.where(new, bits, old).astype(ref.dtype)

    def put_words(ref, base):
        """Words of the block into a unit of scales."""
        lane = lax.broadcasted_iota(jnp.int32, (block, LANES if folded else chunk), 1)
        token = lane & (chunk - 1) if folded else lane
        here = (row_slots[0] - base == token).astype(jnp.float32)
        new = here.max(0, keepdims=True) > 0
        moved = jnp.dot(
            words_ref[...], here.astype(jnp.bfloat16), preferred_element_type=jnp.float32
        ).astype(jnp.int32)
        rows = 2 * kv_heads
        words = sum(moved[i * rows : (i + 1) * rows] << 8 * i for i in range(4))
        words = lax.bitcast_convert_type(words, jnp.uint32)
        if folded:  # every lane that could hold a token has its word: each run of lanes picks
            size = kv_heads // share
            out, run = ref[0], lane[:1] & -chunk
            for i in range(2 * share):
                mine = new & (run == i * chunk)
                out = jnp.where(mine, words[i * size : (i + 1) * size], out)
            ref[0] = out
            return
        for kind in (0, 1):
            part = words[kind * kv_heads : (kind + 1) * kv_heads]
            ref[kind] = jnp.where(new, part, ref[kind])

    # --- Units in flight

    def list_units(*lists):
        """Lists the units that runs of tokens fall into, and returns how many each list has.

        A list is (tokens of a unit, units, tokens in each unit).
        """
        first_token = pl.program_id(0) * block

        def token(i, carry):
            slot = slots_ref[first_token + i]
            valid = (slot >= 0) & (slot < pages.num_pages * page_size)
            new_carry = []
            for (size, units, counts), (total, last) in zip(lists, carry, strict=True):
                this = lax.div(slot, size)
                index = jnp.where(this == last, total - 1, total)

                @pl.when(valid)
                def _(units=units, counts=counts, this=this, last=last, index=index):
                    units[index] = this
                    counts[index] = jnp.where(this == last, counts[index] + 1, 1)

                new_carry.append((jnp.where(valid, index + 1, total), jnp.where(valid, this, last)))
            return tuple(new_carry)

        start = tuple((jnp.int32(0), jnp.int32(-1)) for _ in lists)
        return [total for total, _ in lax.fori_loop(0, block, token, start)]

    def update(size, array, window, vmem, put, count, units, counts, semaphores):
        """Reads, changes and writes the units of one array, IN_FLIGHT of them at once."""
        ahead = IN_FLIGHT // 2

        def copy(i, direction):
            start = units[i] * size
            page, offset = lax.div(start, page_size), lax.rem(start, page_size)
            hbm = array.at[(layer_ref[0], page, *window(pl.multiple_of(offset, size)))]
            slot = lax.rem(i, IN_FLIGHT)
            ends = (hbm, vmem.at[slot]) if direction == 0 else (vmem.at[slot], hbm)
            return pltpu.make_async_copy(*ends, semaphores.at[direction, slot])

        def fetch(i):
            @pl.when(i >= IN_FLIGHT)
            def _():
                copy(i - IN_FLIGHT, 1).wait()

            @pl.when(counts[i] < size)
            def _():
                copy(i, 0).start()

        def change(i):
            @pl.when(counts[i] < size)
            def _():
                copy(i, 0).wait()

            put(vmem.at[lax.rem(i, IN_FLIGHT)], units[i] * size)
            copy(i, 1).start()

        def body(i, _):
            pl.when(i < count)(lambda: fetch(i))
            pl.when(i >= ahead)(lambda: change(i - ahead))

        lax.fori_loop(0, jnp.where(count > 0, count + ahead, 0), body, None)
        lax.fori_loop(
            jnp.maximum(count - IN_FLIGHT, 0), count, lambda i, _: copy(i, 1).wait(), None
        )

    def data_window(offset):
        lead = (slice(None),) * (len(data_vmem.shape) - 3)
        tokens = pl.ds(offset, unit)
        return (*lead, slice(None), tokens) if by_channel else (*lead, tokens)

    def scales_window(offset):
        return slice(None), slice(None), slice(None) if folded else pl.ds(offset, chunk)

    lists = [(unit, *data_units[:2])]
    if quantized:
        lists.append((chunk, *scales_units[:2]))
    totals = list_units(*lists)
    update(unit, arrays[0], data_window, data_vmem, put_rows, totals[0], *data_units)
    if quantized:
        update(chunk, arrays[1], scales_window, scales_vmem, put_words, totals[1], *scales_units)


def _word_bytes(words: list[Array], kv_heads: int, share: int) -> Array:
    """Words of keys and of values, columns [K * n, 1] → their bytes `bfloat16 [4 * 2 * K, n]`.

    Rows are in the order (byte, key or value, i, j), the head being j * share + i.
    """
    block = words[0].shape[0] // kv_heads
    lane = lax.broadcasted_iota(jnp.int32, (block, 2 * kv_heads), 1)
    table = jnp.zeros(lane.shape, jnp.int32)
    for kind, column in enumerate(words):
        column = lax.bitcast_convert_type(column, jnp.int32)
        for h in range(kv_heads):
            here = column[h * block : (h + 1) * block]
            place = h % share * (kv_heads // share) + h // share
            table = jnp.where(lane == kind * kv_heads + place, here, table)
    table = table.T
    pieces = [lax.shift_right_logical(table, 8 * i) & 0xFF for i in range(4)]
    return jnp.concatenate(pieces, 0).astype(jnp.float32).astype(jnp.bfloat16)


def _rotate(x: Array, signs: Array | None, order: int) -> Array:
    """Rows times the Hadamard matrix: exact products of bfloat16 parts, summed in float32."""
    if signs is None or order == 1:
        return x.astype(jnp.float32)
    rest = x.astype(jnp.float32)
    out = jnp.zeros_like(rest)
    for _ in range(1 if x.dtype == jnp.bfloat16 else 3):
        bits = lax.bitcast_convert_type(rest, jnp.uint32) & np.uint32(0xFFFF0000)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        out += jnp.dot(part.astype(jnp.bfloat16), signs, preferred_element_type=jnp.float32)
        rest -= part
    return out * np.float32(order**-0.5)


def _bfloat16_bits(x: Array) -> Array:
    """The bits of a float32 rounded to bfloat16, low in a uint32. NaN stays NaN."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return jnp.where(x != x, np.uint32(0x7FC0), rounded)


def _quantize(x: Array) -> tuple[Array, Array]:
    """`page_format.quantize` of rows, with words as columns [n, 1]: codes are int32."""
    minimum = page_format.floor_to_bf16(x.min(-1, keepdims=True))
    spread = x.max(-1, keepdims=True) - minimum
    scale = lax.bitcast_convert_type(
        _bfloat16_bits(spread * np.float32(1 / 15)) << np.uint32(16), jnp.float32
    )
    finite = jnp.abs(spread) < jnp.inf
    usable = finite & (scale >= page_format._TINY) & (scale < jnp.inf)
    inverse = jnp.where(usable, 1 / scale, 0)
    steps = jnp.round((x - minimum) * inverse)
    codes = jnp.where(usable, jnp.clip(steps, 0, 15), 0).astype(jnp.int32)
    scale = jnp.where(finite, jnp.where(usable, scale, 0), jnp.nan)
    minimum = jnp.where(finite, minimum, 0)
    return codes, page_format.join_scales(scale, minimum)


# XLA fuses QK-norm and RoPE with each other; only the writing is a kernel.
write_qkv = functools.partial(xla_write.write_qkv, write=write_kv)
