"""`write_kv`: rotate, quantize, pack and scatter new keys and values, in place.

`write_qkv` takes them as they leave the projections: QK-norm and RoPE, of the queries too, happen
on the way.
"""

from __future__ import annotations

from typing import Any

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
    _check_tokens(pages, k, v, slots)
    check_layer(layer, pages)
    run = choose("write_kv", implementation, pages, k, v)
    return run(pages, k, v, slots.astype(jnp.int32), layer=layer)


def write_qkv(
    pages: Pages,
    q: Float[Array, "n H D"],
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    slots: Int[Array, "n"],
    *,
    cos: Float[Array, "n D/2"] | None = None,
    sin: Float[Array, "n D/2"] | None = None,
    q_norm: Float[Array, "D"] | None = None,
    k_norm: Float[Array, "D"] | None = None,
    eps: float = 1e-6,
    layer: int | Int[Array, ""] = 0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "n H D"], Pages]:
    """All that lies between the projections and the attention: one launch where a kernel does it.

    Queries and keys are normalized (`x / rms(x) * weight` over D), then turned by RoPE, each
    computed in float32 and rounded to the dtype of x; keys and values are then written as by
    `write_kv`.

    Args:
      pages: as for `write_kv`; donate them.
      q: queries as they leave their projection; any float dtype.
      k: keys as they leave theirs.
      v: values.
      slots: as for `write_kv`. Queries of skipped tokens are processed all the same.
      cos: cosine of the angle by which RoPE turns the channel pair (i, i + D/2) of each token;
        with `sin`, or `None` for no RoPE.
      sin: its sine.
      q_norm: weight of the queries' RMS norm; `None`: they are not normalized.
      k_norm: that of the keys'.
      eps: added to the mean square before its root is taken.
      layer: as for `write_kv`.
      implementation: as for `write_kv`. On TPUs XLA normalizes and turns, a kernel writes.

    Returns:
      The processed queries, not rotated (that is `paged_attention`'s part), and the pages.

    Raises:
      ValueError: shapes or dtypes do not fit the pages or each other.
      NotImplementedError: the named implementation cannot run here; the message says why.
    """
    _check_tokens(pages, k, v, slots)
    check_layer(layer, pages)
    tokens, head_dim = len(slots), pages.head_dim
    if q.ndim != 3 or q.shape[0] != tokens or q.shape[2] != head_dim:
        raise ValueError(f"Expected {q.shape=} to be (n, H, D) = ({tokens}, H, {head_dim})")
    if (cos is None) != (sin is None):
        raise ValueError("Expected cos and sin together, or neither")
    if cos is not None and head_dim % 2:
        raise ValueError(f"Expected {head_dim=} to be even with RoPE")
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "cos": (cos, (tokens, head_dim // 2)),
        "sin": (sin, (tokens, head_dim // 2)),
        "q_norm": (q_norm, (head_dim,)),
        "k_norm": (k_norm, (head_dim,)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"Expected {name}.shape={x.shape} to be {shape}")
    for name, x in {"q": q, **{name: x for name, (x, _) in expected.items()}}.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"Expected {name}.dtype={x.dtype} to be floating")
    if cos is None and q_norm is None and k_norm is None:
        return q, write_kv(pages, k, v, slots, layer=layer, implementation=implementation)
    run = choose("write_qkv", implementation, pages, k, v)
    preparation = dict(cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, eps=eps)
    return run(pages, q, k, v, slots.astype(jnp.int32), layer=layer, **preparation)


def _check_tokens(pages: Pages, k: Array, v: Array, slots: Array) -> None:
    if slots.ndim != 1 or not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ValueError(f"Expected slots {slots.shape=} {slots.dtype=} to be integers [n]")
    tokens = (len(slots), pages.kv_heads, pages.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.shape != tokens:
            raise ValueError(f"Expected {name}.shape={x.shape} to be (n, K, D) = {tokens}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"Expected {name}.dtype={x.dtype} to be floating")


def check_layer(layer: int | Int[Array, ""], pages: Pages) -> None:
    if isinstance(layer, (int, np.integer)) and not 0 <= layer < pages.layers:
        raise ValueError(f"Expected {layer=} to be within {pages.layers=}")
