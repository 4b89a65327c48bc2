"""The Mosaic GPU kernel against the oracle: interpreted anywhere, compiled on a GPU (`-m gpu`)."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageFormat, implementation, init_pages, paged_attention, write_kv
from tests import cases, oracle
from tests.pallas_kernels.test_attention import LAYER, Problem
from tests.pallas_kernels.test_triton import BF16_TOLERANCE, TOLERANCE, relative_error

pytest.importorskip("pallas_kernels.mosaic_gpu", reason="jax is too old", exc_type=ImportError)
from pallas_kernels.mosaic_gpu import attention

INTERPRETED = "interpreted"
COMPILED = pytest.param("compiled", marks=pytest.mark.gpu)

# Interpreted cases that show most for their two seconds each; the others are `slow`.
QUICK = {"split", "bf16", "ragged", "everything", "head_dim_256", "chunk_everything"}


def kernel_cases(all_cases):
    """Each case that it supports interpreted and compiled: `split` for `paired`, larger pages."""
    out = []
    for case in all_cases:
        if case.head_dim % 64:
            continue
        layout = "split" if case.layout == "paired" else case.layout
        case = dataclasses.replace(case, layout=layout, page_size=max(64, case.page_size))
        marks = () if case.name in QUICK else pytest.mark.slow
        out += [
            pytest.param(INTERPRETED, case, id=f"interpreted-{case.name}", marks=marks),
            pytest.param("compiled", case, id=f"compiled-{case.name}", marks=pytest.mark.gpu),
        ]
    return out


def attend(problem, mode, blocks=None):
    case = problem.case
    if blocks is None and mode == INTERPRETED:
        blocks = attention.Blocks(64, 16, 8, 4, 2)
    static = dict(
        causal=case.causal,
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        blocks=blocks,
        interpret=mode == INTERPRETED,
    )
    out = jax.jit(functools.partial(attention.paged_attention, **static))(
        problem.q,
        problem.pages,
        jnp.asarray(problem.page_table),
        jnp.asarray(problem.lengths),
        query_lengths=jnp.asarray(problem.query_lengths),
        sinks=problem.sinks,
        layer=LAYER,
    )
    assert out.shape == problem.q.shape
    assert out.dtype == problem.q.dtype
    return np.asarray(out, np.float64)


def assert_close(actual, problem, tolerance=None):
    case = problem.case
    if tolerance is None:
        short = case.layout == "bf16" or case.dtype == "bfloat16"
        tolerance = BF16_TOLERANCE if short else TOLERANCE
    assert relative_error(actual, problem.expected()) < tolerance


@pytest.mark.parametrize(("mode", "case"), kernel_cases(cases.DECODE + cases.PREFILL))
def test_attention_equals_the_oracle(mode, case):
    problem = Problem(case)
    actual = attend(problem, mode)
    assert_close(actual, problem)
    real = np.arange(case.queries) < problem.query_lengths[:, None]
    assert not actual[~real].any()
    assert not actual[problem.lengths == 0].any()


@pytest.mark.parametrize("mode", [pytest.param(INTERPRETED, marks=pytest.mark.slow), COMPILED])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("block_tokens", "page_size"), [(64, 128), (128, 64), (192, 64)])
@pytest.mark.parametrize("programs", [1, 64])
def test_block_sizes_do_not_show(mode, head_dim, block_tokens, page_size, programs):
    case = cases.AttentionCase(
        "blocks", "split", page_size=page_size, lengths=(0, 650, 33), head_dim=head_dim
    )
    problem = Problem(case)
    blocks = attention.Blocks(block_tokens, 16, programs, 64, 2)
    assert_close(attend(problem, mode, blocks), problem)


@pytest.mark.parametrize("mode", [pytest.param(INTERPRETED, marks=pytest.mark.slow), COMPILED])
@pytest.mark.parametrize("layout", ["split", "bf16"])
@pytest.mark.parametrize("q_heads", [2, 5, 8, 40])
def test_groups(mode, layout, q_heads):
    case = cases.AttentionCase(
        "group",
        layout,
        order=1,
        kv_heads=1,
        q_heads=q_heads,
        queries=3,
        lengths=(40, 7),
        page_size=64,
    )
    problem = Problem(case)
    assert_close(attend(problem, mode), problem)


@pytest.mark.parametrize("mode", [pytest.param(INTERPRETED, marks=pytest.mark.slow), COMPILED])
def test_long_context_in_one_split_keeps_its_digits(mode):
    """Zero-mean values: an offset carried through the sum would show here first."""
    case = cases.AttentionCase(
        "long", "split", lengths=(32_768,), kv_heads=1, head_dim=128, order=128, page_size=64
    )
    problem = Problem(case)
    scale, _ = oracle.split(problem.words)
    minimum = (-7.5 * scale).astype(jnp.bfloat16).view(np.uint16)
    problem.words = (problem.words & 0xFFFF) | minimum.astype(np.uint32) << 16
    assert_close(attend(problem, mode, attention.Blocks(64, 16, 1, 1, 2)), problem, 1e-3)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_values_and_queries_of_any_magnitude(mode, factor):
    case = cases.AttentionCase(
        "magnitude", "split", lengths=(40, 3), scale=float(0.125 / factor), page_size=64
    )
    problem = Problem(case)
    problem.q = problem.q * factor
    scale, minimum = (x * [1, factor] for x in oracle.split(problem.words))  # keys, values
    low, high = (x.astype(jnp.bfloat16).view(np.uint16) for x in (scale, minimum))
    problem.words = low | high.astype(np.uint32) << 16
    assert_close(attend(problem, mode), problem)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
def test_constant_values_are_kept(mode):
    """A constant vector has scale zero: the logarithm of that must do no harm."""
    problem = Problem(cases.AttentionCase("constant", "split", lengths=(40, 3), page_size=64))
    problem.words[..., 1] &= np.uint32(0xFFFF0000)
    assert_close(attend(problem, mode), problem)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
def test_nan_token_spoils_its_own_sequence_only(mode):
    problem = Problem(cases.AttentionCase("nan", "split", lengths=(20, 20), page_size=64))
    problem.words[LAYER, problem.page_table[0, 0], 3, 0, 0] = oracle.NAN_WORD
    out = attend(problem, mode)
    assert np.isnan(out[0, :, :2]).all()  # the two query heads of KV head 0
    assert np.isfinite(out[0, :, 2:]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
@pytest.mark.parametrize("sink", [-np.inf, -1e4, 1e4])
def test_extreme_sinks(mode, sink):
    problem = Problem(
        cases.AttentionCase("sinks", "split", lengths=(20, 0), sinks=True, page_size=64)
    )
    problem.sinks[:] = sink
    actual = attend(problem, mode)
    np.testing.assert_allclose(actual, problem.expected(), rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bf16", "split"])
@pytest.mark.parametrize("queries", [1, 300])
def test_large_problem_equals_xla(method, queries):
    """The shapes of a real model, with the default block sizes."""
    problem = Problem(
        cases.AttentionCase(
            "large",
            method,
            order=1 if method == "bf16" else 128,
            dtype="bfloat16",
            lengths=(5000, 1, 2049, 0, 4096),
            queries=queries,
            query_lengths=(queries, 1, 1, 0, queries),
            q_heads=32,
            kv_heads=8,
            head_dim=128,
            page_size=64,
        )
    )
    actual = attend(problem, "compiled")
    expected = problem.attend(implementation="xla")
    assert relative_error(actual, expected) < BF16_TOLERANCE


# --- Around the kernel ----------------------------------------------------------------------


def test_supported_says_why_not():
    def reason(layout="split", head_dim=128, page_size=64, heads=4):
        sizes = dict(layers=1, num_pages=1, kv_heads=1, page_size=page_size, head_dim=head_dim)
        q = jnp.zeros((1, 1, heads, head_dim), jnp.float32)
        return attention.supported(
            q, init_pages(PageFormat(layout), **sizes), jnp.zeros((1, 1), jnp.int32)
        )

    assert reason() is None
    assert "layout" in reason("paired")
    assert "head_dim" in reason(head_dim=96)
    assert "page_size" in reason(page_size=32)
    assert "query heads" in reason(heads=65)


def choose_on_a_gpu(monkeypatch):
    problem = Problem(cases.AttentionCase("choice", "split", page_size=64))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    operands = problem.q, problem.pages, problem.page_table
    return implementation.choose("paged_attention", None, *operands).__module__


def test_triton_is_the_default(monkeypatch):
    assert choose_on_a_gpu(monkeypatch) == "pallas_kernels.triton.attention"


def test_without_triton_this_one_runs(monkeypatch):
    monkeypatch.setenv(implementation.SWITCHED_OFF, "triton")
    assert choose_on_a_gpu(monkeypatch) == "pallas_kernels.mosaic_gpu.attention"


def test_when_triton_cannot_be_imported_this_one_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pallas_kernels.triton.attention", None)
    assert choose_on_a_gpu(monkeypatch) == "pallas_kernels.mosaic_gpu.attention"


def test_without_either_xla_runs_and_says_so(monkeypatch, caplog):
    monkeypatch.setenv(implementation.SWITCHED_OFF, "triton,mosaic_gpu")
    assert choose_on_a_gpu(monkeypatch) == "pallas_kernels.xla.attention"
    assert "runs by XLA" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 5])
def test_the_operations_run_without_triton(monkeypatch, queries):
    monkeypatch.setenv(implementation.SWITCHED_OFF, "triton")
    sizes = dict(layers=2, num_pages=16, kv_heads=2, page_size=64, head_dim=128)
    k, v = jax.random.normal(jax.random.key(0), (2, 200, 2, 128))
    q = jax.random.normal(jax.random.key(1), (1, queries, 8, 128))
    table = jnp.array([[3, 0, 7, 5]])
    token = jnp.arange(200)
    slots = table[0, token // 64] * 64 + token % 64
    pages = init_pages(PageFormat("split", 128, rotate_v=True), **sizes)
    pages = jax.jit(functools.partial(write_kv, layer=1))(pages, k, v, slots)
    out = {
        name: jax.jit(functools.partial(paged_attention, layer=1, implementation=name))(
            q, pages, table, jnp.array([200])
        )
        for name in (None, "mosaic_gpu", "xla")
    }
    np.testing.assert_array_equal(out[None], out["mosaic_gpu"])
    assert relative_error(np.asarray(out[None]), np.asarray(out["xla"])) < TOLERANCE
