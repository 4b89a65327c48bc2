"""Attention over the paged cache as a Flax NNX module."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from saw_int4_jax.cache import Cache
from saw_int4_jax.nn.attention import rope_attention
from saw_int4_jax.rope import Rope


class PagedAttention(nnx.Module):
    """Causal self-attention with RoPE; keys and values live in a paged cache.

    Takes and returns the cache explicitly: it is no part of the module's state. Without one it is
    plain causal attention over its input, as in training. Parameters have the names and shapes of
    the Linen module's.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int,
        *,
        rope: Rope = Rope(),  # noqa: B008 - frozen
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        window: int | None = None,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters.

        Args:
          in_features: width of the input and the output, E.
          num_heads: query heads.
          num_kv_heads: key/value heads; divides `num_heads`.
          head_dim: numbers per head.
          layer: which of the cache's layers is this one.
          rope: position embedding.
          qkv_bias: whether the q, k and v projections have a bias.
          o_bias: whether the output projection has a bias.
          qk_norm: whether q and k are RMS-normalized per head before RoPE.
          norm_eps: of that normalization.
          window: sliding window in tokens; `None`: all.
          dtype: of the computation; `None`: that of inputs and parameters.
          rngs: for the initial parameters.
        """
        self.head_dim = head_dim
        self.layer = layer
        self.rope = rope
        self.norm_eps = norm_eps
        self.window = window

        def linear(width_in: int, width_out: int, bias: bool):
            return nnx.Linear(width_in, width_out, use_bias=bias, dtype=dtype, rngs=rngs)

        self.q_proj = linear(in_features, num_heads * head_dim, qkv_bias)
        self.k_proj = linear(in_features, num_kv_heads * head_dim, qkv_bias)
        self.v_proj = linear(in_features, num_kv_heads * head_dim, qkv_bias)
        self.o_proj = linear(num_heads * head_dim, in_features, o_bias)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = nnx.RMSNorm(head_dim, epsilon=norm_eps, dtype=dtype, rngs=rngs)
            self.k_norm = nnx.RMSNorm(head_dim, epsilon=norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T E"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        """Attends; the cache must have been extended for these tokens."""
        q, k, v = (
            projection(x).reshape(*x.shape[:2], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )

        def weight(norm: str) -> Array | None:
            return getattr(self, norm).scale[...] if self.qk_norm else None

        out, cache = rope_attention(
            q,
            k,
            v,
            cache,
            layer=self.layer,
            rope=self.rope,
            q_norm=weight("q_norm"),
            k_norm=weight("k_norm"),
            eps=self.norm_eps,
            window=self.window,
        )
        return self.o_proj(out), cache
