"""The Llama family: Llama 2/3, Mistral, Qwen2, Qwen3. One decoder, told apart by its config.

tokens → embedding → [RMSNorm → attention → RMSNorm → SwiGLU] x L → RMSNorm → logits. Parameter
names are those of Hugging Face checkpoints; kernels are [in, out].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saw_int4_jax.cache import Cache, CacheSpec, last_token
from saw_int4_jax.nn.attention import Attend
from saw_int4_jax.nn.dense import dot_general, look_up
from saw_int4_jax.nn.linen import PagedAttention
from saw_int4_jax.nn.norm import RMSNorm
from saw_int4_jax.rope import Rope


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and variant of a model.

    Attributes:
      vocab_size: tokens known.
      embed_dim: width of the residual stream.
      mlp_dim: hidden width of SwiGLU.
      num_layers: decoder layers.
      num_heads: query heads.
      num_kv_heads: key/value heads.
      head_dim: numbers per head.
      max_length: context the model was trained for, in tokens.
      rope: position embedding.
      norm_eps: of all RMS norms.
      qkv_bias: whether the q, k and v projections have a bias; Qwen2.
      o_bias: whether the output projection of the attention has one; some Llamas.
      qk_norm: whether q and k are RMS-normalized per head; Qwen3.
      window: sliding window in tokens; Mistral.
      full_layers: the first layers, which ignore `window`; Qwen2.
      tie_embeddings: the output projection is the embedding.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    full_layers: int = 0
    tie_embeddings: bool = False

    def __post_init__(self):
        sizes = "vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_kv_heads", "max_length"
        for name in sizes:
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"Expected {name}={size} to be positive")
        if self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"Expected {self.num_heads=} to be a multiple of {self.num_kv_heads=}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"Expected {self.head_dim=} to be positive and even")
        if self.window is not None and self.window < 1:
            raise ValueError(f"Expected {self.window=} to be positive")

    def cache_spec(self, num_pages: int, **options) -> CacheSpec:
        """The spec of a cache for this model; `options` as in `CacheSpec`."""
        return CacheSpec(self.num_layers, self.num_kv_heads, self.head_dim, num_pages, **options)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    width: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        def dense(width: int, name: str):
            return nn.Dense(
                width, use_bias=False, dtype=self.dtype, dot_general=dot_general, name=name
            )

        gate, up = dense(self.width, "gate_proj")(x), dense(self.width, "up_proj")(x)
        return dense(x.shape[-1], "down_proj")(jax.nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each normalized before and added to the residual stream."""

    config: LlamaConfig
    layer: int
    dtype: jnp.dtype | None = None
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], cache: Cache | None
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        c = self.config

        def norm(name: str):
            return RMSNorm(epsilon=c.norm_eps, dtype=self.dtype, name=name)

        attention = PagedAttention(
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            layer=self.layer,
            rope=c.rope,
            qkv_bias=c.qkv_bias,
            o_bias=c.o_bias,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            window=None if c.full_layers and self.layer < c.full_layers else c.window,
            dtype=self.dtype,
            attend=self.attend,
            name="self_attn",
        )
        out, cache = attention(norm("input_layernorm")(x), cache)
        x = x + out
        mlp = SwiGLU(c.mlp_dim, self.dtype, name="mlp")
        return x + mlp(norm("post_attention_layernorm")(x)), cache


class Llama(nn.Module):
    """The decoder.

    Attributes:
      config: shape and variant.
      dtype: of the computation; `None`: the parameters'.
      last_only: return the logits of each sequence's newest token alone, which is all that
        generation needs of a prompt.
      attend: what writes to another kind of cache and attends, as those of `saw_int4_jax.methods`;
        `None`: this library's.
    """

    config: LlamaConfig
    dtype: jnp.dtype | None = None
    last_only: bool = False
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T vocab"], Cache | None]:
        """Logits in float32 and the cache with the tokens written.

        Args:
          tokens: token ids.
          cache: extended for these tokens; `None`: plain causal attention over `tokens`.
        """
        c = self.config
        embed = nn.Embed(c.vocab_size, c.embed_dim, dtype=self.dtype, name="embed_tokens")
        x = look_up(embed, tokens)
        for layer in range(c.num_layers):
            block = DecoderLayer(c, layer, self.dtype, self.attend, name=f"layers_{layer}")
            x, cache = block(x, cache)
        if self.last_only:
            x = last_token(x, cache)
        x = RMSNorm(epsilon=c.norm_eps, dtype=self.dtype, name="norm")(x)
        if c.tie_embeddings:
            logits = embed.attend(x)
        else:
            lm_head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                dot_general=dot_general,
                name="lm_head",
            )
            logits = lm_head(x)
        return logits.astype(jnp.float32), cache


@functools.cache
def one_layer_forward(
    config: LlamaConfig, dtype: jnp.dtype | None = None, *, last_only: bool = True
) -> Callable[..., tuple[Array, Cache]]:
    """`Llama(config, dtype, last_only).apply` over a cache, whose layers are one function.

    It is traced and lowered once, not once a layer: a deep model reaches the compiler ten times
    sooner. What is compiled is the same.
    """

    @functools.partial(jax.jit, static_argnames="config")
    def apply_layer(params, x, cache, layer, *, config):
        return DecoderLayer(config, layer, dtype).apply({"params": params}, x, cache)

    windowless = dataclasses.replace(config, window=None, full_layers=0)
    windowed = dataclasses.replace(config, full_layers=0)
    embed = nn.Embed(config.vocab_size, config.embed_dim, dtype=dtype)
    norm = RMSNorm(epsilon=config.norm_eps, dtype=dtype)
    head = nn.Dense(config.vocab_size, use_bias=False, dtype=dtype, dot_general=dot_general)

    def forward(variables, tokens: Int[Array, "B T"], cache: Cache):
        params = variables["params"]
        embedding = {"params": params["embed_tokens"]}
        x: Any = look_up(functools.partial(embed.apply, embedding), tokens)
        for layer in range(config.num_layers):
            kind = windowless if layer < config.full_layers else windowed
            x, cache = apply_layer(
                params[f"layers_{layer}"], x, cache, jnp.int32(layer), config=kind
            )
        if last_only:
            x = last_token(x, cache)
        x = norm.apply({"params": params["norm"]}, x)
        if config.tie_embeddings:
            x = embed.apply(embedding, x, method="attend")
        else:
            x = head.apply({"params": params["lm_head"]}, x)
        return x.astype(jnp.float32), cache

    return forward
