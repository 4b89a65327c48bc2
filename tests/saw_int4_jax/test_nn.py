"""The Linen and the NNX attention module, alone and in a user's model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from saw_int4_jax import CacheSpec, Rope, RopeScaling, extend, generate, init_cache
from saw_int4_jax.nn import linen
from saw_int4_jax.nn.nnx import PagedAttention
from tests.saw_int4_jax.user_models import cache_spec, linen_model, nnx_model

WIDTH = 48
SIZES = dict(num_heads=4, num_kv_heads=2, head_dim=16, layer=1)
OPTIONS = {
    "default": dict(),
    "window": dict(window=3),
    "scaled_rope": dict(rope=Rope(500.0, RopeScaling(4.0, 1.0, 4.0, 8))),
    "bias_and_norm": dict(num_kv_heads=1, qkv_bias=True, o_bias=True, qk_norm=True, norm_eps=1e-2),
    "bfloat16": dict(dtype=jnp.bfloat16, qkv_bias=True),
}
PARTS = (7, 5)  # the tokens of the calls through a cache


def linen_module(options):
    """A module and its parameters, all random."""
    module = linen.PagedAttention(**{**SIZES, **options})
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    rng = np.random.default_rng(1)
    return module, jax.tree.map(lambda x: rng.normal(0.2, 0.3, x.shape).astype(x.dtype), shapes)


def nnx_module(options):
    return PagedAttention(WIDTH, **{**SIZES, **options}, rngs=nnx.Rngs(0))


def plain_and_cached(module, x, cache):
    """Outputs of one call without a cache, of several through one, and the cache."""
    plain, _ = module(x, None)
    outputs = []
    for part in jnp.split(x, np.cumsum(PARTS)[:-1], axis=1):
        cache, _ = extend(cache, jnp.full(len(x), part.shape[1]), max_count=part.shape[1])
        out, cache = module(part, cache)
        outputs.append(out)
    return plain, jnp.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bf16") for name in OPTIONS), ("default", "int4")]
)
def test_nnx_and_linen_agree(name, dtype):
    """With the same weights: without a cache, through one, and one with the other."""
    options = OPTIONS[name]
    module, params = linen_module(options)
    graph, state = nnx.split(nnx_module(options))
    nnx.replace_by_pure_dict(state, params)

    @jax.jit
    def outputs(params, state, x, cache):
        def linen_attention(x, cache):
            return module.apply({"params": params}, x, cache)

        return (
            plain_and_cached(linen_attention, x, cache),
            plain_and_cached(nnx.merge(graph, state), x, cache),
        )

    kv_heads = options.get("num_kv_heads", SIZES["num_kv_heads"])
    cache = init_cache(CacheSpec(2, kv_heads, 16, 8, page_size=4, dtype=dtype), 2)
    x = jax.random.normal(jax.random.key(0), (2, sum(PARTS), WIDTH))
    expected, actual = outputs(params, state, x, cache)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

    plain, cached, cache = actual
    assert plain.dtype == cached.dtype == options.get("dtype", jnp.float32)
    plain, cached = np.asarray(plain, np.float32), np.asarray(cached, np.float32)
    tolerance = 0.02 if dtype == "bf16" else 0.3
    np.testing.assert_allclose(cached, plain, rtol=0, atol=tolerance * np.abs(plain).max())
    if dtype == "int4":  # quantization must show, or this is not the cache's content
        assert np.abs(cached - plain).max() > 0.02 * np.abs(plain).max()
    written = np.asarray(cache.pages.data, np.int32).reshape(2, -1).any(1)
    np.testing.assert_array_equal(written, [False, True])  # `layer` 1 alone


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nnx_has_the_parameters_of_linen(options):
    _, params = linen_module(options)
    state = nnx.to_pure_dict(nnx.state(nnx_module(options)))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, params)


# --- Users' models --------------------------------------------------------------------------

PROMPTS = [[3, 1, 4, 1, 5], [9]]


@pytest.mark.parametrize("make", [linen_model, nnx_model])
def test_users_model_generates(make):
    """Greedy tokens of the decode loop are those of one call over each whole sequence."""
    forward, variables = make()
    spec = cache_spec(16, page_size=4)
    new = generate(
        forward, variables, PROMPTS, init_cache(spec, 2), max_new_tokens=[6, 11], chunk=4, every=3
    )
    assert new.finish == ["length", "length"]
    assert [len(tokens) for tokens in new.tokens] == [6, 11]
    assert len({*new.tokens[0], *new.tokens[1]}) > 4  # the model does react to its input

    tokens = np.zeros((2, 12), np.int32)
    for row, (prompt, continuation) in enumerate(zip(PROMPTS, new.tokens)):
        tokens[row, : len(prompt + continuation)] = prompt + continuation

    @jax.jit
    def whole(variables, tokens):
        cache, _ = extend(init_cache(spec, 2), jnp.full(2, 12))
        return forward(variables, tokens, cache)[0]

    likeliest = np.asarray(whole(variables, tokens).argmax(-1))
    for row, (prompt, continuation) in enumerate(zip(PROMPTS, new.tokens)):
        start = len(prompt) - 1
        assert likeliest[row, start : start + len(continuation)].tolist() == continuation


def test_users_nnx_model_trains_without_a_cache():
    """Plain causal attention; the gradient reaches every parameter."""
    forward, state = nnx_model()

    @jax.jit
    @jax.grad
    def gradient(state):
        logits, _ = forward(state, jnp.asarray(PROMPTS[:1]), None)
        return (logits**2).mean()

    for leaf in jax.tree.leaves(gradient(state)):
        assert np.abs(leaf).max() > 0
