import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageFormat, init_pages, write_kv
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
