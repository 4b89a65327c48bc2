import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saw_int4_jax.nn.norm import RMSNorm

X = np.random.default_rng(0).normal(size=(3, 2, 64)) * 10
SCALE = np.random.default_rng(1).normal(size=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
def test_it_is_what_flax_computes(dtype, scale_dtype, out_dtype):
    x, variables = jnp.asarray(X, dtype), {"params": {"scale": jnp.asarray(SCALE, scale_dtype)}}
    options = dict(epsilon=1e-3, dtype=out_dtype)
    ours, flax = RMSNorm(**options), nn.RMSNorm(**options)
    out, expected = ours.apply(variables, x), flax.apply(variables, x)
    assert out.dtype == expected.dtype
    ulp = 2.0**-8 if out.dtype == jnp.bfloat16 else 2.0**-22
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (out, expected)), rtol=ulp)


def test_its_weight_has_flax_s_name():
    x = jnp.ones((1, 8))
    shapes = [
        jax.tree.map(jnp.shape, norm.init(jax.random.key(0), x))
        for norm in (RMSNorm(), nn.RMSNorm())
    ]
    assert shapes[0] == shapes[1]
