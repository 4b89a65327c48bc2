"""Exact re-parameterizations of a model: other keys and values in the cache, the same logits.

All return new parameters and leave the given ones alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.page_format import rotate
from saw_int4_jax.models.llama import LlamaConfig

Params = dict[str, Any]


def fold_values(params: Params, config: LlamaConfig, order: int) -> Params:
    """Folds the rotation of values into the projections around the attention.

    Values then arrive rotated, are quantized as they are, and the output projection undoes the
    rotation: `CacheSpec.rotate_v` without its work at run time (SAW-INT4, arXiv 2604.19157). Every
    query head's part of W_o gets the rotation of its KV head, which is the same for all.

    Args:
      params: of `Llama(config)`.
      config: the model's.
      order: Hadamard order, a power of two that divides `config.head_dim`; 1 changes nothing.

    Raises:
      ValueError: `order` does not fit.
    """
    if order < 1 or order & (order - 1) or config.head_dim % order:
        raise ValueError(f"Expected {order=} to be a power of two dividing {config.head_dim=}")

    def rotate_heads(x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        heads = x.reshape(*x.shape[:-1], -1, config.head_dim)
        return rotate(heads, order).reshape(x.shape).astype(x.dtype)

    def fold(attention: Params, layer: int) -> Params:
        del layer
        v_proj = {name: rotate_heads(leaf) for name, leaf in attention["v_proj"].items()}
        o_kernel = rotate_heads(attention["o_proj"]["kernel"].T).T
        return {
            **attention,
            "v_proj": v_proj,
            "o_proj": {**attention["o_proj"], "kernel": o_kernel},
        }

    return _map_attention(params, fold)


def scale_key_channels(params: Params, config: LlamaConfig, pair: int, scale: float) -> Params:
    """Injects an outlier: multiplies one RoPE channel pair of every key, divides it in queries.

    For demonstrations. Large models have such channels by nature, small ones hardly; RoPE turns
    the two channels of a pair into each other only, so the logits stay what they were.

    Args:
      params: of `Llama(config)`.
      config: the model's.
      pair: channels `pair` and `pair + D / 2` of every KV head.
      scale: factor on the keys; its inverse goes on the queries.

    Raises:
      ValueError: `pair` or `scale` is out of range.
    """
    half = config.head_dim // 2
    if not 0 <= pair < half:
        raise ValueError(f"Expected {pair=} to be within 0 .. {half - 1}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"Expected {scale=} to be positive and finite")
    shape = config.num_layers, config.num_kv_heads, half
    return scale_keys(params, config, jnp.ones(shape).at[..., pair].set(scale))


def scale_keys(params: Params, config: LlamaConfig, factors: Float[Array, "L K D/2"]) -> Params:
    """Multiplies channels of keys by factors and divides the queries' by them.

    The two channels of a RoPE pair share their factor, or RoPE would not commute with it.

    Args:
      params: of `Llama(config)`.
      config: the model's.
      factors: for each layer, KV head and RoPE pair, not zero. For a model with QK norm, whose
        gains all heads share, alike for all heads.

    Raises:
      ValueError: `factors` has another shape.
    """
    expected = config.num_layers, config.num_kv_heads, config.head_dim // 2
    if factors.shape != expected:
        raise ValueError(f"Expected {factors.shape=} to be [L, K, D / 2] = {expected}")
    # Normalization of q and k would undo a factor before it, so the factor goes into its gains.
    q, k = ("q_norm", "k_norm") if config.qk_norm else ("q_proj", "k_proj")

    def scaled(attention: Params, layer: int) -> Params:
        factor = jnp.tile(factors[layer], 2)  # [K, D]
        if config.qk_norm:
            on_queries = on_keys = factor[:1]
        else:
            on_keys = factor
            on_queries = jnp.repeat(factor, config.num_heads // config.num_kv_heads, axis=0)
        return {
            **attention,
            q: _multiply(attention[q], 1 / on_queries),
            k: _multiply(attention[k], on_keys),
        }

    return _map_attention(params, scaled)


def balance_keys(params: Params, config: LlamaConfig) -> Params:
    """Makes the channels of queries and keys about equally large, from the weights alone.

    Where a key channel is large because its queries are small, most of an outlier is a matter of
    units: scaling the RoPE pair by (E[q²] / E[k²])^(1/4) minimizes the error of scores from steps
    that grow with the key's length (the diagonal of `methods.calibrated`, without its text). The
    squares are those of normalized inputs that are alike in all directions; factors are rounded
    to powers of two, so that the parameters lose no bit and the logits stay what they were.

    Args:
      params: of `Llama(config)`.
      config: the model's.
    """

    def squares(layer: Params, name: str) -> Float[Array, "K D/2"]:
        """The mean square of each RoPE pair, over the heads that share a factor."""
        attention = layer["self_attn"]
        if config.qk_norm:
            x = jnp.square(attention[f"{name}_norm"]["scale"].astype(jnp.float32))
            x = jnp.broadcast_to(x, (config.num_kv_heads, config.head_dim))
        else:
            projection, gain = attention[f"{name}_proj"], layer["input_layernorm"]["scale"]
            kernel = projection["kernel"].astype(jnp.float32) * gain[:, None]
            x = jnp.square(kernel).sum(0)
            if "bias" in projection:
                x += jnp.square(projection["bias"].astype(jnp.float32))
            x = x.reshape(config.num_kv_heads, -1, config.head_dim).mean(1)
        return x.reshape(-1, 2, config.head_dim // 2).mean(1)

    factors = []
    for index in range(config.num_layers):
        layer = params[f"layers_{index}"]
        q, k = squares(layer, "q"), squares(layer, "k")
        usable = (q > 0) & (k > 0)
        power = jnp.where(usable, jnp.log2(jnp.where(usable, q / k, 1)) / 4, 0)
        factors.append(jnp.exp2(jnp.round(jnp.clip(power, -16, 16))))
    return scale_keys(params, config, jnp.stack(factors))


def scale_values(params: Params, config: LlamaConfig, factors: Float[Array, "L K D"]) -> Params:
    """Multiplies channels of values by factors and divides the output projection's rows by them.

    Args:
      params: of `Llama(config)`.
      config: the model's.
      factors: for each layer, KV head and channel, not zero.

    Raises:
      ValueError: `factors` has another shape.
    """
    expected = config.num_layers, config.num_kv_heads, config.head_dim
    if factors.shape != expected:
        raise ValueError(f"Expected {factors.shape=} to be [L, K, D] = {expected}")

    def scaled(attention: Params, layer: int) -> Params:
        on_outputs = jnp.repeat(factors[layer], config.num_heads // config.num_kv_heads, axis=0)
        kernel = attention["o_proj"]["kernel"]
        kernel = (kernel / on_outputs.reshape(-1, 1)).astype(kernel.dtype)
        return {
            **attention,
            "v_proj": _multiply(attention["v_proj"], factors[layer]),
            "o_proj": {**attention["o_proj"], "kernel": kernel},
        }

    return _map_attention(params, scaled)


def _multiply(module: Params, factor: Float[Array, "heads D"]) -> Params:
    """Multiplies what a projection or a normalization puts out by head and channel."""

    def product(x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        heads = x.reshape(*x.shape[:-1], *factor.shape)
        return (heads * factor).reshape(x.shape).astype(x.dtype)

    return {name: product(leaf) for name, leaf in module.items()}


def _map_attention(params: Params, function: Callable[[Params, int], Params]) -> Params:
    """Applies a function to the attention parameters of every layer, which it is told."""
    prefix = "layers_"
    return {
        name: {**module, "self_attn": function(module["self_attn"], int(name[len(prefix) :]))}
        if name.startswith(prefix)
        else module
        for name, module in params.items()
    }
