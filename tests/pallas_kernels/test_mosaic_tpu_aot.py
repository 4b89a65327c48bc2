"""The TPU compiler takes the kernels, for every chip, without a copy of the cache."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import PageFormat, Pages, init_pages
from pallas_kernels.mosaic_tpu import attention, write
from pallas_kernels.page_format import largest_order
from tests import tpu_aot
from tests.hlo import assert_in_place, copied_sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not tpu_aot.available(), reason="libtpu is not installed"),
]

CHIPS = tuple(tpu_aot.TOPOLOGIES)
# More than fits in on-chip memory, where XLA would copy all of it.
LAYERS, TOKENS = 2, 1 << 20
SHAPES = [  # the variants: one chip each, since they differ in shape alone
    dict(head_dim=64),
    dict(head_dim=72),
    dict(head_dim=80),
    dict(head_dim=96),
    dict(head_dim=112),
    dict(head_dim=256),
    dict(page_size=256),
    dict(page_size=64),
    dict(page_size=32),
    dict(page_size=16),
    dict(page_size=16, head_dim=256),
    dict(page_size=64, kv_heads=1),
    dict(page_size=16, layout="bf16"),
    dict(kv_heads=1),
    dict(kv_heads=32),
    dict(kv_heads=32, head_dim=256),
    dict(layout="bf16", head_dim=64),
    dict(rotate_v=True),
]


def pages_of(layout="paired", kv_heads=8, head_dim=128, page_size=128, rotate_v=False):
    order = 1 if layout == "bf16" else largest_order(head_dim)
    tokens = TOKENS // max(1, kv_heads * head_dim // 1024)
    sizes = dict(layers=LAYERS, num_pages=tokens // page_size, kv_heads=kv_heads)
    format = PageFormat(layout, order, rotate_v)
    return jax.eval_shape(
        lambda: init_pages(format, **sizes, page_size=page_size, head_dim=head_dim)
    )


def compile_attention(
    chip, pages, *, queries=1, heads=32, dtype="bfloat16", causal=True, sinks=False, **options
):
    batch, max_pages = 4, 8192 // pages.page_size

    def call(q, pages, table, lengths, query_lengths, layer, sinks):
        return attention.paged_attention(
            q,
            pages,
            table,
            lengths,
            layer=layer,
            query_lengths=query_lengths,
            causal=causal,
            scale=0.1,
            window=options.get("window"),
            soft_cap=options.get("soft_cap"),
            sinks=sinks,
            float8=options.get("float8"),
        )

    integers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return tpu_aot.compile_for(
        chip,
        call,
        jax.ShapeDtypeStruct((batch, queries, heads, pages.head_dim), jnp.dtype(dtype)),
        pages,
        jax.ShapeDtypeStruct((batch, max_pages), jnp.int32),
        integers,
        integers,
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((heads,), jnp.float32) if sinks else None,
    )


def compile_write(chip, pages, n, dtype="bfloat16"):
    token = jax.ShapeDtypeStruct((n, pages.kv_heads, pages.head_dim), jnp.dtype(dtype))
    return tpu_aot.compile_for(
        chip,
        lambda pages, k, v, slots, layer: write.write_kv(pages, k, v, slots, layer=layer),
        pages,
        token,
        token,
        jax.ShapeDtypeStruct((n,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        donate_argnums=0,
    )


def assert_no_copy_of_the_cache(compiled, pages):
    leaves = jax.tree.leaves(pages)
    one_layer = min(leaf.size for leaf in leaves) // LAYERS
    assert max(copied_sizes(compiled), default=0) < one_layer
    layer_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / LAYERS
    assert compiled.memory_analysis().temp_size_in_bytes < layer_bytes / 10


# Every chip with every layout; every number of tokens with each of both.
@pytest.mark.parametrize(
    ("chip", "layout", "queries"),
    [
        *zip(CHIPS, ["paired"] * 4, [1, 64, 1, 64], strict=True),
        *zip(CHIPS, ["bf16"] * 4, [64, 1, 64, 1], strict=True),
    ],
)
def test_attention_compiles(chip, layout, queries):
    pages = pages_of(layout)
    compiled = compile_attention(chip, pages, queries=queries)
    assert_no_copy_of_the_cache(compiled, pages)


@pytest.mark.parametrize(
    ("chip", "layout", "n"),
    [
        *zip(CHIPS, ["paired"] * 4, [1, 64, 512, 64], strict=True),
        *zip(CHIPS, ["bf16"] * 4, [64, 512, 1, 512], strict=True),
    ],
)
def test_write_compiles(chip, layout, n):
    pages = pages_of(layout)
    assert_in_place(compile_write(chip, pages, n), pages)


@pytest.mark.parametrize(
    ("shape", "chip"), list(zip(SHAPES, ["v5e", "v6e"] * len(SHAPES), strict=False)), ids=str
)
def test_shapes(shape, chip):
    pages = pages_of(**shape)
    assert attention.pages_supported(pages) is None
    assert_no_copy_of_the_cache(compile_attention(chip, pages), pages)
    assert_in_place(compile_write(chip, pages, 8), pages)


@pytest.mark.parametrize(
    "options",
    [
        dict(queries=4, dtype="float32", window=300, soft_cap=30.0, sinks=True),
        dict(queries=7, causal=False),
        dict(heads=8),
        dict(heads=56),
        dict(heads=128),
    ],
    ids=str,
)
def test_options(options):
    pages = pages_of()
    compiled = compile_attention("v5e", pages, **options)
    assert_no_copy_of_the_cache(compiled, pages)


@pytest.mark.parametrize("queries", [1, 64])
def test_float8_codes(queries):
    pages = pages_of()
    compiled = compile_attention("tpu7x", pages, queries=queries, float8=True)
    assert_no_copy_of_the_cache(compiled, pages)


@pytest.mark.parametrize(
    "shape", [dict(page_size=64, head_dim=64), dict(page_size=16, kv_heads=1)], ids=str
)
def test_refused_pages_would_be_copied(shape):
    """Why `supported` refuses them. If this fails, they may be let in."""
    pages = pages_of(**shape)
    assert attention.pages_supported(pages)
    with pytest.raises(AssertionError):
        assert_no_copy_of_the_cache(compile_attention("v6e", pages), pages)


# --- Among other operations -----------------------------------------------------------------


def decode(pages, q, k, v, slots, table, lengths, layer):
    """What a layer does with the cache in a decode step."""
    pages = write.write_kv(pages, k, v, slots, layer=layer)
    out = attention.paged_attention(
        q,
        pages,
        table,
        lengths,
        layer=layer,
        query_lengths=jnp.ones_like(lengths),
        causal=True,
        scale=0.1,
        window=None,
        soft_cap=None,
        sinks=None,
    )
    return pages, out


def decode_shapes(pages, batch=8, heads=32):
    token = jax.ShapeDtypeStruct((batch, pages.kv_heads, pages.head_dim), jnp.bfloat16)
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    q = jax.ShapeDtypeStruct((batch, 1, heads, pages.head_dim), jnp.bfloat16)
    return pages, q, token, token, integers, jax.ShapeDtypeStruct((batch, 64), jnp.int32), integers


@pytest.mark.parametrize(
    ("chip", "shape"),
    [
        *((chip, {}) for chip in CHIPS),
        ("v5e", dict(head_dim=64)),
        ("v6e", dict(layout="bf16")),
        ("tpu7x", dict(head_dim=64)),
    ],
    ids=str,
)
def test_scanned_layers_are_updated_in_place(chip, shape):
    pages = pages_of(**shape)

    def step(pages, q, *rest):
        def layer_of(carry, layer):
            return decode(*carry, *rest, layer), None

        return jax.lax.scan(layer_of, (pages, q), jnp.arange(LAYERS))[0]

    assert_in_place(tpu_aot.compile_for(chip, step, *decode_shapes(pages), donate_argnums=0), pages)


def test_heads_sharded_over_four_chips():
    pages = pages_of()
    mesh = Mesh(np.array(tpu_aot.devices("v6e")), ("heads",))
    format = pages.format
    specs = Pages(PartitionSpec(None, None, "heads"), PartitionSpec(*[None] * 3, "heads"), format)
    q, token, whole = (
        PartitionSpec(None, None, "heads"),
        PartitionSpec(None, "heads"),
        PartitionSpec(),
    )
    in_specs = (specs, q, token, token, whole, whole, whole)
    function = jax.shard_map(
        functools.partial(decode, layer=1),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=(specs, q),
        check_vma=False,
    )
    arguments = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        decode_shapes(pages),
        in_specs,
    )
    lowered = (
        jax.jit(function, donate_argnums=0).trace(*arguments).lower(lowering_platforms=("tpu",))
    )
    compiled = lowered.compile()
    memory = compiled.memory_analysis()  # of one chip
    pool_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == pool_bytes / 4
    assert memory.temp_size_in_bytes < pool_bytes / 400


def test_export_for_tpu():
    pages = pages_of()
    function = jax.jit(functools.partial(decode, layer=1), donate_argnums=0)
    exported = jax.export.export(function, platforms=["tpu"])(*decode_shapes(pages))
    assert exported.platforms == ("tpu",)
    assert "tpu_custom_call" in exported.mlir_module()
