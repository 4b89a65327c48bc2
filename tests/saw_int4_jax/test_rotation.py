"""Re-parameterizations: the float function stays, the cache changes as it should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_format import read
from saw_int4_jax import Rope, extend, init_cache
from saw_int4_jax.models import Llama, LlamaConfig
from saw_int4_jax.rotation import balance_keys, fold_values, scale_key_channels
from tests import checkpoints

CONFIGS = {
    name: LlamaConfig(**checkpoints.SIZES, **options)
    for name, options in {
        "plain": dict(),
        "bias": dict(qkv_bias=True, o_bias=True, rope=Rope(1e6)),
        "qk_norm": dict(qk_norm=True, tie_embeddings=True),
    }.items()
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TOKENS = np.random.default_rng(1).integers(0, checkpoints.SIZES["vocab_size"], (2, 24))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, cache=None):
    return Llama(config).apply({"params": params}, jnp.asarray(TOKENS), cache)


def float_logits(config, params):
    return forward(config, params)[0]


def cached(config, params, **options):
    """Logits through a cache, and the cache's dequantized keys and values of the first layer."""
    cache = init_cache(config.cache_spec(8, page_size=8, **options), 2)
    cache, ok = extend(cache, jnp.full(2, TOKENS.shape[1]))
    assert ok.all()
    logits, cache = forward(config, params, cache)
    return logits, read(cache.pages, 0, cache.page_table[:, :3])


@every_config
@pytest.mark.parametrize("order", [1, 4])
def test_folding_keeps_the_function(config, order):
    params = checkpoints.random_params(config)
    folded = fold_values(params, config, order)
    np.testing.assert_allclose(
        float_logits(config, folded), float_logits(config, params), atol=1e-4
    )
    changed = not np.allclose(
        folded["layers_0"]["self_attn"]["v_proj"]["kernel"],
        params["layers_0"]["self_attn"]["v_proj"]["kernel"],
    )
    assert changed == (order > 1)


def test_folding_is_rotation_of_values_in_the_cache():
    config, order = dataclasses.replace(CONFIGS["bias"], num_layers=1), 4
    params = checkpoints.random_params(config)
    rotated, (_, rotated_v) = cached(config, params, order=order, rotate_v=True)
    folded, (_, folded_v) = cached(config, fold_values(params, config, order), order=order)
    plain, (_, plain_v) = cached(config, params, order=order)
    # Sums in another order may move a number that lies between two codes to the other one.
    assert (np.abs(folded_v - rotated_v) > 1e-4).mean() < 0.01
    assert (np.abs(plain_v - rotated_v) > 1e-4).mean() > 0.9
    error = np.abs(folded - rotated).max()
    assert error < 0.05 * np.abs(rotated).max()
    assert error < 0.5 * np.abs(plain - rotated).max()


@every_config
def test_scaling_keys_keeps_the_function_and_makes_an_outlier(config):
    scale = 16
    params = checkpoints.random_params(config)
    scaled = scale_key_channels(params, config, 3, scale)
    np.testing.assert_allclose(
        float_logits(config, scaled), float_logits(config, params), atol=1e-4
    )
    keys, scaled_keys = (cached(config, p, dtype="bf16")[1][0] for p in (params, scaled))
    channel = np.where(np.isin(np.arange(config.head_dim), [3, 3 + config.head_dim // 2]), scale, 1)
    np.testing.assert_allclose(scaled_keys, keys * channel, rtol=0.02, atol=0.02)


@every_config
def test_balancing_keeps_every_bit_of_the_function_and_undoes_an_outlier(config):
    params = checkpoints.random_params(config)
    params = scale_key_channels(params, config, 5, 32)
    scaled = scale_key_channels(params, config, 3, 16)
    balanced, again = balance_keys(params, config), balance_keys(scaled, config)
    np.testing.assert_array_equal(float_logits(config, balanced), float_logits(config, params))
    keys, balanced_keys = (cached(config, p, dtype="bf16")[1][0] for p in (params, balanced))
    assert np.abs(keys).max() > 8 * np.abs(balanced_keys).max()
    jax.tree.map(np.testing.assert_array_equal, again, balanced)


def test_balancing_leaves_channels_that_are_zero():
    config = CONFIGS["plain"]
    params = jax.tree.map(jnp.zeros_like, checkpoints.random_params(config))
    jax.tree.map(np.testing.assert_array_equal, balance_keys(params, config), params)


def test_parameters_keep_their_dtype_and_are_not_changed_in_place():
    config = CONFIGS["bias"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), checkpoints.random_params(config))
    before = jax.tree.map(np.array, params)
    for new in (
        fold_values(params, config, 16),
        scale_key_channels(params, config, 0, 8),
        balance_keys(params, config),
    ):
        assert jax.tree.structure(new) == jax.tree.structure(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize("order", [0, 3, 32])
def test_orders_that_do_not_fit(order):
    with pytest.raises(ValueError, match=f"order={order} to be a power of two dividing"):
        fold_values({}, CONFIGS["plain"], order)


@pytest.mark.parametrize(("pair", "scale"), [(-1, 2), (8, 2), (0, 0), (0, -1), (0, np.inf)])
def test_outliers_that_do_not_fit(pair, scale):
    with pytest.raises(ValueError, match=r"Expected (pair|scale)="):
        scale_key_channels({}, CONFIGS["plain"], pair, scale)
