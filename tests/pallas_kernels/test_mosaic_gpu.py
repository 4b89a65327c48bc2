"""The Mosaic GPU kernels against the oracle: interpreted anywhere, compiled on a GPU (`-m gpu`)."""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageFormat, implementation, init_pages, paged_attention, write_kv
from tests import cases, oracle
from tests.pallas_kernels.test_attention import LAYER, Problem, in_both_modes
from tests.pallas_kernels.test_triton import BF16_TOLERANCE, TOLERANCE, relative_error

pytest.importorskip("pallas_kernels.mosaic_gpu", reason="jax is too old", exc_type=ImportError)
from pallas_kernels.mosaic_gpu import attention, decode, prefill

INTERPRETED = "interpreted"
COMPILED = pytest.param("compiled", marks=pytest.mark.gpu)

# Interpreted cases that show most for their few seconds each; the others are `slow`.
QUICK = {"bf16", "pairs_10", "pairs_1_128", "pairs_12_128"}

# Small, so that an interpreter meets several programs, splits and turns of every ring.
SMALL = {
    decode: decode.Blocks(programs=12, least_turns=1),
    prefill: prefill.Blocks(64, 16, 8, 4, 2),
}


def kernel_cases(all_cases):
    """Each case as the kernels take it: `split` for `paired`, larger pages, and for the decode
    kernel a head dim of 128."""
    found = []
    for case in all_cases:
        layout = "split" if case.layout == "paired" else case.layout
        case = dataclasses.replace(case, layout=layout, page_size=max(64, case.page_size))
        if case.head_dim % 64 == 0:
            found.append(case)
        rows = case.queries * case.q_heads // case.kv_heads
        if layout == "split" and rows <= decode.MAX_ROWS and case.head_dim != 128:
            changes = dict(name=f"{case.name}_128", head_dim=128, order=min(case.order, 128))
            found.append(dataclasses.replace(case, **changes))
    return in_both_modes(found, QUICK)


def attend(problem, mode, blocks=None, kernel=None):
    case = problem.case
    kernel = kernel or attention.kernel(problem.q, problem.pages)
    if blocks is None and mode == INTERPRETED:
        blocks = SMALL[kernel]
    static = dict(
        causal=case.causal,
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        blocks=blocks,
        interpret=mode == INTERPRETED,
    )
    out = jax.jit(functools.partial(kernel.paged_attention, **static))(
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


@pytest.mark.parametrize(("mode", "case"), kernel_cases(cases.ATTENTION))
def test_attention_equals_the_oracle(mode, case):
    problem = Problem(case)
    actual = attend(problem, mode)
    assert_close(actual, problem)
    real = np.arange(case.queries) < problem.query_lengths[:, None]
    assert not actual[~real].any()
    assert not actual[problem.lengths == 0].any()


@pytest.mark.parametrize(
    ("mode", "head_dim"),
    [
        pytest.param(INTERPRETED, 128, marks=pytest.mark.slow),
        *(pytest.param("compiled", head_dim, marks=pytest.mark.gpu) for head_dim in (64, 128, 256)),
    ],
)
@pytest.mark.parametrize(
    ("programs", "block_tokens", "page_size"), [(64, 64, 128), (1, 128, 64), (64, 192, 64)]
)
def test_block_sizes_of_prefill_do_not_show(mode, head_dim, block_tokens, page_size, programs):
    case = cases.AttentionCase(
        "blocks", "split", page_size=page_size, lengths=(0, 650, 33), head_dim=head_dim
    )
    problem = Problem(case)
    blocks = prefill.Blocks(block_tokens, 16, programs, 64, 2)
    assert_close(attend(problem, mode, blocks, prefill), problem)


@pytest.mark.parametrize("mode", [pytest.param(INTERPRETED, marks=pytest.mark.slow), COMPILED])
@pytest.mark.parametrize(
    ("page_size", "blocks"),
    [
        (32, (1, 1, 3)),
        (32, (528, 1, 2)),
        (64, (12, 1, 1)),
        (128, (1, 1, 3)),
        (256, (528, 1, 2)),
    ],
)
def test_block_sizes_of_decode_do_not_show(mode, page_size, blocks):
    case = cases.AttentionCase(
        "blocks", "split", page_size=page_size, lengths=(0, 1350, 33), head_dim=128, order=128
    )
    problem = Problem(case)
    assert_close(attend(problem, mode, decode.Blocks(*blocks), decode), problem)


@pytest.mark.parametrize("mode", [INTERPRETED, COMPILED])
def test_borders_of_parts_and_of_sequences_do_not_show(mode):
    """Blocks of 128 tokens: 1, 2, 6, none, a whole one, and all of one but a token."""
    case = cases.AttentionCase(
        "borders",
        "split",
        lengths=(1, 200, 700, 0, 128, 127),
        head_dim=128,
        order=128,
        page_size=64,
        sinks=True,
    )
    problem = Problem(case)
    assert_close(attend(problem, mode, decode.Blocks(programs=36, least_turns=1), decode), problem)


ONE_SPLIT = {decode: decode.Blocks(1), prefill: prefill.Blocks(64, 16, 1, 1, 2)}


@pytest.mark.parametrize("mode", [pytest.param(INTERPRETED, marks=pytest.mark.slow), COMPILED])
@pytest.mark.parametrize("kernel", [decode, prefill], ids=["decode", "prefill"])
def test_long_context_in_one_split_keeps_its_digits(mode, kernel):
    """Zero-mean values: an offset carried through the sum would show here first."""
    case = cases.AttentionCase(
        "long", "split", lengths=(32_768,), kv_heads=1, head_dim=128, order=128, page_size=64
    )
    problem = Problem(case)
    scale, _ = oracle.split(problem.words)
    minimum = (-7.5 * scale).astype(jnp.bfloat16).view(np.uint16)
    problem.words = (problem.words & 0xFFFF) | minimum.astype(np.uint32) << 16
    assert_close(attend(problem, mode, ONE_SPLIT[kernel], kernel), problem, 1e-3)


# Head dim 64 is the prefill kernel's, whatever the queries.
EITHER_KERNEL = pytest.mark.parametrize(
    ("mode", "head_dim"),
    [
        pytest.param(INTERPRETED, 64, marks=pytest.mark.slow),
        (INTERPRETED, 128),
        pytest.param("compiled", 64, marks=pytest.mark.gpu),
        pytest.param("compiled", 128, marks=pytest.mark.gpu),
    ],
)


@EITHER_KERNEL
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_values_and_queries_of_any_magnitude(mode, head_dim, factor):
    case = cases.AttentionCase(
        "magnitude",
        "split",
        lengths=(40, 3),
        scale=float(0.125 / factor),
        page_size=64,
        head_dim=head_dim,
    )
    problem = Problem(case)
    problem.q = problem.q * factor
    scale, minimum = (x * [1, factor] for x in oracle.split(problem.words))  # keys, values
    low, high = (x.astype(jnp.bfloat16).view(np.uint16) for x in (scale, minimum))
    problem.words = low | high.astype(np.uint32) << 16
    assert_close(attend(problem, mode), problem)


@EITHER_KERNEL
def test_constant_values_are_kept(mode, head_dim):
    """A constant vector has scale zero: the logarithm of that must do no harm."""
    case = cases.AttentionCase(
        "constant", "split", lengths=(40, 3), page_size=64, head_dim=head_dim
    )
    problem = Problem(case)
    problem.words[..., 1] &= np.uint32(0xFFFF0000)
    assert_close(attend(problem, mode), problem)


@EITHER_KERNEL
def test_nan_token_spoils_its_own_sequence_only(mode, head_dim):
    case = cases.AttentionCase("nan", "split", lengths=(20, 20), page_size=64, head_dim=head_dim)
    problem = Problem(case)
    problem.words[LAYER, problem.page_table[0, 0], 3, 0, 0] = oracle.NAN_WORD
    out = attend(problem, mode)
    assert np.isnan(out[0, :, :2]).all()  # the two query heads of KV head 0
    assert np.isfinite(out[0, :, 2:]).all()
    assert np.isfinite(out[1]).all()


@EITHER_KERNEL
@pytest.mark.parametrize("sink", [-np.inf, -1e4, 1e4])
def test_extreme_sinks(mode, head_dim, sink):
    problem = Problem(
        cases.AttentionCase(
            "sinks", "split", lengths=(20, 0), sinks=True, page_size=64, head_dim=head_dim
        )
    )
    problem.sinks[:] = sink
    actual = attend(problem, mode)
    np.testing.assert_allclose(actual, problem.expected(), rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bf16", "split"])
@pytest.mark.parametrize("queries", [1, 3, 300])
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
    assert reason(page_size=32) is None  # the decode kernel's
    assert "page_size" in reason(page_size=32, head_dim=64)
    assert "page_size" in reason(page_size=16)
    assert "query heads" in reason(heads=65)


def test_layers_are_one_function():
    problem = Problem(cases.AttentionCase("layers", "split", page_size=64, head_dim=128))
    options = dict(causal=True, scale=1.0, window=None, soft_cap=None, sinks=None)
    arrays = problem.pages, jnp.asarray(problem.page_table), jnp.asarray(problem.lengths)

    def attend_all(q, query_lengths):
        options.update(query_lengths=query_lengths)
        return [attention.paged_attention(q, *arrays, layer=i, **options) for i in range(3)]

    jaxpr = jax.make_jaxpr(attend_all)(problem.q, jnp.asarray(problem.query_lengths))
    calls = [
        eqn.params["jaxpr"] for eqn in jaxpr.eqns if eqn.params.get("name") == "paged_attention"
    ]
    assert len(calls) == 3
    assert len(set(map(id, calls))) == 1


def choose_on_a_gpu(monkeypatch, **case):
    problem = Problem(cases.AttentionCase("choice", "split", page_size=64, **case))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    operands = problem.q, problem.pages, problem.page_table
    return implementation.choose("paged_attention", None, *operands).__module__


def test_the_faster_one_is_the_default(monkeypatch):
    decode_128 = dict(head_dim=128, kv_heads=4)
    assert choose_on_a_gpu(monkeypatch, **decode_128) == "pallas_kernels.mosaic_gpu.attention"
    two_rows = dict(head_dim=128, kv_heads=2)
    assert choose_on_a_gpu(monkeypatch, **two_rows) == "pallas_kernels.triton.attention"
    assert choose_on_a_gpu(monkeypatch) == "pallas_kernels.triton.attention"
    chunk = dict(head_dim=128, queries=16, lengths=(16, 40))
    assert choose_on_a_gpu(monkeypatch, **chunk) == "pallas_kernels.triton.attention"


def test_triton_is_the_default_before_hopper(monkeypatch):
    ampere = types.SimpleNamespace(compute_capability="8.0", device_kind="NVIDIA A100")
    monkeypatch.setattr(jax, "devices", lambda: [ampere])
    four_rows = dict(head_dim=128, kv_heads=1)
    assert choose_on_a_gpu(monkeypatch, **four_rows) == "pallas_kernels.triton.attention"


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
