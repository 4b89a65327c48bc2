"""k-means: codebooks fitted on calibration text (Lloyd, IEEE Trans. Inf. Theory 28, 1982).

`kmeans` is the ablation of SAW-INT4 (arXiv 2604.19157): the nearest of 16 whole-token centroids is
subtracted and the rest quantized to INT4, rotated or not. `vq` is vector quantization proper:
256 centroids for every two channels, four bits a value, no scales.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.page_format import rotate
from saw_int4_jax.methods.integer import quantize_dequantize
from saw_int4_jax.methods.method import LayerSample, Method

CENTROIDS = 16  # for whole tokens, as the authors' tool takes
ENTRIES = 256  # for two channels
ITERATIONS = 10
FITTED_TOKENS = 4096


def nearest(x: Float[Array, "N d"], centroids: Float[Array, "C d"]) -> Int[Array, "N"]:
    """Index of each row's nearest centroid."""
    products = jnp.matmul(x, centroids.T, precision=lax.Precision.HIGHEST)
    return jnp.argmin((centroids**2).sum(-1) - 2 * products, axis=-1)


def fit(key: Array, x: Float[Array, "N d"], count: int) -> Float[Array, "C d"]:
    """Lloyd's algorithm from `count` random rows; a centroid without rows stays where it is."""
    replace = len(x) < count
    centroids = x[jax.random.choice(key, len(x), (count,), replace=replace)]

    def update(_, centroids):
        members = nearest(x, centroids)
        sizes = jax.ops.segment_sum(jnp.ones(len(x)), members, count)[:, None]
        means = jax.ops.segment_sum(x, members, count) / jnp.maximum(sizes, 1)
        return jnp.where(sizes > 0, means, centroids)

    return lax.fori_loop(0, ITERATIONS, update, centroids)


# --- A centroid for the whole token, INT4 for the rest -----------------------------------------


def kmeans(name: str, order: int) -> Method:
    def around_centroids(x, centroids, order):
        *lead, heads, dim = x.shape
        rows = x.reshape(-1, heads * dim)
        center = centroids[nearest(rows, centroids)].reshape(*lead, heads, dim)
        return center + rotate(quantize_dequantize(rotate(x - center, order)), order)

    @jax.jit
    def calibrate(sample: LayerSample, key: Array):
        both = (
            x[:FITTED_TOKENS].reshape(-1, x.shape[1] * x.shape[2]) for x in (sample.k, sample.v)
        )
        return tuple(fit(k, x, CENTROIDS) for k, x in zip(jax.random.split(key), both))

    def bits(kv_heads: int, head_dim: int, context: int) -> float:
        index = 4 / (kv_heads * head_dim)
        return 4 + 32 / head_dim + index + CENTROIDS * 16 / context

    return Method(
        name,
        f"nearest of {CENTROIDS} centroids subtracted, then "
        + (f"BDR {order}" if order > 1 else "INT4"),
        bits,
        keys=lambda x, centroids: around_centroids(x, centroids, order),
        values=lambda x, centroids: around_centroids(x, centroids, 1),
        calibrate=calibrate,
        uses_text=True,
        random=True,
        regular="no: every token looks its centroid up",
    )


# --- Vector quantization of channel pairs ------------------------------------------------------


def vq(name: str, order: int) -> Method:
    def look_up(x, codebooks, order):
        x = rotate(x, order)
        pairs = x.reshape(-1, x.shape[2] * x.shape[3] // 2, 2).swapaxes(0, 1)  # [K * D/2, N, 2]
        read = jax.vmap(lambda rows, book: book[nearest(rows, book)])(pairs, codebooks)
        return rotate(read.swapaxes(0, 1).reshape(x.shape), order)

    @jax.jit
    def calibrate(sample: LayerSample, key: Array):
        def codebooks(key, x):
            pairs = x[:FITTED_TOKENS].reshape(-1, x.shape[1] * x.shape[2] // 2, 2).swapaxes(0, 1)
            keys = jax.random.split(key, len(pairs))
            # Some pairs at a time: distances of all at once would be gigabytes.
            return lax.map(lambda a: fit(a[0], a[1], ENTRIES), (keys, pairs), batch_size=16)

        for_keys, for_values = jax.random.split(key)
        return codebooks(for_keys, rotate(sample.k, order)), codebooks(for_values, sample.v)

    def bits(kv_heads: int, head_dim: int, context: int) -> float:
        return 4 + ENTRIES * 16 / context

    return Method(
        name,
        f"vector quantization, {ENTRIES} centroids for two channels"
        + (f", K rotated by {order}" if order > 1 else ""),
        bits,
        keys=lambda x, books: look_up(x, books, order),
        values=lambda x, books: look_up(x, books, 1),
        calibrate=calibrate,
        uses_text=True,
        random=True,
        regular="no: a table look-up for every two channels",
        fused="no: codes do not enter a matrix product",
    )
