"""`write_kv` and `write_qkv` for any device: encode the tokens, scatter the rows."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import page_format
from pallas_kernels.page_format import Pages


def write_kv(
    pages: Pages,
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    slots: Int[Array, "n"],
    *,
    layer: int | Int[Array, ""],
) -> Pages:
    rows, scales = page_format.encode(k, v, pages.format)
    return page_format.put(pages, layer, slots, rows, scales)


def write_qkv(
    pages: Pages,
    q: Float[Array, "n H D"],
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    slots: Int[Array, "n"],
    *,
    layer: int | Int[Array, ""],
    write=write_kv,
    **preparation,
) -> tuple[Float[Array, "n H D"], Pages]:
    """`prepare`, then `write` for the rest."""
    q, k = prepare(q, k, **preparation)
    return q, write(pages, k, v, slots, layer=layer)


def prepare(
    q: Float[Array, "n H D"],
    k: Float[Array, "n K D"],
    *,
    cos: Float[Array, "n D/2"] | None,
    sin: Float[Array, "n D/2"] | None,
    q_norm: Float[Array, "D"] | None,
    k_norm: Float[Array, "D"] | None,
    eps: float,
) -> tuple[Float[Array, "n H D"], Float[Array, "n K D"]]:
    """QK-norm and RoPE. Every dimension but the last two may be several."""
    q, k = (
        x if weight is None else rms_norm(x, weight, eps)
        for x, weight in ((q, q_norm), (k, k_norm))
    )
    if cos is None or sin is None:
        return q, k
    return rope(q, cos, sin), rope(k, cos, sin)


def rms_norm(x: Float[Array, "*lead D"], weight: Float[Array, "D"], eps: float) -> Array:
    """x over its root mean square, times `weight`; computed in float32, in x's dtype."""
    y = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (inverse * weight)).astype(x.dtype)


def rope(
    x: Float[Array, "*n heads D"], cos: Float[Array, "*n D/2"], sin: Float[Array, "*n D/2"]
) -> Float[Array, "*n heads D"]:
    """Turns the channel pairs (i, i + D/2) of each token; computed in float32, in x's dtype."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
