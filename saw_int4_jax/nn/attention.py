"""What the Linen and the NNX module share: everything between their projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.xla.write import prepare
from saw_int4_jax import cache as paged
from saw_int4_jax.cache import Cache, positions
from saw_int4_jax.rope import Rope

# (cache, layer, q, k, v, window=…) -> (out, cache)
Attend = Callable[..., tuple[Array, Any]]


def rope_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    cache: Cache | None,
    *,
    layer: int | Int[Array, ""],
    rope: Rope,
    q_norm: Float[Array, "D"] | None = None,
    k_norm: Float[Array, "D"] | None = None,
    eps: float = 1e-6,
    window: int | None = None,
    attend: Attend | None = None,
) -> tuple[Float[Array, "B T H*D"], Cache | None]:
    """QK-norm, RoPE and causal attention: over the cache, or over k and v where there is none.

    Args:
      q: queries as they leave their projection.
      k: keys as they leave theirs.
      v: values.
      cache: extended for these tokens; `None`: the tokens stand at positions 0 .. T - 1.
      layer: which of the cache's layers to write and read.
      rope: position embedding.
      q_norm: weight of the queries' RMS norm; `None`: they are not normalized.
      k_norm: that of the keys'.
      eps: of these norms.
      window: sliding window in tokens; `None`: all.
      attend: what writes to another kind of cache and attends; `None`: this library's.

    Returns:
      The heads' outputs side by side, and the cache with the tokens written.
    """
    batch, num_tokens = q.shape[:2]
    position = jnp.arange(num_tokens)[None] if cache is None else positions(cache, num_tokens)
    cos, sin = rope.angles(position, q.shape[-1])
    preparation: dict[str, Any] = dict(cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, eps=eps)
    if cache is not None and attend is None:
        out, cache = paged.attend(cache, layer, q, k, v, window=window, **preparation)
        return out.reshape(batch, num_tokens, -1), cache
    q, k = prepare(q, k, **preparation)
    if cache is None:
        local = None if window is None else (window - 1, 0)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    else:
        assert attend is not None
        out, cache = attend(cache, layer, q, k, v, window=window)
    return out.reshape(batch, num_tokens, -1), cache
