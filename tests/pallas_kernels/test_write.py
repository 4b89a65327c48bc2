import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageFormat, init_pages, write_kv, write_qkv
from tests import cases, oracle
from tests.hlo import assert_in_place

STATIC = ("layer", "implementation")
write = jax.jit(write_kv, static_argnames=STATIC)


def dirty_pages(case, seed=1):
    """Pages that hold arbitrary bytes, so that a stray write shows."""
    sizes = {name: getattr(case, name) for name in ("layers", "num_pages", "kv_heads")}
    sizes |= dict(page_size=case.page_size, head_dim=case.head_dim)
    pages = init_pages(PageFormat(case.layout, case.order, case.rotate_v), **sizes)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.integers(0, np.iinfo(x.dtype).max, x.shape, x.dtype)), pages
    )


def tokens(case, seed=0):
    """Keys with an outlier channel, values with an offset."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, len(case.slots), case.kv_heads, case.head_dim))
    k[..., 3] *= 20
    v += 1.5
    return jnp.asarray(k, case.dtype), jnp.asarray(v, case.dtype)


def logical(pages):
    codes, words = oracle.from_arrays(pages.data, pages.scales, pages.format.layout)
    return codes.copy(), None if words is None else words.copy()


def expected_write(pages, k, v, slots, layer):
    codes, words = logical(pages)
    format = pages.format
    new = oracle.encode(
        np.asarray(k), np.asarray(v), format.layout, format.order, format.value_order
    )
    oracle.write(codes, words, layer, slots, *new)
    return codes, words


def assert_same_bytes(pages, expected):
    """One code may differ by one: where the last bit of a rotation decides a tie."""
    codes, words = logical(pages)
    expected_codes, expected_words = expected
    if words is None:
        np.testing.assert_array_equal(codes, expected_codes)
    else:
        np.testing.assert_array_equal(words, expected_words)
        assert np.abs(codes.astype(int) - expected_codes).sum() <= 1


@pytest.mark.parametrize("case", cases.WRITES, ids=lambda case: case.name)
def test_write_equals_the_oracle(case):
    pages, (k, v) = dirty_pages(case), tokens(case)
    slots = jnp.array(case.slots, jnp.int32)
    written = write(pages, k, v, slots, layer=case.layer)
    assert_same_bytes(written, expected_write(pages, k, v, case.slots, case.layer))
    assert jax.tree.map(jnp.shape, written) == jax.tree.map(jnp.shape, pages)


@pytest.mark.parametrize("layout", ["paired", "split", "bf16"])
def test_skipped_slots_change_no_byte(layout):
    case = cases.WriteCase("skip", layout, order=1, slots=(-1, -64, -(2**31), 64, 2**31 - 1))
    pages, (k, v) = dirty_pages(case), tokens(case)
    written = write(pages, k, v, jnp.array(case.slots, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, written, pages)


@pytest.mark.parametrize("layout", ["paired", "split", "bf16"])
def test_traced_layer_and_scan(layout):
    case = cases.WriteCase("scan", layout, order=1, layers=3)
    pages, (k, v) = dirty_pages(case), tokens(case)
    slots = jnp.array(case.slots)

    @jax.jit
    def write_one(pages, layer):
        return write_kv(pages, k, v, slots, layer=layer)

    @jax.jit
    def write_all(pages):
        def body(pages, layer):
            return write_kv(pages, k * (layer + 1), v, slots, layer=layer), None

        return jax.lax.scan(body, pages, jnp.arange(case.layers))[0]

    static = write(pages, k, v, slots, layer=2)
    jax.tree.map(np.testing.assert_array_equal, write_one(pages, jnp.int32(2)), static)

    scanned, one_by_one = write_all(pages), pages
    for layer in range(case.layers):
        one_by_one = write(one_by_one, k * (layer + 1), v, slots, layer=layer)
    jax.tree.map(np.testing.assert_array_equal, scanned, one_by_one)


def test_bad_tokens_are_stored_as_nan():
    case = cases.WriteCase("bad", slots=(0, 1, 2))
    k, v = tokens(case)
    k = k.at[0, 0, 5].set(jnp.nan).at[1, 1, 7].set(jnp.inf)
    v = v.at[2, 0, 1].set(-jnp.inf)
    _, words = logical(write(dirty_pages(case), k, v, jnp.array(case.slots)))
    is_nan = words[0, 0, :3] == oracle.NAN_WORD  # [token, K, key or value]
    np.testing.assert_array_equal(np.argwhere(is_nan), [[0, 0, 0], [1, 1, 0], [2, 0, 1]])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_slots_of_any_integer_dtype(dtype):
    case = cases.WriteCase("slots", num_pages=40, slots=(3, 120))
    pages, (k, v) = dirty_pages(case), tokens(case)
    expected = write(pages, k, v, jnp.array([3, 120]))
    actual = write(pages, k, v, jnp.array([3, 120], dtype))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    if np.issubdtype(dtype, np.signedinteger):
        skipped = write(pages, k, v, jnp.array([-1, -1], dtype))
        jax.tree.map(np.testing.assert_array_equal, skipped, pages)


def test_named_implementation():
    case = cases.WRITES[0]
    pages, (k, v), slots = dirty_pages(case), tokens(case), jnp.array(case.slots)
    named = write(pages, k, v, slots, implementation="xla")
    assert_same_bytes(named, expected_write(pages, k, v, case.slots, 0))


# --- Before writing: QK-norm and RoPE ---------------------------------------------------------


def unprepared(case):
    """Pages, (q, k, v, slots) and the options of `write_qkv`."""
    case, q_heads, rope, norm = case.write, case.q_heads, case.rope, case.norm
    rng = np.random.default_rng(2)
    n, head_dim = len(case.slots), case.head_dim
    q = jnp.asarray(rng.normal(size=(n, q_heads, head_dim)), case.dtype)
    options = {}
    if rope:
        angle = rng.uniform(0, 100, (n, head_dim // 2))
        options |= dict(cos=jnp.asarray(np.cos(angle)), sin=jnp.asarray(np.sin(angle)))
    if norm:
        weights = 1 + rng.normal(size=(2, head_dim)) / 4
        options |= dict(zip(("q_norm", "k_norm"), jnp.asarray(weights, case.dtype)), eps=1e-3)
    else:
        options["eps"] = 1e-3
    return dirty_pages(case), (q, *tokens(case), jnp.array(case.slots, jnp.int32)), options


def prepare_and_write(pages, q, k, v, slots, *, cos=None, sin=None, q_norm=None, k_norm=None, eps):
    """In NumPy, but for the writing."""

    def prepared(x, weight):
        dtype = x.dtype
        if weight is not None:
            x = np.asarray(x, np.float64)
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
            x = jnp.asarray(x, dtype)
        if cos is not None:
            a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
            c, s = np.asarray(cos)[:, None], np.asarray(sin)[:, None]
            x = jnp.asarray(np.concatenate([a * c - b * s, b * c + a * s], axis=-1), dtype)
        return x

    return prepared(q, q_norm), write(pages, prepared(k, k_norm), v, slots)


def assert_nearly_equal(actual, expected, dtype):
    tolerance = 1e-5 if dtype == "float32" else 2**-7
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance / 4)
    assert (actual != expected).mean() < (1 if dtype == "float32" else 0.02)


def assert_nearly_equal_pages(actual, expected, dtype):
    """Stored numbers within a step, few of them different."""
    for pages in (actual, expected):
        assert pages.format == expected.format
    if actual.scales is None:
        actual, expected = (
            jax.lax.bitcast_convert_type(pages.data, jnp.bfloat16) for pages in (actual, expected)
        )
        same = np.asarray(actual, np.float32) == np.asarray(expected, np.float32)
        assert (same | np.isnan(np.asarray(actual, np.float32))).mean() > 0.98
        return
    (codes, words), (expected_codes, expected_words) = logical(actual), logical(expected)
    assert (words != expected_words).mean() < 0.01
    same = np.broadcast_to((words == expected_words)[..., None], codes.shape)
    flips = np.abs(codes.astype(int) - expected_codes)[same]
    assert flips.max() <= 1
    assert flips.mean() < (1e-3 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("layout", ["paired", None])
@pytest.mark.parametrize("case", cases.PREPARED, ids=lambda case: case.write.name)
def test_prepared_tokens_equal_those_of_numpy(case, layout):
    if layout and case.write.layout != "bf16":
        case = dataclasses.replace(case, write=dataclasses.replace(case.write, layout=layout))
    pages, operands, options = unprepared(case)
    expected_q, expected = prepare_and_write(pages, *operands, **options)
    q, actual = jax.jit(functools.partial(write_qkv, **options))(pages, *operands)
    assert q.dtype == operands[0].dtype
    assert_nearly_equal(q, expected_q, case.write.dtype)
    assert_nearly_equal_pages(actual, expected, case.write.dtype)


def test_nothing_to_prepare_is_writing():
    case = cases.WRITES[0]
    pages, (k, v), slots = dirty_pages(case), tokens(case), jnp.array(case.slots)
    q, actual = write_qkv(pages, k, k, v, slots)
    assert q is k
    jax.tree.map(np.testing.assert_array_equal, actual, write(pages, k, v, slots))


# --- In place -------------------------------------------------------------------------------


@pytest.mark.parametrize("traced_layer", [False, True])
@pytest.mark.parametrize("layout", ["paired", "split", "bf16"])
def test_donated_pages_are_updated_in_place(layout, traced_layer):
    format = PageFormat(layout, 1 if layout == "bf16" else 64)
    sizes = dict(layers=4, num_pages=512, kv_heads=4, page_size=16, head_dim=64)
    pages = jax.eval_shape(lambda: init_pages(format, **sizes))
    token = jax.ShapeDtypeStruct((8, 4, 64), jnp.float32)
    slots = jax.ShapeDtypeStruct((8,), jnp.int32)
    if traced_layer:
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        function = jax.jit(
            lambda pages, k, v, slots, layer: write_kv(pages, k, v, slots, layer=layer),
            donate_argnums=0,
        )
        compiled = function.lower(pages, token, token, slots, layer).compile()
    else:
        function = jax.jit(write_kv, static_argnames=STATIC, donate_argnums=0)
        compiled = function.lower(pages, token, token, slots, layer=2).compile()

    assert_in_place(compiled, pages)


def test_one_compilation_serves_all_slots():
    case = cases.WRITES[0]
    pages, (k, v) = dirty_pages(case), tokens(case)
    traces = []

    @jax.jit
    def traced(pages, slots):
        traces.append(slots)
        return write_kv(pages, k, v, slots)

    for first in (0, 7, -1):
        traced(pages, jnp.arange(first, first + len(case.slots)))
    assert len(traces) == 1


# --- Errors ---------------------------------------------------------------------------------

K = np.zeros((3, 2, 8), np.float32)
SLOTS = np.arange(3)
BAD_CALLS = [
    (dict(k=K[0]), ValueError, "k.shape"),
    (dict(k=K[:2]), ValueError, "k.shape"),
    (dict(k=K[:, :1]), ValueError, "k.shape"),
    (dict(v=K[:, :, :4]), ValueError, "v.shape"),
    (dict(k=K.astype(np.int32)), ValueError, "k.dtype=int32"),
    (dict(v=K.astype(bool)), ValueError, "v.dtype=bool"),
    (dict(slots=SLOTS[:, None]), ValueError, "slots"),
    (dict(slots=SLOTS[0]), ValueError, "slots"),
    (dict(slots=SLOTS.astype(np.float32)), ValueError, "slots.*float32"),
    (dict(layer=2), ValueError, "layer=2"),
    (dict(layer=-1), ValueError, "layer=-1"),
    (dict(layer=np.int64(2)), ValueError, "layer=.*2"),
    (dict(implementation="cuda"), NotImplementedError, "implementation='cuda'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS)
def test_errors(arguments, error, message):
    sizes = dict(layers=2, num_pages=2, kv_heads=2, page_size=4, head_dim=8)
    good = dict(pages=init_pages(PageFormat("paired", 8), **sizes), k=K, v=K, slots=SLOTS)
    with pytest.raises(error, match=f"^Expected .*{message}"):
        write_kv(**{**good, **arguments})


ANGLE = np.zeros((3, 4), np.float32)
BAD_PREPARATIONS = [
    (dict(q=K[:2]), "q.shape"),
    (dict(q=K[0]), "q.shape"),
    (dict(q=K[..., :4]), "q.shape"),
    (dict(q=K.astype(np.int32)), "q.dtype=int32"),
    (dict(cos=ANGLE), "cos and sin"),
    (dict(cos=ANGLE, sin=ANGLE[:2]), "sin.shape"),
    (dict(cos=ANGLE[:, :2], sin=ANGLE), "cos.shape"),
    (dict(q_norm=np.ones(4)), "q_norm.shape"),
    (dict(k_norm=np.ones(8, int)), "k_norm.dtype"),
    (dict(k=K[:2]), "k.shape"),
    (dict(slots=SLOTS[:, None]), "slots"),
    (dict(layer=2), "layer=2"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_PREPARATIONS)
def test_errors_before_writing(arguments, message):
    sizes = dict(layers=2, num_pages=2, kv_heads=2, page_size=4, head_dim=8)
    good = dict(pages=init_pages(PageFormat("paired", 8), **sizes), q=K, k=K, v=K, slots=SLOTS)
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        write_qkv(**{**good, **arguments})
