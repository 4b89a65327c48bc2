"""Two decoders as users write them, over the paged cache: a Linen and an NNX one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from saw_int4_jax import CacheSpec, Rope, attend, init_cache, positions
from saw_int4_jax.nn.nnx import PagedAttention

VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 97, 2, 4, 2, 32, 64


def cache_spec(num_pages, **options):
    return CacheSpec(LAYERS, KV_HEADS, HEAD_DIM, num_pages, **options)


class LinenDecoder(nn.Module):
    """Own projections; `attend` stands where `jax.nn.dot_product_attention` stood."""

    @nn.compact
    def __call__(self, tokens, cache):
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        rope, position = Rope(), positions(cache, tokens.shape[1])
        for layer in range(LAYERS):
            y = nn.RMSNorm()(x)
            q = rope(nn.DenseGeneral((HEADS, HEAD_DIM))(y), position)
            k = rope(nn.DenseGeneral((KV_HEADS, HEAD_DIM))(y), position)
            v = nn.DenseGeneral((KV_HEADS, HEAD_DIM))(y)
            y, cache = attend(cache, layer, q, k, v)
            x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1))(y)
            x = x + nn.Dense(WIDTH)(jax.nn.silu(nn.Dense(2 * WIDTH)(nn.RMSNorm()(x))))
        return nn.Dense(VOCAB)(nn.RMSNorm()(x)), cache


def linen_model():
    """`forward(variables, tokens, cache)`, as `generate` takes it, and the variables."""
    model = LinenDecoder()
    cache = init_cache(cache_spec(num_pages=1), batch=1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), cache)
    return model.apply, variables


class NnxDecoder(nnx.Module):
    """The ready-made attention module in each layer."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.norms = nnx.List(nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(LAYERS))
        self.attention = nnx.List(
            PagedAttention(WIDTH, HEADS, KV_HEADS, HEAD_DIM, layer, rngs=rngs)
            for layer in range(LAYERS)
        )
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens, cache=None):
        x = self.embed(tokens)
        for norm, attention in zip(self.norms, self.attention):
            y, cache = attention(norm(x), cache)
            x = x + y
        return self.head(x), cache


def nnx_model():
    """`forward(state, tokens, cache)`, as `generate` takes it, and the state."""
    graph, state = nnx.split(nnx.jit(lambda: NnxDecoder(nnx.Rngs(0)))())

    def forward(state, tokens, cache):
        return nnx.merge(graph, state)(tokens, cache)

    return forward, state
