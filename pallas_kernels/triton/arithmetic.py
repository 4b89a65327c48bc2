"""What the kernels here share: codes to numbers, the rotation, a few machine instructions.

A vector of D channels is held as *pieces*: four arrays, piece i holding channels i * D/4 ..
(i + 1) * D/4 - 1, because that is where nibble i of the `split` layout's words belongs (one piece
of all D channels in the `bf16` layout). Pieces are padded with zeros to a power of two, at least
16, which is what the matrix unit takes.

`gpu` chooses machine instructions; without it the same numbers come from plain `jnp`, so that the
kernels run interpreted.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int8, Int32, UInt16, UInt32

from pallas_kernels import page_format

_UPPER_HALF = np.uint32(0xFFFF0000)

# Finite, so that a row with nothing visible yet has exp2(0) to multiply, not exp2(nan).
MASKED = -1e30
LOG2_E = math.log2(math.e)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def padded(width: int, least: int = 16) -> int:
    """The power of two, at least `least`, that holds `width`."""
    return max(least, power_of_two(width))


def dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Matrix product accumulated in float32; float32 operands are not shortened."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    out = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jnp.dot(a, b, precision=precision, preferred_element_type=out)


# --- Codes ----------------------------------------------------------------------------------

# Four codes to a register: the matrix unit takes bytes, and integers are exact.


def codes_as_bytes(words: UInt16[Array, "*s"], gpu: bool) -> list[Int8[Array, "*s"]]:
    """Words → four int8 arrays, one for each nibble: code, 16 * (code - 8), and so again.

    A `prmt` brings together a half of four words, a `lop3` each takes its two nibbles: the lower is
    a number as it stands, the upper is one of two's complement with its highest bit turned.
    """
    if not gpu:
        halves = [(words >> jnp.uint16(shift)).astype(jnp.uint8) for shift in (0, 8)]
        codes = [(x & jnp.uint8(0xF), (x & jnp.uint8(0xF0)) ^ jnp.uint8(0x80)) for x in halves]
        return [lax.bitcast_convert_type(x, jnp.int8) for pair in codes for x in pair]
    out = []
    for selected in ("0x6420", "0x7531"):
        half = _four_bytes(f"prmt.b32 $0, $1, $2, {selected};", words, "=r,r,r")
        out += [
            _four_bytes("and.b32 $0, $1, 0x0F0F0F0F;", half, "=r,r"),
            _four_bytes("lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;", half, "=r,r"),
        ]
    return out


def _four_bytes(instruction: str, x: Any, constraints: str) -> Int8[Array, "*s"]:
    """Applies an instruction to four elements at a time."""
    [out] = plt.elementwise_inline_asm(
        instruction,
        args=[x],
        constraints=constraints,
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int8)],
    )
    return out


# What `dequantize` multiplies codes with must be a float16 after a factor of 2**24.
LARGEST_STEP = 2**9


def dequantize(
    words: UInt16[Array, "n w"],
    step: Float[Array, "n 1"],
    minimum: Float[Array, "n 1"],
    gpu: bool,
) -> list[Float[Array, "n w"]]:
    """Words → four float16 arrays that hold `code * step + minimum`, rounded once.

    The bits of a code, alone in a float16, are a subnormal number: code * 2**-24, or code * 2**-20
    if they are a nibble further up.

    Args:
      words: four codes each.
      step: float32, below 2 / LARGEST_STEP.
      minimum: float32, below float16's largest.
      gpu: by machine instructions.
    """
    low, high, minimum = (
        jnp.broadcast_to(x.astype(jnp.float16), words.shape)
        for x in (step * 2.0**24, step * 2.0**20, minimum)
    )
    if not gpu:
        codes = [((words >> (4 * i)) & 0xF).astype(jnp.float32) for i in range(4)]
        offset = minimum.astype(jnp.float32)
        step = low.astype(jnp.float32) * 2.0**-24
        return [(x * step + offset).astype(jnp.float16) for x in codes]
    out = []
    for i in range(4):
        shift = "mov.b32 t, $1;" if i < 2 else "shr.b32 t, $1, 8;"
        mask = "0x00F000F0" if i % 2 else "0x000F000F"
        out.append(
            _pairs(
                f".reg .b32 t; {shift} and.b32 t, t, {mask}; fma.rn.f16x2 $0, t, $2, $3;",
                words,
                high if i % 2 else low,
                minimum,
            )
        )
    return out


def side_by_side(pieces: list[Float[Array, "n w"]]) -> Float[Array, "n 4*w"]:
    """Four pieces as one array. No number changes its thread."""
    halves = [jnp.stack(pieces[:2], axis=-1), jnp.stack(pieces[2:], axis=-1)]
    joined = jnp.stack(halves, axis=-1).transpose(0, 3, 2, 1)
    return joined.reshape(len(joined), -1)


def _pairs(instructions: str, *args: Any) -> Float[Array, "*s"]:
    """Applies instructions from `$1` … to `$0`, two 16-bit elements at a time."""
    result = jax.ShapeDtypeStruct(args[0].shape, jnp.float16)
    [out] = plt.elementwise_inline_asm(
        f"{{ {instructions} }}",
        args=args,
        constraints="=r" + ",r" * len(args),
        pack=2,
        result_shape_dtypes=[result],
    )
    return out


# --- Numbers as two bytes ---------------------------------------------------------------------

# x = low + 256 * high, both int8. Added to `_ROUND`, a number's integer stands in its lowest bits.
LARGEST_LIMBS = 127 * 256
_ROUND = 1.5 * 2.0**23


def limb(x: Float[Array, "m n"], which: Int32[Array, "m n"]) -> Int8[Array, "m n"]:
    """The low byte (`which` = 0) or the high one of x, rounded, within ±LARGEST_LIMBS."""
    return _limb(x + (_ROUND + 128), which)


def limbs(x: Float[Array, "m n"], factor: Float[Array, "m 1"], gpu: bool) -> Int8[Array, "m 2*n"]:
    """Both bytes of x * factor, side by side: column 2 i + `which` is a byte of column i."""
    x = multiply_add(x, factor, jnp.float32(_ROUND + 128), gpu)
    x = jnp.broadcast_to(x[:, :, None], (*x.shape, 2))
    return _limb(x, jnp.arange(2)[None, None, :]).reshape(len(x), -1)


def _limb(x: Float[Array, "*s"], which: Int32[Array, "*s"]) -> Int8[Array, "*s"]:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    high = jnp.broadcast_to(which == 1, bits.shape)
    return jnp.where(high, bits >> 8, bits ^ 128).astype(jnp.int8)


def join_limbs(x: Int32[Array, "m 2*n"]) -> Float[Array, "m n"]:
    """What was multiplied with both bytes of a number, put together."""
    x = x.reshape(len(x), -1, 2)
    high = jnp.broadcast_to((jnp.arange(2) == 1)[None, None, :], x.shape)
    return jnp.sum(jnp.where(high, x * 256, x), axis=2).astype(jnp.float32)


def largest_magnitude(xs: list[Float[Array, "m n"]]) -> Float[Array, "m"]:
    """Over axis 1 of all. NaN counts: compared as integers, where a float `max` passes over it."""
    bits = [lax.bitcast_convert_type(jnp.abs(x), jnp.int32) for x in xs]
    largest = jnp.max(functools.reduce(jnp.maximum, bits), axis=1)
    return lax.bitcast_convert_type(largest, jnp.float32)


# --- Scales -----------------------------------------------------------------------------------


def split_scales(
    words: UInt32[Array, "*s"],
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """One word → (scale, minimum) in float32."""
    scale = lax.bitcast_convert_type(words << jnp.uint32(16), jnp.float32)
    return scale, lax.bitcast_convert_type(words & _UPPER_HALF, jnp.float32)


# --- Rotation -------------------------------------------------------------------------------


def signs(order: int, head_dim: int, dtype, least: int = 16) -> np.ndarray:
    """The ±1 matrices that `rotate` multiplies with, `[n, n, size, size]` padded with zeros.

    `size` is `padded(head_dim // 4, least)`.

    A Sylvester Hadamard matrix is a Kronecker product. Where blocks of `order` channels lie within
    pieces, or pieces within blocks, one matrix serves all pieces (n = 1) and what lies across
    pieces is butterflies. Where blocks straddle pieces (head dims 80, 96, 112), there is one for
    each pair of pieces (n = 4).
    """
    width = head_dim // 4
    straddle = bool(width % order and order % width)
    count = 4 if straddle else 1
    inner = order if straddle else min(order, width)
    unscaled = page_format.hadamard(inner) * np.sqrt(inner)
    matrix = np.kron(np.eye(count * width // inner), unscaled)
    matrix = matrix.reshape(count, width, count, width).swapaxes(1, 2)
    padding = (0, padded(width, least) - width)
    return np.pad(matrix, ((0, 0), (0, 0), padding, padding)).round().astype(dtype)


def signs_side_by_side(order: int, head_dim: int, dtype) -> np.ndarray:
    """The one ±1 matrix for the channels of all four pieces side by side, padded with zeros."""
    width, size = head_dim // 4, padded(head_dim // 4)
    unscaled = page_format.hadamard(order) * np.sqrt(order)
    matrix = np.kron(np.eye(head_dim // order), unscaled).reshape(4, width, 4, width)
    padding = (0, size - width)
    matrix = np.pad(matrix, ((0, 0), padding, (0, 0), padding))
    return matrix.reshape(4 * size, 4 * size).round().astype(dtype)


def rotate(
    pieces: list[Float[Array, "a b"]], signs: Any, *, order: int, width: int, axis: int
) -> list[Float[Array, "a b"]]:
    """`page_format.rotate` without its factor `order**-0.5`, on four pieces, in float32.

    Multiplying by ±1 is exact, so that only the order of the float32 sums differs from
    `page_format`.

    Args:
      pieces: arrays whose `axis` is channels, padded from `width`; padding is and stays zero.
      signs: a reference to what the function of that name returns; unused with `order` 1.
      order: a power of two that divides `4 * width`.
      width: channels of a piece.
      axis: the axis of channels.
    """
    if order == 1:
        return [x.astype(jnp.float32) for x in pieces]
    index = jnp.arange(pieces[0].shape[axis])

    def load(i: int, j: int) -> Float[Array, "size size"]:
        matrix = plt.load(signs.at[i, j, index[:, None], index[None, :]])
        return matrix.astype(pieces[0].dtype)

    def product(matrix, x):
        return dot(matrix, x) if axis == 0 else dot(x, matrix)

    if width % order and order % width:
        # Symmetric as a whole: matrix (i, j) is the transpose of matrix (j, i).
        return [
            functools.reduce(
                jnp.add,
                (
                    product(load(i, j) if axis == 0 else load(j, i), pieces[j])
                    for j in range(4)
                    if _overlap(i, j, width, order)
                ),
            )
            for i in range(4)
        ]
    matrix = load(0, 0)
    out = [product(matrix, x) for x in pieces]
    step = 1
    while step * width < order:
        for i in range(4):
            if not i & step:
                a, b = out[i], out[i | step]
                out[i], out[i | step] = a + b, a - b
        step *= 2
    return out


# Channel 8 t + 4 b + 2 h + i lies in lane t of its token's four, in register 2 b + h, half i. So it
# comes to `mma` as row g + 8 h, k = 8 b + 2 t + i; column 2 t + i of product b is where it shall
# be. Matrix B says minus one to the number of bits that the channels of its row and column share,
# zero across blocks. What is left is bit h: the sums and differences at the end.
_ROTATE_LANES = """{{
.reg .b32 lane, in, out, w, n, t; .reg .pred p; .reg .f32 z, a<4>, b<4>;
mov.u32 lane, %laneid; and.b32 in, lane, 3; shr.u32 out, lane, 3;
and.b32 t, in, out; and.b32 t, t, {within}; popc.b32 t, t; shl.b32 t, t, 31; shr.s32 t, t, 31;
and.b32 t, t, 0x80008000; shr.u32 w, lane, 2; shl.b32 w, w, 31; xor.b32 w, w, t;
xor.b32 w, w, {one};
xor.b32 t, in, out; and.b32 t, t, {across}; setp.ne.u32 p, t, 0; selp.b32 w, 0, w, p;
shl.b32 t, in, 3; setp.ne.u32 p, t, $12; selp.b32 w, {nan}, w, p;
xor.b32 n, w, 0x80008000; mov.f32 z, 0f00000000;
{mma} {{a0, a1, a2, a3}}, {{$8, $9, $10, $11}}, {{w, w}}, {{z, z, z, z}};
{mma} {{b0, b1, b2, b3}}, {{$8, $9, $10, $11}}, {{w, n}}, {{z, z, z, z}};
add.f32 $0, a0, a2; add.f32 $1, a1, a3; sub.f32 $2, a0, a2; sub.f32 $3, a1, a3;
add.f32 $4, b0, b2; add.f32 $5, b1, b3; sub.f32 $6, b0, b2; sub.f32 $7, b1, b3; }}"""
_ONE_AND_NAN = {"bfloat16": ("0x3F803F80", "0x7FC07FC0"), "float16": ("0x3C003C00", "0x7E007E00")}


def can_rotate_lanes(dtype, *, order: int, width: int, rows: int, num_warps: int) -> bool:
    """Whether `rotate_lanes` takes such pieces, on the default device."""
    # A machine that only compiles has no capability: it compiles for a recent one.
    capability = float(getattr(jax.devices()[0], "compute_capability", "9.0"))
    fits = order >= 8 and width == 32 and rows >= 8 * num_warps
    return fits and capability >= 8.0 and jnp.dtype(dtype).name in _ONE_AND_NAN


def rotate_lanes(x: Float[Array, "tokens 32"], order: int) -> Float[Array, "tokens 32"]:
    """Multiplies each run of `order` channels by ±1 (order 8, 16 or 32), in float32.

    The matrix unit takes the channels from the registers that they were loaded to and leaves them
    there, where a matrix product at large goes through shared memory and back. That needs x as it
    is loaded: four neighbouring lanes hold a token, eight neighbouring channels each. Should a
    compiler ever lay it out otherwise, the result is NaN.
    """
    one, nan = _ONE_AND_NAN[x.dtype.name]
    kind = {"bfloat16": "bf16", "float16": "f16"}[x.dtype.name]
    within = order // 8 - 1
    instructions = _ROTATE_LANES.format(
        within=within,
        across=3 & ~within,
        one=one,
        nan=nan,
        mma=f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
    )
    [out] = plt.elementwise_inline_asm(
        " ".join(instructions.split()),
        args=[x, jnp.broadcast_to(jnp.arange(32)[None], x.shape)],
        constraints=",".join(["=&f"] * 8 + ["r"] * 12),
        pack=8,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return out


def _overlap(i: int, j: int, width: int, order: int) -> bool:
    """Whether a block of `order` channels has channels in both pieces i and j."""

    def blocks(piece: int) -> set[int]:
        return {c // order for c in range(piece * width, (piece + 1) * width)}

    return bool(blocks(i) & blocks(j))


def power_of_two_below(x: Float[Array, "*s"]) -> Float[Array, ""]:
    """The largest power of two not above the largest finite |x|; 1 for zero and subnormals."""
    x = jnp.abs(x)
    largest = jnp.max(jnp.where(x < jnp.inf, x, 0))
    exponent = lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
    return jnp.where(exponent == 0, 1.0, lax.bitcast_convert_type(exponent, jnp.float32))


# --- Instructions that the compiler does not choose by itself ---------------------------------


def multiply_add(a, b, c, gpu: bool) -> Float[Array, "*s"]:
    """a * b + c in float32, rounded once on a GPU."""
    if not gpu:
        return a * b + c
    a, b, c = map(jnp.float32, (a, b, c))
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    return _float32("fma.rn.f32 $0, $1, $2, $3;", *(jnp.broadcast_to(x, shape) for x in (a, b, c)))


def exp2(x: Float[Array, "*s"], gpu: bool) -> Float[Array, "*s"]:
    """2 to the x, within two units in the last place."""
    return _float32("ex2.approx.ftz.f32 $0, $1;", x) if gpu else jnp.exp2(x)


def reciprocal(x: Float[Array, "*s"], gpu: bool) -> Float[Array, "*s"]:
    """1 / x of a bfloat16 x, rounded to nearest, where neither is subnormal.

    One step of Newton's method: a division that takes every number is six times as long.
    """
    if not gpu:
        return 1 / x
    return _float32(
        "{ .reg .f32 y, n, e; rcp.approx.ftz.f32 y, $1; neg.f32 n, $1; "
        "fma.rn.f32 e, n, y, 0f3F800000; fma.rn.f32 $0, e, y, y; }",
        x,
    )


def _float32(instruction: str, *args: Float[Array, "*s"]) -> Float[Array, "*s"]:
    [out] = plt.elementwise_inline_asm(
        instruction,
        args=args,
        constraints="=f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return out
