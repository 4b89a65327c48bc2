"""The decoder in its two forms: a Linen module, and a function whose layers are one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saw_int4_jax import init_cache, step
from saw_int4_jax.models.llama import Llama, LlamaConfig, one_layer_forward
from tests.checkpoints import SIZES, random_params

CONFIG = LlamaConfig(**SIZES)
VARIANTS = {
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True, tie_embeddings=True),
    "qwen2": dataclasses.replace(CONFIG, qkv_bias=True, window=5, full_layers=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_layer_for_all_is_the_same_function(variant):
    config = VARIANTS[variant]
    variables = {"params": random_params(config)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 272, (2, 9)), jnp.int32)
    counts = jnp.asarray([9, 6])
    logits = {}
    for forward in (Llama(config, last_only=True).apply, one_layer_forward(config)):
        cache = init_cache(config.cache_spec(8, page_size=4), 2)
        run = jax.jit(lambda cache, f=forward: step(f, variables, tokens, counts, cache))
        logits[forward], cache, ok = run(cache)
        assert ok.all()
    np.testing.assert_allclose(*logits.values(), rtol=1e-5, atol=1e-5)


def test_layers_are_traced_once():
    config = CONFIG
    variables = {"params": random_params(config)}
    cache = init_cache(config.cache_spec(8, page_size=4), 2)
    tokens, counts = jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
    run = jax.jit(lambda cache: step(one_layer_forward(config), variables, tokens, counts, cache))
    text = run.lower(cache).as_text()
    assert text.count("call @apply_layer(") == 2
    assert text.count("func private @apply_layer(") == 1
