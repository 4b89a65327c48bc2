"""Rotary position embedding against its formula in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saw_int4_jax import Rope, RopeScaling

LLAMA_3_1 = RopeScaling(8.0, 1.0, 4.0, 8192)


def frequencies(head_dim, theta, scaling=None):
    """Section 3.2.2 of arXiv 2104.09864; the scaling by wavelength, as Llama 3.1 published it."""
    result = []
    for pair in range(head_dim // 2):
        frequency = theta ** (-2 * pair / head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            context = scaling.original_max_position_embeddings
            if wavelength > context / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength > context / scaling.high_freq_factor:
                smooth = (context / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency *= smooth + (1 - smooth) / scaling.factor
        result.append(frequency)
    return np.array(result)


def turned(x, positions, frequencies):
    """Channel pair (i, i + D/2) as a complex number, times e^(i angle)."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    pairs = pairs * np.exp(1j * positions[..., None, None] * frequencies)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (64, 10_000.0, None),
        (80, 500_000.0, None),
        (128, 500_000.0, LLAMA_3_1),
        (64, 10_000.0, RopeScaling(32.0, 1.0, 4.0, 64)),
    ],
)
def test_rope_equals_the_formula(head_dim, theta, scaling):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, head_dim)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [40, 7, 511, 1000, 1000]])
    rope = Rope(theta, scaling)
    expected = frequencies(head_dim, theta, scaling)
    np.testing.assert_allclose(rope.frequencies(head_dim), expected, rtol=3e-6)
    actual = jax.jit(rope)(x, positions)
    assert actual.dtype == np.float32
    # Angles of up to 1000 radians in float32 are off by some 1e-4.
    np.testing.assert_allclose(actual, turned(x, positions, expected), atol=1e-3)
    np.testing.assert_array_equal(actual[0, 0], x[0, 0])  # position 0 turns nothing


def test_bfloat16_is_turned_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 64), jnp.bfloat16)
    positions = jnp.array([[3, 1000]])
    actual = Rope()(x, positions)
    assert actual.dtype == jnp.bfloat16
    expected = Rope()(x.astype(jnp.float32), positions).astype(jnp.bfloat16)
    np.testing.assert_array_equal(actual, expected)


def test_scaling_stretches_low_frequencies_alone():
    plain, scaled = Rope(500_000.0), Rope(500_000.0, LLAMA_3_1)
    ratio = scaled.frequencies(128) / plain.frequencies(128)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 8)
    assert (np.diff(ratio) <= 0).all()
    assert len(np.unique(ratio.round(4))) > 3  # between the two it is smooth


@pytest.mark.parametrize("rope", [Rope(), Rope(500_000.0, LLAMA_3_1)])
def test_scores_depend_on_the_distance_alone(rope):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, 64))

    @jax.jit
    def scores(q_position, k_position):
        turned = [rope(x, jnp.full((1, 1), p)) for x, p in ((q, q_position), (k, k_position))]
        return (turned[0] * turned[1]).sum(-1)

    near = scores(9, 2)
    np.testing.assert_allclose(scores(107, 100), near, atol=1e-3)
    np.testing.assert_allclose(scores(1007, 1000), near, atol=1e-3)
    assert np.abs(scores(9, 3) - near).max() > 0.1
    norms = jnp.linalg.norm(rope(q, jnp.full((1, 1), 1000)), axis=-1)
    np.testing.assert_allclose(norms, jnp.linalg.norm(q, axis=-1), rtol=1e-5)
