import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saw_int4_jax.nn.dense import ROWS, dot_general, look_up


@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 16), (2, 1, 16), (1, 3, 16), (16,)])
def test_a_single_row_is_computed_several_times_on_a_gpu(shape, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    plain, repeated = nn.Dense(5), nn.Dense(5, dot_general=dot_general)
    variables = plain.init(jax.random.key(0), x)
    np.testing.assert_allclose(repeated.apply(variables, x), plain.apply(variables, x), rtol=1e-5)
    single = x.size == 16 and x.ndim > 1
    assert (f"f32[{ROWS}," in str(jax.make_jaxpr(repeated.apply)(variables, x))) == single


def test_elsewhere_it_is_the_plain_product():
    x = jnp.ones((1, 1, 16))
    product = nn.Dense(5, dot_general=dot_general)
    variables = product.init(jax.random.key(0), x)
    assert f"f32[{ROWS}," not in str(jax.make_jaxpr(product.apply)(variables, x))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3)])
def test_a_single_token_is_looked_up_among_others(shape):
    embed = nn.Embed(7, 5)
    tokens = jnp.arange(np.prod(shape)).reshape(shape) + 2
    variables = embed.init(jax.random.key(0), tokens)
    counts = []

    def counted(tokens):
        counts.append(tokens.size)
        return embed.apply(variables, tokens)

    np.testing.assert_array_equal(look_up(counted, tokens), embed.apply(variables, tokens))
    assert counts == [max(2, tokens.size)]
