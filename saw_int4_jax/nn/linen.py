"""Attention over the paged cache as a Flax Linen module."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from saw_int4_jax.cache import Cache
from saw_int4_jax.nn.attention import Attend, rope_attention
from saw_int4_jax.nn.dense import dot_general
from saw_int4_jax.rope import Rope


class NormWeight(nn.Module):
    """What `nn.RMSNorm` multiplies with, under the name that it has there."""

    @nn.compact
    def __call__(self, width: int) -> Float[Array, "width"]:
        return self.param("scale", nn.initializers.ones, (width,))


class PagedAttention(nn.Module):
    """Causal self-attention with RoPE; keys and values live in a paged cache.

    Takes and returns the cache explicitly. Without one it is plain causal attention over its
    input, as in training.

    Attributes:
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
      attend: what writes to another kind of cache and attends; `None`: this library's.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer: int
    rope: Rope = Rope()
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    window: int | None = None
    dtype: jnp.dtype | None = None
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        """Attends; the cache must have been extended for these tokens."""

        def project(name: str, heads: int):
            width = heads * self.head_dim
            dense = nn.Dense(
                width,
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                dot_general=dot_general,
                name=name,
            )
            y = dense(x)
            return y.reshape(*x.shape[:2], heads, self.head_dim)

        q = project("q_proj", self.num_heads)
        k = project("k_proj", self.num_kv_heads)
        v = project("v_proj", self.num_kv_heads)
        q_norm = NormWeight(name="q_norm")(self.head_dim) if self.qk_norm else None
        k_norm = NormWeight(name="k_norm")(self.head_dim) if self.qk_norm else None
        out, cache = rope_attention(
            q,
            k,
            v,
            cache,
            layer=self.layer,
            rope=self.rope,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=self.norm_eps,
            window=self.window,
            attend=self.attend,
        )
        o_proj = nn.Dense(
            x.shape[-1],
            use_bias=self.o_bias,
            dtype=self.dtype,
            dot_general=dot_general,
            name="o_proj",
        )
        return o_proj(out), cache
