"""Methods: the quantizers against the page format, and one pass against token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_format import dequantize, quantize, rotate
from saw_int4_jax import comparison
from saw_int4_jax.methods import LayerSample, default_methods, dense, make_method
from saw_int4_jax.methods.calibrated import key_hessian
from saw_int4_jax.methods.integer import quantize_dequantize, token_wise
from saw_int4_jax.methods.method import Method
from saw_int4_jax.methods.windowed import RESIDUAL, SINK, WINDOW
from saw_int4_jax.models.llama import Llama, LlamaConfig
from saw_int4_jax.rotation import scale_key_channels
from tests.checkpoints import SIZES, random_params

CONFIG = LlamaConfig(**SIZES)
QWEN3 = LlamaConfig(**SIZES, qk_norm=True)
# What runs through the paged cache and what is simulated, of every family.
FAMILIES = ["bf16", "signed", "int8", "kivi", "window", "kmeans-bdr", "vq", "gptq-bdr"]
FAMILIES += ["covariance", "centered-bdr"]


def tokens(batch=2, length=160, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length))


@pytest.fixture(scope="module")
def model():
    params = random_params(CONFIG)
    return params, dense.layer_samples(CONFIG, params, tokens(seed=1))


def one_pass(prepared, text):
    counts = np.full(len(text), text.shape[1], np.int32)
    cache = prepared.open(*text.shape)
    return comparison.advance(prepared.forward, prepared.variables, text, counts, cache)[0]


@pytest.mark.parametrize("shape", [(64, 16), (3, 5, 128)])
def test_the_simulated_int4_is_that_of_the_page_format(shape):
    x = jax.random.normal(jax.random.key(0), shape) * 3 + 1
    assert np.array_equal(quantize_dequantize(x), dequantize(*quantize(x)))


def test_more_bits_and_wider_scales_are_closer():
    x = jax.random.normal(jax.random.key(0), (256, 64)) + 5
    errors = [
        float(jnp.square(quantize_dequantize(x, **options) - x).mean())
        for options in (dict(bits=4), dict(bits=4, scale_bits=32), dict(bits=8))
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["int4", "bdr-4"])
def test_simulated_and_paged_methods_agree(model, name):
    """The dense cache stands for the real one: the same quantizer gives the same logits."""
    params, _ = model
    prepared = comparison.prepare(make_method(name, 16), CONFIG, params, [])
    order = dict(prepared.method.paged)["order"]
    simulated = Method("x", "", lambda *_: 4.0, keys=token_wise(order=order), values=token_wise())
    text = tokens()
    same = one_pass(comparison.prepare(simulated, CONFIG, params, []), text)
    np.testing.assert_allclose(one_pass(prepared, text), same, atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_over_a_text_is_decoding_it_token_by_token(model, name):
    """Guards every mask by position: what a query reads must not depend on the chunk."""
    params, samples = model
    prepared = comparison.prepare(make_method(name, 16), CONFIG, params, samples)
    text = tokens(batch=1)
    cache = prepared.open(*text.shape)
    stepwise = comparison.one_by_one(prepared.forward, prepared.variables, text, cache)
    logits = one_pass(prepared, text)
    assert np.isfinite(logits).all()
    # Rounding may fall to the other side after sums in another order, seldom and by a step.
    close = np.isclose(stepwise, logits, atol=2e-2).mean()
    assert close > 0.99


def test_a_program_is_compiled_once(model):
    """However many batches go through it, and variants of one method."""
    params, _ = model
    before = comparison.advance._cache_size()
    for seed in range(2):
        prepared = comparison.prepare(make_method("signed", 16), CONFIG, params, [], seed)
        for text in (tokens(seed=3), tokens(seed=4)):
            one_pass(prepared, text)
    assert comparison.advance._cache_size() <= before + 1


@pytest.mark.parametrize("name", ["hessian", "signed"])
@pytest.mark.parametrize("config", [CONFIG, QWEN3], ids=["llama", "qwen3"])
def test_folding_keeps_the_function(name, config):
    params = random_params(config)
    samples = dense.layer_samples(config, params, tokens())
    prepared = comparison.prepare(make_method(name, 16), config, params, samples)
    exact = Llama(config).apply({"params": params}, tokens())[0]
    folded = Llama(config).apply(prepared.variables, tokens())[0]
    assert not all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(prepared.params))
    )
    np.testing.assert_allclose(folded, exact, atol=1e-3)


def test_the_window_is_exact_as_long_as_it_reaches(model):
    params, _ = model
    exact = one_pass(comparison.prepare(make_method("bf16", 16), CONFIG, params, []), tokens())
    for name, reach in (("window", WINDOW), ("kivi", RESIDUAL)):
        prepared = comparison.prepare(make_method(name, 16), CONFIG, params, [])
        difference = np.abs(one_pass(prepared, tokens()) - exact).max((0, 2))
        bf16_noise = 0.1
        assert difference[:reach].max() < bf16_noise
        assert difference[reach + SINK :].max() > 0


def test_gptq_rounding_lowers_the_error_it_weighs():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(2, 4, 16)) @ rng.normal(size=(2, 16, 16))  # of low rank: correlated
    q = np.einsum("nkr,krd->nkd", rng.normal(size=(256, 2, 4)), mixing).repeat(2, axis=1)
    k, v = rng.normal(size=(2, 256, 2, 16))
    sample = LayerSample(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v, rng.normal(size=(4, 16, 8))))
    )
    hessian = key_hessian(sample)
    found = make_method("gptq", 16).calibrate(sample, jax.random.key(0))[0]

    def weighted(read):
        return float(jnp.einsum("nkc,kcd,nkd->", read - sample.k, hessian, read - sample.k))

    rounded = make_method("gptq", 16).keys(sample.k[None], found)[0]
    assert weighted(rounded) < 0.5 * weighted(quantize_dequantize(sample.k))


def test_the_diagonal_undoes_an_injected_outlier(model):
    """An injected outlier is a diagonal: a method that fits one must find its inverse."""
    params, _ = model
    injected = scale_key_channels(params, CONFIG, 3, 16)
    keys = []
    for variant in (params, injected):
        samples = dense.layer_samples(CONFIG, variant, tokens())
        prepared = comparison.prepare(make_method("hessian", 16), CONFIG, variant, samples)
        keys.append(dense.observe(CONFIG, prepared.params, tokens())[1])
    scale = jnp.abs(keys[0]).max() / jnp.abs(keys[1]).max()
    np.testing.assert_allclose(keys[1] * scale, keys[0], rtol=0.05, atol=0.3)


def test_covariance_rotation_is_orthogonal(model):
    _, samples = model
    matrix = make_method("covariance", 16).calibrate(samples[0], jax.random.key(0))[0]
    np.testing.assert_allclose(matrix @ matrix.swapaxes(1, 2), [np.eye(16)] * 2, atol=1e-4)
    turned = jnp.einsum("nkc,kcd->nkd", samples[0].k, matrix)
    variance = (turned**2).mean(0)
    np.testing.assert_allclose(variance / variance.mean(-1, keepdims=True), 1, atol=1e-2)


def test_bits_count_scales_codebooks_and_windows():
    bits = {name: make_method(name, 128).bits(2, 128, 1024) for name in default_methods(128)}
    assert bits["bf16"] == 16
    assert bits["bdr"] == bits["int4"] == 4.25
    assert bits["int4-fp32"] == 4.5
    assert bits["int8"] == 8.25
    assert bits["vq"] == 4 + 256 * 16 / 1024
    assert bits["window"] == pytest.approx(4.25 + (16 - 4.25) * 68 / 1024)
    assert 5 < bits["kivi"] < 6
    assert bits["kmeans"] == pytest.approx(4.25 + 4 / 256 + 0.25)


def test_only_what_keeps_one_format_and_no_look_ups_serves():
    serving = {name for name in default_methods(128) if make_method(name, 128).serves}
    assert {"int4", "bdr", "bdr-kv", "signed", "hessian-bdr", "centered-bdr"} <= serving
    assert not serving & {"kivi", "window", "kmeans", "vq", "gptq"}


@pytest.mark.parametrize(("name", "message"), [("bdr-12", "order=12"), ("nonsense", "one of bf16")])
def test_unknown_methods_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, 16)


def test_rotation_in_the_simulation_is_undone():
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 16))
    keys = make_method("bdr-fp32", 16).keys
    assert float(jnp.abs(keys(x, ()) - x).max()) < float(jnp.abs(rotate(x, 16) - x).max()) / 4
