"""`write_kv` and `write_qkv` as one Pallas kernel for NVIDIA GPUs, in place.

A program takes a block of tokens and one head, whose keys or values it rotates, quantizes, packs
and scatters, or it prepares as many queries. The numbers are those of `page_format.encode`: the
same operations in the same order, so that the bytes are the same but for the order of the sums in a
rotation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

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
from pallas_kernels.triton.arithmetic import multiply_add, padded, reciprocal

_TINY = float(np.finfo(np.float32).tiny)
_UPPER_HALF = np.uint32(0xFFFF0000)

# Up to so many tokens `write_qkv` takes q, k and v as one array: what a projection left in parts
# XLA then sums in one launch, not in three. More tokens cost more to put together than launches.
SIDE_BY_SIDE = 256

# From so many tokens on throughput counts, below it how long a program takes.
MANY = 4096


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
    operands = dict(k=k, v=v, slots=slots)
    return _launch(pages, operands, layer, blocks=blocks, interpret=interpret)[0]


def write_qkv(
    pages: Pages,
    q: Float[Array, "n H D"],
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    slots: Int[Array, "n"],
    *,
    layer: int | Int[Array, ""],
    cos: Float[Array, "n D/2"] | None,
    sin: Float[Array, "n D/2"] | None,
    q_norm: Float[Array, "D"] | None,
    k_norm: Float[Array, "D"] | None,
    eps: float,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "n H D"], Pages]:
    """See `pallas_kernels.write_qkv`; `blocks` and `interpret` as above."""
    operands = dict(q=q, k=k, v=v, slots=slots, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm)
    side_by_side = len(slots) <= SIDE_BY_SIDE and q.dtype == k.dtype == v.dtype
    if side_by_side:
        operands |= dict.fromkeys("qkv", jnp.concatenate([q, k, v], axis=1))
    pages, [q] = _launch(
        pages,
        operands,
        layer,
        q_heads=q.shape[1],
        side_by_side=side_by_side,
        eps=eps,
        blocks=blocks,
        interpret=interpret,
    )
    return q, pages


# The layer is an operand: a model's layers are one function, traced and lowered once.
@functools.partial(
    jax.jit, static_argnames=("q_heads", "side_by_side", "eps", "blocks", "interpret")
)
def _launch(
    pages: Pages,
    operands: Mapping[str, Array | None],
    layer: Int[Array, ""],
    *,
    q_heads: int = 0,
    side_by_side: bool = False,
    eps: float = 0,
    blocks: Blocks | None,
    interpret: bool,
) -> tuple[Pages, list[Array]]:
    """The pages, and the prepared queries if there are any."""
    given: dict[str, Any] = {name: x for name, x in operands.items() if x is not None}
    tokens, _, head_dim = given["k"].shape
    queries = []
    if q_heads:
        queries = [jax.ShapeDtypeStruct((tokens, q_heads, head_dim), given["q"].dtype)]
    if tokens == 0:
        return pages, [jnp.zeros(q.shape, q.dtype) for q in queries]
    if blocks is None:
        many = tokens >= MANY and not q_heads
        blocks = Blocks(**tuning.blocks("write_kv_many" if many else "write_kv"))
    given["layer"] = jnp.asarray(layer, jnp.int32).reshape(1)
    if pages.format.order > 1:
        given["signs"] = arithmetic.signs(pages.format.order, head_dim, given["k"].dtype)
    stored = {"data": pages.data} | ({} if pages.scales is None else {"scales": pages.scales})
    results = stored | dict(zip(["q_out"], queries, strict=False))
    # Four codes make a word; halves are what RoPE turns against each other.
    pieces = 4 if pages.scales is not None else 1 + (head_dim % 2 == 0)
    kernel = functools.partial(
        _program,
        pieces=pieces,
        width=head_dim // pieces,
        orders=(pages.format.order, pages.format.value_order),
        eps=eps,
        first_head=(0, q_heads, q_heads + pages.kv_heads) if side_by_side else (0, 0, 0),
        blocks=blocks,
        gpu=not interpret,
    )

    def with_names(*refs):
        # The inputs that become outputs are not read.
        named = dict(zip(given, refs, strict=False))
        kernel(**named, **dict(zip(results, refs[-len(results) :], strict=True)))

    outputs = pl.pallas_call(
        with_names,
        grid=(
            pl.cdiv(tokens, blocks.block_tokens) * 2 * pages.kv_heads
            + pl.cdiv(tokens * q_heads, blocks.block_tokens),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results.values()],
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (len(given) + len(stored)),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(results),
        input_output_aliases={len(given) + i: i for i in range(len(stored))},
        compiler_params=plt.CompilerParams(num_warps=blocks.num_warps, num_stages=1),
        interpret=interpret,
        name="write_qkv" if queries else "write_kv",
    )(*map(jnp.asarray, given.values()), *stored.values())
    scales = outputs[1] if pages.scales is not None else None
    return Pages(outputs[0], scales, pages.format), outputs[len(stored) :]


def _program(
    k,
    v,
    slots,
    layer,
    data,
    scales=None,
    q=None,
    q_out=None,
    cos=None,
    sin=None,
    q_norm=None,
    k_norm=None,
    signs=None,
    *,
    pieces: int,
    width: int,
    orders: tuple[int, int],
    eps: float,
    first_head: tuple[int, int, int],
    blocks: Blocks,
    gpu: bool,
):
    """One program: keys of a head, values of a head, or queries. Arrays are whole.

    `first_head` says where those of q, k and v begin in their arrays.
    """
    tokens, _, head_dim = k.shape
    kv_heads = data.shape[2]
    first_q, first_k, first_v = first_head
    row = jnp.arange(blocks.block_tokens)
    column = jnp.arange(padded(width))
    inside = column < width
    token_blocks = pl.cdiv(tokens, blocks.block_tokens)
    kv_programs = token_blocks * 2 * kv_heads
    program = pl.program_id(0)

    def load(x, count: int, token, *head):
        """`count` pieces [rows, width] of x [n, D], or of x [n, heads, D] with a head, or many."""
        mask = (token < tokens)[:, None] & inside[None, :]
        return [
            plt.load(x.at[token[:, None], *head, (i * width + column)[None, :]], mask=mask, other=0)
            for i in range(count)
        ]

    def normalized(numbers, weight):
        square = jnp.zeros_like(numbers[0])
        for x in numbers:
            square = multiply_add(x, x, square, gpu)
        inverse = lax.rsqrt(jnp.sum(square, axis=1) * np.float32(1 / head_dim) + eps)[:, None]
        out = []
        for i, x in enumerate(numbers):
            # As often as there are rows: each thread loads its own.
            channel = jnp.broadcast_to((i * width + column)[None, :], x.shape)
            w = plt.load(
                weight.at[channel], mask=jnp.broadcast_to(inside[None, :], x.shape), other=0
            )
            out.append(x * (inverse * w.astype(jnp.float32)))
        return out

    def turned(numbers, token):
        half = pieces // 2
        cosines, sines = load(cos, half, token), load(sin, half, token)
        out = list(numbers)
        for i, (c, s) in enumerate(zip(cosines, sines, strict=True)):
            a, b = numbers[i], numbers[i + half]
            out[i] = multiply_add(a, c, -(b * s), gpu)
            out[i + half] = multiply_add(b, c, a * s, gpu)
        return out

    def prepared(numbers, token, weight):
        """QK-norm and RoPE, each rounded as `pallas_kernels.xla` rounds it."""
        dtype = numbers[0].dtype
        if weight is not None:
            numbers = normalized([x.astype(jnp.float32) for x in numbers], weight)
            numbers = [x.astype(dtype) for x in numbers]
        if cos is not None:
            numbers = turned([x.astype(jnp.float32) for x in numbers], token)
            numbers = [x.astype(dtype) for x in numbers]
        return numbers

    def write(numbers, token, kind: int, kv_head):
        num_pages, page_size = data.shape[1], data.shape[4]
        # Unsigned: what is negative lies past the pool.
        slot = plt.load(slots.at[token], mask=token < tokens, other=-1).astype(jnp.uint32)
        kept = slot < np.uint32(num_pages * page_size)
        # An interpreter drops it, a mask skips it.
        slot = jnp.where(kept, slot, np.uint32(num_pages * page_size))
        page = lax.div(slot, np.uint32(page_size)).astype(jnp.int32)
        offset = lax.rem(slot, np.uint32(page_size)).astype(jnp.int32)
        mask = kept[:, None] & inside[None, :]

        def rows(i: int):
            channel = i * width + column
            return data.at[
                layer[0], page[:, None], kv_head, kind, offset[:, None], channel[None, :]
            ]

        if scales is None:
            for i, x in enumerate(numbers):
                bits = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
                plt.store(rows(i), bits, mask=mask)
            return
        order = orders[kind]
        rotated = _rotate(numbers, signs, order, width, blocks.num_warps, gpu)
        words, scale_words = _quantize(*rotated, inside, order=order, width=width, gpu=gpu)
        plt.store(rows(0), words, mask=mask)
        plt.store(scales.at[layer[0], page, kv_head, kind, offset], scale_words, mask=kept)

    @pl.when(program < kv_programs)
    def keys_or_values():
        head = lax.div(program, token_blocks)
        token = lax.rem(program, token_blocks) * blocks.block_tokens + row

        @pl.when(head < kv_heads)
        def keys():
            numbers = load(k, pieces, token, first_k + head)
            write(prepared(numbers, token, k_norm), token, 0, head)

        @pl.when(head >= kv_heads)
        def values():
            write(load(v, pieces, token, first_v + head - kv_heads), token, 1, head - kv_heads)

    if q is None:
        return

    # Heads of a token side by side: they share its cosines.
    @pl.when(program >= kv_programs)
    def queries():
        q_heads = q_out.shape[1]
        at = (program - kv_programs) * blocks.block_tokens + row
        token, head = lax.div(at, q_heads), lax.rem(at, q_heads)[:, None]
        mask = (token < tokens)[:, None] & inside[None, :]
        numbers = load(q, pieces, token, first_q + head)
        for i, x in enumerate(prepared(numbers, token, q_norm)):
            channel = i * width + column
            plt.store(q_out.at[token[:, None], head, channel[None, :]], x, mask=mask)


def _rotate(
    numbers: list[Float[Array, "tokens width"]],
    signs,
    order: int,
    width: int,
    num_warps: int,
    gpu: bool,
) -> tuple[list[Array], list[Array], list[Array]]:
    """Four pieces rotated but not scaled, and arrays that hold their minimum and their maximum."""
    if width % order and order % width:
        numbers = arithmetic.rotate(numbers, signs, order=order, width=width, axis=1)
        return numbers, numbers, numbers
    inner = min(order, width)
    fits = dict(order=inner, width=width, rows=len(numbers[0]), num_warps=num_warps)
    if gpu and arithmetic.can_rotate_lanes(numbers[0].dtype, **fits):
        numbers = [arithmetic.rotate_lanes(x, inner) for x in numbers]
    else:
        numbers = arithmetic.rotate(numbers, signs, order=inner, width=width, axis=1)
    lows, highs = numbers, numbers
    step = 1
    while step * width < order:
        lows, highs = [], []
        for i in range(4):
            if not i & step:
                a, b = numbers[i], numbers[i | step]
                numbers[i], numbers[i | step] = a + b, a - b
                # Of both: an addition is cheaper than a comparison.
                lows.append(a - jnp.abs(b))
                highs.append(a + jnp.abs(b))
        step *= 2
    return numbers, lows, highs


def _quantize(
    numbers: list[Float[Array, "tokens width"]],
    lows: list[Float[Array, "tokens width"]],
    highs: list[Float[Array, "tokens width"]],
    inside,
    *,
    order: int,
    width: int,
    gpu: bool,
) -> tuple[UInt16[Array, "tokens width"], UInt32[Array, "tokens"]]:
    """`page_format.quantize` and `pack`, step by step, on what `_rotate` returns."""
    # A minimum passes over NaN, zero times a number does not: a vector that holds one, or an
    # infinity, gets an infinite range. A rotation spreads them over its blocks: one piece of those
    # that it joins shows them, and where it joins all, nothing finite is left to pass over to.
    low = functools.reduce(jnp.minimum, lows)
    if order < 4 * width:
        poison = jnp.zeros_like(low)
        for x in numbers[:: max(1, order // width)]:
            poison = multiply_add(x, jnp.zeros_like(x), poison, gpu)
        low = jnp.where(poison == 0, low, -jnp.inf)
    low = jnp.min(jnp.where(inside[None, :], low, jnp.inf), axis=1)
    high = functools.reduce(jnp.maximum, highs)
    high = jnp.max(jnp.where(inside[None, :], high, -jnp.inf), axis=1)
    factor = np.float32(order**-0.5)
    low, high = low * factor, high * factor
    minimum = _floor_to_bf16(low)
    spread = high - minimum
    # As XLA compiles a division by a constant.
    scale = _round_to_bf16(spread * np.float32(1 / 15))
    usable = (scale >= _TINY) & (scale < jnp.inf)
    inverse = jnp.where(usable, reciprocal(scale, gpu), 0)
    words = jnp.zeros(numbers[0].shape, jnp.int32)
    for x in reversed(numbers):
        # Within 0 .. 15.1 without clipping: the minimum was rounded down, the scale by 2^-9. Adding
        # 2^23 rounds to nearest even and leaves the integer in the lowest bits, the next twenty
        # being zero.
        if order == 1:
            magic = (x - minimum[:, None]) * inverse[:, None] + np.float32(2**23)
        else:  # the last bit of x is that of a sum in some order: round once, not three times
            above = multiply_add(x, factor, -minimum[:, None], gpu)
            magic = multiply_add(above, inverse[:, None], np.float32(2**23), gpu)
        bits = lax.bitcast_convert_type(magic, jnp.int32)
        words = words * 16 + bits
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
