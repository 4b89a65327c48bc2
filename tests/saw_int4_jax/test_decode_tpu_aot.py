"""The TPU compiler takes whole decode loops of a model, from the public functions alone."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import saw_int4_jax as saw
from saw_int4_jax.cache import AXES
from saw_int4_jax.generate import DecodeState
from saw_int4_jax.models import CONFIGS, Llama
from saw_int4_jax.sharding import cache_shardings, param_shardings
from tests import tpu_aot
from tests.hlo import copied_sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not tpu_aot.available(), reason="libtpu is not installed"),
]

CHIPS = tuple(tpu_aot.TOPOLOGIES)
BATCH, NUM_STEPS = 8, 4
# XLA copies what fits in on-chip memory: each device's share of the scales must not.
NUM_PAGES = {"int4": 32768, "bf16": 4096}


@functools.cache
def model_and_shapes(name, method="int4"):
    """The decode loop of a published model of two layers: parameters and state as shapes."""
    config = dataclasses.replace(CONFIGS[name], num_layers=2)
    model = Llama(config, dtype=jnp.bfloat16, last_only=True)
    spec = config.cache_spec(NUM_PAGES[method], dtype=method, implementation="mosaic_tpu")
    cache = jax.eval_shape(lambda: saw.init_cache(spec, BATCH, max_length=8192))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables)
    row = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return model.apply, variables, DecodeState(cache, row, row, row)


def placed(shapes, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def trace(forward, variables, state, everywhere):
    eos = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=everywhere)
    return saw.decode.trace(forward, variables, state, num_steps=NUM_STEPS, eos=eos)


def lower_on_one(chip, name, method="int4"):
    mesh = Mesh(np.array(tpu_aot.devices(chip)[:1]), ("heads",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    forward, *shapes = model_and_shapes(name, method)
    shapes = placed(shapes, jax.tree.map(lambda _: everywhere, shapes))
    return trace(forward, *shapes, everywhere).lower(lowering_platforms=("tpu",))


def lower_on_four(chip, name, data=1):
    mesh = Mesh(np.array(tpu_aot.devices(chip)).reshape(data, -1, 1), AXES)
    everywhere = NamedSharding(mesh, PartitionSpec())
    forward, variables, state = model_and_shapes(name)
    pools = jax.ShapeDtypeStruct((data,), jnp.int32)
    cache = dataclasses.replace(state.cache, num_free=pools, mesh=mesh)
    shardings = cache_shardings(cache, mesh)
    rows = placed(dataclasses.replace(state, cache=None), everywhere_like(state, everywhere))
    state = dataclasses.replace(rows, cache=placed(cache, shardings))
    variables = placed(variables, param_shardings(variables, mesh))
    return trace(forward, variables, state, everywhere).lower(lowering_platforms=("tpu",))


def everywhere_like(state, everywhere):
    return jax.tree.map(lambda _: everywhere, dataclasses.replace(state, cache=None))


def assert_cache_in_place(compiled, chip, name, method="int4", devices=1):
    """The pool is its own output, and no copy is as large as a layer's share of it on one device.

    XLA does copy weights into the layout of a product. Those are bfloat16, pages never are. On
    tpu7x they are most of the model, so temporary memory says nothing there and is not looked at.
    """
    pages = model_and_shapes(name, method)[2].cache.pages
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pages.nbytes / devices
    if chip != "tpu7x":
        assert memory.temp_size_in_bytes < pages.nbytes / devices / pages.layers / 2
    one_layer = min(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(pages)) // devices
    assert max(copied_sizes(compiled, "[su]\\d+"), default=0) < one_layer
    for kernel in ("write_kv", "paged_attention"):
        assert f"{kernel}_" in compiled.as_text(), f"no {kernel} kernel in the program"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B"])
def test_on_one_chip(chip, name):
    assert_cache_in_place(lower_on_one(chip, name).compile(), chip, name)


def test_bf16_on_one_chip():
    name = "Llama-3.1-8B"
    assert_cache_in_place(lower_on_one("v6e", name, "bf16").compile(), "v6e", name, "bf16")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B"])
def test_heads_on_four_chips(chip, name):
    compiled = lower_on_four(chip, name).compile()
    # Four chips of tpu7x are eight devices.
    assert_cache_in_place(compiled, chip, name, devices=len(tpu_aot.devices(chip)))
    assert "all-reduce" in compiled.as_text()


def test_pools_and_heads_on_four_chips():
    compiled = lower_on_four("v5e", "Qwen3-8B", data=2).compile()
    assert_cache_in_place(compiled, "v5e", "Qwen3-8B", devices=4)


def test_export_round_trip():
    """A decode loop exported for TPUs on a machine without one, read back, keeps its types."""
    forward, variables, state = model_and_shapes("Qwen3-8B")
    decode = jax.jit(
        lambda variables, state, eos: jax.tree.leaves(
            saw.decode(forward, variables, state, num_steps=NUM_STEPS, eos=eos)
        ),
        donate_argnums=1,
    )
    leaves, treedef = jax.tree.flatten((variables, state))
    exported = jax.export.export(
        jax.jit(lambda eos, *leaves: decode(*jax.tree.unflatten(treedef, leaves), eos)),
        platforms=["tpu"],
    )(jax.ShapeDtypeStruct((1,), jnp.int32), *leaves)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("tpu",)
    assert again.in_avals == exported.in_avals
    assert again.out_avals == exported.out_avals
    assert again.mlir_module().count("tpu_custom_call") >= 4  # two kernels in each of two layers
