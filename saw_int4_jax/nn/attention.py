"""What the Linen and the NNX module share: everything between their projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saw_int4_jax.cache import Cache, attend, positions
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
    window: int | None = None,
    attend: Attend = attend,
) -> tuple[Float[Array, "B T H*D"], Cache | None]:
    """RoPE, then causal attention: over the cache, or over k and v alone where there is none.

    Args:
      q: queries before RoPE.
      k: keys before RoPE.
      v: values.
      cache: extended for these tokens; `None`: the tokens stand at positions 0 .. T - 1.
      layer: which of the cache's layers to write and read.
      rope: position embedding.
      window: sliding window in tokens; `None`: all.
      attend: what writes to the cache and attends; another takes another kind of cache.

    Returns:
      The heads' outputs side by side, and the cache with the tokens written.
    """
    batch, num_tokens = q.shape[:2]
    position = jnp.arange(num_tokens)[None] if cache is None else positions(cache, num_tokens)
    q, k = rope(q, position), rope(k, position)
    if cache is None:
        local = None if window is None else (window - 1, 0)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    else:
        out, cache = attend(cache, layer, q, k, v, window=window)
    return out.reshape(batch, num_tokens, -1), cache
