"""KV heads and projections over four devices give what one device gives."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

import saw_int4_jax as saw
from saw_int4_jax import sharding
from saw_int4_jax.models import Llama
from saw_int4_jax.models.llama import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    embed_dim=32,
    mlp_dim=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_length=64,
    qkv_bias=True,
    qk_norm=True,
)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Auto,))


def generate_on(mesh, dtype):
    model = Llama(CONFIG, last_only=True)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    cache = saw.init_cache(CONFIG.cache_spec(num_pages=32, page_size=4, dtype=dtype), batch=2)
    if mesh is not None:
        variables = sharding.shard_params(variables, mesh, "heads")
        cache = sharding.shard_cache(cache, mesh, "heads")
    return saw.generate(model.apply, variables, [[1, 2, 3], [4] * 9], cache, max_new_tokens=12)


def check_same_tokens():
    """Runs in a process that has four devices."""
    mesh = mesh_of(4)
    for dtype in ("int4", "bf16"):
        one, four = generate_on(None, dtype), generate_on(mesh, dtype)
        assert one.tokens == four.tokens
        data = four.cache.pages.data
        assert len(data.addressable_shards) == 4
        assert data.addressable_shards[0].data.shape[2] == 1  # of four KV heads


def test_four_devices_generate_what_one_does():
    flags = "--xla_force_host_platform_device_count=4"
    code = "from tests.saw_int4_jax.test_sharding import check_same_tokens as f; f()"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[2],
        check=True,
    )


def test_projections_are_split_where_heads_are():
    model = Llama(dataclasses.replace(CONFIG, num_layers=1))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    shardings = sharding.param_shardings(variables, mesh_of(1), "heads")["params"]
    attention, mlp = shardings["layers_0"]["self_attn"], shardings["layers_0"]["mlp"]
    assert attention["k_proj"]["kernel"].spec == PartitionSpec(None, "heads")
    assert attention["k_proj"]["bias"].spec == PartitionSpec("heads")
    assert attention["o_proj"]["kernel"].spec == PartitionSpec("heads", None)
    assert attention["q_norm"]["scale"].spec == PartitionSpec()
    assert mlp["up_proj"]["kernel"].spec == PartitionSpec(None, "heads")
    assert mlp["down_proj"]["kernel"].spec == PartitionSpec("heads", None)
    assert shardings["embed_tokens"]["embedding"].spec == PartitionSpec("heads", None)
    assert shardings["lm_head"]["kernel"].spec == PartitionSpec(None, "heads")
    assert shardings["norm"]["scale"].spec == PartitionSpec()


def test_heads_that_the_devices_do_not_divide():
    cache = jax.eval_shape(lambda: saw.init_cache(CONFIG.cache_spec(num_pages=8), batch=1))
    mesh = jax.sharding.AbstractMesh((3,), ("heads",))
    with pytest.raises(ValueError, match="Expected kv_heads=4 to be a multiple of the 3"):
        sharding.cache_shardings(cache, mesh, "heads")
