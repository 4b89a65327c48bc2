import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import PageFormat, Pages, init_pages, paged_attention, write_kv
from tests import cases, oracle

STATIC = ("layer", "causal", "scale", "window", "soft_cap", "implementation")
attend = jax.jit(paged_attention, static_argnames=STATIC)

# float32 arithmetic on numbers of order one; a bfloat16 output is rounded once more.
TOLERANCE = dict(rtol=0, atol=2e-6)
BF16_TOLERANCE = dict(rtol=2**-8, atol=2e-6)

LAYER, LAYERS = 1, 2
GARBAGE = (-1, 2**31 - 1, 12345)


def distinct(all_cases):
    """The first of those that are the same but for their names."""
    seen = {}
    for case in all_cases:
        seen.setdefault(dataclasses.replace(case, name=""), case)
    return list(seen.values())


def in_both_modes(all_cases, quick):
    """Distinct cases as parameters `mode, case`: interpreted, `slow` if not quick; and compiled."""
    out = []
    for case in distinct(all_cases):
        marks = () if case.name in quick else pytest.mark.slow
        out += [
            pytest.param("interpreted", case, id=f"interpreted-{case.name}", marks=marks),
            pytest.param("compiled", case, id=f"compiled-{case.name}", marks=pytest.mark.gpu),
        ]
    return out


class Problem:
    """The arrays of a case. Whatever must not be read is NaN, and so is every other layer."""

    def __init__(self, case, seed=0):
        rng = np.random.default_rng(seed)
        self.case = case
        batch, page_size = len(case.lengths), case.page_size
        needed = [-(-length // page_size) for length in case.lengths]
        num_pages = sum(needed) + 3
        self.page_table = np.resize(GARBAGE, (batch, max(needed) + 2)).astype(np.int32)
        free = iter(rng.permutation(num_pages))
        for b, count in enumerate(needed):
            self.page_table[b, :count] = [next(free) for _ in range(count)]
        self.page_table[1:, : case.shared_pages] = self.page_table[0, : case.shared_pages]

        tokens = (LAYERS, num_pages, page_size, case.kv_heads, 2)
        used = np.zeros(tokens[:3], bool)
        for pages, length in zip(self.page_table, case.lengths, strict=True):
            token = np.arange(length)
            used[LAYER, pages[token // page_size], token % page_size] = True
        if case.layout == "bf16":
            numbers = rng.normal(size=(*tokens, case.head_dim)).astype(ml_dtypes.bfloat16)
            numbers[~used] = np.nan
            self.codes, self.words = numbers.view(np.uint16), None
        else:
            self.codes = rng.integers(0, 16, (*tokens, case.head_dim), np.uint8)
            scale = rng.uniform(0.1, 0.3, tokens).astype(ml_dtypes.bfloat16).view(np.uint16)
            minimum = rng.uniform(-3, -1, tokens).astype(ml_dtypes.bfloat16).view(np.uint16)
            self.words = scale | minimum.astype(np.uint32) << 16
            self.words[~used] = oracle.NAN_WORD

        q = rng.normal(size=(batch, case.queries, case.q_heads, case.head_dim))
        self.q = jnp.asarray(q, case.dtype)
        self.lengths = np.array(case.lengths, np.int32)
        all_queries = (case.queries,) * batch
        self.query_lengths = np.array(case.query_lengths or all_queries, np.int32)
        self.sinks = rng.normal(size=case.q_heads).astype(np.float32) if case.sinks else None
        self.options = dict(causal=case.causal, window=case.window, soft_cap=case.soft_cap)

    @functools.cached_property
    def pages(self):
        case = self.case
        arrays = oracle.to_arrays(self.codes, self.words, case.layout)
        format = PageFormat(case.layout, case.order, case.rotate_v)
        return Pages(*(x if x is None else jnp.asarray(x) for x in arrays), format)

    def attend(self, **options):
        case = self.case
        out = attend(
            self.q,
            self.pages,
            self.page_table,
            self.lengths,
            layer=LAYER,
            query_lengths=None if case.query_lengths is None else self.query_lengths,
            scale=case.scale,
            sinks=self.sinks,
            **{**self.options, **options},
        )
        assert out.shape == self.q.shape
        assert out.dtype == self.q.dtype
        return np.asarray(out, np.float64)

    def expected(self, words=None):
        case = self.case
        words = self.words if words is None else words
        stored = oracle.dequantize(self.codes[LAYER], None if words is None else words[LAYER])
        # The stored keys are turned back, rather than the queries turned.
        return oracle.attention(
            np.asarray(self.q, np.float64),
            oracle.rotate(stored[..., 0, :], case.order),
            oracle.rotate(stored[..., 1, :], case.order if case.rotate_v else 1),
            self.page_table,
            self.lengths,
            self.query_lengths,
            scale=case.head_dim**-0.5 if case.scale is None else case.scale,
            sinks=self.sinks,
            **self.options,
        )


@pytest.mark.parametrize("case", cases.DECODE + cases.PREFILL, ids=lambda case: case.name)
def test_attention_equals_the_oracle(case):
    problem = Problem(case)
    tolerance = BF16_TOLERANCE if case.dtype == "bfloat16" else TOLERANCE
    actual = problem.attend()
    np.testing.assert_allclose(actual, problem.expected(), **tolerance)
    real = np.arange(case.queries) < problem.query_lengths[:, None]
    assert not actual[~real].any()
    assert not actual[problem.lengths == 0].any()


# --- The tolerance is tight -----------------------------------------------------------------


@pytest.fixture(scope="module")
def solved():
    problem = Problem(cases.AttentionCase("tight", lengths=(600,)))
    return problem, problem.attend()


@pytest.mark.parametrize("token", [0, 300, 599])
@pytest.mark.parametrize("kind", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("last_bit", [1, 1 << 16], ids=["scale", "minimum"])
def test_one_wrong_scale_is_caught(solved, token, kind, last_bit):
    problem, actual = solved
    page = problem.page_table[0, token // problem.case.page_size]
    words = problem.words.copy()
    words[LAYER, page, token % problem.case.page_size, 0, kind] += last_bit
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        np.testing.assert_allclose(actual, problem.expected(words), **TOLERANCE)


# --- What is data is not a shape ------------------------------------------------------------


def test_one_compilation_serves_all_lengths():
    problem = Problem(cases.AttentionCase("lengths", queries=4, lengths=(600, 40, 33)))
    traces = []

    @jax.jit
    def traced(pages, page_table, lengths, query_lengths):
        traces.append(lengths)
        return paged_attention(
            problem.q, pages, page_table, lengths, layer=LAYER, query_lengths=query_lengths
        )

    for lengths, query_lengths in [
        ((600, 40, 33), (4, 4, 4)),
        ((0, 1, 2), (0, 1, 2)),
        ((513, 4, 16), (1, 4, 3)),
    ]:
        problem.lengths, problem.query_lengths = np.array(lengths), np.array(query_lengths)
        data = problem.page_table, problem.lengths, problem.query_lengths
        actual = traced(problem.pages, *map(jnp.asarray, data))
        np.testing.assert_allclose(actual, problem.expected(), **TOLERANCE)
    assert len(traces) == 1


def test_traced_layer_equals_static():
    problem = Problem(cases.AttentionCase("layer"))
    arrays = problem.q, problem.pages, problem.page_table, problem.lengths
    traced = jax.jit(lambda layer: paged_attention(*arrays, layer=layer))
    np.testing.assert_array_equal(traced(LAYER), problem.attend())
    assert np.isnan(traced(0)).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_lengths_of_any_integer_dtype(dtype, causal):
    problem = Problem(cases.AttentionCase("dtype", lengths=(0, 33), queries=2, causal=causal))
    expected = problem.attend()
    problem.page_table = np.maximum(problem.page_table, 0).clip(max=100).astype(dtype)
    problem.lengths = problem.lengths.astype(dtype)
    np.testing.assert_array_equal(problem.attend(), expected)


def test_named_implementation():
    problem = Problem(cases.DECODE[0])
    actual = problem.attend(implementation="xla")
    np.testing.assert_allclose(actual, problem.expected(), **TOLERANCE)


# --- Numbers that are no numbers ------------------------------------------------------------


def test_nan_token_spoils_its_own_sequence_only():
    problem = Problem(cases.AttentionCase("nan", lengths=(20, 20)))
    problem.words[LAYER, problem.page_table[0, 0], 3, 0, 0] = oracle.NAN_WORD
    out = problem.attend()
    assert np.isnan(out[0, :, :2]).all()  # the two query heads of KV head 0
    assert np.isfinite(out[0, :, 2:]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("sink", [-np.inf, -1e4, 1e4])
def test_extreme_sinks(sink):
    problem = Problem(cases.AttentionCase("sinks", lengths=(20, 0), sinks=True))
    problem.sinks[:] = sink
    actual = problem.attend()
    np.testing.assert_allclose(actual, problem.expected(), **TOLERANCE)


# --- The whole way --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format",
    [PageFormat("paired", 64, rotate_v=True), PageFormat("split", 16), PageFormat("bf16")],
    ids=lambda format: format.layout,
)
def test_written_then_read(format):
    """Attention over what `write_kv` stored is near attention over the numbers themselves."""
    rng = np.random.default_rng(0)
    length, kv_heads, head_dim = 40, 2, 64
    k, v = rng.normal(size=(2, length, kv_heads, head_dim)).astype(np.float32)
    q = rng.normal(size=(1, 3, 4, head_dim)).astype(np.float32)
    sizes = dict(layers=1, num_pages=4, kv_heads=kv_heads, page_size=16, head_dim=head_dim)
    page_table = np.array([[2, 0, 3]])
    token = np.arange(length)
    slots = page_table[0, token // 16] * 16 + token % 16
    pages = jax.jit(write_kv)(init_pages(format, **sizes), k, v, slots)
    actual = attend(q, pages, page_table, np.array([length]))
    options = dict(causal=True, scale=head_dim**-0.5, window=None, soft_cap=None, sinks=None)
    table, lengths, query_lengths = np.zeros((1, 1), int), [length], [3]
    expected = oracle.attention(q, k[None], v[None], table, lengths, query_lengths, **options)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error < (0.005 if format.layout == "bf16" else 0.15)


# --- Memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["paired", "split", "bf16"])
def test_memory_does_not_grow_with_the_context(layout):
    """Neither scores of the whole context nor a dequantized cache is ever held."""
    batch, queries, heads, max_pages = 2, 16, 8, 2048
    sizes = dict(layers=2, num_pages=4096, kv_heads=2, page_size=64, head_dim=128)
    pages = jax.eval_shape(lambda: init_pages(PageFormat(layout), **sizes))
    compiled = attend.lower(
        jax.ShapeDtypeStruct((batch, queries, heads, 128), jnp.float32),
        pages,
        jax.ShapeDtypeStruct((batch, max_pages), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        layer=1,
    ).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    scores_bytes = 4 * batch * heads * queries * max_pages * sizes["page_size"]
    pool_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages))
    assert temporary < scores_bytes / 10
    assert temporary < pool_bytes / 10


# --- Errors ---------------------------------------------------------------------------------

Q = np.zeros((3, 2, 4, 8), np.float32)
TABLE, LENGTHS = np.zeros((3, 5), np.int32), np.ones(3, np.int32)
BAD_CALLS = [
    (dict(q=Q[0]), ValueError, "q.shape"),
    (dict(q=Q[:, :, :3]), ValueError, "q.shape"),
    (dict(q=Q[..., :4]), ValueError, "q.shape"),
    (dict(q=Q.astype(np.int32)), ValueError, "q.dtype=.*int32"),
    (dict(page_table=TABLE[0]), ValueError, "page_table"),
    (dict(page_table=TABLE[:2]), ValueError, "page_table"),
    (dict(page_table=TABLE.astype(np.float32)), ValueError, "page_table.*float32"),
    (dict(lengths=LENGTHS[:2]), ValueError, "lengths"),
    (dict(lengths=LENGTHS[:, None]), ValueError, "lengths"),
    (dict(lengths=LENGTHS.astype(np.float32)), ValueError, "lengths.*float32"),
    (dict(query_lengths=LENGTHS[:1]), ValueError, "query_lengths"),
    (dict(query_lengths=LENGTHS.astype(bool)), ValueError, "query_lengths.*bool"),
    (dict(sinks=np.zeros(2)), ValueError, "sinks.shape"),
    (dict(sinks=np.zeros((4, 1))), ValueError, "sinks.shape"),
    (dict(window=0), ValueError, "window=0"),
    (dict(window=-3), ValueError, "window=-3"),
    (dict(window=4, causal=False), ValueError, "causal=False with window=4"),
    (dict(soft_cap=0.0), ValueError, "soft_cap=0.0"),
    (dict(soft_cap=-1.0), ValueError, "soft_cap=-1.0"),
    (dict(layer=2), ValueError, "layer=2"),
    (dict(layer=-1), ValueError, "layer=-1"),
    (dict(implementation="cuda"), NotImplementedError, "implementation='cuda'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS)
def test_errors(arguments, error, message):
    sizes = dict(layers=2, num_pages=2, kv_heads=2, page_size=4, head_dim=8)
    pages = init_pages(PageFormat("paired", 8), **sizes)
    good = dict(q=Q, pages=pages, page_table=TABLE, lengths=LENGTHS)
    with pytest.raises(error, match=f"^Expected .*{message}"):
        paged_attention(**{**good, **arguments})
