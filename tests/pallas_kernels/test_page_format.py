import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pallas_kernels import page_format
from pallas_kernels.page_format import PageFormat, Pages, init_pages
from tests import cases, oracle

TINY = float(np.finfo(np.float32).tiny)

rotate = jax.jit(page_format.rotate, static_argnums=1)
quantize = jax.jit(page_format.quantize)
dequantize = jax.jit(page_format.dequantize)
pack = jax.jit(page_format.pack, static_argnums=2)
unpack = jax.jit(page_format.unpack, static_argnums=1)

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)
VECTORS = (4, 16)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_tokens(layout, shape, seed=0):
    """Codes and words of `shape = [L, P, S, K, D]` in the oracle's logical order."""
    rng = np.random.default_rng(seed)
    *tokens, head_dim = shape
    if layout == "bf16":
        bits = rng.normal(size=(*tokens, 2, head_dim)).astype(ml_dtypes.bfloat16)
        return bits.view(np.uint16), None
    codes = rng.integers(0, 16, (*tokens, 2, head_dim), np.uint8)
    scale = rng.uniform(0.1, 0.3, (*tokens, 2)).astype(ml_dtypes.bfloat16).view(np.uint16)
    minimum = rng.uniform(-3, -1, (*tokens, 2)).astype(ml_dtypes.bfloat16).view(np.uint16)
    return codes, scale.astype(np.uint32) | minimum.astype(np.uint32) << 16


def pages_of(codes, words, layout):
    data, scales = oracle.to_arrays(codes, words, layout)
    return Pages(
        jnp.asarray(data), None if scales is None else jnp.asarray(scales), PageFormat(layout)
    )


def assert_within_half_a_step(x, codes, words):
    x = x.astype(np.float64)
    restored = oracle.dequantize(codes, words)
    scale, minimum = oracle.split(words)
    rounding = 2.0**-22 * np.abs(x).max(-1) + 16 * TINY
    bound = scale * (0.5 + 15 * 2.0**-9) + rounding
    assert (np.abs(restored - x) <= bound[:, None]).all()
    assert (minimum <= x.min(-1)).all()


# --- Rotation -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 16, 256])
def test_hadamard_matrix(order):
    matrix = page_format.hadamard(order)
    np.testing.assert_allclose(matrix, oracle.hadamard(order), rtol=1e-15)
    np.testing.assert_allclose(matrix @ matrix, np.eye(order), atol=1e-12)


@pytest.mark.parametrize(("head_dim", "order"), cases.LARGEST_ORDERS.items())
def test_largest_order(head_dim, order):
    assert page_format.largest_order(head_dim) == order


@pytest.mark.parametrize(("head_dim", "order"), cases.ROTATIONS)
class TestRotate:
    def test_is_the_hadamard_product(self, head_dim, order):
        x = normal(6, head_dim)
        blocks = x.astype(np.float64).reshape(6, -1, order)
        expected = (blocks @ oracle.hadamard(order)).reshape(x.shape)
        np.testing.assert_allclose(rotate(x, order), expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(oracle.rotate(x.astype(np.float64), order), expected, atol=1e-12)

    def test_is_orthonormal(self, head_dim, order):
        q, k = normal(2, 6, head_dim)
        rotated_q, rotated_k = rotate(q, order), rotate(k, order)
        np.testing.assert_allclose(rotate(rotated_q, order), q, rtol=0, atol=2e-6)
        np.testing.assert_allclose(
            np.linalg.norm(rotated_q, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-6
        )
        products = np.einsum("nd,nd->n", rotated_q, rotated_k)
        np.testing.assert_allclose(products, np.einsum("nd,nd->n", q, k), rtol=0, atol=3e-5)

    def test_keeps_to_its_block(self, head_dim, order):
        impulses = np.zeros((6, head_dim), np.float32)
        channels = np.linspace(0, head_dim - 1, 6).astype(int)
        impulses[np.arange(6), channels] = 1
        touched = np.asarray(rotate(impulses, order)) != 0
        same_block = np.arange(head_dim) // order == channels[:, None] // order
        np.testing.assert_array_equal(touched, same_block)


def test_rotate_takes_bfloat16():
    x = jnp.asarray(normal(6, 64), jnp.bfloat16)
    assert rotate(x, 16).dtype == rotate(x, 1).dtype == jnp.float32
    np.testing.assert_array_equal(rotate(x, 16), rotate(x.astype(jnp.float32), 16))


# --- Quantization ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors():
    """A million numbers: rows of very different ranges and offsets, one channel an outlier."""
    rng = np.random.default_rng(0)
    x = normal(8192, 128) * np.exp(rng.uniform(-20, 20, (8192, 1)))
    x += np.abs(x).max(-1, keepdims=True) * rng.uniform(-2, 2, (8192, 1))
    x[:, 5] *= 20
    return x.astype(np.float32)


def test_quantize_equals_the_oracle(vectors):
    codes, words = page_format.quantize(jnp.asarray(vectors))
    expected_codes, expected_words = oracle.quantize(vectors)
    np.testing.assert_array_equal(words, expected_words)
    np.testing.assert_array_equal(codes, expected_codes)
    assert codes.dtype == np.uint8
    assert words.dtype == np.uint32
    assert_within_half_a_step(vectors, np.asarray(codes), np.asarray(words))


def test_quantize_compiled_equals_eager(vectors):
    codes, words = page_format.quantize(jnp.asarray(vectors))
    compiled_codes, compiled_words = quantize(vectors)
    np.testing.assert_array_equal(words, compiled_words)
    apart = np.abs(np.asarray(codes, int) - np.asarray(compiled_codes, int))
    assert apart.max() <= 1
    assert apart.sum() <= 1e-6 * apart.size


@pytest.mark.parametrize("row", cases.ROWS, ids=lambda row: row.name)
def test_quantize_hard_rows(row):
    x = np.array([row.values], np.float32)
    codes, words = map(np.asarray, quantize(x))
    expected_codes, expected_words = oracle.quantize(x)
    if row.same_bytes:
        np.testing.assert_array_equal(words, expected_words)
        np.testing.assert_array_equal(codes, expected_codes)
    restored = np.asarray(dequantize(codes, words))
    match row.restores:
        case "exact":
            np.testing.assert_array_equal(restored, x)
        case "close":
            assert_within_half_a_step(x, codes, words)
            expected = oracle.dequantize(codes, words)
            np.testing.assert_allclose(restored, expected, rtol=1e-6, atol=TINY)
        case "nan":
            assert words[0] == oracle.NAN_WORD
            assert np.isnan(restored).all()


def test_bad_row_leaves_its_neighbours_alone():
    x = normal(3, 16)
    codes, words = quantize(x)
    x[1, 7] = np.nan
    bad_codes, bad_words = quantize(x)
    np.testing.assert_array_equal(bad_codes[::2], codes[::2])
    np.testing.assert_array_equal(bad_words[::2], words[::2])
    assert bad_words[1] == oracle.NAN_WORD


@quick
@given(
    arrays.arrays(
        np.float32,
        VECTORS,
        elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
    )
)
def test_quantize_any_vector(x):
    x = x + np.float32(0)  # the order of 0 and -0 is nobody's promise
    codes, words = map(np.asarray, quantize(x))
    expected_codes, expected_words = oracle.quantize(x)
    np.testing.assert_array_equal(words, expected_words)
    np.testing.assert_array_equal(codes, expected_codes)
    assert codes.max() <= 15
    assert_within_half_a_step(x, codes, words)


@quick
@given(arrays.arrays(np.float32, VECTORS, elements=st.floats(width=32, allow_subnormal=False)))
def test_quantize_is_never_silently_wrong(x):
    codes, words = quantize(x)
    restored = np.asarray(dequantize(codes, words))
    bad = ~np.isfinite(x).all(-1)
    assert np.isnan(restored[bad]).all()
    assert (np.asarray(words)[bad] == oracle.NAN_WORD).all()


def test_join_and_split_scales():
    words = jnp.array([0x40003F80, 0xC0803F00, 0x00007FC0], jnp.uint32)
    scale, minimum = page_format.split_scales(words)
    np.testing.assert_array_equal(scale, [1, 0.5, np.nan])
    np.testing.assert_array_equal(minimum, [2, -4, 0])
    np.testing.assert_array_equal(page_format.join_scales(scale, minimum), words)


# --- Codes ↔ rows ---------------------------------------------------------------------------

K_CODES = [0, 1, 2, 3, 4, 5, 6, 7]
V_CODES = [15, 14, 13, 12, 11, 10, 9, 8]
PACKED = {
    "paired": [0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87],
    "split": [[0x6420, 0x7531], [0x9BDF, 0x8ACE]],
}


@pytest.mark.parametrize(("layout", "rows"), PACKED.items())
def test_pack_by_hand(layout, rows):
    codes = jnp.array(K_CODES, jnp.uint8), jnp.array(V_CODES, jnp.uint8)
    packed = pack(*codes, layout)
    np.testing.assert_array_equal(packed, rows)
    assert packed.dtype == {"paired": np.uint8, "split": np.uint16}[layout]
    np.testing.assert_array_equal(unpack(packed, layout), codes)


@pytest.mark.parametrize("layout", PACKED)
@quick
@given(arrays.arrays(np.uint8, (2, *VECTORS), elements=st.integers(0, 15)))
def test_unpack_inverts_pack(layout, codes):
    unpacked = unpack(pack(*codes, layout), layout)
    np.testing.assert_array_equal(unpacked, codes)
    assert unpacked[0].dtype == np.uint8


# --- Tokens ↔ pages -------------------------------------------------------------------------

# One token in slot 1 of a page of two: the key has scale 1 and minimum 0, the value 0.5 and -4.
KEY = [0, 1, 2, 3, 4, 5, 6, 15]
VALUE = [-4, -3.5, -3, -2.5, -2, -1.5, -1, 3.5]
KEY_WORD, VALUE_WORD = 0x00003F80, 0xC0803F00
PAGE = {
    "paired": (
        [[0] * 8, [0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0xFF]],
        [[[0, KEY_WORD]], [[0, VALUE_WORD]]],
    ),
    "split": (
        [[[0, 0], [0x6420, 0xF531]], [[0, 0], [0x6420, 0xF531]]],
        [[[0, KEY_WORD], [0, VALUE_WORD]]],
    ),
    "bf16": (
        [
            [[0] * 8, [0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x4170]],
            [[0] * 8, [0xC080, 0xC060, 0xC040, 0xC020, 0xC000, 0xBFC0, 0xBF80, 0x4060]],
        ],
        None,
    ),
}


@pytest.mark.parametrize("layout", PAGE)
def test_page_by_hand(layout):
    format = PageFormat(layout)
    pages = init_pages(format, layers=1, num_pages=1, kv_heads=1, page_size=2, head_dim=8)
    token = jnp.array([[KEY]], jnp.float32), jnp.array([[VALUE]], jnp.float32)
    pages = page_format.put(pages, 0, jnp.array([1]), *page_format.encode(*token, format))
    data, scales = PAGE[layout]
    np.testing.assert_array_equal(pages.data[0, 0, 0], data)
    if scales is not None:
        np.testing.assert_array_equal(pages.scales[0, 0], scales)
    k, v = page_format.read(pages, 0, jnp.array([0]))
    np.testing.assert_array_equal(k[0, 0, 1], KEY)
    np.testing.assert_array_equal(v[0, 0, 1], VALUE)


@pytest.mark.parametrize("layout", page_format.LAYOUTS)
def test_read_restores_whole_pages(layout):
    codes, words = random_tokens(layout, (2, 5, 16, 3, 64))
    pages = pages_of(codes, words, layout)
    page_ids = np.array([[3, 0], [3, 4]])
    expected = oracle.dequantize(codes, words)[1, page_ids]  # [2, 2, S, K, 2, D]
    for i, x in enumerate(page_format.read(pages, 1, page_ids)):
        np.testing.assert_allclose(x.swapaxes(-3, -2), expected[..., i, :], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [("paired", "split"), ("split", "paired")])
def test_convert_keeps_every_bit(source, target):
    codes, words = random_tokens(source, (2, 5, 16, 3, 64))
    pages = pages_of(codes, words, source)
    pages = dataclasses.replace(pages, format=PageFormat(source, 16, rotate_v=True))
    converted = page_format.convert(pages, target)
    assert converted.format == PageFormat(target, 16, rotate_v=True)
    expected = pages_of(codes, words, target)
    jax.tree.map(np.testing.assert_array_equal, converted.data, expected.data)
    jax.tree.map(np.testing.assert_array_equal, converted.scales, expected.scales)
    jax.tree.map(np.testing.assert_array_equal, page_format.convert(converted, source), pages)
    assert page_format.convert(pages, source) is pages


@pytest.mark.parametrize(
    ("layout", "head_dim", "bits"),
    [
        ("paired", 128, 4.25),
        ("split", 128, 4.25),
        ("bf16", 128, 16),
        ("paired", 64, 4.5),
        ("split", 256, 4.125),
    ],
)
def test_bits_per_number(layout, head_dim, bits):
    sizes = dict(layers=2, num_pages=3, kv_heads=2, page_size=16, head_dim=head_dim)
    pages = init_pages(PageFormat(layout), **sizes)
    numbers = 2 * np.prod(list(sizes.values()))
    assert pages.nbytes * 8 / numbers == bits
    assert {name: getattr(pages, name) for name in sizes} == sizes
    assert not any(leaf.any() for leaf in jax.tree.leaves(pages))


def test_value_order():
    assert PageFormat("split", 16).value_order == 1
    assert PageFormat("split", 16, rotate_v=True).value_order == 16


# --- Errors ---------------------------------------------------------------------------------

BAD_FORMATS = [
    (dict(layout="int3"), "layout='int3'"),
    (dict(layout="paired", order=0), "order=0"),
    (dict(layout="paired", order=-4), "order=-4"),
    (dict(layout="split", order=12), "order=12"),
    (dict(layout="bf16", order=16), "layout='bf16'.*order=16"),
    (dict(layout="bf16", rotate_v=True), "layout='bf16'.*rotate_v=True"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FORMATS)
def test_format_errors(fields, message):
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        PageFormat(**fields)


SIZES = dict(layers=1, num_pages=2, kv_heads=1, page_size=4, head_dim=8)
BAD_SIZES = [
    *((PageFormat("paired"), {name: 0}, f"{name}=0") for name in SIZES),
    (PageFormat("paired"), dict(page_size=-16), "page_size=-16"),
    (PageFormat("paired", 16), dict(), "order=16.*head_dim=8"),
    (PageFormat("split", 32), dict(head_dim=80), "order=32.*head_dim=80"),
    (PageFormat("split"), dict(head_dim=6), "head_dim=6.*layout='split'"),
]


@pytest.mark.parametrize(("format", "sizes", "message"), BAD_SIZES)
def test_init_pages_errors(format, sizes, message):
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        init_pages(format, **{**SIZES, **sizes})


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("bf16", "paired", "bf16 and paired"),
        ("split", "bf16", "split and bf16"),
        ("bf16", "bf16", "bf16 and bf16"),
        ("paired", "int3", "layout='int3'"),
    ],
)
def test_convert_errors(source, target, message):
    pages = init_pages(PageFormat(source), **SIZES)
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        page_format.convert(pages, target)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bad_number_anywhere_makes_its_row_nan(bad, dtype):
    """And no other. Compiled: a vectorized minimum may pass over a NaN in some lanes."""
    x = np.random.default_rng(0).normal(size=(130, 128))
    x[np.arange(128), np.arange(128)] = bad
    _, words = quantize(jnp.asarray(x, dtype))
    np.testing.assert_array_equal(words == oracle.NAN_WORD, np.arange(130) < 128)
