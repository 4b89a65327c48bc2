"""Uniform quantization of each token's vector: BF16, INT8, INT4, BDR and its variants.

BDR is INT4 after a block-diagonal Hadamard rotation (SAW-INT4, arXiv 2604.19157). Random signs
before it make it a randomized Hadamard transform (QuIP#, arXiv 2402.04396; QuaRot, arXiv
2404.00456).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.page_format import floor_to_bf16, rotate
from saw_int4_jax.methods.method import Method, Quantizer, through_the_cache, unchanged
from saw_int4_jax.rotation import balance_keys, scale_keys


def grid(
    x: Float[Array, "*lead"], *, bits: int = 4, axis: int = -1, scale_bits: int = 16
) -> tuple[Float[Array, "*ones"], Float[Array, "*ones"]]:
    """(scale, minimum) of 2^bits evenly spaced values over the range of x along an axis."""
    minimum = x.min(axis, keepdims=True)
    if scale_bits == 16:
        minimum = floor_to_bf16(minimum)
    scale = (x.max(axis, keepdims=True) - minimum) * np.float32(1 / (2**bits - 1))
    if scale_bits == 16:
        scale = lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    return scale, minimum


def quantize_dequantize(
    x: Float[Array, "*lead"], *, bits: int = 4, axis: int = -1, scale_bits: int = 16
) -> Float[Array, "*lead"]:
    """Rounds x to its `grid` along an axis.

    With four bits, bfloat16 scale and minimum and the last axis it is what `page_format.quantize`
    and `dequantize` make of x. With `scale_bits=32` scale and minimum are not rounded.
    """
    scale, minimum = grid(x, bits=bits, axis=axis, scale_bits=scale_bits)
    inverse = jnp.where(scale > 0, 1 / scale, 0)
    return jnp.clip(jnp.round((x - minimum) * inverse), 0, 2**bits - 1) * scale + minimum


def token_wise(bits: int = 4, order: int = 1, scale_bits: int = 16) -> Quantizer:
    """The quantizer of each token's vector after rotation with this Hadamard order."""
    return functools.partial(_token_wise, bits=bits, order=order, scale_bits=scale_bits)


def _token_wise(x, found, *, bits, order, scale_bits):
    del found
    rotated = quantize_dequantize(rotate(x, order), bits=bits, scale_bits=scale_bits)
    return rotate(rotated, order)


def token_wise_bits(bits: int = 4, scale_bits: int = 16):
    """Bits a value: the code, and a scale and a minimum for each vector."""
    return lambda kv_heads, head_dim, context: bits + 2 * scale_bits / head_dim


def bf16() -> Method:
    return Method("bf16", "not quantized", lambda *_: 16.0, through_the_cache(dict(dtype="bf16")))


def paged(name: str, about: str, order: int, rotate_v: bool = False, **more: Any) -> Method:
    """INT4 in the library's own cache; `more` is what else the `Method` says."""
    cache = through_the_cache(dict(order=order, rotate_v=rotate_v))
    return Method(name, about, token_wise_bits(), cache, **more)


def int4() -> Method:
    return paged("int4", "INT4", 1)


def bdr(name: str, order: int, rotate_v: bool) -> Method:
    which = "K and V" if rotate_v else "K"
    return paged(name, f"INT4, {which} rotated by Hadamard blocks of {order}", order, rotate_v)


def balanced(name: str, order: int, rotate_v: bool) -> Method:
    """Queries and keys brought to one size by powers of two, from the weights, then BDR."""
    which = "K and V" if rotate_v else "K"
    about = f"channels balanced from the weights, then {which} rotated by {order}"
    return paged(
        name, about, order, rotate_v, fold=lambda params, config, *_: balance_keys(params, config)
    )


def signed(name: str, order: int) -> Method:
    """Random signs before the rotation, folded into W_q and W_k: both of a RoPE pair alike."""

    def fold(params, config, samples, key):
        del samples
        shape = config.num_layers, 1, config.head_dim // 2
        signs = jax.random.rademacher(key, shape, dtype=jnp.float32)
        return scale_keys(params, config, jnp.repeat(signs, config.num_kv_heads, axis=1))

    return paged(name, f"BDR {order} with random signs before it", order, fold=fold, random=True)


def int8() -> Method:
    quantizer = token_wise(bits=8)
    return Method("int8", "INT8", token_wise_bits(8), keys=quantizer, values=quantizer)


def wide_scales(name: str, order: int) -> Method:
    """INT4 or BDR with float32 scales and minima, as in the authors' code."""
    return Method(
        name,
        f"INT4 with 32-bit scales, K rotated by {order}" if order > 1 else "INT4, 32-bit scales",
        token_wise_bits(scale_bits=32),
        keys=token_wise(order=order, scale_bits=32),
        values=token_wise(scale_bits=32),
    )


def int4_keys_only(name: str, order: int) -> Method:
    """BDR keys, BF16 values: how much of the error is the keys'."""
    return Method(
        name,
        f"INT4 keys rotated by {order}, values not quantized",
        lambda kv_heads, head_dim, context: (20 + 32 / head_dim) / 2,
        keys=token_wise(order=order),
        values=unchanged,
    )
