"""How the next token is picked, against the same choice written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saw_int4_jax import make_sampling
from saw_int4_jax.generate import sample as sample_eagerly

sample = jax.jit(sample_eagerly)

DRAWS = 4000
LOGITS = np.array([0.1, 2.0, -1.0, 1.2, 1.9, 0.4, -3.0, 0.9, 1.5, -0.2], np.float32)
FILTERS = [
    dict(),
    dict(temperature=2.5),
    dict(temperature=0.4),
    dict(top_k=1),
    dict(top_k=4),
    dict(top_k=1000),
    dict(top_p=0.05),
    dict(top_p=0.7),
    dict(min_p=0.3),
    dict(min_p=1.0),
    dict(temperature=1.7, top_k=6, top_p=0.8),
    dict(temperature=1.3, top_k=7, top_p=0.95, min_p=0.2),
]


def probabilities(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution to draw from: filters in this order, each on what the last one left."""
    weights = np.exp(np.float64(logits) / temperature)
    likeliest_first = sorted(range(len(logits)), key=lambda token: -weights[token])
    kept = likeliest_first[: top_k or None]
    total, reached, nucleus = sum(weights[kept]), 0.0, []
    for token in kept:
        if reached < top_p:
            nucleus.append(token)
        reached += weights[token] / total
    kept = [token for token in nucleus if weights[token] >= min_p * weights[kept[0]]]
    result = np.zeros(len(logits))
    result[kept] = weights[kept] / sum(weights[kept])
    return result


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(options):
    """Over many positions of one seed: no token outside the kept set, each within 5 sigma."""
    expected = probabilities(LOGITS, **options)
    logits = np.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    tokens = sample(logits, jnp.arange(DRAWS), make_sampling(DRAWS, seed=[7] * DRAWS, **options))
    counts = np.bincount(tokens, minlength=len(LOGITS))
    sigma = np.sqrt(expected * (1 - expected) * DRAWS)
    assert (np.abs(counts - expected * DRAWS) <= 5 * sigma).all()
    assert (counts[expected > 0.005] > 0).all()


def test_seeds_are_independent():
    """As many draws of one position with as many seeds have the same distribution."""
    expected = probabilities(LOGITS)
    logits = np.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    tokens = sample(logits, jnp.full(DRAWS, 3), make_sampling(DRAWS, seed=100))
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert (np.abs(counts - expected * DRAWS) <= 5 * np.sqrt(expected * DRAWS)).all()


ROWS = 6
MIXED = dict(
    temperature=[0.0, 1.0, 3.0, 1e-5, 1.0, 2.0],
    top_k=[0, 0, 3, 0, 1, 0],
    top_p=[1.0, 0.6, 1.0, 1.0, 1.0, 0.9],
    min_p=[0.0, 0.0, 0.1, 0.0, 0.0, 0.5],
    seed=[1, 2, 3, 4, 5, 1],
)


def mixed_logits():
    return np.random.default_rng(0).normal(size=(ROWS, 50)).astype(np.float32) * 2


def test_greedy_rows():
    """No sampling, temperature 0 or next to it, and top-1 are all the likeliest token."""
    logits = mixed_logits()
    likeliest = logits.argmax(-1)
    position = jnp.arange(ROWS)
    np.testing.assert_array_equal(sample(logits, position, None), likeliest)
    tokens = np.asarray(sample(logits, position, make_sampling(ROWS, **MIXED)))
    np.testing.assert_array_equal(tokens[[0, 3, 4]], likeliest[[0, 3, 4]])
    for options in (dict(temperature=0.0), dict(temperature=1e-38), dict(top_k=1)):
        tokens = sample(logits, position, make_sampling(ROWS, **options))
        np.testing.assert_array_equal(tokens, likeliest)


def test_the_first_of_equally_likely_tokens_is_greedy():
    logits = np.zeros((ROWS, 50), np.float32)
    logits[:, [9, 17, 30]] = 1
    position = jnp.arange(ROWS)
    for sampling in (None, make_sampling(ROWS, temperature=0.0), make_sampling(ROWS, top_k=1)):
        np.testing.assert_array_equal(sample(logits, position, sampling), [9] * ROWS)


def test_a_row_does_not_depend_on_the_others():
    logits, position = mixed_logits(), np.arange(10, 10 + ROWS)
    together = sample(logits, position, make_sampling(ROWS, **MIXED))
    for row in range(ROWS):
        alone = make_sampling(1, **{name: values[row : row + 1] for name, values in MIXED.items()})
        here = slice(row, row + 1)
        np.testing.assert_array_equal(sample(logits[here], position[here], alone), together[here])


def test_a_draw_depends_on_seed_and_position():
    logits, seeds = np.zeros((ROWS, 50), np.float32), [5, 5, 5, 6, 5, 6]
    position = np.array([1, 1, 2, 1, 1, 2])
    tokens = sample(logits, position, make_sampling(ROWS, seed=seeds)).tolist()
    assert tokens[0] == tokens[1] == tokens[4]
    assert len(set(tokens)) > 2
    np.testing.assert_array_equal(make_sampling(3, seed=5).seed, [5, 6, 7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=[1.0, float("nan"), 1.0]), "temperature="),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(min_p=-0.1), "min_p=-0.1"),
        (dict(min_p=[0, 0, 2]), "min_p="),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(seed=2**31), "seed="),
        (dict(temperature=[1.0]), "temperature=.*one or 3 of them"),
        (dict(top_k=[1, 2]), "top_k=.*one or 3 of them"),
        (dict(seed=[1, 2, 3, 4]), "seed=.*one or 3 of them"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        make_sampling(3, **options)
