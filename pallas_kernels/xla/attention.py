"""`paged_attention` for any device: online softmax over blocks of pages.

Each turn of the loop dequantizes one block of every sequence, so that memory does not grow with
the context; the loop ends with the longest sequence, so that time does not grow with the pool.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import page_format
from pallas_kernels.page_format import Pages

BLOCK_TOKENS = 512
# Finite, so that a row with nothing visible yet has exp(0) to multiply, not exp(nan).
MASKED = -1e30


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
) -> Float[Array, "B T H D"]:
    batch, num_queries, heads, head_dim = q.shape
    kv_heads = pages.kv_heads
    group = heads // kv_heads
    block_pages = max(1, BLOCK_TOKENS // pages.page_size)
    block = block_pages * pages.page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))

    q = page_format.rotate(q, pages.format.order) * scale
    q = q.reshape(batch, num_queries, kv_heads, group, head_dim)

    # Query t sees the tokens first .. last; none if the row is padding.
    index = jnp.arange(num_queries)
    position = (lengths - query_lengths)[:, None] + index  # [B, T]
    last = position if causal else jnp.broadcast_to(lengths[:, None] - 1, position.shape)
    last = jnp.where(index < query_lengths[:, None], last, -1)
    first = jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)
    begin = jnp.min(jnp.where(last >= 0, first, jnp.iinfo(jnp.int32).max)) // block
    end = (jnp.max(last) + block) // block

    def accumulate(i, carry):
        running_max, total, acc = carry
        ids = lax.dynamic_slice_in_dim(page_table, i * block_pages, block_pages, axis=1)
        k, v = page_format.read(pages, layer, jnp.maximum(ids, 0))  # [B, pages, K, S, D]
        k, v = (x.swapaxes(1, 2).reshape(batch, kv_heads, block, head_dim) for x in (k, v))

        token = i * block + jnp.arange(block)
        visible = (token >= first[..., None]) & (token <= last[..., None])  # [B, T, block]
        visible = visible[:, None, None]
        # A slot never written may hold anything, and 0 * NaN is NaN.
        v = jnp.where((token < lengths[:, None])[:, None, :, None], v, 0)

        scores = jnp.einsum("btkgd,bksd->bkgts", q, k, precision=lax.Precision.HIGHEST)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(visible, scores, MASKED)
        new_max = jnp.maximum(running_max, scores.max(-1))
        decay = jnp.exp(running_max - new_max)
        weights = jnp.where(visible, jnp.exp(scores - new_max[..., None]), 0)
        values = jnp.einsum("bkgts,bksd->bkgtd", weights, v, precision=lax.Precision.HIGHEST)
        return new_max, total * decay + weights.sum(-1), acc * decay[..., None] + values

    shape = (batch, kv_heads, group, num_queries)
    if sinks is None:
        running_max, total = jnp.full(shape, MASKED), jnp.zeros(shape)
    else:  # a sink is a key with this score and no value
        sink = sinks.astype(jnp.float32).reshape(kv_heads, group, 1)
        running_max, total = jnp.broadcast_to(sink, shape), jnp.ones(shape)
    acc = jnp.zeros((*shape, head_dim))
    _, total, acc = lax.fori_loop(begin, end, accumulate, (running_max, total, acc))

    out = acc / jnp.where(total == 0, 1, total)[..., None]
    out = page_format.rotate(out, pages.format.value_order)
    return out.transpose(0, 3, 1, 2, 4).reshape(*q.shape[:2], heads, head_dim)
