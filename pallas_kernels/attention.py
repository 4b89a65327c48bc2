"""`paged_attention`: attention of any number of new queries over packed pages."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementation import Implementation, choose
from pallas_kernels.page_format import Pages
from pallas_kernels.write import check_layer


def paged_attention(
    q: Float[Array, "B T H D"],
    pages: Pages,
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""] = 0,
    query_lengths: Int[Array, "B"] | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H D"]:
    """Attention over each sequence's pages (SAW-INT4, arXiv 2604.19157).

    One operation for decode (T = 1), chunked prefill and verification of drafts: the T queries of
    a sequence are its newest tokens, already written, so that query t of sequence b stands at
    position `lengths[b] - query_lengths[b] + t`. Queries are rotated here as the keys were when
    written. H = K * G: query heads k * G .. k * G + G - 1 share KV head k (GQA; MHA and MQA are
    G = 1 and K = 1).

    Args:
      q: queries, after RoPE, unrotated; any float dtype.
      pages: the cache's pages.
      page_table: page ids of each sequence, in order. Entries past its length are never used.
      lengths: tokens of each sequence, the new ones included. 0 gives zeros.
      layer: which layer's pages to read; may be traced.
      query_lengths: how many of the T queries are real, from the left; the rest give zeros.
        `None`: all.
      causal: a query sees no token after its own position. Static: another program.
      scale: factor on q·k; `None` is 1 / sqrt(D). Static: a constant of the model.
      window: a query sees only the `window` newest tokens up to its own. Static: it bounds the
        loop.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`. Static: a constant of the model.
      sinks: one logit per query head that takes part in the softmax without a value.
      implementation: `None` picks the best for the default device; `"xla"` runs anywhere,
        `"triton"` on NVIDIA GPUs, `"mosaic_gpu"` on Hopper, `"mosaic_tpu"` on TPUs. Name it to
        compile for a device that is not there.

    Returns:
      The attention output in q's dtype.

    Raises:
      ValueError: shapes, dtypes or options do not fit.
      NotImplementedError: the named implementation cannot run here; the message says why.
    """
    if q.ndim != 4 or q.shape[2] % pages.kv_heads or q.shape[3] != pages.head_dim:
        raise ValueError(
            f"Expected {q.shape=} to be (B, T, H, D) with H a multiple of {pages.kv_heads=} "
            f"and D = {pages.head_dim=}"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"Expected {q.dtype=} to be floating")
    batch = q.shape[0]
    if query_lengths is None:
        query_lengths = jnp.full((batch,), q.shape[1], jnp.int32)
    for name, x, ndim in (
        ("page_table", page_table, 2),
        ("lengths", lengths, 1),
        ("query_lengths", query_lengths, 1),
    ):
        if x.ndim != ndim or x.shape[0] != batch or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"Expected {name} of shape {x.shape} and dtype {x.dtype} to be integers, "
                f"{ndim} axes, the first {batch}"
            )
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"Expected {sinks.shape=} to be (H,) = {(q.shape[2],)}")
    if window is not None and window < 1:
        raise ValueError(f"Expected {window=} to be positive")
    if window is not None and not causal:
        raise ValueError(f"Expected {causal=} with {window=}: a window ends at the query")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"Expected {soft_cap=} to be positive")
    check_layer(layer, pages)
    run = choose("paged_attention", implementation, q, pages, page_table)
    out = run(
        q,
        pages,
        page_table.astype(jnp.int32),
        lengths.astype(jnp.int32),
        layer=layer,
        query_lengths=query_lengths.astype(jnp.int32),
        causal=causal,
        scale=1 / math.sqrt(pages.head_dim) if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
    return out.astype(q.dtype)
