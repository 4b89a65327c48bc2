"""`write_kv` as one Pallas kernel for NVIDIA GPUs: rotate, quantize, pack and scatter in place.

A program takes a block of tokens and one KV head, and either its keys or its values. The numbers
are those of `page_format.encode`: the same operations in the same order, so that the bytes are the
same but for the order of the sums in a rotation.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, UInt16, UInt32

from pallas_kernels import page_format, tuning
from pallas_kernels.page_format import Pages
from pallas_kernels.triton import arithmetic
from pallas_kernels.triton.arithmetic import divide, padded

_TINY = float(np.finfo(np.float32).tiny)
_UPPER_HALF = np.uint32(0xFFFF0000)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut. The defaults per device are data, in `pallas_kernels/tuning`.

    Attributes:
      block_tokens: tokens of a program; a power of two, at least 16.
      num_warps: warps of a program.
    """

    block_tokens: int
    num_warps: int


def supported(pages: Pages, k: Float[Array, "n K D"], v: Float[Array, "n K D"]) -> str | None:
    """Why this implementation cannot run, or `None`. Where it runs is not its question."""
    if pages.format.layout == "paired":
        return "Expected the layout to be 'split' or 'bf16', got 'paired'"
    if max(k.dtype.itemsize, v.dtype.itemsize) > 4:
        return f"Expected {k.dtype=} and {v.dtype=} to be of at most 32 bits"
    if pages.head_dim > 256:
        return f"Expected {pages.head_dim=} to be at most 256"
    return None


def write_kv(
    pages: Pages,
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    slots: Int[Array, "n"],
    *,
    layer: int | Int[Array, ""],
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Pages:
    """See `pallas_kernels.write_kv`. Beyond its arguments:

    `blocks` says how to cut the work; `None` is the device's default.
    `interpret` runs it as plain `jnp` on any device.
    """
    tokens, kv_heads, _ = k.shape
    if tokens == 0:
        return pages
    if blocks is None:
        blocks = Blocks(**tuning.blocks("write_kv"))
    quantized = pages.scales is not None
    pieces = 4 if quantized else 1
    kernel = functools.partial(
        _write,
        pieces=pieces,
        width=pages.head_dim // pieces,
        orders=(pages.format.order, pages.format.value_order),
        block_tokens=blocks.block_tokens,
        gpu=not interpret,
    )
    stored = [x for x in (pages.data, pages.scales) if x is not None]
    inputs = [k, v, slots, jnp.asarray(layer, jnp.int32).reshape(1)]
    if pages.format.order > 1:
        matrices = arithmetic.signs(pages.format.order, pages.head_dim, k.dtype)
        inputs.append(jnp.asarray(matrices))
    outputs = pl.pallas_call(
        # The inputs that become outputs are not read.
        lambda *refs: kernel(refs[: len(inputs)], *refs[len(inputs) + len(stored) :]),
        grid=(pl.cdiv(tokens, blocks.block_tokens), kv_heads, 2),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored],
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (len(inputs) + len(stored)),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(stored),
        input_output_aliases={len(inputs) + i: i for i in range(len(stored))},
        compiler_params=plt.CompilerParams(num_warps=blocks.num_warps, num_stages=1),
        interpret=interpret,
        name="write_kv",
    )(*inputs, *stored)
    return Pages(outputs[0], outputs[1] if quantized else None, pages.format)


def _write(
    inputs,
    data,
    scales=None,
    *,
    pieces: int,
    width: int,
    orders: tuple[int, int],
    block_tokens: int,
    gpu: bool,
):
    """One program. Arrays are whole."""
    k, v, slots, layer, *signs = inputs
    tokens = k.shape[0]
    num_pages, page_size = data.shape[1], data.shape[4]
    token = pl.program_id(0) * block_tokens + jnp.arange(block_tokens)
    kv_head = pl.program_id(1)
    layer = layer[0]
    slot = plt.load(slots.at[token], mask=token < tokens, other=-1)
    kept = (slot >= 0) & (slot < num_pages * page_size)
    slot = jnp.where(kept, slot, num_pages * page_size)  # an interpreter drops it, a mask skips it
    page, offset = lax.div(slot, page_size), lax.rem(slot, page_size)
    column = jnp.arange(padded(width))
    inside = column < width
    mask = kept[:, None] & inside[None, :]
    # Numbers do not wait for the slots.
    given = (token < tokens)[:, None] & inside[None, :]

    def write(x, kind):
        def load(piece):
            channel = piece * width + column
            return plt.load(x.at[token[:, None], kv_head, channel[None, :]], mask=given, other=0)

        rows = data.at[layer, page[:, None], kv_head, kind, offset[:, None], column[None, :]]
        numbers = [load(i) for i in range(pieces)]  # [tokens, width]
        if scales is None:
            bits = lax.bitcast_convert_type(numbers[0].astype(jnp.bfloat16), jnp.uint16)
            plt.store(rows, bits, mask=mask)
            return
        order = orders[kind]
        numbers = arithmetic.rotate(
            numbers, signs[0] if signs else None, order=order, width=width, axis=1
        )
        if order > 1:
            numbers = [x * np.float32(order**-0.5) for x in numbers]
        words, scale_words = _quantize(numbers, inside, gpu)
        plt.store(rows, words, mask=mask)
        plt.store(scales.at[layer, page, kv_head, kind, offset], scale_words, mask=kept)

    for kind, x in enumerate((k, v)):
        pl.when(pl.program_id(2) == kind)(functools.partial(write, x, kind))


def _quantize(
    numbers: list[Float[Array, "tokens width"]], inside, gpu: bool
) -> tuple[UInt16[Array, "tokens width"], UInt32[Array, "tokens"]]:
    """`page_format.quantize` and `pack`, step by step, on the four pieces of each vector."""

    # A minimum passes over NaN: a vector that holds one, or an infinity, gets an infinite range.
    finite = functools.reduce(jnp.logical_and, (jnp.abs(x) < jnp.inf for x in numbers))
    low = jnp.where(finite, functools.reduce(jnp.minimum, numbers), -jnp.inf)
    low = jnp.min(jnp.where(inside[None, :], low, jnp.inf), axis=1)
    high = functools.reduce(jnp.maximum, numbers)
    high = jnp.max(jnp.where(inside[None, :], high, -jnp.inf), axis=1)
    minimum = _floor_to_bf16(low)
    spread = high - minimum
    # As XLA compiles a division by a constant.
    scale = _round_to_bf16(spread * np.float32(1 / 15))
    usable = (scale >= _TINY) & (scale < jnp.inf)
    inverse = jnp.where(usable, divide(jnp.ones_like(scale), scale, gpu), 0)
    words = jnp.zeros(numbers[0].shape, jnp.int32)
    for i, x in enumerate(numbers):
        steps = jnp.clip((x - minimum[:, None]) * inverse[:, None], 0, 15)
        # Adding 2^23 rounds to nearest even and leaves the integer in the lowest bits, the next
        # twenty being zero.
        bits = lax.bitcast_convert_type(steps + np.float32(2**23), jnp.int32)
        words = words | bits << 4 * i
    words = jnp.where(usable[:, None], words, 0).astype(jnp.uint16)
    finite = jnp.abs(spread) < jnp.inf
    scale = jnp.where(finite, jnp.where(usable, scale, 0), jnp.nan)
    return words, page_format.join_scales(scale, jnp.where(finite, minimum, 0))


def _floor_to_bf16(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """The largest bfloat16 not above a finite x, as float32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    away_from_zero = jnp.where(x < 0, jnp.uint32(0xFFFF), jnp.uint32(0))
    return lax.bitcast_convert_type((bits + away_from_zero) & _UPPER_HALF, jnp.float32)


def _round_to_bf16(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """The bfloat16 nearest to x, ties to even, as float32; a NaN stays one."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jnp.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = lax.bitcast_convert_type(bits & _UPPER_HALF, jnp.float32)
    return jnp.where(jnp.abs(x) < jnp.inf, rounded, x)
