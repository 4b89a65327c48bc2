"""A dense cache that holds keys and values as they are and quantizes them when they are read.

It stands where the paged cache stands, in the same model code, for methods that the kernels do
not know: `Llama(config, attend=dense.attend)`. A token sees itself and all before it as the
method stores them at that moment, so that one pass over a text gives what decoding it token by
token gives. Simple and slow: every read quantizes the whole buffer anew.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from saw_int4_jax.methods.method import LayerSample, Method
from saw_int4_jax.models.llama import Llama, LlamaConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Keys and values of B sequences with room for S tokens each.

    Attributes:
      k: keys, exact.
      v: values, exact.
      lengths: `int32[B]`, tokens of each sequence, the current step's included.
      new_tokens: `int32[B]`, the current step's.
      found: what calibration found, for (keys, values); leaves begin with the layer axis.
      method: how they come back.
    """

    k: Float[Array, "L B S K D"]
    v: Float[Array, "L B S K D"]
    lengths: Int[Array, "B"]
    new_tokens: Int[Array, "B"]
    found: tuple[Any, Any]
    method: Method = dataclasses.field(metadata={"static": True})

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]


def init_dense(
    method: Method, config: LlamaConfig, found: tuple[Any, Any], batch: int, length: int
) -> DenseCache:
    """An empty cache for `length` tokens of each of `batch` sequences."""
    shape = config.num_layers, batch, length, config.num_kv_heads, config.head_dim
    zeros = jnp.zeros(batch, jnp.int32)
    return DenseCache(jnp.zeros(shape), jnp.zeros(shape), zeros, zeros, found, method)


def extend(cache: DenseCache, counts: Int[Array, "B"]) -> DenseCache:
    """Starts a step of `counts` new tokens; the caller sees to it that they fit."""
    return dataclasses.replace(cache, lengths=cache.lengths + counts, new_tokens=counts)


def attend(
    cache: DenseCache,
    layer: int | Int[Array, ""],
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    window: int | None = None,
) -> tuple[Float[Array, "B T H D"], DenseCache]:
    """Writes a step's keys and values, then attends to all as the method stores them."""
    batch, num_tokens = q.shape[:2]
    size, method = cache.k.shape[2], cache.method
    position = (cache.lengths - cache.new_tokens)[:, None] + jnp.arange(num_tokens)  # [B, T]
    real = jnp.arange(num_tokens) < cache.new_tokens[:, None]
    at = layer, jnp.arange(batch)[:, None], jnp.where(real, position, size)
    cache = dataclasses.replace(
        cache,
        k=cache.k.at[at].set(k.astype(jnp.float32), mode="drop"),
        v=cache.v.at[at].set(v.astype(jnp.float32), mode="drop"),
    )
    exact_k, exact_v = cache.k[layer], cache.v[layer]  # [B, S, K, D]
    for_keys, for_values = jax.tree.map(lambda x: x[layer], cache.found)
    stored_k, stored_v = method.keys(exact_k, for_keys), method.values(exact_v, for_values)

    query, token = position[..., None], jnp.arange(size)  # [B, T, 1], [S]
    visible = (token <= query) & real[..., None]
    if window is not None:
        visible &= token > query - window
    grouped = q.astype(jnp.float32).reshape(batch, num_tokens, k.shape[2], -1, q.shape[-1])
    grouped /= math.sqrt(q.shape[-1])

    scores = _scores(grouped, stored_k)  # [B, K, G, T, S]
    if method.recent_keys is not None:
        recent = method.recent_keys(query, token)[:, None, None]
        scores = jnp.where(recent, _scores(grouped, exact_k), scores)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30))
    if method.recent_values is None:
        out = _mix(weights, stored_v)
    else:
        recent = method.recent_values(query, token)[:, None, None]
        out = _mix(jnp.where(recent, weights, 0), exact_v)
        out += _mix(jnp.where(recent, 0, weights), stored_v)
    return out.reshape(q.shape).astype(q.dtype), cache


def _scores(q: Float[Array, "B T K G D"], k: Float[Array, "B S K D"]) -> Array:
    return jnp.einsum("btkgd,bskd->bkgts", q, k, precision=lax.Precision.HIGHEST)


def _mix(weights: Float[Array, "B K G T S"], v: Float[Array, "B S K D"]) -> Array:
    return jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=lax.Precision.HIGHEST)


# --- What the layers meet -------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """A cache that only takes notes: queries, keys, values and exact outputs layer by layer."""

    layers: tuple[tuple[Array, Array, Array, Array], ...]
    lengths: Int[Array, "B"]
    new_tokens: Int[Array, "B"]


def note(
    record: Record, layer: int, q: Array, k: Array, v: Array, *, window: int | None = None
) -> tuple[Array, Record]:
    """Plain causal attention over one step's own tokens, written down."""
    del layer  # they come in order
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    return out, dataclasses.replace(record, layers=(*record.layers, (q, k, v, out)))


def observe(
    config: LlamaConfig, params: dict[str, Any], tokens: Int[np.ndarray, "B T"]
) -> tuple[Float[Array, "L B T H D"], ...]:
    """Queries, keys, values and attention outputs of all layers on a batch of texts, exact."""
    return _observe(config, params, jnp.asarray(tokens))


def _observe_now(config, params, tokens):
    counts = jnp.full(tokens.shape[0], tokens.shape[1])
    model = Llama(config, attend=note)
    record: Any
    _, record = model.apply({"params": params}, tokens, Record((), counts, counts))
    return tuple(jnp.stack(x).astype(jnp.float32) for x in zip(*record.layers))


_observe = jax.jit(_observe_now, static_argnums=0)


def layer_samples(
    config: LlamaConfig, params: dict[str, Any], tokens: Int[np.ndarray, "B T"]
) -> list[LayerSample]:
    """What each layer meets on calibration text."""
    q, k, v, _ = observe(config, params, tokens)
    flat = [x.reshape(len(x), -1, *x.shape[3:]) for x in (q, k, v)]
    return [
        LayerSample(
            flat[0][layer],
            flat[1][layer],
            flat[2][layer],
            output_projection(config, params, layer),
        )
        for layer in range(config.num_layers)
    ]


def output_projection(
    config: LlamaConfig, params: dict[str, Any], layer: int
) -> Float[Array, "H D E"]:
    """W_o by query head, float32."""
    kernel = params[f"layers_{layer}"]["self_attn"]["o_proj"]["kernel"]
    return kernel.astype(jnp.float32).reshape(config.num_heads, config.head_dim, -1)
