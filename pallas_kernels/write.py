"""`write_kv`: rotate, quantize, pack and scatter new keys and values, in place."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.implementation import Implementation, choose
from pallas_kernels.page_format import Pages


def write_kv(
    pages: Pages,
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    slots: Int[Array, "n"],
    *,
    layer: int | Int[Array, ""] = 0,
    implementation: Implementation | None = None,
) -> Pages:
    """Writes n tokens of one layer to their slots (SAW-INT4, arXiv 2604.19157).

    Donate `pages` to the jitted function around this: the update is then in place. Two tokens of
    one call must not share a slot.

    Args:
      pages: the cache's pages; their `format` says how tokens are stored.
      k: keys, after RoPE, unrotated; any float dtype.
      v: values.
      slots: page * S + offset for each token. -1, and anything past the pool, is skipped.
      layer: which layer's pages to write. A traced value is allowed (layers under `lax.scan`).
      implementation: `None` picks the best for the default device; `"xla"` runs anywhere,
        `"triton"` on NVIDIA GPUs, `"mosaic_tpu"` on TPUs. Name it to compile for a device that is
        not there.

    Returns:
      The pages with the tokens written.

    Raises:
      ValueError: shapes or dtypes do not fit the pages.
      NotImplementedError: the named implementation cannot run here; the message says why.
    """
    if slots.ndim != 1 or not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ValueError(f"Expected slots {slots.shape=} {slots.dtype=} to be integers [n]")
    tokens = (len(slots), pages.kv_heads, pages.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.shape != tokens:
            raise ValueError(f"Expected {name}.shape={x.shape} to be (n, K, D) = {tokens}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"Expected {name}.dtype={x.dtype} to be floating")
    check_layer(layer, pages)
    run = choose("write_kv", implementation, pages, k, v)
    return run(pages, k, v, slots.astype(jnp.int32), layer=layer)


def check_layer(layer: int | Int[Array, ""], pages: Pages) -> None:
    if isinstance(layer, (int, np.integer)) and not 0 <= layer < pages.layers:
        raise ValueError(f"Expected {layer=} to be within {pages.layers=}")
