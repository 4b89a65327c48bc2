"""`evaluate`: windows, and scores against the same quantities computed without a cache."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saw_int4_jax.evaluate import evaluate, windows
from saw_int4_jax.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=50,
    embed_dim=32,
    mlp_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=64,
    tie_embeddings=True,
)
SPECS = [
    CONFIG.cache_spec(1, page_size=8, **options)
    for options in (dict(dtype="bf16"), dict(order=1), dict())
]


@pytest.fixture(scope="module")
def model():
    llama = Llama(CONFIG)
    variables = jax.jit(llama.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return llama.apply, variables


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 5 * 32)
    return windows(tokens.tolist(), 32, bos=1)


def test_windows_with_bos_predict_every_token():
    assert windows(range(10, 17), 3, bos=1).tolist() == [[1, 10, 11, 12], [1, 13, 14, 15]]


def test_windows_without_bos_begin_with_the_token_before():
    assert windows(range(10, 17), 3).tolist() == [[10, 11, 12, 13], [13, 14, 15, 16]]


def test_windows_refuse_a_short_text():
    with pytest.raises(ValueError, match="Expected a text of 2 tokens"):
        windows([1, 2], 3, bos=1)


def test_scores_agree_with_attention_without_a_cache(model, text):
    forward, variables = model
    logits, _ = jax.jit(forward)(variables, jnp.asarray(text[:, :-1]))
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, jnp.asarray(text[:, 1:])[..., None], -1).mean()
    bf16, int4, bdr = evaluate(forward, variables, text, SPECS, batch=2, chunk=8)
    assert bf16.nats == pytest.approx(float(nats), abs=2e-3)
    assert (bf16.kl, bf16.top1, bf16.tokens) == (0, 1, 160)
    for score in (int4, bdr):
        assert score.nats == pytest.approx(float(nats), abs=0.1)
        assert 1e-6 < score.kl < 0.1
        assert 0.5 < score.top1 <= 1


def test_batch_and_chunk_do_not_matter(model, text):
    whole, parts = (
        evaluate(*model, text, SPECS[::2], batch=batch, chunk=chunk)[-1]
        for batch, chunk in ((5, 32), (2, 8))
    )
    assert parts.tokens == whole.tokens
    assert parts.nats == pytest.approx(whole.nats, rel=1e-5)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-3)


def test_progress_reaches_the_total(model, text):
    seen = []
    evaluate(*model, text, SPECS[:1], batch=2, chunk=8, progress=lambda *x: seen.append(x))
    assert seen[-1] == (160, 160)
    assert seen == sorted(seen)


def test_a_chunk_that_does_not_divide_is_refused(model, text):
    with pytest.raises(ValueError, match=r"Expected text\.shape=\(5, 33\)"):
        evaluate(*model, text, SPECS, chunk=7)


def test_score_units(model, text):
    (score,) = evaluate(*model, text, SPECS[:1], batch=5, chunk=32)
    assert score.perplexity == pytest.approx(math.exp(score.nats))
    assert score.bits_per_byte(320) == pytest.approx(score.nats / math.log(2) / 2)
